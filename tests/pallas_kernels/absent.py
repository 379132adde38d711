"""Chips that are not here."""

import pytest

from pallas_kernels.tools import aot

# What is always compiled for: the two generations of each that are in most use.
TPUS = ("v5e", "v6e")
GPUS = ("a100", "h100")


def needs_compiler(chip: str) -> None:
    """Reports the test as not run where the compiler for `chip` is not installed."""
    if reason := aot.missing(chip):
        pytest.skip(f"not run: {reason}")


def on_tpus(representatives):
    """``(chip, shape)``: shapes of each kind on `TPUS` in turn, a single one on all of them.

    Every named shape on every chip is a cell of `experiments/results/kernels/aot.json`.
    """
    return _in_turn(representatives, TPUS)


def on_gpus(representatives):
    """``(chip, shape)``, as `on_tpus`, on `GPUS`."""
    return _in_turn(representatives, GPUS)


def for_spills(chips, shapes, *, always=False):
    """``(chip, shapes)``, as `full`; with ``always`` the first shape always, on the first GPU."""
    every = [pytest.param(chip, shapes, marks=pytest.mark.full) for chip in chips]
    return [(GPUS[0], shapes[:1]), *every] if always else every


def _in_turn(shapes, chips):
    return [
        (chips[i % len(chips)], shapes[i % len(shapes)])
        for i in range(max(len(shapes), len(chips)))
    ]


def assert_spills_nothing(chip, case, shapes, kernel, mode="forward"):
    """No GPU kernel of the programs of ``shapes``, of which one has ``kernel`` in its name."""
    needs_compiler(chip)
    reports = aot.each(chip, case, [[shape, "gpu", mode] for shape in shapes])
    for shape, kernels in zip(shapes, reports, strict=True):
        assert not isinstance(kernels, Exception), (shape, kernels)
        assert any(kernel in k.name for k in kernels)
        assert {k.name: k.spill_stores for k in kernels if k.spill_stores} == {}, shape
