"""The public op: signature, validation, dispatch."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pallas_kernels.common import dispatch, segments, validate
from pallas_kernels.common.backend import Op, call_op, summarize
from pallas_kernels.selective_scan import gpu, reference, tile, tpu, xla
from pallas_kernels.selective_scan.tile import Config

_OP = "selective_scan"
OP = Op(
    _OP,
    {
        "reference": reference.BACKEND,
        "xla": xla.BACKEND,
        "tpu": tpu.BACKEND,
        "gpu": gpu.BACKEND,
    },
    one_token=xla.one_token,
    summary=tile.summary,
)


def selective_scan(
    x: Float[ArrayLike, "b l d"],
    dt: Float[ArrayLike, "b l d"],
    A: Float[ArrayLike, "d n"],
    B: Float[ArrayLike, "b l n"],
    C: Float[ArrayLike, "b l n"],
    D: Float[ArrayLike, " d"] | None = None,
    *,
    gate: Float[ArrayLike, "b l d"] | None = None,
    dt_bias: Float[ArrayLike, " d"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[ArrayLike, "b d n"] | None = None,
    segment_ids: Int[ArrayLike, "b l"] | None = None,
    reverse: bool = False,
    implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """The state space model of Mamba (Gu and Dao 2023, arXiv:2312.00752, section 3).

    For each channel d and state n, with `A` discretised exactly and `B` by Euler's rule:

        h_t[d, n] = exp(dt_t[d] A[d, n]) h_{t-1}[d, n] + dt_t[d] x_t[d] B_t[n]
        y_t[d]    = (sum_n C_t[n] h_t[d, n] + D[d] x_t[d]) * silu(gate_t[d])

    Nothing of shape `(B, L, D, N)` is ever stored, forward or backward.

    Args:
      x: inputs `(B, L, D)`; float32 or bfloat16. float64 is kept by `reference` and `xla`.
      dt: step sizes `(B, L, D)`, >= 0 after bias and softplus; float32 (float64 for such an x) or
        bfloat16, as are `B`, `C` and `gate`.
      A: `(D, N)` float32 (float64 for such an x), <= 0.
      B: what each token writes to the states, `(B, L, N)`.
      C: what each token reads from the states, `(B, L, N)`.
      D: weight of the skip connection, `(D,)` in A's dtype, or None.
      gate: `(B, L, D)`: the output is multiplied by `silu(gate)`, or None.
      dt_bias: added to dt first, `(D,)` in A's dtype, or None.
      dt_softplus: dt, with its bias, goes through `log(1 + exp(dt))`.
      initial_state: the state before the first token, `(B, D, N)` in A's dtype; zeros if None. It
        belongs to the row's first document.
      segment_ids: `(B, L)` int32, the document of each token; 0 is padding and stands only at the
        end of a row. State never crosses a change of id; padding leaves it untouched and its
        output is 0.
      reverse: run from the last real token to the first: the initial state enters at the last,
        the final state is the one after token 0.
      implementation: None, or a name or a sequence of names of `"reference" | "xla" | "tpu" |
        "gpu"`; see `dispatch.run`.

    Returns:
      `y (B, L, D)` in `x`'s dtype and `final_state (B, D, N)` in A's dtype: the state after the
      last real token (`initial_state` for a row of padding).

    Gradients flow through all arrays but `segment_ids`, and through both outputs. Forward mode and
    second derivatives: `implementation="reference"`.

    Raises:
      ValueError: a shape, dtype or value that does not fit; the message names the argument. Values
        are looked at in arrays on the host or the CPU backend; in traced arrays and on accelerators
        by `checked`.
      NotImplementedError: a forced implementation cannot serve the arguments.
    """
    validate.at_most_zero(_OP, "A", A, "Mamba's is -exp(A_log)")
    config, arrays = _arguments(
        *(x, dt, A, B, C, D, gate, dt_bias),
        config=Config(dt_softplus=dt_softplus, reverse=reverse),
        initial_state=initial_state,
        segment_ids=segment_ids,
    )
    length = arrays[0].shape[1]
    y, final_state = call_op(OP, config, *arrays, length=length, implementation=implementation)
    return y, final_state


def summary(
    x: ArrayLike,
    dt: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    *,
    dt_bias: ArrayLike | None = None,
    dt_softplus: bool = False,
    segment_ids: ArrayLike | None = None,
    reverse: bool = False,
    implementation: dispatch.Implementation = None,
) -> tuple[Array, Array]:
    """What each row does to a state, `(decay, state)`, both `(B, D, N)`; see `backend.summarize`.
    It does not depend on `C`."""
    config, arrays = _arguments(
        *(x, dt, A, B, C, None, None, dt_bias),
        config=Config(dt_softplus=dt_softplus, reverse=reverse),
        initial_state=None,
        segment_ids=segment_ids,
    )
    return summarize(OP, config, *arrays, implementation=implementation)


def _arguments(
    x, dt, A, B, C, D, gate, dt_bias, *, config: Config, initial_state, segment_ids
) -> tuple[Config, tuple[Any, ...]]:
    """The op's config and arrays."""
    given = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "gate": gate, "dt_bias": dt_bias}
    arrays: dict[str, Any] = {k: None if z is None else jnp.asarray(z) for k, z in given.items()}
    state_dtype = _validate(arrays, initial_state, segment_ids)
    if initial_state is None:
        batch = arrays["x"].shape[0]
        initial_state = jnp.zeros((batch, *arrays["A"].shape), state_dtype)
    segment_index = None if segment_ids is None else segments.index(jnp.asarray(segment_ids))
    return config, (*arrays.values(), initial_state, segment_index)


def _validate(arrays: dict[str, Any], initial_state: Any, segment_ids: Any) -> Any:
    """The dtype of the state."""
    x, A = arrays["x"], arrays["A"]
    validate.shape(_OP, "x", x, "(B, L, D)", (None, None, None))
    batch, length, width = x.shape
    validate.shape(_OP, "A", A, "(D, N)", (width, None))
    states = A.shape[1]
    if x.size == 0 or states == 0:
        raise ValueError(f"{_OP}: x and A must not be empty, got shapes {x.shape} and {A.shape}")
    validate.dtype(_OP, "x", x, ("float32", "bfloat16", "float64"))
    state_dtype = jnp.dtype(jnp.float32) if x.dtype == jnp.bfloat16 else x.dtype
    because = f"x is {x.dtype}"
    # By argument: the rule on its shape, the sizes, and whether it may be narrow.
    rules: dict[str, tuple[str, tuple[int, ...], bool]] = {
        "dt": ("(B, L, D)", (batch, length, width), True),
        "A": ("(D, N)", (width, states), False),
        "B": ("(B, L, N)", (batch, length, states), True),
        "C": ("(B, L, N)", (batch, length, states), True),
        "D": ("(D,)", (width,), False),
        "gate": ("(B, L, D)", (batch, length, width), True),
        "dt_bias": ("(D,)", (width,), False),
        "initial_state": ("(B, D, N)", (batch, width, states), False),
    }
    for name, (rule, sizes, narrow) in rules.items():
        array = initial_state if name == "initial_state" else arrays[name]
        if array is not None:
            validate.shape(_OP, name, array, rule, sizes)
            either = narrow and state_dtype == jnp.float32
            allowed = (state_dtype.name, "bfloat16") if either else (state_dtype.name,)
            validate.dtype(_OP, name, array, allowed, because)
    if segment_ids is not None:
        validate.segment_ids(_OP, segment_ids, batch, length)
    return state_dtype
