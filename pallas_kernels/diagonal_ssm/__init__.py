"""Diagonal state-space models with one input and one output a channel: S4D, DSS."""

from pallas_kernels.diagonal_ssm.api import diagonal_ssm, summary

__all__ = ["diagonal_ssm", "summary"]
