"""`check_contract` passes a mixer that keeps the contract, and names a rule that is broken."""

import jax.numpy as jnp
import pytest

from seqmodels.mixers import LRU, LRUConfig, S5Config, Segments, build
from seqmodels.mixers.contract import ContractError, check_contract

CONFIG = LRUConfig(state_size=8)


class LooksAhead(LRU):
    """Its outputs come a token early."""

    def __call__(self, x, **options):
        y, state = super().__call__(x, **options)
        return jnp.pad(y[:, 1:], ((0, 0), (0, 1), (0, 0))), state


class WritesPadding(LRU):
    """Its outputs on padding are not zero."""

    def __call__(self, x, **options):
        y, state = super().__call__(x, **options)
        return y + 1.0, state


class JoinsDocuments(LRU):
    """One document a row, whatever it is told."""

    def __call__(self, x, *, segments=None, **options):
        if segments is not None:
            segments = Segments.from_ids(segments.mask.astype(jnp.int32))
        return super().__call__(x, segments=segments, **options)


class Forgets(LRU):
    """Each call begins anew."""

    def __call__(self, x, *, state=None, **options):
        return super().__call__(x, **options)


def test_a_mixer_that_keeps_the_contract_passes():
    rules = check_contract(build(CONFIG, 8))
    assert {"causality", "isolated documents", "carried state"} <= set(rules)


@pytest.mark.full
def test_a_mixer_that_sees_both_sides_has_fewer_rules():
    rules = check_contract(build(CONFIG, 8))
    two_sided = check_contract(build(S5Config(state_size=8, bidirectional=True), 8))
    assert set(rules) - set(two_sided) == {
        "causality", "pieces and single tokens", "carried state", "training as streaming",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (WritesPadding, "padding"),
        (LooksAhead, "causality"),
        (JoinsDocuments, "isolated documents"),
        (Forgets, "carried state"),
    ],
)
def test_a_broken_rule_is_named(kind, rule):
    with pytest.raises(ContractError, match=rf"lru mixer, {rule}: "):
        check_contract(kind(config=CONFIG, width=8))
