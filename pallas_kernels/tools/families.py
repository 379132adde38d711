"""All families of kernels: what the ahead-of-time table, benchmarks and tests go through."""

from __future__ import annotations

from typing import Any

from pallas_kernels.causal_conv1d import shapes as causal_conv1d
from pallas_kernels.checkpoint_attention import shapes as checkpoint_attention
from pallas_kernels.delta_rule import shapes as delta_rule
from pallas_kernels.diagonal_ssm import shapes as diagonal_ssm
from pallas_kernels.linear_attention import shapes as linear_attention
from pallas_kernels.linear_scan import shapes as linear_scan
from pallas_kernels.long_conv import shapes as long_conv
from pallas_kernels.selective_scan import shapes as selective_scan
from pallas_kernels.tools.family import Family

# In the order of README.
FAMILIES: dict[str, Family[Any]] = {
    module.FAMILY.name: module.FAMILY
    for module in (
        linear_scan,
        selective_scan,
        diagonal_ssm,
        causal_conv1d,
        linear_attention,
        delta_rule,
        checkpoint_attention,
        long_conv,
    )
}
