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


def on_tpus(shapes, always, modes=("forward+backward", "forward")):
    """``(chip, shape, mode)``: every named shape on every TPU.

    Those of ``always``, one of each kind, always run in the first mode, on `TPUS` in turn, a
    single one on all of `TPUS`. The rest is `full`.
    """
    chosen = _in_turn(always, TPUS)
    return [
        _always(mode == modes[0] and (chip, shape) in chosen, chip, shape, mode)
        for mode in modes
        for shape in shapes
        for chip in aot.TPUS
    ]


def on_gpus(shapes, always):
    """``(chip, shape)``: every named shape on every GPU; ``always`` as for TPUs, on `GPUS`."""
    chosen = _in_turn(always, GPUS)
    return [_always((chip, shape) in chosen, chip, shape) for shape in shapes for chip in aot.GPUS]


def for_spills(chips, shapes, *, always=False):
    """``(chip, shapes)``, as `full`; with ``always`` the first shape always, on the first GPU."""
    every = [pytest.param(chip, shapes, marks=pytest.mark.full) for chip in chips]
    return [(GPUS[0], shapes[:1]), *every] if always else every


def _in_turn(shapes, chips):
    """``(chip, shape)``: each shape on one chip, each chip with one shape at least."""
    return {
        (chips[i % len(chips)], shapes[i % len(shapes)])
        for i in range(max(len(shapes), len(chips)))
    }


def _always(always, *case):
    return pytest.param(*case, marks=() if always else pytest.mark.full)


def assert_spills_nothing(chip, case, shapes, kernel, mode="forward"):
    """No GPU kernel of the programs of ``shapes``, of which one has ``kernel`` in its name."""
    needs_compiler(chip)
    reports = aot.each(chip, case, [[shape, "gpu", mode] for shape in shapes])
    for shape, kernels in zip(shapes, reports, strict=True):
        assert not isinstance(kernels, Exception), (shape, kernels)
        assert any(kernel in k.name for k in kernels)
        assert {k.name: k.spill_stores for k in kernels if k.spill_stores} == {}, shape
