"""Settings of the whole suite: 8 simulated devices, no silent rank promotion, no timed asserts.

Most of the suite's time is tracing and compiling small programs. Unless `--everything` is given,
- tests marked `full` are left out;
- XLA compiles for CPUs with its quick code generator, except for the tests marked `optimised`:
  those of the portable operators' numbers, and of runs that are compared bit for bit with those of
  processes of their own;
- what calls ops is traced for CPUs alone, as training on one is, except for the tests of the ops
  and those marked `all_platforms`.

With `--everything` what calls ops is still traced for CPUs alone, and interpreted kernels compiled
quickly: what a CPU makes of an interpreter runs on no chip.
"""

import hypothesis
import jax
import pytest
from jax._src import compiler

from pallas_kernels.common import dispatch
from pallas_kernels.tools import testing

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a test compiles, which takes long; how long is not what is tested.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

_EVERYTHING = "--everything"
# Ends of the names of modules whose kernels are interpreted.
_INTERPRETED = ("_kernels", "_tpu", "_gpu")


def pytest_addoption(parser):
    parser.addoption(
        _EVERYTHING,
        action="store_true",
        help="run tests marked `full` too, and compile everything with full optimisation",
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption(_EVERYTHING):
        return
    left_out = [item for item in items if _is_full(item)]
    if left_out:
        items[:] = [item for item in items if not _is_full(item)]
        config.hook.pytest_deselected(items=left_out)


def _is_full(item):
    """Whether a test is marked for all of its parameters, or a call for itself."""
    return any(not mark.args for mark in item.iter_markers("full"))


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc):
    """Marks `full` the calls that `full(*ids)` names, and those that `always(*ids)` does not."""
    calls = {call.id: call for call in metafunc._calls}
    for name in ("always", "full"):
        for mark in metafunc.definition.iter_markers(name):
            unknown = set(mark.args) - calls.keys()
            if unknown:
                test = metafunc.definition.nodeid
                raise pytest.UsageError(f"{test}: {name} names {unknown}, it has {set(calls)}")
            chosen = calls.keys() - set(mark.args) if name == "always" else mark.args
            for call in chosen:
                calls[call].marks.append(pytest.mark.full.mark)


@pytest.fixture(autouse=True, scope="module")
def _module_compilation(request):
    """As `_compilation`, for fixtures of a module; afterwards its programs are dropped.

    Thousands of compiled programs take more memory than a small machine has.
    """
    _compile_as_wanted(request)
    yield
    _drop_programs()


@pytest.fixture(autouse=True)
def _compilation(request, _module_compilation):
    """With `--everything` or the mark `optimised` programs are compiled as users compile them."""
    _compile_as_wanted(request)


@pytest.fixture(autouse=True)
def _traced_for_cpus(request):
    """Above the kernels, nothing that only other platforms run is traced."""
    ops = request.path.is_relative_to(request.config.rootpath / "tests" / "pallas_kernels")
    if ops or request.node.get_closest_marker("all_platforms"):
        yield
    else:
        with dispatch.only_for("cpu"):
            yield


def _compile_as_wanted(request):
    interpreted = request.path.stem.endswith(_INTERPRETED)
    everything = request.config.getoption(_EVERYTHING) and not interpreted
    as_users = everything or request.node.get_closest_marker("optimised")
    wanted = _get_compile_options if as_users else _quick_on_cpus
    if compiler.get_compile_options is not wanted:
        _drop_programs()  # none may be found again that was compiled otherwise
        compiler.get_compile_options = wanted


def _drop_programs():
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
