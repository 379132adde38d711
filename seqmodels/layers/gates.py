"""The position-wise output stage of state-space blocks: activation, gate, dropout."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels.layers.dropout import Dropout

GateKind = Literal["half_glu1", "half_glu2", "full_glu", "gelu", "glu"]


class Gate(nn.Module):
    """Output stage called ``kind``, for ``y (B, L, H)``; with ``z = Dropout(GELU(y))``:

    - "half_glu1": ``z * sigmoid(W z)``; "half_glu2": ``y * sigmoid(W z)``; "full_glu":
      ``(V z) * sigmoid(W z)`` (S5);
    - "glu": ``a * sigmoid(b)``, ``[a, b] = W z`` (S4); "gelu": ``z``.

    A second dropout follows; both share one mask among all time steps. GELU is the tanh form.
    """

    kind: GateKind
    dropout: float = 0.0
    deterministic: bool = True

    @nn.compact
    def __call__(self, y: Float[Array, "b l h"]) -> Float[Array, "b l h"]:
        width = y.shape[-1]

        def drop(x: Array) -> Array:
            return Dropout(self.dropout, self.deterministic)(x)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, name=name, dtype=y.dtype)

        z = drop(jax.nn.gelu(y, approximate=True))
        if self.kind == "gelu":
            return z
        if self.kind == "glu":
            value, gate = jnp.split(dense(2 * width, "gate")(z), 2, axis=-1)
            return drop(value * jax.nn.sigmoid(gate))
        value = {
            "half_glu1": lambda: z,
            "half_glu2": lambda: y,
            "full_glu": lambda: dense(width, "value")(z),
        }[self.kind]()
        return drop(value * jax.nn.sigmoid(dense(width, "gate")(z)))
