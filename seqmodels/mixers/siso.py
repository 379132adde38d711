"""What S4 and S4D share: one single-input single-output model for each channel, its parameters."""

import dataclasses
from typing import Any, Generic, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Complex, Float

from seqmodels.mixers.base import (
    SSM_LABEL,
    Mixer,
    MixerConfig,
    ParamLabel,
    RecurrentState,
    Segments,
    mask_padding,
)
from seqmodels.mixers.ssm import check_step_range, constant, log_uniform
from seqmodels.ranges import Positive, Size


@dataclasses.dataclass(frozen=True)
class SISOConfig(MixerConfig):
    """Configuration of a layer with a state-space model for each channel.

    Attributes:
      state_size: real state size of each channel; half as many complex states are kept.
      dt_min, dt_max: range of the log-uniform initial step sizes, one for each channel.
      n_ssm: independent copies of the continuous system (its output excepted), a divisor of the
        width; channel h uses copy ``h % n_ssm``. None is one for each channel.
      bidirectional: adds a kernel from the right with its own C. It acts on the tokens *after* the
        current one, which only the kernel from the left sees.
      dt_global: trains the step sizes at the main rate instead of the ssm rate.
      c_ssm: trains C at the ssm rate instead of the main rate.
    """

    state_size: Size = 64
    dt_min: Positive = 1e-3
    dt_max: Positive = 1e-1
    n_ssm: Size | None = None
    bidirectional: bool = False
    dt_global: bool = False
    c_ssm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.state_size % 2:
            raise ValueError(
                f"{name}: state_size={self.state_size} must be an even number >= 2: states come "
                "in conjugate pairs"
            )
        check_step_range(name, self.dt_min, self.dt_max)

    @property
    def causal(self) -> bool:
        return not self.bidirectional

    @property
    def stateful(self) -> bool:
        return not self.bidirectional

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the output vectors C, one a direction."""
        return ("C1", "C2") if self.bidirectional else ("C",)

    def param_labels(self) -> dict[str, ParamLabel]:
        c = ParamLabel(group="ssm" if self.c_ssm else "main", float32=True)
        step = dataclasses.replace(SSM_LABEL, group="main" if self.dt_global else "ssm")
        outputs = dict.fromkeys(self.outputs, c)
        system = dict.fromkeys(("log_A_real", "A_imag", "B"), SSM_LABEL)
        return {**system, "log_dt": step, "D": ParamLabel(float32=True), **outputs}

    def param_axes(self) -> dict[str, PartitionSpec]:
        names = ("log_A_real", "A_imag", "B", *self.outputs)
        return dict.fromkeys(names, PartitionSpec("inner"))  # every channel has its own system


Config = TypeVar("Config", bound=SISOConfig)


class SISOMixer(Mixer[Config], Generic[Config]):
    """``y = mix(u) + D u`` in float32, where a subclass says what ``mix`` is.

    Parameters: ``log_dt`` ``(H,)``; ``log_A_real``, ``A_imag`` ``(n_ssm, N/2)``; ``B``
    ``(n_ssm, N/2, 2)``; ``C`` ``(H, N/2, 2)``, or ``C1`` and ``C2`` when bidirectional; ``D``
    ``(H,)``. The last axis of 2 holds real and imaginary part.
    """

    def mix(
        self,
        u: Float[Array, "b l h"],
        segments: Segments | None,
        initial_state: Complex[Array, "b h n"] | None,
    ) -> tuple[Float[Array, "b l h"], Complex[Array, "b h n"] | None]:
        """Outputs, and the state after the last real token if the mixer is stateful.

        ``u`` is zero on padding, where outputs are unspecified.
        """
        raise NotImplementedError

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
        entering = None if state is None else state.reset_at_document_start(segments)
        y, final = self.mix(u, segments, entering)
        skip = self.param("D", initializers.normal(1.0), (self.width,), jnp.float32)
        y = y + jnp.broadcast_to(skip, u.shape) * u  # not skip[None, None], as in S5
        y = mask_padding(y, segments).astype(x.dtype)
        if not self.stateful:
            return y, None
        state = self.initial_state(x.shape[0]) if state is None else state
        return y, state.update(final, segments, x.shape[1])

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Zeros: ``state`` is complex64 ``(B, H, N/2)``; the other arguments are unused."""
        self.require_stateful("initial_state")
        shape = (batch_size, self.width, self.config.state_size // 2)
        return RecurrentState.start(jnp.zeros(shape, jnp.complex64), batch_size)

    def eigenvalues(self, values: np.ndarray) -> Complex[Array, "h n"]:
        """``-exp(log_A_real) + i A_imag``, initially ``values (N/2,)``, for each channel."""
        log_real = self._copied("log_A_real", np.log(-values.real))
        return jax.lax.complex(-jnp.exp(log_real), self._copied("A_imag", values.imag))

    def vector(self, name: str, values: np.ndarray) -> Complex[Array, "h n"]:
        """The complex parameter ``name``, initially ``values (N/2,)``, for each channel."""
        pairs = self._copied(name, np.stack([values.real, values.imag], axis=-1))
        return jax.lax.complex(pairs[..., 0], pairs[..., 1])

    def _copied(self, name: str, values: np.ndarray) -> Float[Array, "h *p"]:
        copies = self.width if self.config.n_ssm is None else self.config.n_ssm
        if self.width % copies:
            raise ValueError(
                f"{self.config.mixer} mixer: n_ssm={copies} must divide the width {self.width}"
            )
        parameter = self.param(name, constant(np.tile(values, (copies, *(1,) * values.ndim))))
        return jnp.tile(parameter, (self.width // copies, *(1,) * values.ndim))

    def steps(self) -> Float[Array, " h"]:
        """Step sizes."""
        init = log_uniform(self.config.dt_min, self.config.dt_max)
        return jnp.exp(self.param("log_dt", init, (self.width,)))

    def output_vectors(self) -> tuple[Complex[Array, "h n"], ...]:
        """C, one a direction; complex normal of variance 1."""
        shape = (self.width, self.config.state_size // 2, 2)
        init = initializers.normal(0.5**0.5)
        pairs = [self.param(name, init, shape, jnp.float32) for name in self.config.outputs]
        return tuple(jax.lax.complex(c[..., 0], c[..., 1]) for c in pairs)
