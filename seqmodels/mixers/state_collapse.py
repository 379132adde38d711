"""What keeps the state of a trained Mamba-2 from collapsing on rows longer than it was trained on.

Chen et al., "Stuffed Mamba: State Collapse and State Capacity of RNN-Based Long-Context Modeling",
2024 (arXiv:2410.07145), section 4: three ways that need no training. All are for inference, and run
token by token: the second has no associative form, and they are all written once.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels.ranges import Checked, Portion, Positive, Size


@dataclasses.dataclass(frozen=True)
class ForgetMore(Checked):
    """Retain and insert less: ``S_t = decay α_t S_{t-1} + insert Δ_t B_t x_t^T``.

    Attributes:
      decay: c_α, what the decay of every step is multiplied by.
      insert: c_B, what every input is multiplied by.
    """

    decay: Portion = 1.0
    insert: Portion = 1.0


@dataclasses.dataclass(frozen=True)
class NormaliseState(Checked):
    """A state whose norm, of one head, is above ``limit`` is scaled down to it after each step."""

    limit: Positive


@dataclasses.dataclass(frozen=True)
class WindowState(Checked):
    """Outputs read the state that the last ``tokens`` tokens make, by subtracting what is older.

    The difference is ``S_t - (α_{t-tokens+1} .. α_t) S_{t-tokens}``, in float32.
    """

    tokens: Size


Mitigation = ForgetMore | NormaliseState | WindowState


class _Carry(NamedTuple):
    """The state, that of so many tokens ago, and the decay between the two as a logarithm."""

    state: Array
    old: Array
    since: Array


def mitigated_ssd(
    mitigation: Mitigation,
    x: Float[Array, "b l h p"],
    log_decay: Float[Array, "b l h"],
    k: Float[Array, "b l h n"],
    q: Float[Array, "b l h n"],
    initial_state: Float[Array, "b h n p"],
) -> tuple[Float[Array, "b l h p"], Float[Array, "b h n p"]]:
    """``S_t = exp(log_decay_t) S_{t-1} + k_t x_t^T``, ``y_t = S_t^T q_t``, mitigated; the last S.

    Args:
      mitigation: what is done to the state.
      x: inputs, times their step sizes.
      log_decay: at most 0.
      k, q: B and C, one for each head.
      initial_state: what enters; with ``WindowState`` zeros, nothing older can be subtracted.
    """
    x, k, q = (part.astype(jnp.float32) for part in (x, k, q))
    if isinstance(mitigation, ForgetMore):
        log_decay = log_decay + jnp.log(jnp.float32(mitigation.decay))
        k = k * mitigation.insert

    def step(state: Array, token: tuple[Array, ...]) -> Array:
        x, log_decay, k = token
        state = jnp.exp(log_decay)[..., None, None] * state + k[..., None] * x[..., None, :]
        if isinstance(mitigation, NormaliseState):
            norm = jnp.sqrt(jnp.sum(state**2, axis=(-2, -1), keepdims=True))
            state = state * jnp.minimum(1.0, mitigation.limit / jnp.maximum(norm, 1e-30))
        return state

    def read(state: Array, q: Array) -> Array:
        return jnp.einsum("bhnp,bhn->bhp", state, q)

    def body(carry: _Carry, token: tuple[tuple[Array, ...], ...]) -> tuple[_Carry, Array]:
        now, before, (q,) = token
        state = step(carry.state, now)
        if not isinstance(mitigation, WindowState):
            return _Carry(state, carry.old, carry.since), read(state, q)
        old = step(carry.old, before)
        since = carry.since + now[1] - before[1]
        return _Carry(state, old, since), read(state - jnp.exp(since)[..., None, None] * old, q)

    tokens = (x, log_decay, k)
    # What was read so many tokens ago; before the row nothing, which neither decays nor adds.
    delay = min(mitigation.tokens if isinstance(mitigation, WindowState) else 0, x.shape[1])
    delayed = tuple(
        jnp.pad(part, ((0, 0), (delay, 0)) + ((0, 0),) * (part.ndim - 2))[:, : x.shape[1]]
        for part in tokens
    )
    start = _Carry(initial_state, jnp.zeros_like(initial_state), jnp.zeros_like(log_decay[:, 0]))
    along = jax.tree.map(lambda part: jnp.moveaxis(part, 1, 0), (tokens, delayed, (q,)))
    last, y = jax.lax.scan(body, start, along)
    return jnp.moveaxis(y, 0, 1), last.state
