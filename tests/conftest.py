"""Settings of the whole suite: 8 simulated devices, no silent rank promotion, no timed asserts.

Most of the suite's time is XLA compiling small programs. Unless `--everything` is given, tests
marked `full` are left out, and XLA compiles for CPUs with its quick code generator, except where a
portable operator's numbers are tested: those are compiled as users compile them.
"""

import hypothesis
import jax
import pytest
from jax._src import compiler

from pallas_kernels.tools import testing

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a test compiles, which takes long; how long is not what is tested.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

_EVERYTHING = "--everything"


def pytest_addoption(parser):
    parser.addoption(
        _EVERYTHING,
        action="store_true",
        help="run tests marked `full` too, and compile everything with full optimisation",
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption(_EVERYTHING):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)


def _optimised(path):
    """Whether the module's programs are compiled as users compile them.

    Tests of an operator's numbers, pallas_kernels/<op>/test_<op>.py; and the training loop, whose
    runs are compared bit for bit with those of processes of their own.
    """
    operator = (
        path.parent.parent.name == "pallas_kernels" and path.stem == f"test_{path.parent.name}"
    )
    return operator or path.stem == "test_training_loop"


@pytest.fixture(autouse=True, scope="module")
def _compilation(request):
    """How the module's programs are compiled; afterwards they are dropped.

    Thousands of compiled programs take more memory than a small machine has, and none may be found
    again by a module that wants it compiled otherwise.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not (request.config.getoption(_EVERYTHING) or _optimised(request.path)):
            patch.setattr(compiler, "get_compile_options", _quick_on_cpus)
        yield
    testing.program.cache_clear()
    testing.oracle.cache_clear()
    jax.clear_caches()


_get_compile_options = compiler.get_compile_options


def _quick_on_cpus(*args, backend=None, env_options_overrides=None, **options):
    """`get_compile_options` with the options of `testing.QUICK` where the program is for a CPU."""
    if backend is not None and backend.platform == "cpu":
        env_options_overrides = testing.QUICK | (env_options_overrides or {})
    return _get_compile_options(
        *args, backend=backend, env_options_overrides=env_options_overrides, **options
    )


@pytest.fixture(autouse=True)
def _replaced_code_is_compiled_anew(request):
    """A test that replaces code finds no program of before, nor leaves one behind."""
    replaces = "monkeypatch" in request.fixturenames
    if replaces:
        testing.program.cache_clear()
    yield
    if replaces:
        testing.program.cache_clear()
