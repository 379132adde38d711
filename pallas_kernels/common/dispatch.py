"""Which implementation of an op runs where, and why.

Every op offers some of the implementations `reference` (one token at a time), `xla` (portable),
`tpu` and `gpu` (Pallas). What runs is decided where a program is lowered, not where it is traced:
one traced program lowers for any one platform, also on a machine without it. Lowered for several at
once (`jax.export` with more than one platform), every branch is lowered for all of them, which
Pallas refuses: such a program takes `implementation="xla"`.

One thing is looked up where a program is traced, because lowering does not know it: whether the GPU
of this machine is too old for the kernels.

Tracing the kernels of every platform takes time, often more than tracing all else. Who knows where
a program will run traces it inside `only_for`.
"""

from __future__ import annotations

import contextlib
import contextvars
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental.xla_metadata import set_xla_metadata

PLATFORMS = ("cpu", "tpu", "cuda", "rocm")
_RUNS_ON = {
    "reference": PLATFORMS,
    "xla": PLATFORMS,
    "tpu": ("tpu",),
    "gpu": ("cuda",),
}
_DEFAULT = ("tpu", "gpu", "xla")

Implementation = str | Sequence[str] | None


class Choice(NamedTuple):
    """What runs on one platform, and why not something before it."""

    op: str
    platform: str
    implementation: str | None
    skipped: dict[str, str]

    def __str__(self) -> str:
        why = "".join(f"; not {name}: {reason}" for name, reason in self.skipped.items())
        return f"{self.op} on {self.platform}: {self.implementation or 'nothing'}{why}"


# Part of jax's trace cache: what is traced inside the context never runs outside, nor vice versa.
_preferred = jax.make_user_context(default_value=None)

_platforms = jax.make_user_context(default_value=None)

_record: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar(
    "record", default=None
)


@contextlib.contextmanager
def preferring(implementation: str) -> Iterator[None]:
    """Where the caller of an op leaves `implementation` open, take this one, if it serves the call.

    For tests and measurements of what calls several ops, such as a layer. Holds for what is traced
    inside; the name is taken at its word as a single forced name is. Rows of one token are not
    concerned.
    """
    with _preferred(implementation):
        yield


@contextlib.contextmanager
def only_for(platform: str) -> Iterator[None]:
    """Trace nothing that only another platform runs.

    What is traced inside must be lowered for this platform alone: it has no other's kernels.

    Args:
      platform: as `jax.Device.platform` or lowering names it: "cpu", "tpu", "gpu", "cuda", "rocm".

    Raises:
      ValueError: another platform.
    """
    platforms = ("cuda", "rocm") if platform == "gpu" else (platform,)
    if platforms[0] not in PLATFORMS:
        known = ", ".join(("gpu", *PLATFORMS))
        raise ValueError(f"platform={platform!r} is unknown; one of {known}")
    with _platforms(platforms):
        yield


def where(arrays: Any) -> contextlib.AbstractContextManager[None]:
    """`only_for` the platform that the arrays of a tree are on, those in numpy the default one.

    For whoever calls a compiled function of theirs; no limit where any of them is being traced.
    """
    leaves = jax.tree.leaves(arrays)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return contextlib.nullcontext()
    on = {d.platform for leaf in leaves if isinstance(leaf, jax.Array) for d in leaf.devices()}
    return only_for(min(on, default=jax.default_backend()))


def run(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    *args: Any,
    requested: Implementation,
    unsupported: Mapping[str, str],
) -> Any:
    """Call the implementation of `op` that each platform takes.

    Args:
      op: the op's name, for messages.
      implementations: functions of `*args` by name; each carries its own derivative.
      requested: the caller's `implementation`. None lets every platform take its fastest; a name
        forces it; a sequence is tried in order on each platform.
      unsupported: why an implementation cannot serve these arguments, by name.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: a forced implementation, or all of a sequence, cannot serve the
        arguments; the reasons are in the message.
    """
    if requested is None and _preferred.value in implementations.keys() - unsupported.keys():
        requested = _preferred.value
    names = _names(op, implementations, requested)
    choices = [_choose(op, platform, names, unsupported, requested) for platform in PLATFORMS]
    if all(choice.implementation is None for choice in choices):
        reasons = "; ".join(f"{name}: {unsupported.get(name) or _old_gpu()}" for name in names)
        raise NotImplementedError(f"{op}: implementation={requested!r} cannot run here: {reasons}")
    # Outermost, around complete custom VJPs: inside one, branches would have to share residuals.
    on_cpu = next(c.implementation for c in choices if c.platform == "cpu")
    return _lower(choices, on_cpu, implementations, args)


