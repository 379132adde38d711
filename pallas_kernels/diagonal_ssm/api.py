"""The public op: signature, validation, dispatch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Complex, Float, Int

from pallas_kernels.common import dispatch, segments, validate
from pallas_kernels.common.backend import Op, call_op, summarize
from pallas_kernels.diagonal_ssm import gpu, powers, reference, tile, tpu, xla
from pallas_kernels.diagonal_ssm.tile import Config

_OP = "diagonal_ssm"
OP = Op(
    _OP,
    {
        "reference": reference.BACKEND,
        "xla": xla.BACKEND,
        "tpu": tpu.BACKEND,
        "gpu": gpu.BACKEND,
    },
    summary=tile.summary,
)
METHODS = ("fft", "chunked", "scan")


def diagonal_ssm(
    u: Float[ArrayLike, "b l h"],
    log_a: Complex[ArrayLike, "h n"],
    c: Complex[ArrayLike, "h n"],
    *,
    initial_state: Complex[ArrayLike, "b h n"] | None = None,
    segment_ids: Int[ArrayLike, "b l"] | None = None,
    reverse: bool = False,
    method: str | None = None,
    implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "b l h"], Complex[Array, "b h n"]]:
    """A diagonal state-space model for each channel (S4D, DSS).

    `h_t = exp(log_a) h_{t-1} + u_t` and `y_t = 2 Re sum_n c_n h_tn`, in every channel h, with one
    eigenvalue of each conjugate pair; the input matrix is folded into `c`. Gu, Gupta, Goel & Ré,
    "On the Parameterization and Initialization of Diagonal State Space Models", NeurIPS 2022,
    equations 2 and 3; Gupta, Gu & Berant, "Diagonal State Spaces are as Effective as Structured
    State Spaces", NeurIPS 2022. (S5 and LRU mix channels: see `linear_scan`.)

    Args:
      u: inputs `(B, L, H)`; float32 or bfloat16. float64 is kept by `reference` and `xla`.
      log_a: `(H, N)` complex64 (complex128 for float64), real part <= 0.
      c: `(H, N)`, `log_a`'s dtype.
      initial_state: the state before the first token, `(B, H, N)`, `log_a`'s dtype; zeros if None.
        It belongs to the row's first document.
      segment_ids: `(B, L)` int32, the document of each token; 0 is padding and stands only at the
        end of a row. State never crosses a change of id; padding leaves it untouched and its
        output is 0.
      reverse: run from the last real token to the first: the initial state enters at the last,
        the final state is the one after token 0.
      method: how it is computed. "fft": one convolution (`xla`; no segments but one document a
        row, known when traced; L < 2**17). "chunked": matrix products over chunks and a carried
        state (`xla`). "scan": token by token (`xla`, `tpu`, `gpu`). None takes the fastest that
        serves the arguments.
      implementation: None, or a name or a sequence of names of `"reference" | "xla" | "tpu" |
        "gpu"`; see `dispatch.run`. `reference` has one method of its own, whatever `method` says.

    Returns:
      `y (B, L, H)` in `u`'s dtype and `final_state (B, H, N)` in `log_a`'s: the state after the
      last real token (`initial_state` for a row of padding).

    Accuracy in float32: powers `exp(t log_a)` are within 1.5e-7 of exact for any imaginary part
    and t < 2**17, and states are carried by decays in two parts, so that "fft" and "chunked" stay
    below 1e-6 (RMS error over RMS) at 100,000 tokens of which all are remembered. "scan" rounds at
    every step and adds about 3e-9 for each step that a model remembers, `1 / |Re log_a|`.

    Gradients flow through `u`, `log_a`, `c`, `initial_state` and both outputs. Forward mode and
    second derivatives: `implementation="reference"`.

    Raises:
      ValueError: a shape, dtype, name or value that does not fit; the message names the argument.
        Values are looked at in arrays on the host or the CPU backend; in traced arrays and on
        accelerators by `checked`.
      NotImplementedError: a forced implementation or method cannot serve the arguments.
    """
    config = Config(reverse, method)
    arrays = _arguments(u, log_a, c, config, initial_state, segment_ids)
    length = arrays[0].shape[1]
    y, final_state = call_op(OP, config, *arrays, length=length, implementation=implementation)
    return y, final_state


def summary(
    u: ArrayLike,
    log_a: ArrayLike,
    c: ArrayLike,
    *,
    segment_ids: ArrayLike | None = None,
    reverse: bool = False,
    implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """What each row does to a state, `(decay, state)`, both `(B, H, N)`; see `backend.summarize`.
    It does not depend on `c`."""
    config = Config(reverse)
    arrays = _arguments(u, log_a, c, config, None, segment_ids)
    return summarize(OP, config, *arrays, implementation=implementation)


def _arguments(u, log_a, c, config: Config, initial_state, segment_ids) -> tuple[Any, ...]:
    """The op's arrays."""
    method = config.method
    u, log_a, c = jnp.asarray(u), jnp.asarray(log_a), jnp.asarray(c)
    _validate(u, log_a, c, initial_state, segment_ids, method)
    if method == "fft":
        _check_fft(u, segment_ids)
    segment_index = None if segment_ids is None else segments.index(jnp.asarray(segment_ids))
    if initial_state is None:
        initial_state = jnp.zeros((u.shape[0], *c.shape), c.dtype)
    return u, log_a, c, initial_state, segment_index


