"""S4D: one diagonal state-space model for each channel.

Gu, Gupta, Goel & Ré, "On the Parameterization and Initialization of Diagonal State Space Models",
NeurIPS 2022.
"""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from jaxtyping import Array, Complex, Float

from pallas_kernels import diagonal_ssm
from seqmodels.mixers import hippo
from seqmodels.mixers.base import (
    SSM,
    Mark,
    Mixer,
    MixerConfig,
    RecurrentState,
    Segments,
    check_choices,
    mask_padding,
)
from seqmodels.mixers.ssm import (
    Discretization,
    check_step_range,
    constant,
    discretize,
    log_uniform,
)
from seqmodels.parallel.rows import over_rows

Init = Literal["lin", "inv", "legs", "real"]


@dataclasses.dataclass(frozen=True)
class S4DConfig(MixerConfig):
    """Configuration of an S4D layer.

    Attributes:
      state_size: real state size of each channel; half as many complex states are kept.
      init: eigenvalues: "lin" ``-1/2 + i pi n``, "inv" the inverse law, "legs" HiPPO-LegS without
        its low-rank part (with S4's clipped input vector), "real" ``-(n + 1)``.
      discretization: zero-order hold or bilinear.
      dt_min, dt_max: range of the log-uniform initial step sizes, one for each channel.
      n_ssm: independent copies of eigenvalues and input vector, a divisor of the width; channel h
        uses copy ``h % n_ssm``. None is one for each channel.
      bidirectional: adds a kernel from the right with its own C. It acts on the tokens *after* the
        current one, which only the kernel from the left sees.
      dt_global: trains the step sizes at the main rate instead of the ssm rate.
      c_ssm: trains C at the ssm rate instead of the main rate.
    """

    mixer: ClassVar[str] = "s4d"

    state_size: int = 64
    init: Init = "lin"
    discretization: Discretization = "zoh"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    n_ssm: int | None = None
    bidirectional: bool = False
    dt_global: bool = False
    c_ssm: bool = False

    def __post_init__(self) -> None:
        if self.state_size < 2 or self.state_size % 2:
            raise ValueError(
                f"S4DConfig: state_size={self.state_size} must be an even number >= 2: states come "
                "in conjugate pairs"
            )
        if self.n_ssm is not None and self.n_ssm < 1:
            raise ValueError(f"S4DConfig: n_ssm={self.n_ssm} must be positive or None")
        check_choices(self)
        check_step_range("S4DConfig", self.dt_min, self.dt_max)

    @property
    def causal(self) -> bool:
        return not self.bidirectional

    @property
    def streams(self) -> bool:
        return not self.bidirectional

    def marks(self) -> dict[str, Mark]:
        c = Mark(group="ssm" if self.c_ssm else "main", float32=True)
        step = Mark(group="main" if self.dt_global else "ssm", weight_decay=False, float32=True)
        outputs = dict.fromkeys(_readouts(self), c)
        return {
            "log_A_real": SSM,
            "A_imag": SSM,
            "B": SSM,
            "log_dt": step,
            "D": Mark(float32=True),
            **outputs,
        }


class System(NamedTuple):
    """A discretised layer: state ``h_t = exp(log_a) h_{t-1} + u_t``, both ``(H, N/2)``.

    ``readouts`` holds one ``c`` a direction, ``(H, N/2)``, the input vector folded in:
    ``y_t = 2 Re sum_n c_n h_tn``.
    """

    log_a: Complex[Array, "h n"]
    readouts: tuple[Complex[Array, "h n"], ...]


