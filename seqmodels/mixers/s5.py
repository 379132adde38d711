"""S5: one multi-input multi-output diagonal state-space model per layer.

Smith, Warrington & Linderman, "Simplified State Space Layers for Sequence Modeling", ICLR 2023.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Complex, Float

from seqmodels import ops
from seqmodels.mixers import hippo
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
from seqmodels.mixers.ssm import Discretization, check_step_range, constant, discretize, log_uniform
from seqmodels.ranges import Positive, Size

CInit = Literal["lecun_normal", "trunc_standard_normal", "complex_normal"]
Decay = Literal["standard", "BandCdecay", "BfastandCdecay", "noBCdecay"]

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class S5Config(MixerConfig):
    """Configuration of an S5 layer.

    Attributes:
      state_size: real state size; ``state_size / 2`` complex states are kept, one of each
        conjugate pair.
      blocks: HiPPO blocks that initialise the state matrix; ``state_size / blocks`` must be even.
      c_init: initialisation of C. "lecun_normal" counts the output channels in its fan, as the
        authors' code does, so it is smaller by sqrt(width) than "trunc_standard_normal".
      discretization: zero-order hold or bilinear.
      dt_min, dt_max: range of the log-uniform initial step sizes, one for each state.
      bidirectional: adds a scan from the right with its own C; the current token is in both.
      clip_eigs: keeps the real part of the eigenvalues at or below -1e-4.
      dt_global: puts the step sizes into the main optimizer group, with weight decay.
      decay: which group B and C belong to: "standard" B ssm, C main; "BandCdecay" B ssm rate with
        weight decay, C main; "BfastandCdecay" both main; "noBCdecay" B, C and D ssm.
      step_rescale: multiplies all step sizes, to apply a model at another sampling rate.
    """

    mixer: ClassVar[str] = "s5"

    state_size: Size = 64
    blocks: Size = 1
    c_init: CInit = "lecun_normal"
    discretization: Discretization = "zoh"
    dt_min: Positive = 1e-3
    dt_max: Positive = 1e-1
    bidirectional: bool = False
    clip_eigs: bool = False
    dt_global: bool = False
    decay: Decay = "standard"
    step_rescale: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.state_size % (2 * self.blocks):
            raise ValueError(
                f"S5Config: state_size={self.state_size} must be a positive multiple of "
                f"2 * blocks = {2 * self.blocks}"
            )
        check_step_range("S5Config", self.dt_min, self.dt_max)

    @property
    def causal(self) -> bool:
        return not self.bidirectional

    @property
    def stateful(self) -> bool:
        return not self.bidirectional

    def param_labels(self) -> dict[str, ParamLabel]:
        main = ParamLabel(float32=True)
        b = {
            "standard": SSM_LABEL,
            "noBCdecay": SSM_LABEL,
            "BandCdecay": dataclasses.replace(SSM_LABEL, weight_decay=True),
            "BfastandCdecay": main,
        }[self.decay]
        c = SSM_LABEL if self.decay == "noBCdecay" else main
        step = main if self.dt_global else SSM_LABEL
        outputs = dict.fromkeys(_outputs(self), c)
        return {
            "Lambda_re": SSM_LABEL,
            "Lambda_im": SSM_LABEL,
            "log_step": step,
            "B": b,
            "D": c,
            **outputs,
        }

    def param_axes(self) -> dict[str, PartitionSpec]:
        return {
            "B": PartitionSpec("inner", "embed"),
            **dict.fromkeys(_outputs(self), PartitionSpec("embed", "inner")),
        }


class S5(Mixer[S5Config]):
    """``h_t = Λ̄ h_{t-1} + B̄ u_t``, ``y_t = 2 Re(C h_t) + D u_t``, P = state_size / 2 states.

    Parameters: ``Lambda_re``, ``Lambda_im``, ``log_step`` ``(P,)``; ``B`` ``(P, H, 2)``; ``C``
    ``(H, P, 2)``, or ``C1`` and ``C2`` (from the left, from the right) when bidirectional; ``D``
    ``(H,)``. The last axis of 2 holds real and imaginary part. All arithmetic is float32.
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
        decay, into = self._system()
        into = jnp.concatenate([into.real, into.imag]).T
        final = None
        if self.config.bidirectional:
            y = ops.bidirectional_mimo_scan(
                u, decay, into, self._output_projection(), segments=segments
            )
        else:
            entering = None if state is None else state.reset_at_document_start(segments)
            y, final = mimo_scan(u, decay, into, self._output_projection(), segments, entering)
        skip = self.param("D", initializers.normal(1.0), (self.width,), jnp.float32)
        # Not skip[None, None]: of that, XLA sums the gradient of a single row 20 times slower.
        y = y + jnp.broadcast_to(skip, u.shape) * u
        y = mask_padding(y, segments).astype(x.dtype)
        return y, None if state is None else state.update(final, segments, x.shape[1])

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Zeros: ``state`` is complex64 ``(B, P)``; ``dtype`` and ``max_length`` are unused."""
        self.require_stateful("initial_state")
        zeros = jnp.zeros((batch_size, self.config.state_size // 2), jnp.complex64)
        return RecurrentState.start(zeros, batch_size)

    def _system(self) -> tuple[Complex[Array, " p"], Complex[Array, "p h"]]:
        """Discretised state matrix and input matrix."""
        config, states = self.config, self.config.state_size // 2
        values, vectors = hippo.blocked_eigen(config.state_size, config.blocks)
        real = self.param("Lambda_re", constant(values.real))
        imaginary = self.param("Lambda_im", constant(values.imag))
        b = self.param("B", _b_init(vectors), (config.state_size, self.width))
        log_step = self.param("log_step", log_uniform(config.dt_min, config.dt_max), (states,))
        if config.clip_eigs:
            real = jnp.minimum(real, -1e-4)
        log_decay, gain = discretize(
            jax.lax.complex(real, imaginary),
            config.step_rescale * jnp.exp(log_step),
            config.discretization,
        )
        return jnp.exp(log_decay), gain[:, None] * jax.lax.complex(b[..., 0], b[..., 1])

    def _output_projection(self) -> Float[Array, "planes h"]:
        """C of all directions, laid out for the planes [re, im] of each direction's states."""
        _, vectors = hippo.blocked_eigen(self.config.state_size, self.config.blocks)
        init, rows = _c_init(self.config.c_init, vectors), []
        for name in _outputs(self.config):
            c = self.param(name, init, (self.width, self.config.state_size))
            rows += [2.0 * c[..., 0].T, -2.0 * c[..., 1].T]
        return jnp.concatenate(rows)


