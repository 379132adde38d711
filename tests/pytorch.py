"""PyTorch and transformers, which some tests hold ours against.

`from tests.pytorch import torch, transformers`. Where one is not installed, each test that uses it
is reported as not run, and no other.
"""

import importlib
import os
from typing import Any

import pytest


class _Absent:
    """Stands for a module and for all that is in it: modules of tests may use it, tests may not."""

    def __init__(self, module: str):
        self.module = module

    def __getattr__(self, name: str) -> "_Absent":
        return self()

    def __call__(self, *args: Any, **options: Any) -> "_Absent":
        if "PYTEST_CURRENT_TEST" in os.environ:
            pytest.skip(f"not run: {self.module} is not installed")
        return self


def _installed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return _Absent(module)


torch = _installed("torch")
# Small models beside another worker: threads of one operation would wait for each other.
torch.set_num_threads(1)
transformers = _installed("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
