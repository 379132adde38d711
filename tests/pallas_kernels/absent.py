"""Chips that are not here."""

import pytest

from pallas_kernels import aot


def needs_compiler(chip: str) -> None:
    """Reports the test as not run where the compiler for `chip` is not installed."""
    if reason := aot.missing(chip):
        pytest.skip(f"not run: {reason}")
