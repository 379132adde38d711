"""Mamba-3: a trapezoidal rule, keys and queries that turn, several inputs and outputs a head.

Lahoti et al., "Mamba-3: Improved Sequence Modeling using State Space Principles", 2026
(arXiv:2603.15569), with the parametrisation of the published code.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqmodels import ops
from seqmodels.layers.heads import GatedNorm, merge_heads, split_heads, step_bias
from seqmodels.layers.projections import dense
from seqmodels.mixers.base import (
    NO_DECAY_LABEL,
    Implementation,
    Mixer,
    MixerConfig,
    ParamLabel,
    RecurrentState,
    Segments,
    last_token,
    mask_padding,
)
from seqmodels.mixers.mamba2 import GatedGroupNorm
from seqmodels.mixers.ssm import check_step_range
from seqmodels.ranges import Portion, Positive, Size

_LEAST_RATE = 1e-4
"""Every head forgets a little."""


@dataclasses.dataclass(frozen=True)
class Mamba3Config(MixerConfig):
    """Configuration of a Mamba-3 layer over E channels, in heads of ``head_size``.

    Attributes:
      state_size: N.
      expand: E as a multiple of the width.
      head_size: P.
      groups: G, sets of B and C; each serves as many heads.
      rank: R, inputs and outputs of a head; 1 for a single one.
      rotary_fraction: share of the N state channels that turn.
      dt_min, dt_max: range of the log-uniform initial step sizes, one for each head.
      norm: RMS norm of each head's outputs before the gate; for a rank of 1.
      norm_epsilon: added to the mean square in the norms.
      implementation: of the kernel, see ``pallas_kernels.common.dispatch``; None for the fastest,
        "reference" for forward mode and second derivatives.
    """

    mixer: ClassVar[str] = "mamba3"

    state_size: Size = 128
    expand: Size = 2
    head_size: Size = 64
    groups: Size = 1
    rank: Size = 1
    rotary_fraction: Portion = 0.5
    dt_min: Positive = 1e-3
    dt_max: Positive = 1e-1
    norm: bool = False
    norm_epsilon: Positive = 1e-5
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_step_range(type(self).__name__, self.dt_min, self.dt_max)
        if not self.angles:
            raise ValueError(
                f"Mamba3Config: rotary_fraction={self.rotary_fraction} of state_size="
                f"{self.state_size} channels leaves no pair to turn; choose a larger one"
            )
        if self.norm and self.rank > 1:
            raise ValueError(f"Mamba3Config: norm=True needs rank=1, not {self.rank}")

    def param_labels(self) -> dict[str, ParamLabel]:
        return dict.fromkeys(("D", "dt_bias", "B_bias", "C_bias"), NO_DECAY_LABEL)

    def param_axes(self) -> dict[str, PartitionSpec]:
        names = ("B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")
        return dict.fromkeys(names, PartitionSpec("inner"))

    @property
    def angles(self) -> int:
        """S, pairs of state channels that turn."""
        return int(self.state_size * self.rotary_fraction) // 2

    def heads(self, width: int) -> int:
        """H; ValueError unless the heads divide the channels and the groups the heads."""
        heads, rest = divmod(self.expand * width, self.head_size)
        if rest or heads % self.groups:
            raise ValueError(
                f"mamba3 mixer: head_size={self.head_size} must divide expand * width = "
                f"{self.expand * width}, and groups={self.groups} the heads, {heads}"
            )
        return heads


class Steps(NamedTuple):
    """What the rule does at each token, float32 ``(B, L, H)``.

    Attributes:
      log_decay: ``A_t Δ_t``.
      now: ``λ_t Δ_t``, the weight of the token's own write.
      before: ``(1 - λ_t) Δ_t``, that of the write of the token before it, which then decays.
    """

    log_decay: Float[Array, "b l h"]
    now: Float[Array, "b l h"]
    before: Float[Array, "b l h"]


class Mamba3(Mixer[Mamba3Config]):
    """``S_t = α_t S_{t-1} + (1 - λ_t) Δ_t α_t k_{t-1} v_{t-1}^T + λ_t Δ_t k_t v_t^T``.

    ``[z, x, B, C, dt, a, trap, angle] = in_proj(u)``; ``Δ = softplus(dt + dt_bias)``,
    ``λ = sigmoid(trap)``, ``α = exp(A Δ)`` with ``A = -max(f(a), 1e-4)``, ``f(a) = 1 + a`` above 0
    and ``1 / (1 - a)`` below. Keys and queries are B and C, normed, plus a bias for each head, with
    pairs of channels turned by ``φ_t = φ_{t-1} + π tanh(angle_t) Δ_t``, which is a state matrix
    with complex eigenvalues. ``y_t = S_t^T q_t + D x_t``; the output is ``out_proj(y * silu(z))``.

    With a rank R above 1 a head has R keys and queries a token, values ``x * mimo_x`` and outputs
    ``sum_r y_r silu(z * mimo_z) * mimo_o``: a state of the same size, R times the products.

    One call of linear attention: a key is written once, with its own weight and with that which the
    next token gives it; what a token must not see of that yet is taken off on the diagonal.

    Parameters: ``in_proj``, ``out_proj``, ``B_norm/scale``, ``C_norm/scale`` ``(N,)``, ``B_bias``,
    ``C_bias`` ``(H, R, N)``, ``dt_bias``, ``D`` ``(H,)``, ``norm/scale`` ``(E,)``, and with R above
    1 ``mimo_x``, ``mimo_z``, ``mimo_o`` ``(H, R, P)``. Steps, decays, angles, states are float32.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        segments: Segments | None = None,
        state: RecurrentState | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "b l d"], RecurrentState]:
        state, entering = self.enter(x, segments, state)
        config = self.config
        heads = config.heads(self.width)
        inner, shared = heads * config.head_size, config.groups * config.rank * config.state_size
        sizes = (inner, inner, shared, shared, heads, heads, heads, config.angles)
        parts = dense(x, sum(sizes), "in_proj")
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
        gate, values, b, c, dt, rate, trap, angle = jnp.split(parts, ends, axis=-1)

        x = split_heads(values, config.head_size)
        step = self._step(dt)
        phase, last_phase = self._phase(angle, step, entering["phase"], segments)
        k, q = (
            turned(self._keys(part, name), phase).astype(parts.dtype)
            for part, name in ((b, "B"), (c, "C"))
        )
        y, final_state = self._recur(q, k, x, trapezoid(step, rate, trap), entering, segments)
        y = self._output(y, split_heads(gate, config.head_size), parts.dtype)
        after = {
            "recurrent_state": final_state,
            "phase": last_phase,
            "key": last_token(k, entering["key"], segments),
            "value": last_token(x, entering["value"], segments),
        }
        return mask_padding(y, segments), state.update(after, segments, x.shape[1])

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Zeros: ``state`` is a dict, ``"recurrent_state"`` ``(B, H, N, P)`` and ``"phase"``
        ``(B, H, S)``, radians, in float32; of the last token ``"key"`` ``(B, R, H, N)`` and
        ``"value"`` ``(B, H, P)`` in ``dtype``."""
        config, heads = self.config, self.config.heads(self.width)
        shapes = {
            "recurrent_state": (heads, config.state_size, config.head_size),
            "phase": (heads, config.angles),
            "key": (config.rank, heads, config.state_size),
            "value": (heads, config.head_size),
        }
        dtypes = dict.fromkeys(("key", "value"), dtype)
        start = {
            name: jnp.zeros((batch_size, *shape), dtypes.get(name, jnp.float32))
            for name, shape in shapes.items()
        }
        return RecurrentState.start(start, batch_size)

    def _step(self, dt: Float[Array, "b l h"]) -> Float[Array, "b l h"]:
        bias = self.param(
            "dt_bias", step_bias(self.config.dt_min, self.config.dt_max), dt.shape[-1:]
        )
        wide = dt.astype(jnp.float32)
        return jax.nn.softplus(wide + jnp.broadcast_to(bias, wide.shape))

    def _phase(
        self,
        angle: Float[Array, "b l s"],
        step: Float[Array, "b l h"],
        entering: Float[Array, "b h s"],
        segments: Segments | None,
    ) -> tuple[Float[Array, "b l h s"], Float[Array, "b h s"]]:
        """``φ_t``, and the last one within half a turn of 0."""
        rate = jnp.pi * jnp.tanh(angle.astype(jnp.float32))
        turns = step[..., None] * rate[:, :, None]
        flat = turns.reshape(*turns.shape[:2], -1)
        phase, last = ops.linear_scan(
            jnp.ones(flat.shape[-1], jnp.float32),
            flat,
            initial_state=entering.reshape(entering.shape[0], -1),
            segments=segments,
        )
        last = last - 2 * jnp.pi * jax.lax.stop_gradient(jnp.round(last / (2 * jnp.pi)))
        return phase.reshape(turns.shape), last.reshape(entering.shape)

    def _keys(self, x: Float[Array, "b l rn"], name: str) -> Float[Array, "b l r h n"]:
        """B or C of each head: normed, and a bias."""
        config, heads = self.config, self.config.heads(self.width)
        x = x.reshape(*x.shape[:2], config.groups, config.rank, config.state_size)
        x = GatedNorm(config.norm_epsilon, name=f"{name}_norm")(x.astype(jnp.float32))
        x = jnp.repeat(jnp.swapaxes(x, 2, 3), heads // config.groups, axis=3)
        shape = (heads, config.rank, config.state_size)
        bias = self.param(f"{name}_bias", nn.initializers.ones, shape, jnp.float32)
        return x + jnp.swapaxes(bias, 0, 1)[None, None]

    def _recur(
        self,
        q: Float[Array, "b l r h n"],
        k: Float[Array, "b l r h n"],
        x: Float[Array, "b l h p"],
        rule: Steps,
        entering: dict[str, Array],
        segments: Segments | None,
    ) -> tuple[Float[Array, "b l r h p"], Float[Array, "b h n p"]]:
        """Outputs in float32, and the state after the last real token: nothing of the next one."""
        scales = self._mimo("mimo_x", 1 / self.config.rank, x.shape[2])
        v, last = (of_rank(part, scales) for part in (x, entering["value"][:, None]))
        later = of_next(rule.before, segments)
        weight = rule.now + later
        start = entering["recurrent_state"] + jnp.einsum(
            "bh,brhn,brhp->bhnp",
            mask_padding(rule.before, segments)[:, 0],
            entering["key"].astype(jnp.float32),
            last[:, 0].astype(jnp.float32),
            precision="highest",
        )
        o, final_state = linear_attention_of_rank(
            q, k, v, weight, rule.log_decay, start, segments, self.config.implementation
        )
        einsum = functools.partial(jnp.einsum, precision="highest")
        scores = einsum("blrhn,blshn->blrsh", *(part.astype(jnp.float32) for part in (q, k)))
        # What is seen of the token's own writes, and what is to be.
        order = jnp.tril(jnp.ones((self.config.rank,) * 2, jnp.float32))[None, None, :, :, None]
        excess = order * weight[:, :, None, None] - rule.now[:, :, None, None]
        wide = v.astype(jnp.float32)
        y = o.astype(jnp.float32) - einsum("blrsh,blshp->blrhp", scores * excess, wide)
        skip = self.param("D", nn.initializers.ones, x.shape[2:3], jnp.float32)
        return y + skip[None, None, None, :, None] * wide, final_state

    def _mimo(self, name: str, start: float, heads: int) -> Float[Array, "r h p"] | None:
        """A factor for each of R; None where there is one."""
        config = self.config
        if config.rank == 1:
            return None
        shape = (heads, config.rank, config.head_size)
        scales = self.param(name, nn.initializers.constant(start), shape, jnp.float32)
        return jnp.swapaxes(scales, 0, 1)

    def _output(
        self, y: Float[Array, "b l r h p"], gate: Float[Array, "b l h p"], dtype: Any
    ) -> Float[Array, "b l d"]:
        """The gate, and the projection of the sum over R."""
        config, heads = self.config, y.shape[3]
        if config.norm:
            norm = GatedGroupNorm(heads, config.norm_epsilon, before_gate=True, name="norm")
            inner = norm(merge_heads(y[:, :, 0]), merge_heads(gate))
        else:
            gates = of_rank(gate, self._mimo("mimo_z", 1.0, heads))
            y = y * jax.nn.silu(gates.astype(jnp.float32))
            y = of_rank(y, self._mimo("mimo_o", 1 / config.rank, heads))
            inner = merge_heads(jnp.sum(y, axis=2))
        return dense(inner.astype(dtype), self.width, "out_proj")


def of_rank(x: Array, scales: Float[Array, "r h p"] | None) -> Float[Array, "b l r h p"]:
    """``x (B, L, H, P)`` or ``(B, L, R, H, P)`` times each of ``scales``; None is a single 1."""
    x = x if x.ndim == 5 else x[:, :, None]
    return x if scales is None else x * scales[None, None].astype(x.dtype)


def trapezoid(
    step: Float[Array, "b l h"], rate: Float[Array, "b l h"], trap: Float[Array, "b l h"]
) -> Steps:
    """The rule of each token from its step size Δ and the logits of A and λ."""
    rate = rate.astype(jnp.float32)
    grows = 1 + jnp.maximum(rate, 0)
    decay = jnp.where(rate >= 0, grows, 1 / (1 - jnp.minimum(rate, 0)))
    share = jax.nn.sigmoid(trap.astype(jnp.float32))
    return Steps(-jnp.maximum(decay, _LEAST_RATE) * step, share * step, (1 - share) * step)


def turned(x: Float[Array, "b l r h n"], phase: Float[Array, "b l h s"]) -> Float[Array, "..."]:
    """``x`` whose channels 2 i and 2 i + 1 are turned by angle i; those behind stay."""
    angles = phase.shape[-1]
    pairs = x[..., : 2 * angles].reshape(*x.shape[:-1], angles, 2)
    cosine, sine = jnp.cos(phase)[:, :, None], jnp.sin(phase)[:, :, None]
    first, second = pairs[..., 0], pairs[..., 1]
    both = jnp.stack([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    both = both.reshape(*x.shape[:-1], 2 * angles)
    return jnp.concatenate([both, x[..., 2 * angles :]], axis=-1)


def of_next(x: Float[Array, "b l h"], segments: Segments | None) -> Float[Array, "b l h"]:
    """``x`` of the next token of the same document; 0 at its end."""
    after = jnp.pad(x[:, 1:], ((0, 0), (0, 1), (0, 0)))
    if segments is None:
        return after
    same = jnp.pad(segments.index[:, 1:] == segments.index[:, :-1], ((0, 0), (0, 1)))
    return jnp.where((same & segments.mask)[..., None], after, jnp.zeros_like(after))


def linear_attention_of_rank(
    q: Float[Array, "b l r h n"],
    k: Float[Array, "b l r h n"],
    v: Float[Array, "b l r h p"],
    weight: Float[Array, "b l h"],
    log_decay: Float[Array, "b l h"],
    initial_state: Float[Array, "b h n p"],
    segments: Segments | None,
    implementation: Implementation | None,
) -> tuple[Float[Array, "b l r h p"], Float[Array, "b h n p"]]:
    """``S_t = α_t S_{t-1} + w_t sum_r k_r v_r^T``; output r sees the writes up to its own.

    Writes of one token follow each other without a decay: a row R times as long.
    """
    rank = q.shape[2]
    k = (k.astype(jnp.float32) * weight[:, :, None, :, None]).astype(k.dtype)
    decay = jnp.pad(log_decay[:, :, None], ((0, 0), (0, 0), (0, rank - 1), (0, 0)))
    rows = [part.reshape(part.shape[0], -1, *part.shape[3:]) for part in (q, k, v, decay)]
    if segments is not None and rank > 1:
        segments = repeated(segments, rank)
    o, final_state = ops.linear_attention(
        *rows,
        scale=1.0,
        initial_state=initial_state,
        segments=segments,
        implementation=implementation,
    )
    return o.reshape(v.shape), final_state


def repeated(segments: Segments, times: int) -> Segments:
    """The documents of rows in which each token stands so many times."""
    ids, index = (jnp.repeat(part, times, axis=1) for part in (segments.ids, segments.index))
    within = jnp.tile(jnp.arange(times, dtype=jnp.int32), segments.ids.shape[1])[None]
    positions = jnp.repeat(segments.positions, times, axis=1) * times + within
    return Segments(ids, index, positions, segments.single)
