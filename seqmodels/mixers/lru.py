"""LRU: the linear recurrent unit, a complex diagonal recurrence with a stable parameterisation.

Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu & De, "Resurrecting Recurrent Neural Networks for
Long Sequences", ICML 2023, section 3 and appendix A.
"""

import dataclasses
import math
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Complex, Float

from seqmodels import ops
from seqmodels.mixers.base import (
    SSM_LABEL,
    Mixer,
    MixerConfig,
    ParamLabel,
    RecurrentState,
    Segments,
    mask_padding,
)
from seqmodels.mixers.mimo_scan import mimo_scan
from seqmodels.mixers.published import Published
from seqmodels.ranges import Portion, Range, Share, Size


@dataclasses.dataclass(frozen=True)
class LRUConfig(MixerConfig):
    """Configuration of an LRU layer.

    Attributes:
      state_size: N, complex states; no conjugate pairs are implied.
      r_min, r_max: the initial eigenvalues are uniform on the ring between these radii.
      max_phase: and on the sector of phases from 0 to this.
      bidirectional: adds a recurrence from the right with columns of C of its own; the current
        token is in both.
    """

    mixer: ClassVar[str] = "lru"

    state_size: Size = 256
    r_min: Share = 0.0
    r_max: Portion = 1.0
    max_phase: Annotated[float, Range("in (0, 2 pi]", 0, 2 * math.pi, above=True)] = 2 * math.pi
    bidirectional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.r_min < self.r_max:
            raise ValueError(
                f"LRUConfig: need 0 <= r_min < r_max <= 1, got r_min={self.r_min} and "
                f"r_max={self.r_max}"
            )

    @property
    def causal(self) -> bool:
        return not self.bidirectional

    @property
    def stateful(self) -> bool:
        return not self.bidirectional

    def param_labels(self) -> dict[str, ParamLabel]:
        system = dict.fromkeys(("nu_log", "theta_log", "gamma_log", "B_re", "B_im"), SSM_LABEL)
        return system | dict.fromkeys(("C_re", "C_im", "D"), ParamLabel(float32=True))

    def param_axes(self) -> dict[str, PartitionSpec]:
        inputs = dict.fromkeys(("B_re", "B_im"), PartitionSpec("inner", "embed"))
        return inputs | dict.fromkeys(("C_re", "C_im"), PartitionSpec("embed", "inner"))


LRU_LRA = {
    "cifar": Published(512, 6, LRUConfig(384, 0.9, 0.999, bidirectional=True)),
    "listops": Published(128, 6, LRUConfig(256, 0.0, 0.99, bidirectional=True)),
    "imdb": Published(256, 6, LRUConfig(192, 0.0, 0.9, bidirectional=True)),
    "aan": Published(128, 6, LRUConfig(256, 0.5, 0.9, bidirectional=True)),
    "pathfinder": Published(192, 6, LRUConfig(256, 0.9, 0.999, bidirectional=True)),
    "pathx": Published(128, 6, LRUConfig(256, 0.999, 0.9999, math.pi / 10, bidirectional=True)),
}
"""The layers of the paper's Long Range Arena models, by task (its appendix on hyperparameters)."""


class LRU(Mixer[LRUConfig]):
    """``h_t = λ h_{t-1} + γ (B u_t)``, ``y_t = Re(C h_t) + D u_t``, ``λ = exp(-e^ν + i e^θ)``.

    Parameters: ``nu_log``, ``theta_log``, ``gamma_log`` ``(N,)``; ``B_re``, ``B_im`` ``(N, H)``;
    ``C_re``, ``C_im`` ``(H, N)``, or ``(H, 2 N)`` when bidirectional, the columns of the states
    from the left first; ``D`` ``(H,)``. γ starts as ``sqrt(1 - |λ|^2)`` and is trained. All
    arithmetic is float32.
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
        if state is None and self.stateful:
            state = self.initial_state(x.shape[0])
        u = x.astype(jnp.float32)
        decay, input_projection = self._system()
        output_projection, final = self._output_projection(), None
        if state is None:
            y = ops.bidirectional_mimo_scan(
                u, decay, input_projection, output_projection, segments=segments
            )
        else:
            entering = state.reset_at_document_start(segments)
            y, final = mimo_scan(u, decay, input_projection, output_projection, segments, entering)
        skip = self.param("D", initializers.normal(1.0), (self.width,), jnp.float32)
        y = y + jnp.broadcast_to(skip, u.shape) * u  # not skip[None, None], as in S5
        y = mask_padding(y, segments).astype(x.dtype)
        return y, None if state is None else state.update(final, segments, x.shape[1])

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Zeros: ``state`` is complex64 ``(B, N)``; ``dtype`` and ``max_length`` are unused."""
        self.require_stateful("initial_state")
        zeros = jnp.zeros((batch_size, self.config.state_size), jnp.complex64)
        return RecurrentState.start(zeros, batch_size)

    def _system(self) -> tuple[Complex[Array, " n"], Float[Array, "h 2*n"]]:
        """λ, and ``γ B`` transposed, as planes ``[re, im]``."""
        config, shape = self.config, (self.config.state_size,)
        nu_log = self.param("nu_log", _nu_log(config.r_min, config.r_max), shape)
        theta_log = self.param("theta_log", _theta_log(config.max_phase), shape)
        gamma_log = self.param("gamma_log", lambda key: _gamma_log(nu_log))
        init = initializers.normal((2 * self.width) ** -0.5)
        inputs = (*shape, self.width)
        b = [self.param(name, init, inputs, jnp.float32) for name in ("B_re", "B_im")]
        decay = jnp.exp(jax.lax.complex(-jnp.exp(nu_log), jnp.exp(theta_log)))
        gain = jnp.tile(jnp.exp(gamma_log), 2)
        return decay, jnp.concatenate(b).T * jnp.broadcast_to(gain, (self.width, gain.size))

    def _output_projection(self) -> Float[Array, "planes h"]:
        """C laid out for the planes [re, im] of each direction's states."""
        states, directions = self.config.state_size, 2 if self.config.bidirectional else 1
        init = initializers.normal(states**-0.5)
        shape = (self.width, directions * states)
        parts = (self.param(name, init, shape, jnp.float32) for name in ("C_re", "C_im"))
        real, imaginary = (part.T for part in parts)
        pieces = zip(jnp.split(real, directions), jnp.split(imaginary, directions), strict=True)
        return jnp.concatenate([plane for re, im in pieces for plane in (re, -im)])


def _nu_log(r_min: float, r_max: float) -> Any:
    """Initialiser: radii ``exp(-e^ν)`` uniform, by area, on the ring from r_min to r_max."""

    def init(key: Array, shape: tuple[int, ...]) -> Array:
        square = _positive_uniform(key, shape) * (r_max**2 - r_min**2) + r_min**2
        return jnp.log(-0.5 * jnp.log(square))

    return init


def _theta_log(max_phase: float) -> Any:
    def init(key: Array, shape: tuple[int, ...]) -> Array:
        return jnp.log(max_phase * _positive_uniform(key, shape))

    return init


def _positive_uniform(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, jnp.float32, minval=jnp.finfo(jnp.float32).tiny)


def _gamma_log(nu_log: Float[Array, " n"]) -> Float[Array, " n"]:
    """``ln sqrt(1 - |λ|^2)``."""
    return 0.5 * jnp.log(-jnp.expm1(-2.0 * jnp.exp(nu_log)))
