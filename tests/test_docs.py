"""The documentation: its code runs, its commands parse, its tables are current, its links lead on.

What cannot run says so where the reader sees it: "```python no-run: reason".
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import re
import shlex
import sys
import types
from pathlib import Path

import jaxtyping
import pytest

from experiments import command_line, pages
from experiments.lm import presets as lm_presets
from experiments.lra import presets as lra_presets
from experiments.recall import presets as recall_presets
from seqmodels import mixers
from seqmodels.config import to_dict
from seqmodels.training.checkpoint import flatten
from seqmodels.training.lora import LoRAConfig
from tests.tiers import one_of_many

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
}
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:python -m experiments\.|^seqmodels )([\w.]+)([^\n]*)", re.MULTILINE)
TARGET = re.compile(r"^make ([\w-]+)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CONFIGS = (
    lra_presets.experiment("listops", "s5", "cpu"),
    lm_presets.experiment("s5", "tiny"),
    recall_presets.experiment("mqar", "s5", "tiny"),
)
FIELDS = {name for config in CONFIGS for name in flatten(to_dict(config))}
FIELDS |= {f"lora.{field.name}" for field in dataclasses.fields(LoRAConfig)}


def blocks(page, *languages):
    """The fenced blocks of these languages: line, what follows the language, code."""
    for found in FENCE.finditer(PAGES[page]):
        if found[1] in languages:
            yield PAGES[page].count("\n", 0, found.start()) + 1, found[2].strip(), found[3]


def runnable(page):
    return [(line, code) for line, info, code in blocks(page, "python") if not info]


@pytest.mark.parametrize(
    "page",
    one_of_many(
        filter(runnable, PAGES),
        ["README.md", "docs/extending/mixer.md", "docs/operators/linear_scan.md"],
    ),
)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    # No types are checked where readers run them: a symbolic dimension is an int only to jax.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr(mixers, "REGISTRY", dict(mixers.REGISTRY))
    module = types.ModuleType("a_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with contextlib.chdir(tmp_path):
        for line, code in runnable(page):
            before_it = "\n" * line  # so that a traceback has the page's lines
            exec(compile(before_it + code, page, "exec"), vars(module))


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language_and_what_cannot_run_a_reason(page):
    for line, info, _ in blocks(page, "", "python", "sh", "text"):
        assert not info or re.fullmatch(r"no-run: \w.+", info), f"{page}:{line}: {info}"
    for found in FENCE.finditer(PAGES[page]):
        assert found[1] in ("python", "sh", "text"), f"{page}: {found[0][:60]}"


def commands(page):
    """Modules and arguments of the commands in a page's blocks."""
    for _, _, code in blocks(page, "sh"):
        joined = re.sub(r"\\\n\s*", " ", code)
        for found in COMMAND.finditer(joined):
            text = re.sub(r"\$\([^)]*\)", "", found[2])
            inside = text.count('"') % 2  # the command is itself an argument in quotes
            words = shlex.split(text.rstrip('"') if inside else text, comments=True)
            name = f"experiments.{found[1]}"
            if importlib.util.find_spec(name).submodule_search_locations:  # seqmodels lra train
                name = f"{name}.{words.pop(0)}"
            yield name, words


def parsed_only(kind, action, arguments, *, description, prog, config_fields=False, **options):
    """In place of `run_command`: the command line is read, and nothing is done."""
    _, rest = command_line.parse(kind, arguments, prog=prog, strict=not config_fields, **options)
    names = [word.partition("=")[0] for word in rest if word.startswith("--")]
    assert rest == [] or rest[0].startswith("--")
    for name in names:
        assert name.removeprefix("--").replace("-", "_") in FIELDS, f"no option {name}"
    return 0


def test_commands_parse(monkeypatch):
    read = 0
    for page in PAGES:
        for name, arguments in commands(page):
            module = importlib.import_module(name)
            monkeypatch.setattr(module, "run_command", parsed_only)
            try:
                assert module.main(arguments) == 0
            except command_line.UsageError as error:
                pytest.fail(f"{page}: python -m {name} {shlex.join(arguments)}: {error}")
            read += 1
    assert read > 30


def test_an_option_that_there_is_not_is_found(monkeypatch):
    module = importlib.import_module("experiments.lm.train")
    monkeypatch.setattr(module, "run_command", parsed_only)
    for wrong in (["--train.learning-rat", "1"], ["--mixerr", "gla"]):
        with pytest.raises((AssertionError, command_line.UsageError)):
            module.main(["--data", "book.txt", *wrong])


def test_targets_and_modules_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page, text in PAGES.items():
        for _, _, code in blocks(page, "sh"):
            for target in TARGET.findall(code):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"
        for found in COMMAND.finditer(text):
            name = f"experiments.{found[1]}".rstrip(".")
            assert importlib.util.find_spec(name), f"{page}: {name}"


def test_tables_are_those_of_the_committed_results():
    """And what is stale by now: after a change of kernels `experiments.pages` says so there."""
    current = {path: before == now for path, before, now in pages.pages()}
    assert current
    assert [str(path) for path, same in current.items() if not same] == []


def test_a_table_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="table 'nothing' is unknown"):
        pages.filled("<!-- table nothing: begin -->\n<!-- table nothing: end -->")


def test_check_names_the_pages_that_are_not_current(monkeypatch, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(
        "<!-- table memory: begin -->\nold\n<!-- table memory: end -->\n"
    )
    (tmp_path / "README.md").write_text("no tables")
    monkeypatch.setattr(pages, "REPOSITORY", tmp_path)
    assert pages.main(["--check"]) == 1
    assert "not current: docs/page.md" in capsys.readouterr().err
    assert pages.main([]) == 0
    assert pages.main(["--check"]) == 0


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    """On GitHub; `mkdocs build --strict` checks the site's, and anchors."""
    text = FENCE.sub("", PAGES[page])
    for link in LINK.findall(text):
        if not re.match(r"[a-z]+:|#", link):
            target = (ROOT / page).parent / link.partition("#")[0]
            assert target.exists(), f"{page}: {link}"