def _outputs(config: S5Config) -> tuple[str, ...]:
    return ("C1", "C2") if config.bidirectional else ("C",)


def _b_init(vectors: np.ndarray) -> Any:
    """``V* B`` of a real Lecun-normal ``B (state_size, H)`` -> ``(P, H, 2)``."""

    def init(key: Array, shape: tuple[int, int]) -> Float[Array, "p h 2"]:
        b = initializers.lecun_normal()(key, shape, jnp.float32)
        adjoint = vectors.conj().T
        parts = [jnp.asarray(part, jnp.float32) for part in (adjoint.real, adjoint.imag)]
        return jnp.stack([jnp.dot(part, b, precision=_HIGHEST) for part in parts], axis=-1)

    return init


def _c_init(kind: CInit, vectors: np.ndarray) -> Any:
    """``C V`` of a random complex ``C (H, state_size)``, or a direct draw -> ``(H, P, 2)``."""

    def init(key: Array, shape: tuple[int, int]) -> Float[Array, "h p 2"]:
        width, size = shape
        if kind == "complex_normal":
            return 0.5**0.5 * jax.random.normal(key, (width, size // 2, 2), jnp.float32)
        lecun = initializers.lecun_normal()
        if kind == "lecun_normal":
            c = lecun(key, (width, size, 2), jnp.float32)
        else:
            keys = jax.random.split(key, width)
            c = jax.vmap(lambda k: lecun(k, (1, size, 2), jnp.float32)[0])(keys)
        c_re, c_im = c[..., 0], c[..., 1]
        v_re, v_im = (jnp.asarray(part, jnp.float32) for part in (vectors.real, vectors.imag))

        def dot(left: Array, right: Array) -> Array:
            return jnp.dot(left, right, precision=_HIGHEST)

        real = dot(c_re, v_re) - dot(c_im, v_im)
        return jnp.stack([real, dot(c_re, v_im) + dot(c_im, v_re)], axis=-1)

    return init
