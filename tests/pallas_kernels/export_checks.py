"""What tests of `jax.export` share."""

import contextlib

import jaxtyping
from jax import export

# Triton's calls carry no promise of stability between versions of jax.
DISABLED_CHECKS = [
    export.DisabledSafetyCheck.custom_call(name)
    for name in ("triton_kernel_call", "__gpu$xla.gpu.triton")
]


@contextlib.contextmanager
def symbols_as_sizes():
    """A symbolic size is no `int`, as which the suite's type checks know sizes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
