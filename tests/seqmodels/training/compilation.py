"""Compiling a test model once for a whole module."""

import contextlib

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def compiled_once(directory):
    """Keeps compiled programs in `directory`, for tests that train the same model repeatedly."""
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def on_one_device(directory):
    """`compiled_once`, with one device, which is enough for tiny batches."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch, compiled_once(directory):
        patch.setattr(jax, "devices", lambda: first)
        yield
