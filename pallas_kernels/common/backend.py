"""The contract between an op and its backends, and the one way in which every op runs.

An op has a *config*, what is static (a hashable named tuple or frozen dataclass), and *arrays* in a
fixed order, None where one is left out. A backend is a few functions of them (see `Backend`);
`call_op` does once what would otherwise stand in every family: types under `jax.shard_map`, the
rule for a single token, `jax.custom_vjp`, dispatch by platform and the names for `jax.checkpoint`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.common import compat, dispatch


def _no_limits(config: Any, *arrays: Any) -> str | None:
    """`unsupported` of a backend that serves all arguments."""
    return None


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
      forward: `(config, *arrays, return_residuals) -> (outputs, residuals)`; residuals is a pytree
        of arrays, None where `return_residuals` is False or `backward` is None.
      backward: `(config, residuals, cotangents) -> gradients`, one for each array, None for
        integers and for arrays that are None. If there is no such function JAX differentiates
        `forward`, any number of times.
      prepare: `(config, *arrays) -> (arrays, restore)`: what stands around the derivative, padding
        mostly; JAX differentiates it. `restore(outputs)` undoes it.
      unsupported: `(config, *arrays)` -> why they cannot be served, None if they can.
    """

    forward: Callable[..., tuple[Any, Any]]
    backward: Callable[..., tuple[Any, ...]] | None = None
    prepare: Callable[..., tuple[tuple[Any, ...], Callable[[Any], Any]]] | None = None
    unsupported: Callable[..., str | None] = _no_limits

    def __call__(self, config: Any, *arrays: Any) -> Any:
        """The outputs, differentiable."""
        if self.prepare is None:
            return self._differentiable(config, *arrays)
        arrays, restore = self.prepare(config, *arrays)
        return restore(self._differentiable(config, *arrays))

    @functools.cached_property
    def _differentiable(self) -> Callable[..., Any]:
        def outputs(config, *arrays):
            return self.forward(config, *arrays, return_residuals=False)[0]

        if self.backward is None:
            return outputs

        def with_residuals(config, *arrays):
            return self.forward(config, *arrays, return_residuals=True)

        op = jax.custom_vjp(outputs, nondiff_argnums=(0,))
        op.defvjp(with_residuals, self.backward)
        return op


def no_wide_numbers(x: Any) -> str | None:
    """Why a Pallas kernel cannot take float64 or complex128."""
    wide = x.dtype in (jnp.float64, jnp.complex128)
    return f"it has no {x.dtype}; reference and xla do" if wide else None


@dataclasses.dataclass(frozen=True)
class Op:
    """An op and what can run it.

    Attributes:
      name: of the op, for messages, and of its first output for `jax.checkpoint` policies.
      backends: by name, `reference`, `xla`, `tpu` and `gpu`, or some of them.
      one_token: `(config, *arrays) -> outputs` for rows of one token, in place of `xla`; it needs
        no kernel and JAX differentiates it. None where `xla` is as good.
      summary: `(run, config, *arrays) -> (decay, state)`, what a row does to any state that enters
        it, by means of `run(config, *arrays)`, the op on one backend; see `summarize`.
      outputs: what is appended to the name for each output.
    """

    name: str
    backends: Mapping[str, Backend]
    one_token: Callable[..., Any] | None = None
    summary: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    outputs: tuple[str, ...] = ("", "_state")


def call_op(
    op: Op,
    config: Any,
    *arrays: Any,
    length: int,
    implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, ...]:
    """Run `op` on whatever platform the program is lowered for.

    Args:
      op: which.
      config: what is static, hashable.
      arrays: in the op's order; None where one is left out.
      length: tokens in a row.
      implementation: see `dispatch.run`; decoding, a row of one token, takes no kernel if None.

    Returns:
      The outputs, each with its `checkpoint_name`.

    Raises:
      ValueError, NotImplementedError: as `dispatch.run`.
    """
    run: dict[str, Callable[..., Any]] = dict(op.backends)
    if op.one_token is not None:
        run["xla"] = functools.partial(_by_length, op, length)
    skipped = {}
    if length == 1 and implementation is None:
        skipped = dict.fromkeys(op.backends.keys() - {"xla"}, "a row of one token needs no kernel")
    outputs = _dispatch(op, run, config, arrays, implementation, skipped)
    names = (op.name + suffix for suffix in op.outputs)
    return tuple(checkpoint_name(x, name) for x, name in zip(outputs, names, strict=True))


def _by_length(op: Op, length: int, config: Any, *arrays: Any) -> Any:
    """The portable path, for rows of one token the cheap step."""
    assert op.one_token is not None
    ways: dict[str, Callable[..., Any]] = {
        "whole": op.backends["xla"],
        "one token": op.one_token,
    }
    return dispatch.choose(
        f"{op.name} rows",
        {name: functools.partial(way, config) for name, way in ways.items()},
        *arrays,
        default="whole",
        everywhere="one token",
        unsupported={} if length == 1 else {"one token": f"there are {length}"},
    )


def summarize(
    op: Op, config: Any, *arrays: Any, implementation: dispatch.Implementation = None
) -> tuple[jax.Array, jax.Array]:
    """What each row does to any state that enters it, as `(decay, state)`.

    The state that leaves is `state + decay * entering`, or `state + decay @ entering` where the
    decay is a matrix over keys (`delta_rule`); the decay is 0 where a document begins inside the
    row. It is what one shard of a row sends to those after it. What a backend computes only for
    its outputs is dead code here and is not run.

    Args:
      op: one with a `summary`.
      config, arrays, implementation: as in `call_op`; the initial state must be zero.
    """
    assert op.summary is not None, f"{op.name} has no summary"
    run = {name: functools.partial(op.summary, backend) for name, backend in op.backends.items()}
    return _dispatch(op, run, config, arrays, implementation, {})


def _dispatch(
    op: Op, run: Mapping[str, Callable[..., Any]], config, arrays, implementation, skipped
):
    """`run[name](config, *arrays)` of the backend that each platform takes.

    `skipped` are reasons against a backend beyond its own.
    """
    arrays = compat.match_vma(*arrays)
    reasons = {name: b.unsupported(config, *arrays) for name, b in op.backends.items()}
    reasons |= skipped
    return dispatch.run(
        op.name,
        {name: functools.partial(function, config) for name, function in run.items()},
        *arrays,
        requested=implementation,
        unsupported={name: reason for name, reason in reasons.items() if reason},
    )