def choose(
    op: str,
    ways: Mapping[str, Callable[..., Any]],
    *args: Any,
    default: str,
    everywhere: str | None = None,
    unsupported: Mapping[str, str] | None = None,
    platforms: Sequence[str] = PLATFORMS,
    **preferred: str,
) -> Any:
    """Call one of several ways to compute the same: the better one, unless something forbids it.

    For what is chosen inside an implementation, or above all ops; `explain` lists it.

    Args:
      op: what is computed, for `explain`.
      ways: functions of `*args` by name, each with a derivative of its own where one is needed.
      default: the name of the way that serves all arguments on all platforms.
      everywhere: the name of the way that is better on all platforms, where it serves.
      unsupported: why another way does not serve these arguments, such as their size, by name.
      platforms: those that this runs on, where it is part of a kernel.
      **preferred: by platform, the name of the way that is better there than the default.
    """
    unsupported = unsupported or {}
    choices = []
    for platform in platforms:
        name = preferred.get(platform, everywhere or default)
        skipped = {name: unsupported[name]} if name in unsupported else {}
        choices.append(Choice(op, platform, default if skipped else name, skipped))
    return _lower(choices, default, ways, args)


def _lower(
    choices: list[Choice],
    default: str | None,
    functions: Mapping[str, Callable[..., Any]],
    args: tuple[Any, ...],
) -> Any:
    """What each platform has chosen, as one program; `explain` is told of it.

    Platforms that are not ours take `default`; None where there is nothing for them.
    """
    platforms = _platforms.value or PLATFORMS
    if (record := _record.get()) is not None:
        record.extend(choice for choice in choices if choice not in record)
        platforms = PLATFORMS
    by_platform = {c.platform: c.implementation for c in choices if c.implementation}
    # Nothing is left inside a kernel of another platform, which then is being interpreted.
    by_platform = {p: by_platform[p] for p in platforms if p in by_platform} or by_platform
    if len(set(by_platform.values())) == 1:
        return functions[next(iter(by_platform.values()))](*args)
    special = {p: functions[name] for p, name in by_platform.items() if name != default}
    otherwise = None if default is None else functions[default]
    return jax.lax.platform_dependent(*args, default=otherwise, **special)


def _names(op: str, implementations: Mapping[str, Any], requested: Implementation) -> list[str]:
    if requested is None:
        return [name for name in _DEFAULT if name in implementations]
    names = [requested] if isinstance(requested, str) else list(requested)
    unknown = [name for name in names if name not in implementations]
    if unknown or not names:
        raise ValueError(
            f"{op}: implementation={requested!r}; choose among {', '.join(implementations)}, "
            "a sequence of them, or None for the fastest on each platform"
        )
    return names


def _choose(op, platform, names, unsupported, requested) -> Choice:
    skipped: dict[str, str] = {}
    for name in names:
        # A single forced name is taken at its word: it may be lowered elsewhere, or interpreted.
        if not isinstance(requested, str) and platform not in _RUNS_ON[name]:
            skipped[name] = f"it does not run on {platform}"
        elif name in unsupported:
            skipped[name] = unsupported[name]
        elif name == "gpu" and (old := _old_gpu()):
            skipped[name] = old
        else:
            return Choice(op, platform, name, skipped)
    return Choice(op, platform, None, skipped)


def _old_gpu() -> str | None:
    """Why the GPU of this machine, if it has one, does not run our kernels.

    A program that is lowered here for a newer GPU elsewhere takes `xla` for the same reason.
    """
    if jax.default_backend() != "gpu":
        return None
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is None or float(capability) >= 8.0:
        return None
    return f"the GPU of this machine has compute capability {capability}, the kernels need 8.0"


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Choice]:
    """What `op(*args, **kwargs)` runs on each platform and why; nothing is computed.

    Works for any function that calls our ops, such as a model's `apply`, and lists what is chosen
    inside them too. Arguments may be `jax.ShapeDtypeStruct`.

    >>> for choice in explain(linear_scan, a, b):
    ...     print(choice)
    """
    arrays = [x for x in jax.tree.leaves((args, kwargs)) if hasattr(x, "shape")]

    def call(*arrays):
        # Only arrays are traced: flags and names stay what they are.
        leaves, structure = jax.tree.flatten((args, kwargs))
        rest = iter(arrays)
        leaves = [next(rest) if hasattr(x, "shape") else x for x in leaves]
        args_, kwargs_ = jax.tree.unflatten(structure, leaves)
        return op(*args_, **kwargs_)

    with _recording() as choices:
        jax.eval_shape(call, *arrays)
    return choices


@contextlib.contextmanager
def _recording() -> Iterator[list[Choice]]:
    choices: list[Choice] = []
    token = _record.set(choices)
    try:
        # What `jax.jit` has traced before would not be traced again: here it is, under a new name.
        with set_xla_metadata(explained=uuid.uuid4().hex):
            yield choices
    finally:
        _record.reset(token)
