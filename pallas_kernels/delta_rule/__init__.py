"""The delta rule: a matrix state that forgets what it held under a key before it writes there."""

from pallas_kernels.delta_rule.api import delta_rule, summary

__all__ = ["delta_rule", "summary"]
