"""S4: one state-space model for each channel, diagonal plus low rank.

Gu, Goel & Ré, "Efficiently Modeling Long Sequences with Structured State Spaces", ICLR 2022, with
the initialisation of the published code.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Complex, Float

from pallas_kernels.common import dispatch
from seqmodels import ops
from seqmodels.mixers import hippo
from seqmodels.mixers.base import SSM_LABEL, ParamLabel, Segments
from seqmodels.mixers.siso import SISOConfig, SISOMixer

_TOGETHER = 32
"""Channels whose matrices are powered together: 0.5 MB each for 64 states."""


@dataclasses.dataclass(frozen=True)
class S4Config(SISOConfig):
    """Configuration of an S4 layer: HiPPO-LegS, low rank of 1, bilinear discretisation."""

    mixer: ClassVar[str] = "s4"

    @property
    def supports_packing(self) -> bool:
        return False  # a convolution does not stop where a document ends

    def param_labels(self) -> dict[str, ParamLabel]:
        return {**super().param_labels(), "P": SSM_LABEL}

    def param_axes(self) -> dict[str, PartitionSpec]:
        return {**super().param_axes(), "P": PartitionSpec("inner")}


class Model(NamedTuple):
    """``x' = A x + B u``, ``A = diag(λ) - p p*``, of every channel; half of the modes are kept.

    Attributes:
      step: Δ ``(H,)``.
      eigenvalues, p, b: λ, p and B, ``(H, N/2)`` each.
      c: C of R directions, ``(R, H, N/2)``.
    """

    step: Float[Array, " h"]
    eigenvalues: Complex[Array, "h n"]
    p: Complex[Array, "h n"]
    b: Complex[Array, "h n"]
    c: Complex[Array, "r h n"]


class S4(SISOMixer[S4Config]):
    """``y = K_left * u (+ K_right * u) + D u``, ``K_j = 2 Re C Ā^j B̄``.

    Parameters as ``SISOMixer`` lists them, and ``P`` ``(n_ssm, N/2, 2)``. All arithmetic is
    float32. C is that of the recurrence; the published code trains ``C (I - Ā^L)`` of one
    length L instead, so that its layer is another one at another length.

    A row without a state is convolved. With a carried state the recurrence runs token by token,
    O(N) work a channel and token; so does the final state of a convolved row, which costs nothing
    where nobody reads it and the caller is compiled.
    """

    def mix(
        self,
        u: Float[Array, "b l h"],
        segments: Segments | None,
        initial_state: Complex[Array, "b h n"] | None,
    ) -> tuple[Float[Array, "b l h"], Complex[Array, "b h n"] | None]:
        unsupported = {}
        if initial_state is not None:
            unsupported["convolution"] = "it begins without a state"
        elif self.stateful and u.shape[1] == 1:
            unsupported["convolution"] = "one token is one step"
        return dispatch.choose(
            "s4",
            {"recurrence": recurrence, "convolution": self._convolved},
            *(self._model(), u, segments, initial_state),
            default="recurrence",
            everywhere="convolution",
            unsupported=unsupported,
        )

    def _convolved(
        self, model: Model, u: Float[Array, "b l h"], segments: Segments | None, _: None
    ) -> tuple[Float[Array, "b l h"], Complex[Array, "b h n"] | None]:
        final = recurrence(model, u, segments, None)[1] if self.stateful else None
        return convolution(model, u), final

    def _model(self) -> Model:
        values, vectors = hippo.normal_eigen(self.config.state_size)
        eigenvalues = self.eigenvalues(values)
        b = self.vector("B", hippo.normal_input(vectors))
        p = self.vector("P", hippo.normal_low_rank(vectors))
        return Model(self.steps(), eigenvalues, p, b, jnp.stack(self.output_vectors()))


def convolution(model: Model, u: Float[Array, "b l h"]) -> Float[Array, "b l h"]:
    """The whole of a row from a state of zero, both directions."""
    length = u.shape[1]
    c = truncated(model, length)
    kernels = ops.s4_kernel(model.step, model.eigenvalues, model.p, model.b, c, length=length)
    return ops.long_conv(u, kernels[0], kernel_reverse=kernels[1] if len(kernels) == 2 else None)


def recurrence(
    model: Model,
    u: Float[Array, "b l h"],
    segments: Segments | None,
    initial_state: Complex[Array, "b h n"] | None,
) -> tuple[Float[Array, "b l h"], Complex[Array, "b h n"]]:
    """Token by token; padding leaves the state as it is."""
    batch, length, width = u.shape
    if initial_state is None:
        initial_state = jnp.zeros((batch, width, model.b.shape[1]), model.b.dtype)
    real = jnp.ones((batch, length), bool) if segments is None else segments.mask
    shared = model._replace(c=model.c[0])._asdict()
    rows = {"initial_state": initial_state}
    return ops.each_channel(
        _recurrence, u, shared=shared, rows=rows, tokens={"real": real}, stateful=True
    )


def _recurrence(
    u: Float[Array, "b l h"],
    real: Bool[Array, "b l"],
    initial_state: Complex[Array, "b h n"],
    **parts: Array,
) -> tuple[Float[Array, "b l h"], Complex[Array, "b h n"]]:
    model = Model(**parts)

    def token(x: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        u, real = now
        after = x + jax.vmap(increment, (None, 0, 0))(model, x, u)
        x = jnp.where(real[:, None, None], after, x)
        return x, 2 * jnp.sum(model.c[None] * x, axis=-1).real

    final, y = jax.lax.scan(token, initial_state, (jnp.moveaxis(u, 1, 0), real.T))
    return jnp.moveaxis(y, 0, 1), final


def increment(
    model: Model, x: Complex[Array, "h n"], u: Float[Array, " h"]
) -> Complex[Array, "h n"]:
    """``(Ā - I) x + B̄ u = (I - Δ/2 A)^-1 Δ (A x + B u)`` in O(N), by Woodbury's identity.

    A small step changes little; what it adds is held to all digits.
    """

    def inner(x: Array) -> Array:
        """``p* x`` over all modes, a real number a channel."""
        total = 2 * jnp.sum(jnp.conj(model.p) * x, axis=-1, keepdims=True).real
        return total.astype(x.dtype)

    step = model.step[:, None].astype(x.dtype)
    slope = model.eigenvalues * x - model.p * inner(x) + model.b * u[:, None].astype(x.dtype)
    inverse = 1 / (1 - step / 2 * model.eigenvalues)
    change = inverse * step * slope
    shared = step / 2 * inverse * model.p
    return change - shared * inner(change) / (1 + inner(shared))


def truncated(model: Model, length: int) -> Complex[Array, "r h n"]:
    """``C (I - Ā^L)`` of every direction, what the kernel's transform of L points needs."""

    def channel(parts: Model) -> Array:
        one = jax.tree.map(lambda part: part[None], parts)
        return _truncated(one._replace(c=parts.c[:, None]), length)[:, 0]

    parts = model._replace(c=jnp.moveaxis(model.c, 1, 0))
    return jnp.moveaxis(jax.lax.map(jax.checkpoint(channel), parts, batch_size=_TOGETHER), 0, 1)


