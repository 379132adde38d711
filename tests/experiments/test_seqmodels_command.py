"""The command `seqmodels`: what it finds, says and completes; the package that it comes in."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import seqmodels
from experiments import commands, completion, main
from tests.experiments.legible import too_long

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OF_THE_CHECKOUT = {"experiments.pages", "experiments.notebooks"}  # they make the documentation
PACKAGES = ("pallas_kernels", "seqmodels", "experiments")


def functions(path):
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef)}  # fmt: skip


def test_every_module_that_can_be_run_is_a_command_and_nothing_else_is():
    paths = (ROOT / "experiments").rglob("*.py")
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in paths
        if "main" in functions(path)
    }
    assert found - OF_THE_CHECKOUT == {*commands.MODULES.values(), "experiments.main"}
    for words, module in commands.MODULES.items():
        assert module == ".".join(("experiments", *words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lar"], "command='lar' is not known (did you mean lra?); choose one of doctor"),
        (["docter"], "(did you mean doctor?)"),
        (["lra", "trian"], "lra command='trian' is not known (did you mean train?)"),
        (["train"], "command='train' is not known; choose one of"),
        (["lm"], "lm: name one of train, eval, finetune, generate, table"),
        ([], "name a command: doctor"),
        (["lra", "train", "--task", "listop", "--model", "s5"], "(did you mean listops?)"),
        (["lra", "train", "--task", "listops", "--model", "s4dd"], "(did you mean s4d?)"),
        (["lra", "train", "--task", "text", "--model", "s5", "--preset", "cpu-our"], "cpu-hour?"),
        (["lra", "data", "--task", "pathfindr"], "(did you mean pathfinder?)"),
        (["lm", "train", "--data", "x", "--mixer", "mamba4"], "(did you mean mamba?)"),
        (["lm", "train", "--data", "x", "--mixer", "s5", "--preset", "smal"], "mean small?"),
        (["recall", "train", "--task", "mqra", "--mixer", "gla"], "(did you mean mqar?)"),
        (["kernels", "aot", "--family", "delta_rul"], "(did you mean delta_rule?)"),
        (["scaling", "report", "--exchange", "rings"], "(did you mean ring?)"),
        (["doctor", "--ops", "linear_scn"], "(did you mean linear_scan?)"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(words, message, capsys):
    assert main.main(words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_help_is_quick_and_80_columns_wide():
    code = (
        "import sys; from experiments.main import main\n"
        "for words in (['--help'], ['lra', '--help'], ['--version']): assert main(words) == 0\n"
        "assert not {'jax', 'numpy', 'rich', 'tyro'} & sys.modules.keys(), sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert too_long(done.stdout) == []
    for group, (_, listed) in commands.GROUPS.items():
        for name, command in listed.items():
            assert re.search(rf"  {group} {name} +{re.escape(command.summary)}", done.stdout)
    for exit_code in ("0", "1", "2", "3", "130", "143"):
        assert re.search(rf"^  {exit_code} +\w", done.stdout, re.MULTILINE)


def test_the_module_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "seqmodels", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"seqmodels {seqmodels.__version__}\n")


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("bin/seqmodels", "seqmodels lm eval"),
        ("seqmodels/__main__.py", "python -m seqmodels lm eval"),
        ("experiments/lm/eval.py", "python -m experiments.lm.eval"),
    ],
)
def test_help_has_the_command_as_it_was_typed(start, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [start])
    with pytest.raises(SystemExit) as end:
        main.main(["lm", "eval", "--help"])
    out = capsys.readouterr().out
    assert not end.value.code
    assert out.startswith(f"usage: {expected} ")
    assert f"{expected} --checkpoint runs" in out
    assert too_long(out) == []


def complete(script, *words):
    """What bash offers for the last word."""
    quoted = " ".join(f"'{word}'" for word in words)
    command = (
        f'COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _seqmodels; echo "${{COMPREPLY[*]}}"'
    )
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{command}"], check=True, capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes(capsys):
    assert main.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for words, expected in {
        ("l",): {"lra", "lm"},
        ("lra", "t"): {"train"},
        ("lra", "train", "--mo"): {"--model"},
        ("lra", "train", "--task", "path"): {"pathfinder", "path-x", "path-256"},
        ("recall", "sweep", "--mixers", "gla", "delta"): {"deltanet", "deltanet-negative"},
        ("doctor", "--ops", "linear_s"): {"linear_scan"},
        ("completion", "z"): {"zsh"},
        ("lra", "baselines", "te"): {"text"},
        ("lra", "train", "--data-dir", ""): set(),
        ("lra", "train", "--distributed.c"): {"--distributed.coordinator"},
    }.items():
        assert set(complete(script, "seqmodels", *words)) == expected
    assert "--resume" in complete(script, "seqmodels", "lm", "train", "--seed", "1", "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_the_same_words(shell):
    found = {words: {"--help": (), "--data": None, "--mixer": ("s5", "gla")}
             for words in commands.MODULES}  # fmt: skip
    text = getattr(completion, shell)(found)
    for words in commands.MODULES:
        assert all(word in text for word in words)
    assert "s5 gla" in text


def test_the_package_has_its_command_types_and_one_version():
    (name, place), = PROJECT["project"]["scripts"].items()  # fmt: skip
    assert (name, place) == ("seqmodels", f"{main.__name__}:{main.main.__name__}")
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "seqmodels/__init__.py"
    assert set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == set(PACKAGES)
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {seqmodels.__version__}\n" in citation
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{seqmodels.__version__}]" in changes


def test_imports_go_down_only():
    for floor, package in enumerate(PACKAGES):
        above = "|".join(PACKAGES[floor + 1 :]) or "tests"
        statement = re.compile(rf"^ *(from|import) ({above})\b", re.MULTILINE)
        for path in (ROOT / package).rglob("*.py"):
            assert not statement.search(path.read_text(encoding="utf-8")), path


@pytest.mark.full
def test_a_wheel_can_be_built(tmp_path):
    """Without a network: by the build backend alone, where it is installed."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run([*command, "--directory", str(tmp_path)], cwd=ROOT, check=True)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert b"seqmodels = experiments.main:main" in wheel.read(entry_points)
    assert path.name.startswith(f"seqmodels-{seqmodels.__version__}-")
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert "experiments/results/lra/listops-s5-cpu-seed0.json" in names
    assert not [name for name in names if name.startswith(("tests/", "runs/", "docs/"))]
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES
               for path in (ROOT / package).rglob("*.py")}  # fmt: skip
    assert sources <= names
