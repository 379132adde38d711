"""Where the committed results are, and where measurements are written."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The checkout, or what an installed package is in."""

IN_CHECKOUT = (ROOT / "pyproject.toml").is_file()


def committed(kind: str) -> Path:
    """The folder of the committed results of a kind, "lra"; they come with the package.

    As it is called from the current directory if that is the checkout.
    """
    path = _results(kind)
    return path.relative_to(ROOT) if os.path.realpath(ROOT) == os.getcwd() else path


def output(kind: str) -> Path:
    """The folder that a benchmark writes to: among the committed results in a checkout.

    An installed package is not written to: the folder is then ``runs/results/<kind>``.
    """
    return _results(kind) if IN_CHECKOUT else Path("runs/results") / kind


def _results(kind: str) -> Path:
    return ROOT / "experiments" / "results" / kind
