"""The public op: signature, validation, dispatch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Complex, Float

from pallas_kernels.common import dispatch, validate
from pallas_kernels.common.backend import Op, call_op
from pallas_kernels.s4_kernel import reference, xla
from pallas_kernels.s4_kernel.xla import Config

_OP = "s4_kernel"
OP = Op(
    _OP,
    {
        "reference": reference.BACKEND,
        "xla": xla.BACKEND,
        "tpu": xla.NO_KERNEL,
        "gpu": xla.NO_KERNEL,
    },
    one_token=xla.one_token,
    outputs=("",),
)


def s4_kernel(
    dt: Float[ArrayLike, " h"],
    eigenvalues: Complex[ArrayLike, "h n"],
    p: Complex[ArrayLike, "h n"],
    b: Complex[ArrayLike, "h n"],
    c: Complex[ArrayLike, "r h n"],
    *,
    length: int,
    implementation: dispatch.Implementation = None,
) -> Float[Array, "r h l"]:
    """`K_t = 2 Re C_r Ā^t B̄` for t below `length`: the filter of S4, for `long_conv`.

    Of the model `x' = A x + B u`, `y = 2 Re C x` with `A = diag(λ) - p p*`, one of each conjugate
    pair of modes, by the bilinear rule and for a C that is already truncated, `C~ = C (I - Ā^L)`.
    Its transform at the L-th roots of unity is four Cauchy sums and Woodbury's identity: Gu, Goel &
    Ré, "Efficiently Modeling Long Sequences with Structured State Spaces", ICLR 2022, appendix C.3.

    Args:
      dt: step sizes `(H,)`, float32; float64 is kept.
      eigenvalues: λ `(H, N/2)`, one of each conjugate pair, real part < 0; complex64 (complex128
        for float64).
      p: the low-rank part, `(H, N/2)`, `eigenvalues`' dtype.
      b: the input vector, `(H, N/2)`, `eigenvalues`' dtype.
      c: truncated, of R directions, `(R, H, N/2)`, `eigenvalues`' dtype.
      length: L, tokens.
      implementation: None, or a name or a sequence of names of `"reference" | "xla"`; see
        `dispatch.run`. There is no Pallas kernel. `reference` takes the recurrence.

    Returns:
      `K (R, H, L)` in `dt`'s dtype. Memory beyond that is some `(H, N/2, 64)`, whatever the length.

    Gradients flow through all arrays. Forward mode and second derivatives:
    `implementation="reference"`.

    Raises:
      ValueError: a shape, dtype or value that does not fit; the message names the argument.
      NotImplementedError: a forced implementation that there is not: "tpu", "gpu".
    """
    arrays = tuple(map(jnp.asarray, (dt, eigenvalues, p, b, c)))
    _validate(arrays, length)
    (kernel,) = call_op(
        OP, Config(int(length)), *arrays, length=int(length), implementation=implementation
    )
    return kernel


def _validate(arrays: tuple[jax.Array, ...], length: int) -> None:
    dt, eigenvalues, p, b, c = arrays
    validate.shape(_OP, "dt", dt, "(H,)", (None,))
    validate.shape(_OP, "eigenvalues", eigenvalues, "(H, N/2)", (dt.shape[0], None))
    if 0 in eigenvalues.shape:
        raise ValueError(f"{_OP}: eigenvalues must not be empty, got shape {eigenvalues.shape}")
    validate.shape(_OP, "p", p, "(H, N/2)", eigenvalues.shape)
    validate.shape(_OP, "b", b, "(H, N/2)", eigenvalues.shape)
    validate.shape(_OP, "c", c, "(R, H, N/2)", (None, *eigenvalues.shape))
    validate.dtype(_OP, "dt", dt, ("float32", "float64"))
    modes = "complex128" if dt.dtype == jnp.float64 else "complex64"
    for name, x in (("eigenvalues", eigenvalues), ("p", p), ("b", b), ("c", c)):
        validate.dtype(_OP, name, x, (modes,), because=f"dt is {dt.dtype}")
    if not isinstance(length, int | np.integer) or isinstance(length, bool) or length < 1:
        raise ValueError(f"{_OP}: length={length!r} must be a whole number of at least 1")