class S4D(Mixer[S4DConfig]):
    """``y = K_left * u (+ K_right * u) + D u``, ``K_j = 2 Re sum_n C_n B_n f(λ_n) a_n^j``.

    Parameters: ``log_dt`` ``(H,)``; ``log_A_real``, ``A_imag`` ``(n_ssm, N/2)``; ``B``
    ``(n_ssm, N/2, 2)``; ``C`` ``(H, N/2, 2)``, or ``C1`` and ``C2`` when bidirectional; ``D``
    ``(H,)``. The last axis of 2 holds real and imaginary part. All arithmetic is float32.

    The kernel of `pallas_kernels.diagonal_ssm` for every use: whole rows, packed ones, carried
    states and single tokens.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        segments: Segments | None = None,
        state: RecurrentState | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "b l d"], RecurrentState | None]:
        self.check(x, segments, state)
        u = mask_padding(x.astype(jnp.float32), segments)
        hidden = None if state is None else state.resume(segments)
        y, final = _run(u, self._system(), segments, hidden, streams=self.streams)
        skip = self.param("D", initializers.normal(1.0), (self.width,))
        y = y + jnp.broadcast_to(skip, u.shape) * u  # not skip[None, None], as in S5
        y = mask_padding(y, segments).astype(x.dtype)
        if not self.streams:
            return y, None
        state = self.initial_state(x.shape[0]) if state is None else state
        return y, state.advance(final, segments, x.shape[1])

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Zeros: ``hidden`` is complex64 ``(B, H, N/2)``; the other arguments are unused."""
        self.require_streams("initial_state")
        shape = (batch_size, self.width, self.config.state_size // 2)
        return RecurrentState.start(jnp.zeros(shape, jnp.complex64), batch_size)

    def _system(self) -> System:
        config, states = self.config, self.config.state_size // 2
        copies = self.width if config.n_ssm is None else config.n_ssm
        if self.width % copies:
            raise ValueError(f"s4d mixer: n_ssm={copies} must divide the width {self.width}")
        values, inputs = initial_system(config.init, config.state_size)
        pairs = np.stack([inputs.real, inputs.imag], axis=-1)
        log_real = self.param("log_A_real", constant(np.tile(np.log(-values.real), (copies, 1))))
        imaginary = self.param("A_imag", constant(np.tile(values.imag, (copies, 1))))
        b = self.param("B", constant(np.tile(pairs, (copies, 1, 1))))
        log_dt = self.param("log_dt", log_uniform(config.dt_min, config.dt_max), (self.width,))

        def spread(part: Complex[Array, "copies n"]) -> Complex[Array, "h n"]:
            return jnp.tile(part, (self.width // copies, 1))

        log_a, gain = discretize(
            spread(jax.lax.complex(-jnp.exp(log_real), imaginary)),
            jnp.broadcast_to(jnp.exp(log_dt)[:, None], (self.width, states)),
            config.discretization,
        )
        gain = gain * spread(jax.lax.complex(b[..., 0], b[..., 1]))
        init = initializers.normal(0.5**0.5)
        shape = (self.width, states, 2)
        readouts = [self.param(name, init, shape) for name in _readouts(config)]
        return System(log_a, tuple(gain * jax.lax.complex(c[..., 0], c[..., 1]) for c in readouts))


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


def _readouts(config: S4DConfig) -> tuple[str, ...]:
    return ("C1", "C2") if config.bidirectional else ("C",)


def _run(
    u: Float[Array, "b l h"],
    system: System,
    segments: Segments | None,
    hidden: Complex[Array, "b h n"] | None,
    *,
    streams: bool,
) -> tuple[Float[Array, "b l h"], Complex[Array, "b h n"]]:
    """The layer and the state after each row's last real token; ``u`` is zero on padding."""
    # One document a row and zeros behind it: nothing to stop, unless the final state is wanted.
    runs = None
    if segments is not None and (streams or not segments.single):
        runs = segments.runs

    def model(c: Complex[Array, "h n"], hidden: Any, *, reverse: bool) -> tuple[Any, Any]:
        def op(log_a: Any, c: Any, u: Any, hidden: Any, runs: Any) -> tuple[Array, Array]:
            return diagonal_ssm(
                u, log_a, c, initial_state=hidden, segment_ids=runs, reverse=reverse
            )

        return over_rows(op, [system.log_a, c], [u, hidden, runs])

    y, final = model(system.readouts[0], hidden, reverse=False)
    if len(system.readouts) == 2:
        y = y + _next_token(model(system.readouts[1], None, reverse=True)[0], segments)
    return y, final


def _next_token(y: Float[Array, "b l h"], segments: Segments | None) -> Float[Array, "b l h"]:
    """``y_{t+1}`` at t; zero where t + 1 is another document or past the end."""
    y = jnp.pad(y[:, 1:], ((0, 0), (0, 1), (0, 0)))
    if segments is None:
        return y
    following = jnp.pad(segments.runs[:, 1:], ((0, 0), (0, 1)))
    return jnp.where((following == segments.runs)[..., None], y, jnp.zeros_like(y))
