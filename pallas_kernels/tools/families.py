"""All families of kernels: what tests, the ahead-of-time table and benchmarks go through."""

from __future__ import annotations

from typing import Any

from pallas_kernels.bidirectional_mimo_scan import api as bidirectional_mimo_scan
from pallas_kernels.causal_conv1d import shapes as causal_conv1d
from pallas_kernels.checkpoint_attention import shapes as checkpoint_attention
from pallas_kernels.delta_rule import shapes as delta_rule
from pallas_kernels.diagonal_ssm import shapes as diagonal_ssm
from pallas_kernels.linear_attention import shapes as linear_attention
from pallas_kernels.linear_scan import shapes as linear_scan
from pallas_kernels.long_conv import shapes as long_conv
from pallas_kernels.s4_kernel import api as s4_kernel
from pallas_kernels.selective_scan import shapes as selective_scan
from pallas_kernels.tools.family import Family

# In the order of docs/operators/index.md.
TABULATED: dict[str, Family[Any]] = {
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
"""Those with shapes of real models, which are compiled ahead of time and timed."""

_OTHERS: tuple[Family[Any], ...] = (
    # Products around `linear_scan`.
    Family(bidirectional_mimo_scan.bidirectional_mimo_scan, bidirectional_mimo_scan.OP, {}, ()),
    # Timed with `long_conv`, which it is the filter of.
    Family(s4_kernel.s4_kernel, s4_kernel.OP, {}, (), has_kernels=False),
)
FAMILIES = TABULATED | {family.name: family for family in _OTHERS}
