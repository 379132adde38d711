"""A mixture of experts: MLPs of which each token goes through a few, and no token is dropped."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqmodels.layers.grouped import grouped_dot
from seqmodels.layers.projections import dense, uniform_fan_in
from seqmodels.ranges import Checked, Positive, Size

ActivationKind = Literal["gelu", "relu2", "swiglu", "geglu"]


def squared_relu(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """``max(x, 0)^2`` (So et al., "Primer", 2021)."""
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS = {
    "gelu": jax.nn.gelu,
    "relu2": squared_relu,
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
}
GATED = frozenset({"swiglu", "geglu"})
"""Kinds whose activations multiply the outputs of another matrix."""


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
      scores: what a token's shares are of the router's outputs: "softmax", or "sigmoid" (Liu et
        al., "DeepSeek-V3", 2024, section 2.1), for which the router is computed in float32.
      correction: a parameter for each expert is added to its share where experts are chosen, and
        not to their weights.
      groups: the experts are divided into so many groups, ...
      chosen_groups: ... of which each token takes experts of these alone: those whose two largest
        shares have the largest sum.
      scale: what the weights are multiplied by.
      latent: None, or the width of what goes into and out of the experts: a projection of the
        tokens, and one back.
    """

    experts: Size
    chosen: Size
    hidden: Size
    shared: Size | None = None
    shared_gate: bool = False
    normalised: bool = True
    scores: Literal["softmax", "sigmoid"] = "softmax"
    correction: bool = False
    groups: Size = 1
    chosen_groups: Size = 1
    scale: Positive = 1.0
    latent: Size | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chosen > self.experts:
            raise ValueError(
                f"ExpertsConfig: chosen={self.chosen} must be at most experts={self.experts}"
            )
        if self.shared_gate and self.shared is None:
            raise ValueError("ExpertsConfig: shared_gate=True needs a shared MLP; set shared")
        size, rest = divmod(self.experts, self.groups)
        if rest or (self.groups > 1 and size < 2):
            raise ValueError(
                f"ExpertsConfig: groups={self.groups} must divide experts={self.experts} into "
                "groups of two or more"
            )
        if self.chosen_groups > self.groups or self.chosen > self.chosen_groups * size:
            raise ValueError(
                f"ExpertsConfig: chosen_groups={self.chosen_groups} must be at most groups="
                f"{self.groups} and hold chosen={self.chosen} experts"
            )