def _truncated(model: Model, length: int) -> Complex[Array, "r h n"]:
    """By repeated squaring of real ``(N, N)`` matrices, on real parts followed by imaginary parts.

    Not Ā but ``Ā - I`` is squared: of a small step the identity would take the leading digits.
    """
    half = model.b.shape[1]
    units = jnp.eye(half, dtype=model.b.dtype)
    units = jnp.concatenate([units, 1j * units])
    still = jnp.zeros_like(model.step)

    def column(unit: Array) -> Array:
        return increment(model, jnp.broadcast_to(unit, model.b.shape), still)

    def reals(x: Array) -> Array:
        return jnp.concatenate([x.real, x.imag], axis=-1)

    change = _power(jnp.moveaxis(reals(jax.vmap(column)(units)), 0, 2), length)
    row = reals(jnp.conj(model.c))
    row = -jnp.einsum("rhi,hij->rhj", row, change, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.complex(row[..., :half], -row[..., half:])


def _power(change: Float[Array, "h n n"], exponent: int) -> Float[Array, "h n n"]:
    """``(I + change)^exponent - I``."""

    def after(one: Array, two: Array) -> Array:
        return one + two + jnp.matmul(one, two, precision=jax.lax.Precision.HIGHEST)

    total = None
    while True:
        if exponent % 2:
            total = change if total is None else after(total, change)
        exponent //= 2
        if not exponent:
            assert total is not None
            return total
        change = after(change, change)
