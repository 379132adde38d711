"""S4D: one diagonal state-space model for each channel.

Gu, Gupta, Goel & Ré, "On the Parameterization and Initialization of Diagonal State Space Models",
NeurIPS 2022; Yu, Lyu, Lim, Mahoney & Erichson, "Tuning Frequency Bias of State Space Models", ICLR
2025 (arXiv:2410.02035), for the frequencies and their weights (S4D-FT).
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from seqmodels import ops
from seqmodels.mixers import hippo
from seqmodels.mixers.base import ParamLabel, Segments
from seqmodels.mixers.siso import SISOConfig, SISOMixer
from seqmodels.mixers.ssm import Discretization, discretize
from seqmodels.ranges import Positive

Init = Literal["lin", "inv", "legs", "real"]

FREQUENCY_LABEL = ParamLabel(group="frequency", weight_decay=False, float32=True)
"""Exponents of the frequencies' weights: a learning rate of their own."""


@dataclasses.dataclass(frozen=True)
class S4DConfig(SISOConfig):
    """Configuration of an S4D layer; see ``SISOConfig`` for the other fields.

    Attributes:
      init: eigenvalues: "lin" ``-1/2 + i pi n``, "inv" the inverse law, "legs" HiPPO-LegS without
        its low-rank part (with S4's clipped input vector), "real" ``-(n + 1)``.
      discretization: zero-order hold or bilinear.
      frequency_scale: α, multiplies the initial imaginary parts of the eigenvalues.
      frequency_weight: trains β, one a channel: what passes at f cycles a token is multiplied by
        ``(1 + f)^β``, initially 1. Rows are whole and see both sides.
    """

    mixer: ClassVar[str] = "s4d"

    init: Init = "lin"
    discretization: Discretization = "zoh"
    frequency_scale: Positive = 1.0
    frequency_weight: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frequency_weight and not self.bidirectional:
            raise ValueError(
                "S4DConfig: frequency_weight=True sees both sides of a token; set "
                "bidirectional=True"
            )

    @property
    def supports_packing(self) -> bool:
        return not self.frequency_weight  # a transform does not stop where a document ends

    def param_labels(self) -> dict[str, ParamLabel]:
        labels = super().param_labels()
        if self.frequency_weight:
            labels["frequency_weight"] = FREQUENCY_LABEL
        return labels


class System(NamedTuple):
    """A discretised layer: state ``h_t = exp(log_a) h_{t-1} + u_t``, both ``(H, N/2)``.

    ``c`` holds one C a direction, ``(H, N/2)``, the input vector folded in:
    ``y_t = 2 Re sum_n c_n h_tn``.
    """

    log_a: Complex[Array, "h n"]
    c: tuple[Complex[Array, "h n"], ...]


class S4D(SISOMixer[S4DConfig]):
    """``y = K_left * u (+ K_right * u) + D u``, ``K_j = 2 Re sum_n C_n B_n f(λ_n) a_n^j``.

    Parameters as ``SISOMixer`` lists them, and with ``frequency_weight`` the exponents of that name
    ``(H,)``. All arithmetic is float32.

    The kernel of `pallas_kernels.diagonal_ssm` for every use: whole rows, packed ones, carried
    states and single tokens. With ``frequency_weight`` its response to an impulse is convolved with
    rows, by a transform of twice the padded length, on which the weights depend as they do in the
    published code.
    """

    def mix(
        self,
        u: Float[Array, "b l h"],
        segments: Segments | None,
        initial_state: Complex[Array, "b h n"] | None,
    ) -> tuple[Float[Array, "b l h"], Complex[Array, "b h n"] | None]:
        system = self._system()
        if self.config.frequency_weight:
            zeros = nn.initializers.zeros
            power = self.param("frequency_weight", zeros, (self.width,), jnp.float32)
            return _run_weighted(u, system, power), None
        return _run(u, system, segments, initial_state, stateful=self.stateful)

    def _system(self) -> System:
        values, inputs = initial_system(self.config.init, self.config.state_size)
        values = values.real + 1j * self.config.frequency_scale * values.imag
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


def _run_weighted(
    u: Float[Array, "b l h"], system: System, power: Float[Array, " h"]
) -> Float[Array, "b l h"]:
    """The layer, each frequency times its weight; ``u`` is zero on padding."""
    length = u.shape[1]
    left, right = (ops.diagonal_ssm_filter(system.log_a, c, length=length) for c in system.c)
    logarithm = np.log1p(np.arange(length + 1) / (2 * length)).astype(np.float32)

    def convolved(u: Array, left: Array, right: Array, power: Array) -> Array:
        # Of a ring of 2 L places, those behind L are the ones before the first.
        spectrum = jnp.fft.rfft(jnp.concatenate([left, jnp.flip(right, axis=1)], axis=1))
        weight = jnp.exp(power[:, None] * logarithm[None])
        spectrum = (spectrum * weight.astype(spectrum.dtype)).T
        rows = jnp.fft.rfft(u, n=2 * length, axis=1)
        return jnp.fft.irfft(rows * spectrum[None], n=2 * length, axis=1)[:, :length]

    return ops.each_channel(convolved, u, shared={"left": left, "right": right, "power": power})


def _next_token(y: Float[Array, "b l h"], segments: Segments | None) -> Float[Array, "b l h"]:
    """``y_{t+1}`` at t; zero where t + 1 is another document or past the end."""
    y = jnp.pad(y[:, 1:], ((0, 0), (0, 1), (0, 0)))
    if segments is None:
        return y
    following = jnp.pad(segments.index[:, 1:], ((0, 0), (0, 1)))
    return jnp.where((following == segments.index)[..., None], y, jnp.zeros_like(y))