class Experts(nn.Module):
    """``y = sum_e w_e W_out,e (act(W_gate,e x) * W_in,e x)`` over the k likeliest experts.

    Shares are ``softmax(W_r x)`` in float32 (Shazeer et al., "Outrageously Large Neural Networks",
    2017) unless the config says otherwise. Tokens are sorted by expert and multiplied group by
    group (``grouped_dot``). Kinds that are not gated have no ``W_gate``.

    Sows ``("losses", "load_balance")``: ``E sum_e f_e p_e`` with the tokens that chose e, a token's
    k choices counted apart, and e's mean share (Fedus et al., "Switch Transformers", 2021, eq. 4);
    it is k where all experts are used alike.

    Parameters: ``router/kernel (D, E)``, ``w_gate``, ``w_in`` ``(E, D, I)``, ``w_out (E, I, D)``;
    ``correction_bias (E,)``; ``latent_in``, ``latent_out``, ``shared_in``, ``shared_gate``,
    ``shared_out`` and ``shared_router``, each with a ``kernel``.
    """

    config: ExpertsConfig
    kind: ActivationKind = "swiglu"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b l d"]:
        """Outputs of each token; ``mask`` leaves padding out of the loss."""
        config, init = self.config, uniform_fan_in()
        weights, chosen = self._route(x, mask)
        inner = (
            x if config.latent is None else dense(x, config.latent, "latent_in", kernel_init=init)
        )
        y = self._routed(inner, weights, chosen)
        if config.latent is not None:
            y = dense(y, x.shape[-1], "latent_out", kernel_init=init)
        return y if config.shared is None else y + self._shared(x)

    def _route(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None
    ) -> tuple[Float[Array, "b l k"], Int[Array, "b l k"]]:
        """Each token's experts and their weights."""
        config = self.config
        if config.scores == "softmax":
            shares = jax.nn.softmax(dense(x, config.experts, "router").astype(jnp.float32))
        else:
            shares = jax.nn.sigmoid(dense(x.astype(jnp.float32), config.experts, "router"))
        scores = shares
        if config.correction:
            bias = self.param("correction_bias", nn.initializers.zeros, (config.experts,))
            scores = shares + jnp.broadcast_to(bias, shares.shape)
        scores = within_groups(scores, config.groups, config.chosen_groups)
        chosen = jax.lax.top_k(scores, config.chosen)[1]
        weights = jnp.take_along_axis(shares, chosen, axis=-1)
        if config.normalised:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        if config.scores == "sigmoid":
            shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
        sow_load_balance(self, shares, chosen, mask)
        return weights if config.scale == 1.0 else weights * config.scale, chosen

    def _routed(
        self,
        x: Float[Array, "b l d"],
        weights: Float[Array, "b l k"],
        chosen: Int[Array, "b l k"],
    ) -> Float[Array, "b l d"]:
        """Each token through its experts."""
        config, width = self.config, x.shape[-1]
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))
        sizes = {"w_gate": (width, config.hidden)} if self.kind in GATED else {}
        sizes |= {"w_in": (width, config.hidden), "w_out": (config.hidden, width)}
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
        return y.reshape(x.shape)

    def _shared(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """The MLP that every token goes through."""
        config, init = self.config, uniform_fan_in()

        def project(name: str) -> Array:
            return dense(x, config.shared or 0, name, kernel_init=init)

        hidden = activated(project, "shared_gate", "shared_in", self.kind)
        y = dense(hidden, x.shape[-1], "shared_out", kernel_init=init)
        return y * jax.nn.sigmoid(dense(x, 1, "shared_router")) if config.shared_gate else y


def activated(
    project: Callable[[str], Array], gate: str, inner: str, kind: ActivationKind
) -> Float[Array, "*b i"]:
    """An MLP's hidden layer from its projections, called by their names."""
    activation = ACTIVATIONS[kind]
    return (
        activation(project(gate)) * project(inner) if kind in GATED else activation(project(inner))
    )


def within_groups(scores: Float[Array, "b l e"], groups: int, chosen: int) -> Float[Array, "b l e"]:
    """Scores, those of experts outside the ``chosen`` best of all groups ``-inf``."""
    if chosen == groups:
        return scores
    apart = scores.reshape(*scores.shape[:-1], groups, -1)
    best = jnp.sum(jax.lax.top_k(apart, 2)[0], axis=-1)
    kept = jax.nn.one_hot(jax.lax.top_k(best, chosen)[1], groups, dtype=bool)
    return jnp.where(jnp.any(kept, axis=-2)[..., None], apart, -jnp.inf).reshape(scores.shape)


def routed(
    x: Float[Array, "t d"],
    chosen: Int[Array, "t k"],
    weights: Float[Array, "t k"],
    kernels: dict[str, Array],
    kind: ActivationKind,
) -> Float[Array, "t d"]:
    """Each token through its experts, weighted and summed."""
    order = jnp.argsort(chosen.ravel(), stable=True)
    sizes = jnp.bincount(chosen.ravel(), length=kernels["w_in"].shape[0]).astype(jnp.int32)
    rows = x[order // chosen.shape[1]]

    def project(name: str) -> Array:
        return grouped_dot(rows, kernels[name], sizes)

    hidden = activated(project, "w_gate", "w_in", kind)
    out = grouped_dot(hidden, kernels["w_out"], sizes)
    apart = out[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return jnp.sum(apart * weights[..., None], axis=1)


def sow_load_balance(
    module: nn.Module,
    shares: Float[Array, "b l e"],
    chosen: Int[Array, "b l k"],
    mask: Bool[Array, "b l"] | None,
) -> None:
    """Sows ``("losses", "load_balance")``, but not while the module is made: it is no variable."""
    if not module.is_initializing():
        module.sow("losses", "load_balance", load_balance(shares, chosen, mask))


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
