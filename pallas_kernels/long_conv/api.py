"""The public op: signature, validation, dispatch."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from pallas_kernels.common import dispatch, validate
from pallas_kernels.common.backend import Op, call_op
from pallas_kernels.long_conv import reference, xla

_OP = "long_conv"
METHODS = ("fft", "blocked")
OP = Op(
    _OP,
    {
        "reference": reference.BACKEND,
        "xla": xla.BACKEND,
        "tpu": xla.NO_TPU_KERNEL,
        "gpu": xla.NO_GPU_KERNEL,
    },
    outputs=("",),
)


def long_conv(
    u: Float[ArrayLike, "b l h"],
    kernel: Float[ArrayLike, "h k"],
    *,
    kernel_reverse: Float[ArrayLike, "h r"] | None = None,
    method: str | None = None,
    implementation: dispatch.Implementation = None,
) -> Float[Array, "b l h"]:
    """A convolution of every channel with its own filter as long as the row: S4, SGConv, Hyena.

    `y_t = sum_{j>=0} kernel_j u_{t-j} + sum_{j>=0} kernel_reverse_j u_{t+1+j}`, tokens outside of
    the row being 0: token t itself is in the first sum only. Gu, Goel & Ré, "Efficiently Modeling
    Long Sequences with Structured State Spaces", ICLR 2022, section 3; two-sided as in their code.
    There are no segments: a row is one document, and what follows it must be 0 if `kernel_reverse`
    is given.

    Args:
      u: `(B, L, H)`; float32 or bfloat16. float64 is kept.
      kernel: `(H, Lk)`, any Lk, by distance; float32 or bfloat16 (float64 for a float64 `u`). Taps
        from L on meet no token.
      kernel_reverse: `(H, Lr)`, any Lr, dtypes as `kernel`: the weights of later tokens. Both sides
        take one pass.
      method: how it is computed. "fft": the platform's transform. "blocked": the transform as two
        dense ones, by matrix products (Fu et al., "FlashFFTConv", ICLR 2024). None takes "blocked"
        on TPUs and "fft" elsewhere.
      implementation: None, or a name or a sequence of names of `"reference" | "xla"`; see
        `dispatch.run`. `reference` has one method of its own, whatever `method` says. There is no
        Pallas kernel.

    Returns:
      `y (B, L, H)` in `u`'s dtype. Inside all is float32 (float64 for float64); for a bfloat16 `u`
      the products of "blocked" are of `jax.lax.Precision.HIGH`, which on a TPU keeps 16 bits.

    Accuracy in float32: below 1e-6 (RMS error over RMS), of the whole row: a transform spreads the
    error of its largest numbers over all of them.

    Gradients flow through `u`, `kernel` and `kernel_reverse`. Forward mode and second derivatives:
    `implementation="reference"`.

    Raises:
      ValueError: a shape, dtype or name that does not fit; the message names the argument.
      NotImplementedError: a forced implementation that there is not: "tpu", "gpu".
    """
    u, kernel = jnp.asarray(u), jnp.asarray(kernel)
    kernel_reverse = None if kernel_reverse is None else jnp.asarray(kernel_reverse)
    _validate(u, kernel, kernel_reverse, method)
    (y,) = call_op(
        OP,
        xla.Config(method),
        *(u, kernel, kernel_reverse),
        length=u.shape[1],
        implementation=implementation,
    )
    return y


def _validate(u: Any, kernel: Any, kernel_reverse: Any, method: str | None) -> None:
    validate.shape(_OP, "u", u, "(B, L, H)", (None, None, None))
    if any(size == 0 for size in u.shape):
        raise ValueError(f"{_OP}: u must not be empty, got shape {u.shape}")
    validate.dtype(_OP, "u", u, ("float32", "bfloat16", "float64"))
    allowed = ("float64",) if u.dtype == jnp.float64 else ("float32", "bfloat16")
    for name, x in (("kernel", kernel), ("kernel_reverse", kernel_reverse)):
        if x is None:
            continue
        validate.shape(_OP, name, x, "(H, any)", (u.shape[2], None))
        if x.shape[1] == 0:
            raise ValueError(f"{_OP}: {name} must have at least one tap, got shape {x.shape}")
        validate.dtype(_OP, name, x, allowed, because=f"u is {u.dtype}")
    if method is not None and method not in METHODS:
        raise ValueError(
            f"{_OP}: method={method!r}; choose among {', '.join(METHODS)}, or None for the fastest"
        )
