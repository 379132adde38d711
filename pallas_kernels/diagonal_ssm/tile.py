"""The maths of one chunk of T tokens and of one step, on values; shared by every backend.

A chunk is two matrices a channel and one multiplication of the state. With the state S before it,
`K_m = 2 Re sum_n c_n a_n^m` and `a = exp(log_a)`:

    y_i = sum_{j <= i} K_{i-j} u_j + 2 Re sum_n c_n a_n^(i+1) S_n
    S'  = a^T S + sum_j a^(T-1-j) u_j

Complex states are two real planes side by side, `(..., 2N)`: real parts, then imaginary ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import planes as numbers
from pallas_kernels.common.planes import Planes
from pallas_kernels.common.segments import RESET, SKIP, step_codes
from pallas_kernels.diagonal_ssm.powers import powers, precise

HIGHEST = jax.lax.Precision.HIGHEST


class Config(NamedTuple):
    """What is static about a call.

    Attributes:
      reverse: from the last token to the first.
      method: "fft", "chunked" or "scan"; None for the fastest.
      tiles: the backend's own `Tiles`; None for what suits the shape.
    """

    reverse: bool
    method: str | None = None
    tiles: Any = None


class Chunk(NamedTuple):
    """What a chunk of T tokens does, for every channel.

    Attributes:
      toeplitz: `(H, T, T)` real; row j holds what token j adds to each output.
      read: `(H, 2N, T)` real; what the entering state adds to each output.
      write: `(H, T, 2N)` real; what token j leaves in the state.
      decay, lacking: `(H, N)` complex; the entering state is multiplied by their sum.
    """

    toeplitz: jax.Array
    read: jax.Array
    write: jax.Array
    decay: jax.Array
    lacking: jax.Array


def chunk(log_a: jax.Array, c: jax.Array, steps: int) -> Chunk:
    """The matrices of a chunk of `steps` tokens; JAX differentiates them."""
    table = powers(log_a[..., None], jnp.arange(steps + 1, dtype=jnp.int32)[None, None])
    whole = jnp.full((1, 1), steps, jnp.int32)
    output_projection = 2 * c[..., None] * table
    read = jnp.concatenate([output_projection.real, -output_projection.imag], axis=1)[..., 1:]
    kernel = output_projection.real[..., :steps].sum(1)
    back = table[..., steps - 1 :: -1] if steps > 1 else table[..., :1]
    write = jnp.concatenate([back.real, back.imag], axis=1).swapaxes(1, 2)
    return Chunk(toeplitz(kernel), read, write, *precise(log_a, whole))


def toeplitz(kernel: jax.Array) -> jax.Array:
    """`(H, T) -> (H, T, T)`: element (j, i) is `kernel[i - j]`, 0 where that is negative.

    Rows of a table of 2T columns, read one element later in each row: a reshape, no gather.
    """
    width, steps = kernel.shape
    row = jnp.pad(kernel, ((0, 0), (0, steps)))
    table = jnp.broadcast_to(row[:, None], (width, steps, 2 * steps)).reshape(width, -1)
    return table[:, :-steps].reshape(width, steps, 2 * steps - 1)[..., :steps]


def to_planes(state: jax.Array) -> jax.Array:
    """Complex `(..., N)` to real `(..., 2N)`."""
    return jnp.concatenate([state.real, state.imag], axis=-1)


def to_complex(planes: jax.Array) -> jax.Array:
    """Real `(..., 2N)` to complex `(..., N)`."""
    real, imaginary = jnp.split(planes, 2, axis=-1)
    return jax.lax.complex(real, imaginary)


# One step of the scan. States, decays and readouts are pairs of planes `(N, channels)`, inputs and
# outputs one plane that broadcasts against them; `output_projection` is 2 c.
#
#   forward       h_t = a h_{t-1} + u_t,   y_t = sum_n Re(readout h_t)
#   adjoint       G_t = readout dy_t + c_{t+1},   c_t = a G_t,   du_t = sum_n Re(G_t)
#   sensitivity   p_t = dh_t / dlog_a = a (p_{t-1} + h_{t-1})
#
# The derivative with respect to `log_a` is summed forward in time, from p: no state is stored, and
# none is recovered by division or subtraction.


def multiply(a: Planes, h: Planes, lacking: Planes | None = None) -> Planes:
    """`(a + lacking) h`."""
    product = numbers.mul(a, h)
    return product if lacking is None else numbers.add(product, numbers.mul(lacking, h))


def select(code: jax.Array | None, before: Planes, first: Planes, after: Planes) -> Planes:
    """What a step leaves: `before` on padding, `first` where a document begins, else `after`."""
    if code is None:
        return after
    return numbers.where(code == SKIP, before, numbers.where(code == RESET, first, after))


def advance(h: Planes, u: jax.Array, code, a: Planes, lacking: Planes | None = None) -> Planes:
    """`h_t` from `h_{t-1}`; at a reset a select drops even an infinity of the last document."""
    real, imaginary = multiply(a, h, lacking)
    drive = jnp.broadcast_to(u, real.shape)
    return select(code, h, (drive, jnp.zeros_like(drive)), (real + drive, imaginary))


def contract(output_projection: Planes, h: Planes) -> jax.Array:
    """`Re(readout h)`, to be summed over N."""
    return output_projection[0] * h[0] - output_projection[1] * h[1]


def retreat(
    carry: Planes,
    dy: jax.Array,
    code,
    output_projection: Planes,
    a: Planes,
    lacking: Planes | None = None,
) -> tuple[Planes, Planes]:
    """`(G_t, c_t)` from `c_{t+1}` and the cotangent of `y_t`."""
    gradient = (carry[0] + output_projection[0] * dy, carry[1] + output_projection[1] * dy)
    zero = numbers.zeros_like(carry)
    before = select(code, carry, zero, multiply(a, gradient, lacking))
    return (gradient if code is None else numbers.where(code == SKIP, zero, gradient)), before


def sensitivity(
    p: Planes, h_before: Planes, code, a: Planes, lacking: Planes | None = None
) -> Planes:
    """`p_t` from `p_{t-1}` and `h_{t-1}`."""
    after = multiply(a, numbers.add(p, h_before), lacking)
    return select(code, p, numbers.zeros_like(p), after)


def summary(run, config: Config, u, log_a, c, initial_state, segment_index):
    """`(decay, state)`, each `(B, H, N)`; see `backend.summarize`."""
    _, state = run(config, u, log_a, c, initial_state, segment_index)
    batch, length = u.shape[:2]
    real = jnp.full((batch,), length, jnp.int32)
    if segment_index is not None:
        real = jnp.sum(segment_index != 0, axis=1, dtype=jnp.int32)
    decay = powers(log_a[None], real[:, None, None])
    if segment_index is None:
        return decay, state
    restarts = step_codes(segment_index, reverse=config.reverse) == RESET
    forgotten = jnp.any(restarts, axis=1)[:, None, None]
    return jnp.where(forgotten, jnp.zeros_like(decay), decay), state
