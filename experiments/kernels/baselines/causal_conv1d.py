"""What the short convolution is measured against: the same maths written with JAX alone.

Each has the signature of the op it stands in for.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d.shapes import named
from pallas_kernels.tools.programs import program


def depthwise_conv(x, weight, bias=None, *, activation=None, initial_state=None, segment_ids=None):
    """`jax.lax.conv_general_dilated` with one group a channel.

    Raises:
      NotImplementedError: `segment_ids` are given.
    """
    rows = _rows(x, weight, initial_state, segment_ids)
    y = jax.lax.conv_general_dilated(
        rows,
        weight.astype(x.dtype)[:, None],
        (1,),
        "VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=x.shape[2],
    )
    return _finish(y, bias, activation), _window(rows, weight)


def shifted_adds(x, weight, bias=None, *, activation=None, initial_state=None, segment_ids=None):
    """The sum of shifted products, as the codes of Griffin have it; JAX differentiates it.

    Raises:
      NotImplementedError: `segment_ids` are given.
    """
    rows, length = _rows(x, weight, initial_state, segment_ids), x.shape[1]
    y = sum(rows[:, j : j + length] * weight[j][None, None] for j in range(weight.shape[0]))
    return _finish(y, bias, activation).astype(x.dtype), _window(rows, weight)


CONVS: dict[str, Any] = {"depthwise_conv": depthwise_conv, "shifted_adds": shifted_adds}


def case(shape: str, baseline: str, mode: str, scale: str = "1") -> tuple[Any, ...]:
    """As `pallas_kernels.causal_conv1d.shapes.case`, of a key of `CONVS`."""
    fn, operands = program(CONVS[baseline], named(shape).scaled(float(scale)), mode)
    return fn, *operands


def _rows(x, weight, initial_state, segment_ids):
    if segment_ids is not None:
        raise NotImplementedError("the baselines know no segments")
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], weight.shape[0] - 1, x.shape[2]), x.dtype)
    return jnp.concatenate([initial_state, x], axis=1)


def _window(rows, weight):
    return rows[:, rows.shape[1] - weight.shape[0] + 1 :]


def _finish(y, bias, activation):
    y = y if bias is None else y + bias.astype(y.dtype)[None, None]
    return jax.nn.silu(y) if activation == "silu" else y
