"""The portable path: two methods of the same op, and which one runs."""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.common import dispatch
from pallas_kernels.common.backend import Backend
from pallas_kernels.long_conv import blocked, fft
from pallas_kernels.long_conv.spectrum import wide

_METHODS = {"fft": fft.long_conv, "blocked": blocked.long_conv}


class Config(NamedTuple):
    """What is static: `method` "fft", "blocked", or None for the platform's fastest."""

    method: str | None


def forward(config: Config, u, kernel, kernel_reverse, *, return_residuals: bool):
    """`((y,), None)`; JAX differentiates it, the methods have rules of their own."""
    if u.shape[1] == 1:
        return (step(u, kernel),), None
    if config.method is not None:
        return (_METHODS[config.method](u, kernel, kernel_reverse),), None
    # Around complete custom VJPs, like the choice of an implementation.
    y = dispatch.choose(
        "long_conv method", _METHODS, u, kernel, kernel_reverse, default="fft", tpu="blocked"
    )
    return (y,), None


def step(u, kernel):
    """One token, which meets one tap."""
    dtype = wide(u.dtype)
    return (u.astype(dtype) * kernel[None, None, :, 0].astype(dtype)).astype(u.dtype)


BACKEND = Backend(forward)
NO_TPU_KERNEL = Backend(
    forward,
    unsupported=lambda *_: (
        "it has no Pallas kernel: method 'blocked' is matrix products, XLA's for the MXU"
    ),
)
NO_GPU_KERNEL = Backend(
    forward,
    unsupported=lambda *_: "it has no Pallas kernel: method 'fft' is the platform's own transform",
)