def _validate(u, log_a, c, initial_state, segment_ids, method) -> None:
    validate.shape(_OP, "u", u, "(B, L, H)", (None, None, None))
    if any(size == 0 for size in u.shape):
        raise ValueError(f"{_OP}: u must not be empty, got shape {u.shape}")
    batch, length, width = u.shape
    validate.shape(_OP, "log_a", log_a, "(H, N)", (width, None))
    if log_a.shape[1] == 0:
        raise ValueError(f"{_OP}: log_a must have at least one state, got shape {log_a.shape}")
    validate.shape(_OP, "c", c, "(H, N)", log_a.shape)
    validate.dtype(_OP, "u", u, ("float32", "bfloat16", "float64"))
    state = "complex128" if u.dtype == jnp.float64 else "complex64"
    for name, x in (("log_a", log_a), ("c", c)):
        validate.dtype(_OP, name, x, (state,), because=f"u is {u.dtype}")
    if initial_state is not None:
        sizes = (batch, *log_a.shape)
        validate.shape(_OP, "initial_state", initial_state, "(B, H, N)", sizes)
        validate.dtype(_OP, "initial_state", initial_state, (state,))
    if segment_ids is not None:
        validate.segment_ids(_OP, segment_ids, batch, length)
    validate.at_most_zero(_OP, "log_a's real part", log_a, "above, states grow without bound")
    if method is not None and method not in METHODS:
        raise ValueError(
            f"{_OP}: method={method!r}; choose among {', '.join(METHODS)}, or None for the fastest"
        )


def _check_fft(u, segment_ids) -> None:
    """NotImplementedError where a forced convolution cannot serve the arguments."""
    reason = None
    if u.shape[1] >= powers.LIMIT:
        reason = f"phases are exact below a length of {powers.LIMIT}, u has {u.shape[1]}"
    elif isinstance(segment_ids, jax.core.Tracer):
        reason = "it takes one document a row, and whether segment_ids do is not known under jit"
    elif segment_ids is not None:
        ids = np.asarray(segment_ids)
        if ((ids != 0) & (ids != ids[:, :1])).any():
            reason = "a convolution does not stop at documents; segment_ids hold several in a row"
    if reason:
        raise NotImplementedError(
            f"{_OP}: method='fft' cannot run here: {reason}; use 'chunked', 'scan' or None"
        )
