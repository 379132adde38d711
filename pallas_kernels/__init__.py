"""Efficient sequence operators: arrays in, arrays out, on TPU, GPU and CPU."""

from pallas_kernels.bidirectional_mimo_scan import bidirectional_mimo_scan
from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.checkpoint_attention import checkpoint_attention
from pallas_kernels.common import segments
from pallas_kernels.common.dispatch import explain
from pallas_kernels.common.validate import checked
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.diagonal_ssm import diagonal_ssm
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.long_conv import long_conv
from pallas_kernels.s4_kernel import s4_kernel
from pallas_kernels.selective_scan import selective_scan

__all__ = [
    "bidirectional_mimo_scan",
    "causal_conv1d",
    "checked",
    "checkpoint_attention",
    "delta_rule",
    "diagonal_ssm",
    "explain",
    "linear_attention",
    "linear_scan",
    "long_conv",
    "s4_kernel",
    "segments",
    "selective_scan",
]
