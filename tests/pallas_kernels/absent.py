"""Chips that are not here."""

import itertools

import pytest

from pallas_kernels.tools import aot


def needs_compiler(chip: str) -> None:
    """Reports the test as not run where the compiler for `chip` is not installed."""
    if reason := aot.missing(chip):
        pytest.skip(f"not run: {reason}")


# What CI compiles for. The table of compiled shapes has every shape on every chip.
TPUS = ("v5e", "v6e")
GPUS = ("a100", "h100")


def alternating(chips, shapes):
    """``(chip, shape)`` for every shape, with one chip after the other."""
    return list(zip(itertools.cycle(chips), shapes, strict=False))


def both_modes(chips, shapes):
    """``(chip, shape, mode)``: the backward pass on one chip, forward alone on the next."""
    modes = [("forward+backward", chips), ("forward", chips[1:] + chips[:1])]
    return [(*pair, mode) for mode, order in modes for pair in alternating(order, shapes)]


def assert_forward_spills_nothing(chip, case, shapes, kernel):
    """The GPU's forward kernels of ``shapes``, of which one has ``kernel`` in its name."""
    needs_compiler(chip)
    reports = aot.each(chip, case, [[shape, "gpu", "forward"] for shape in shapes])
    for shape, kernels in zip(shapes, reports, strict=True):
        assert not isinstance(kernels, Exception), (shape, kernels)
        assert any(kernel in k.name for k in kernels)
        assert {k.name: k.spill_stores for k in kernels if k.spill_stores} == {}, shape
