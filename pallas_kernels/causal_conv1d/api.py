"""The public op: signature, validation, dispatch."""

from __future__ import annotations

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pallas_kernels.causal_conv1d import gpu, reference, tile, tpu, xla
from pallas_kernels.causal_conv1d.tile import Config
from pallas_kernels.common import compat, dispatch, segments, validate
from pallas_kernels.common.backend import Op, call_op

_OP = "causal_conv1d"
OP = Op(
    _OP,
    {
        "reference": reference.BACKEND,
        "xla": xla.BACKEND,
        "tpu": tpu.BACKEND,
        "gpu": gpu.BACKEND,
    },
    outputs=("",),
)


def causal_conv1d(
    x: Float[ArrayLike, "b l d"],
    weight: Float[ArrayLike, "w d"],
    bias: Float[ArrayLike, " d"] | None = None,
    *,
    activation: str | None = None,
    initial_state: Float[ArrayLike, "b w-1 d"] | None = None,
    segment_ids: Int[ArrayLike, "b l"] | None = None,
    implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "b l d"], Float[Array, "b w-1 d"]]:
    """The short causal depthwise convolution in front of Mamba, Griffin and the delta rules.

    `y_t = act(bias + sum_{j<W} weight_j * x_{t-(W-1)+j})` for each channel (Gu and Dao 2023,
    arXiv:2312.00752, section 3.4; De et al. 2024, arXiv:2402.19427, section 2.4).

    Args:
      x: `(B, L, D)`; float32 or bfloat16. float64 is kept by `reference` and `xla`.
      weight: `(W, D)`, the newest token's tap last; float32 or bfloat16 (float64 for a float64
        `x`).
      bias: `(D,)`, dtypes as `weight`; 0 if None.
      activation: None or "silu", `z * sigmoid(z)`.
      initial_state: the `W - 1` tokens before token 0, `(B, W-1, D)` in `x`'s dtype; zeros if None.
        They belong to the row's first document.
      segment_ids: `(B, L)` int32, the document of each token; 0 is padding and stands only at the
        end of a row. Taps never cross the start of a document; the output of padding is 0.
      implementation: None, or a name or a sequence of names of `"reference" | "xla" | "tpu" |
        "gpu"`; see `dispatch.run`.

    Returns:
      `y (B, L, D)` and `final_state (B, W-1, D)`, both in `x`'s dtype: the window after the last
      real token, with zeros in place of what belongs to earlier documents (`initial_state` for a
      row of padding). Sums and the activation are float32 inside.

    Gradients flow through `x`, `weight`, `bias`, `initial_state` and both outputs. Forward mode and
    second derivatives: `implementation="reference"`.

    Raises:
      ValueError: a shape or dtype that does not fit; the message names the argument.
      NotImplementedError: a forced implementation cannot serve the arguments.
    """
    x, weight = jnp.asarray(x), jnp.asarray(weight)
    _validate(x, weight, bias, activation, initial_state, segment_ids)
    window = (x.shape[0], weight.shape[0] - 1, x.shape[2])
    bias = jnp.zeros(x.shape[2:], weight.dtype) if bias is None else jnp.asarray(bias)
    state = jnp.zeros(window, x.dtype) if initial_state is None else jnp.asarray(initial_state)
    segment_index = None if segment_ids is None else segments.index(jnp.asarray(segment_ids))
    arrays = compat.match_vma(x, weight, bias, state, segment_index)
    (y,) = call_op(
        OP, Config(activation), *arrays, length=x.shape[1], implementation=implementation
    )
    # Outside of what is dispatched: where nobody uses it, its gradient costs nothing.
    final_state = tile.final_window(arrays[0], *arrays[3:])
    return y, checkpoint_name(final_state, f"{_OP}_state")


def _validate(x, weight, bias, activation, initial_state, segment_ids) -> None:
    validate.shape(_OP, "x", x, "(B, L, D)", (None, None, None))
    if any(size == 0 for size in x.shape):
        raise ValueError(f"{_OP}: x must not be empty, got shape {x.shape}")
    validate.dtype(_OP, "x", x, ("float32", "bfloat16", "float64"))
    batch, length, width = x.shape
    allowed = ("float64",) if x.dtype == jnp.float64 else ("float32", "bfloat16")
    validate.shape(_OP, "weight", weight, "(W, D)", (None, width))
    if weight.shape[0] == 0:
        raise ValueError(f"{_OP}: weight must have at least one tap, got shape {weight.shape}")
    validate.dtype(_OP, "weight", weight, allowed, because=f"x is {x.dtype}")
    if bias is not None:
        validate.shape(_OP, "bias", bias, "(D,)", (width,))
        validate.dtype(_OP, "bias", bias, allowed, because=f"x is {x.dtype}")
    if activation not in (None, "silu"):
        raise ValueError(f"{_OP}: activation must be None or 'silu', got {activation!r}")
    if initial_state is not None:
        sizes = (batch, weight.shape[0] - 1, width)
        validate.shape(_OP, "initial_state", initial_state, "(B, W-1, D)", sizes)
        validate.dtype(
            _OP, "initial_state", initial_state, (x.dtype.name,), because=f"x is {x.dtype}"
        )
    if segment_ids is not None:
        validate.segment_ids(_OP, segment_ids, batch, length)
