"""Which exchange an operator takes where the length of a row is split over devices."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping

from jax.experimental.xla_metadata import set_xla_metadata

from seqmodels.parallel.state import STRATEGIES as STATE

STRATEGIES: dict[str, tuple[str, ...]] = {
    "linear_scan": tuple(STATE),
    "selective_scan": tuple(STATE),
    "diagonal_ssm": tuple(STATE),
    "linear_attention": tuple(STATE),
    "delta_rule": ("doubling", "chain", "all_gather"),
    "attention": ("gather", "ring", "ulysses"),
    "sliding_window": ("halo", "gather", "ulysses"),
}
"""What each operator can take, the default first.

States with a decay for each element are small: one collective of all of them is the shortest way,
until there are more than ``MANY`` shards: then it is "doubling", of which a shard holds one state
more than its own, however many there are. A delta rule's map is a matrix, of which P at once are
too many. Keys and values of attention are gathered, which is one collective too and knows
documents; a ring holds those of two shards at a time, and "ulysses" gives each shard all tokens of
some heads. Short convolutions take a halo, checkpoint attention gathers the checkpoints: there is
no choice.
"""

MANY = 16
"""More shards than these do not gather states unless they are asked to."""

_chosen: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("chosen", default={})  # noqa: B039


def check(exchange: Mapping[str, str]) -> None:
    """Raises ValueError unless ``exchange`` names operators and strategies that they can take."""
    for op, strategy in exchange.items():
        if op not in STRATEGIES:
            raise ValueError(f"exchange: op {op!r} is not one of {', '.join(STRATEGIES)}")
        if strategy not in STRATEGIES[op]:
            raise ValueError(
                f"exchange: {op} cannot take {strategy!r}; choose among {', '.join(STRATEGIES[op])}"
            )


@contextlib.contextmanager
def choosing(exchange: Mapping[str, str]) -> Iterator[None]:
    """Operators traced inside take ``exchange[op]``, where it names them."""
    token = _chosen.set(exchange)
    # What `jax.jit` has traced for another exchange is not taken for this one.
    told = ",".join(f"{op}={strategy}" for op, strategy in sorted(exchange.items()))
    try:
        with set_xla_metadata(exchange=told) if told else contextlib.nullcontext():
            yield
    finally:
        _chosen.reset(token)


def strategy_of(op: str, shards: int) -> str:
    """The strategy that ``op`` takes over so many shards."""
    default = STRATEGIES[op][0]
    if default == "all_gather" and shards > MANY:
        default = "doubling"
    return _chosen.get().get(op, default)
