"""A digest changes with every program that a module runs, and with nothing else."""

import pytest

from pallas_kernels.tools import sources
from pallas_kernels.tools.families import FAMILIES

FILES = {
    "__init__.py": "from pallas_kernels.one import api",
    "one/__init__.py": "",
    "one/api.py": "from pallas_kernels.common import far\nfrom pallas_kernels.one import tile",
    "one/tile.py": "import jax\nimport pallas_kernels.one.tpu",
    "one/tpu.py": "def f(x):\n    'What it is.'\n    return x + 1  # why",
    "common/__init__.py": "",
    "common/far.py": "from pallas_kernels.two import two",
    "two/__init__.py": "from pallas_kernels.two.api import two",
    "two/api.py": "def two():\n    return 2.0",
    "three/api.py": "3",
}
READ = ["common.far", "one.api", "one.tile", "one.tpu", "two", "two.api"]
MODULES = ["pallas_kernels.one.api"]


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        write(tmp_path, name, text)
    return tmp_path


def write(root, name, text):
    path = root / "pallas_kernels" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_imports_are_followed_at_any_depth(root):
    assert sources.imported(MODULES, root) == [f"pallas_kernels.{name}" for name in READ]


@pytest.mark.parametrize("name", FILES)
def test_a_change_of_anything_imported_changes_it(root, name):
    before = sources.digest(MODULES, root)
    write(root, name, FILES[name] + "\nadded = 1\n")
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert (sources.digest(MODULES, root) != before) == (module in READ)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("def f(x):\n    return x + 1", True),
        ('"""A module."""\n\ndef f(\n    x,\n):\n    # how\n    return (x + 1)\n', True),
        ("def f(x):\n    'What it is.'\n    return x + 2", False),
        ("def f(x):\n    'What it is.'\n    return x - 1", False),
        ("def f(y):\n    'What it is.'\n    return y + 1", False),
        ("def f(x):\n    return x + 1\n\nf.reason = 'a text that a program holds'", False),
    ],
)
def test_words_do_not_count(root, text, same):
    before = sources.digest(MODULES, root)
    write(root, "one/tpu.py", text)
    assert (sources.digest(MODULES, root) == before) == same


PROGRAM = """
@decorate
def f(a, *b: int, c=None, **d) -> float:
    with open(f"{a!r:>{c}} and {'b'}") as file, b:
        return [x if x else -1.5e-3 for x in (lambda: ...)() if a @ b][1:, ::2]
"""


def test_it_does_not_depend_on_the_version_of_python(root):
    """The digest was the same with 3.11, 3.12 and 3.13."""
    write(root, "one/tpu.py", PROGRAM)
    assert sources.digest(MODULES, root) == "83026c5fb9264c23"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_made_of_its_own_files_and_of_common_ones(name):
    modules = sources.imported([FAMILIES[name].op.__module__])
    own = {f"pallas_kernels.{name}.{part}" for part in ("api", "reference", "xla")}
    assert own <= set(modules)
    assert {"pallas_kernels.common.backend", "pallas_kernels.common.dispatch"} <= set(modules)
    assert not [module for module in modules if module.startswith("pallas_kernels.tools")]
    if name in ("linear_attention", "delta_rule"):
        assert "pallas_kernels.matrix_state.tile" in modules
