"""A mixture of experts: MLPs of which each token goes through a few, and no token is dropped."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqmodels.layers.projections import dense, uniform_fan_in
from seqmodels.ranges import Checked, Size

GatedKind = Literal["swiglu", "geglu"]
ACTIVATIONS = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}


@dataclasses.dataclass(frozen=True)
class ExpertsConfig(Checked):
    """Configuration of a mixture of experts.

    Attributes:
      experts: E.
      chosen: k, the experts of each token.
      hidden: I, width of an expert's hidden layer.
      shared: None, or the width of the hidden layer of an MLP that every token goes through.
      shared_gate: the shared MLP's outputs are multiplied by ``sigmoid(W x)``.
      normalised: the weights of a token's experts sum to 1; else they are its shares of all E.
    """

    experts: Size
    chosen: Size
    hidden: Size
    shared: Size | None = None
    shared_gate: bool = False
    normalised: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chosen > self.experts:
            raise ValueError(
                f"ExpertsConfig: chosen={self.chosen} must be at most experts={self.experts}"
            )
        if self.shared_gate and self.shared is None:
            raise ValueError("ExpertsConfig: shared_gate=True needs a shared MLP; set shared")


class Experts(nn.Module):
    """``y = sum_e w_e W_out,e (act(W_gate,e x) * W_in,e x)`` over the k likeliest experts.

    Shares are ``softmax(W_r x)`` in float32 (Shazeer et al., "Outrageously Large Neural Networks",
    2017). Tokens are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`).

    Sows ``("losses", "load_balance")``: ``E sum_e f_e p_e`` with the tokens that chose e, a token's
    k choices counted apart, and e's mean share (Fedus et al., "Switch Transformers", 2021, eq. 4);
    it is k where all experts are used alike.

    Parameters: ``router/kernel (D, E)``, ``w_gate``, ``w_in`` ``(E, D, I)``, ``w_out (E, I, D)``;
    ``shared_in``, ``shared_gate``, ``shared_out`` and ``shared_router``, each with a ``kernel``.
    """

    config: ExpertsConfig
    kind: GatedKind = "swiglu"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b l d"]:
        """Outputs of each token; ``mask`` leaves padding out of the loss."""
        config, width = self.config, x.shape[-1]
        shares = jax.nn.softmax(dense(x, config.experts, "router").astype(jnp.float32))
        weights, chosen = jax.lax.top_k(shares, config.chosen)
        if config.normalised:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        self.sow("losses", "load_balance", load_balance(shares, chosen, mask))
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))
        sizes = {"w_gate": (width, config.hidden), "w_in": (width, config.hidden)}
        sizes["w_out"] = (config.hidden, width)
        kernels = {
            name: self.param(name, init, (config.experts, *size), jnp.float32).astype(x.dtype)
            for name, size in sizes.items()
        }
        y = routed(
            x.reshape(-1, width),
            chosen.reshape(-1, config.chosen),
            weights.reshape(-1, config.chosen).astype(x.dtype),
            kernels,
            self.kind,
        )
        y = y.reshape(x.shape)
        return y if config.shared is None else y + self._shared(x)

    def _shared(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """The MLP that every token goes through."""
        config, init = self.config, uniform_fan_in()
        gate, inner = (
            dense(x, config.shared or 0, name, kernel_init=init)
            for name in ("shared_gate", "shared_in")
        )
        y = dense(ACTIVATIONS[self.kind](gate) * inner, x.shape[-1], "shared_out", kernel_init=init)
        return y * jax.nn.sigmoid(dense(x, 1, "shared_router")) if config.shared_gate else y


def routed(
    x: Float[Array, "t d"],
    chosen: Int[Array, "t k"],
    weights: Float[Array, "t k"],
    kernels: dict[str, Array],
    kind: GatedKind,
) -> Float[Array, "t d"]:
    """Each token through its experts, weighted and summed."""
    order = jnp.argsort(chosen.ravel(), stable=True)
    sizes = jnp.bincount(chosen.ravel(), length=kernels["w_in"].shape[0]).astype(jnp.int32)
    rows = x[order // chosen.shape[1]]
    gate, inner = (jax.lax.ragged_dot(rows, kernels[name], sizes) for name in ("w_gate", "w_in"))
    hidden = ACTIVATIONS[kind](gate) * inner
    out = jax.lax.ragged_dot(hidden, kernels["w_out"], sizes)
    apart = out[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return jnp.sum(apart * weights[..., None], axis=1)


def load_balance(
    shares: Float[Array, "b l e"], chosen: Int[Array, "b l k"], mask: Bool[Array, "b l"] | None
) -> Float[Array, ""]:
    """The loss that ``Experts`` sows; 0 without tokens."""
    experts = shares.shape[-1]
    counted = jnp.ones(shares.shape[:2], jnp.float32) if mask is None else mask.astype(jnp.float32)
    total = jnp.maximum(jnp.sum(counted), 1.0)
    picked = jnp.sum(jax.nn.one_hot(chosen, experts, dtype=jnp.float32), axis=-2)
    used, mean = (jnp.einsum("ble,bl->e", part, counted) / total for part in (picked, shares))
    return experts * jnp.sum(used * mean)
