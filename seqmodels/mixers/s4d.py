"""S4D: one diagonal state-space model for each channel.

Gu, Gupta, Goel & Ré, "On the Parameterization and Initialization of Diagonal State Space Models",
NeurIPS 2022.
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from seqmodels import ops
from seqmodels.mixers import hippo
from seqmodels.mixers.base import Segments
from seqmodels.mixers.siso import SISOConfig, SISOMixer
from seqmodels.mixers.ssm import Discretization, discretize

Init = Literal["lin", "inv", "legs", "real"]


@dataclasses.dataclass(frozen=True)
class S4DConfig(SISOConfig):
    """Configuration of an S4D layer; see ``SISOConfig`` for the other fields.

    Attributes:
      init: eigenvalues: "lin" ``-1/2 + i pi n``, "inv" the inverse law, "legs" HiPPO-LegS without
        its low-rank part (with S4's clipped input vector), "real" ``-(n + 1)``.
      discretization: zero-order hold or bilinear.
    """

    mixer: ClassVar[str] = "s4d"

    init: Init = "lin"
    discretization: Discretization = "zoh"


class System(NamedTuple):
    """A discretised layer: state ``h_t = exp(log_a) h_{t-1} + u_t``, both ``(H, N/2)``.

    ``c`` holds one C a direction, ``(H, N/2)``, the input vector folded in:
    ``y_t = 2 Re sum_n c_n h_tn``.
    """

    log_a: Complex[Array, "h n"]
    c: tuple[Complex[Array, "h n"], ...]


class S4D(SISOMixer[S4DConfig]):
    """``y = K_left * u (+ K_right * u) + D u``, ``K_j = 2 Re sum_n C_n B_n f(λ_n) a_n^j``.

    Parameters as ``SISOMixer`` lists them. All arithmetic is float32.

    The kernel of `pallas_kernels.diagonal_ssm` for every use: whole rows, packed ones, carried
    states and single tokens.
    """

    def mix(
        self,
        u: Float[Array, "b l h"],
        segments: Segments | None,
        initial_state: Complex[Array, "b h n"] | None,
    ) -> tuple[Float[Array, "b l h"], Complex[Array, "b h n"]]:
        return _run(u, self._system(), segments, initial_state, stateful=self.stateful)

    def _system(self) -> System:
        values, inputs = initial_system(self.config.init, self.config.state_size)
        eigenvalues, b = self.eigenvalues(values), self.vector("B", inputs)
        step = jnp.broadcast_to(self.steps()[:, None], eigenvalues.shape)
        log_a, gain = discretize(eigenvalues, step, self.config.discretization)
        return System(log_a, tuple(gain * b * c for c in self.output_vectors()))


def initial_system(init: Init, state_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and input vector, complex128 ``(N/2,)`` each (section 4 of the paper)."""
    n = np.arange(state_size // 2)
    ones = np.ones(state_size // 2, np.complex128)
    if init == "lin":
        return -0.5 + 1j * np.pi * n, ones
    if init == "inv":
        return -0.5 + 1j * state_size / np.pi * (state_size / (2 * n + 1) - 1), ones
    if init == "real":
        return -(n + 1.0) + 0j, ones
    values, vectors = hippo.normal_eigen(state_size)
    return values, hippo.normal_input(vectors)


def _run(
    u: Float[Array, "b l h"],
    system: System,
    segments: Segments | None,
    initial_state: Complex[Array, "b h n"] | None,
    *,
    stateful: bool,
) -> tuple[Float[Array, "b l h"], Complex[Array, "b h n"]]:
    """The layer and the state after each row's last real token; ``u`` is zero on padding."""
    # One document a row and zeros behind it: nothing to stop, unless the final state is wanted.
    within = segments
    if segments is not None and segments.single and not stateful:
        within = None
    left, *right = system.c
    y, final = ops.diagonal_ssm(u, system.log_a, left, initial_state=initial_state, segments=within)
    for c in right:
        later, _ = ops.diagonal_ssm(u, system.log_a, c, segments=within, reverse=True)
        y = y + _next_token(later, segments)
    return y, final


def _next_token(y: Float[Array, "b l h"], segments: Segments | None) -> Float[Array, "b l h"]:
    """``y_{t+1}`` at t; zero where t + 1 is another document or past the end."""
    y = jnp.pad(y[:, 1:], ((0, 0), (0, 1), (0, 0)))
    if segments is None:
        return y
    following = jnp.pad(segments.index[:, 1:], ((0, 0), (0, 1)))
    return jnp.where((following == segments.index)[..., None], y, jnp.zeros_like(y))
