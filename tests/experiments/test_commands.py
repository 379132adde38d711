"""Every command, on anything a user may type or have on the disk: success, or one line.

The work itself is cut off: what is tested is everything before it.
"""

import contextlib
import io
import json
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import completion, doctor, machine
from experiments.kernels import aot as kernels_aot
from experiments.kernels import bench as kernels_bench
from experiments.lm import eval as lm_eval
from experiments.lm import generate as lm_generate
from experiments.lm import presets as lm_presets
from experiments.lm import run as lm_run
from experiments.lm import table as lm_table
from experiments.lm import train as lm_train
from experiments.lra import baselines as lra_baselines
from experiments.lra import check as lra_check
from experiments.lra import data as lra_data
from experiments.lra import eval as lra_eval
from experiments.lra import presets as lra_presets
from experiments.lra import report as lra_report
from experiments.lra import sweep as lra_sweep
from experiments.lra import train as lra_train
from experiments.models import bench as models_bench
from experiments.recall import eval as recall_eval
from experiments.recall import presets as recall_presets
from experiments.recall import report as recall_report
from experiments.recall import run as recall_run
from experiments.recall import sweep as recall_sweep
from experiments.recall import train as recall_train
from experiments.scaling import report as scaling_report
from pallas_kernels.tools import aot
from pallas_kernels.tools.families import TABULATED
from seqmodels import ranges
from seqmodels.config import to_dict
from seqmodels.data.lra import ListOpsConfig, TextConfig
from seqmodels.training.checkpoint import flatten

RESULTS = Path(__file__).parents[2] / "experiments" / "results"

LRA_CONFIG = to_dict(lra_presets.experiment("listops", "s5", "cpu"))
LM_CONFIG = to_dict(lm_presets.experiment("s5", "tiny"))
RECALL_CONFIG = to_dict(recall_presets.experiment("mqar", "s5", "tiny"))
LRA_FIELDS, LM_FIELDS, RECALL_FIELDS = (
    [f"--{path}" for path in flatten(config)] for config in (LRA_CONFIG, LM_CONFIG, RECALL_CONFIG)
)
DATA = {"cache_dir": "cache", "data_dir": None, "digest": "0"}
LRA_RESULT = json.loads((RESULTS / "lra" / "listops-s5-cpu-seed0.json").read_text()) | {"curve": []}
RECALL_RESULT = {
    **{name: RECALL_CONFIG[name] for name in ("task", "mixer", "size", "preset", "repeats")},
    "seed": 0,
    "tests": {"1": {"accuracy": 0.5, "rows_right": 0.1, "counted": 9, "tokens": 16}},
    "chance": 0.1,
    "trained_tokens": 16,
    "state_bytes": 100,
    "steps": 6,
    "complete": True,
    "parameters": 1000,
    "wall_seconds": 1.0,
    "environment": {"cpu": "a processor", "commit": "abc"},
    "config": RECALL_CONFIG,
}
LM_TABLE = json.loads((RESULTS / "lm" / "mixers.json").read_text())
LM_TABLE["rows"] = {
    name: row | {"curve": [], "environment": {}, "config": {}}
    for name, row in list(LM_TABLE["rows"].items())[:2]
}


def options(*kinds):
    """The options of these dataclasses."""
    hidden = {"task"} if lra_baselines.Args in kinds else set()
    hidden |= {"check"} if kernels_aot.AotConfig in kinds else set()  # whose answer is exit code 1
    names = [name for kind in kinds for name in ranges.hints(kind) if name not in hidden]
    return [f"--{name.replace('_', '-')}" for name in names]


class Command(typing.NamedTuple):
    """A command, the options that it has to have, and those to try."""

    module: typing.Any
    needed: list[str]
    options: list[str]


COMMANDS = {
    "lra.train": Command(
        lra_train, ["--task", "listops", "--model", "s5"], options(lra_train.Arguments) + LRA_FIELDS
    ),
    "lra.sweep": Command(lra_sweep, ["--runs-dir", "runs"], options(lra_sweep.Arguments)),
    "lra.eval": Command(lra_eval, ["--checkpoint", "lra-run"], options(lra_eval.Arguments)),
    "lra.report": Command(lra_report, ["--results-dir", "results"], options(lra_report.Arguments)),
    "lra.baselines": Command(
        lra_baselines,
        ["--cache-dir", "cache", "listops"],
        options(lra_baselines.Args, ListOpsConfig, TextConfig),
    ),
    "lra.data": Command(
        lra_data, ["--task", "listops"], options(lra_data.Arguments, ListOpsConfig)
    ),
    "lm.train": Command(
        lm_train, ["--data", "text.txt", "--mixer", "s5"], options(lm_train.Arguments) + LM_FIELDS
    ),
    "lm.eval": Command(
        lm_eval, ["--checkpoint", "lm-run", "--data", "text.txt"], options(lm_eval.Arguments)
    ),
    "lm.generate": Command(lm_generate, ["--checkpoint", "lm-run"], options(lm_generate.Arguments)),
    "lm.table": Command(
        lm_table, ["--data", "text.txt", "--results-dir", "tables"], options(lm_table.Arguments)
    ),
    "kernels.bench": Command(
        kernels_bench, ["--output", "bench.json"], options(kernels_bench.BenchConfig)
    ),
    "kernels.aot": Command(kernels_aot, ["--output", "aot.json"], options(kernels_aot.AotConfig)),
    "models.bench": Command(
        models_bench, ["--output", "models.json"], options(models_bench.ModelBenchConfig)
    ),
    "recall.train": Command(
        recall_train,
        ["--task", "mqar", "--mixer", "s5", "--preset", "tiny"],
        options(recall_train.Arguments) + RECALL_FIELDS,
    ),
    "recall.sweep": Command(
        recall_sweep,
        ["--tasks", "parity", "--mixers", "s5", "--sizes", "4"],
        options(recall_sweep.Arguments) + RECALL_FIELDS,
    ),
    "recall.report": Command(
        recall_report, ["--results-dir", "recall"], options(recall_report.Arguments)
    ),
    "recall.eval": Command(
        recall_eval, ["--checkpoint", "recall-run"], options(recall_eval.Arguments)
    ),
    "scaling.report": Command(
        scaling_report, ["--output", "scaling"], options(scaling_report.ScalingConfig)
    ),
    "doctor": Command(doctor, [], options(doctor.Arguments)),
    "completion": Command(completion, ["bash"], ["--shell", "--traceback"]),
}

BORDERS = (
    "-1", "0", "1", "2", "2147483648", "4294967296", "99999999999999999999", "-0.5", "0.5", "1.0",
    "1e400", "-inf", "nan", "None", "True", "false", "", ".", "..", "../../x", "/", "nowhere",
    "text.txt", "lra-run", "lm-run", "x", "s5", "hydra", "tiny", "paper", "text", "{}", "[]", "[5]",
    "é", "a b", "--x", "-", "=", "²",
)  # fmt: skip
SETTINGS = (
    "task=text", "preset=../../x", "seed=1", "lengths=[]", "lengths=[5]", "train.steps=0", "a", "=",
    "train={}", "train.seed=99999999999999999999", "train.clip_norm=null", "data.validation=0",
    "model.vocabulary_size=256", "train.mesh=[[1]]", "--train.steps=1", "lengths=[null]",
)  # fmt: skip
VALUES = st.one_of(st.sampled_from(BORDERS), st.text(max_size=5).filter(lambda t: "\0" not in t))
JSON = st.sampled_from(
    [None, True, -1, 0, 2**70, 0.5, float("nan"), "", "x", "../x", [], {}, [1], {"a": {}}]
)


class CutOff(ValueError):
    """The command would have begun to work."""


def cut_off(*arguments, **options):
    raise CutOff("the work begins")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A folder with runs, results and a text, the current one; all work is cut off."""
    folder = tmp_path_factory.mktemp("commands")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        for module, name in (
            (lra_train, "load_data"), (lra_eval, "load_data"), (lra_baselines, "load"),
            (lra_data, "load"), (lra_sweep, "train_cell"), (lra_report, "picture"),
            (lra_check, "load_data"), (lm_train, "load_data"), (lm_run, "restore"),
            (lm_table, "load_data"), (kernels_aot, "measure"), (scaling_report, "measure"),
            (recall_train, "open_run"), (recall_sweep, "check_memory"),
            (recall_report, "against_state"), (recall_run, "restore"), (machine, "inspect"),
            (completion, "options"),
        ):  # fmt: skip
            patch.setattr(module, name, cut_off)
        for module in (kernels_bench, models_bench):
            patch.setattr(module, "run", cut_off)
        yield folder


def fill(folder):
    """The files that commands read, as they should be."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "text.txt").write_text("a text")
    for path, content in files(folder).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))


def files(folder):
    return {
        folder / "lra-run" / "config.json": LRA_CONFIG,
        folder / "lra-run" / "data.json": DATA,
        folder / "lra-run" / "result.json": {"test_step": 3, "test_accuracy": 0.5},
        folder / "lm-run" / "config.json": LM_CONFIG,
        folder / "lm-run" / "data.json": DATA,
        folder / "lm-run" / "result.json": {"test_step": 3},
        folder / "results" / "result.json": LRA_RESULT,
        folder / "tables" / "mixers.json": LM_TABLE,
        folder / "aot.json": {"cells": []},
        folder / "recall-run" / "config.json": RECALL_CONFIG,
        folder / "recall-run" / "result.json": {"test_step": 3},
        folder / "recall" / "result.json": RECALL_RESULT,
    }


def outcome(module, arguments):
    """The exit code and what went to stderr; any exception but SystemExit is a failure."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = module.main(arguments)
        except SystemExit as end:
            code = end.code or 0
    return code, err.getvalue()


def assert_success_or_one_line(module, arguments):
    code, said = outcome(module, arguments)
    assert code in (0, 1, 2), (code, said)
    if code:
        assert said.startswith("error: "), said
        assert said.count("\n") == 1, said
        assert said.endswith("\n"), said
        assert len(said) > len("error: x\n"), said


FUZZ = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.full("kernels.aot")
@pytest.mark.parametrize("name", COMMANDS)
def test_any_options_give_success_or_one_line(name, folder):
    command = COMMANDS[name]
    fill(folder)
    # A traceback is asked for; help is printed and wide.
    tried = [o for o in command.options if o not in ("--traceback", "--help-fields", "--set")]

    @FUZZ
    @given(st.data())
    def check(data):
        words = []
        for option in data.draw(st.lists(st.sampled_from(tried), min_size=1, max_size=2)):
            values = data.draw(st.lists(VALUES, max_size=2))
            words += [f"{option}={values[0]}"] if len(values) == 2 else [option, *values]
        if "--set" in command.options:
            for setting in data.draw(st.lists(st.sampled_from(SETTINGS), max_size=1)):
                words += ["--set", setting]
        assert_success_or_one_line(command.module, [*command.needed, *words])

    check()


def places(value, path=()):
    """Paths of all values within a JSON value, but those below a list's first entry."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


READERS = {
    "lra-run/config.json": ("lra.eval", []),
    "lra-run/data.json": ("lra.eval", []),
    "lra-run/result.json": ("lra.eval", []),
    "lm-run/config.json": ("lm.generate", []),
    "lm-run/result.json": ("lm.eval", []),
    "results/result.json": ("lra.report", []),
    "tables/mixers.json": ("lm.table", ["--print-only"]),
    "aot.json": ("kernels.aot", []),
    "recall-run/config.json": ("recall.eval", []),
    "recall/result.json": ("recall.report", []),
}


@pytest.mark.parametrize("file", READERS)
def test_any_file_gives_success_or_one_line(file, folder):
    fill(folder)
    name, more = READERS[file]
    content = files(folder)[folder / file]
    paths = list(places(content))

    @FUZZ
    @given(st.data())
    def check(data):
        changed = json.loads(json.dumps(content))
        if paths and data.draw(st.booleans()):
            *parents, last = data.draw(st.sampled_from(paths))
            node = changed
            for key in parents:
                node = node[key]
            if isinstance(node, dict) and data.draw(st.booleans()):
                del node[last]
            else:
                node[last] = data.draw(JSON)
        else:
            changed = data.draw(JSON)
        text = json.dumps(changed)
        (folder / file).write_text(text[: -data.draw(st.integers(0, 1)) or None])
        command = COMMANDS[name]
        assert_success_or_one_line(command.module, [*command.needed, *more])

    check()


@pytest.mark.parametrize("name", COMMANDS)
def test_as_it_should_be_every_command_gets_to_its_work(name, folder):
    """Or the tests above would pass on commands that refuse everything."""
    fill(folder)
    command = COMMANDS[name]
    code, said = outcome(command.module, command.needed)
    assert (code, said) == (1, "error: the work begins\n")


def test_choices_of_the_benchmark_are_all_there_are():
    assert set(typing.get_args(kernels_bench.Tpu)) == set(aot.TPUS)
    assert set(typing.get_args(kernels_bench.Gpu)) == set(aot.GPUS)
    assert set(typing.get_args(kernels_bench.Family)) == set(TABULATED)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("kernels.bench", ["--tpu-chips", "v9"], "--tpu-chips"),
        ("lm.generate", ["--seed", "99999999999999999999"], "seed=99999999999999999999 must be in"),
        ("lra.train", ["--seed", "99999999999999999999"], "seed=99999999999999999999 must be in"),
        ("lra.train", ["--set", "preset=../../x"], "--preset"),
        ("lra.train", ["--set", "lengths=[]"], "lengths=() must be increasing"),
        ("lra.train", ["--lengths", "5"], "would cut rows of up to 199 tokens"),
        ("lra.train", ["--run-dir", ""], "--run-dir '' must name a file or a folder"),
        ("lra.train", ["--data.validation", "0"], "leaves nothing for train.select"),
        ("lm.train", ["--set", "model.vocabulary_size=256"], "vocabulary_size=256 is too small"),
        ("lm.train", ["--results-dir="], "--results-dir '' must name"),
        ("lra.eval", ["--steps", "3"], "Unrecognized options: --steps, 3"),
        ("lra.train", ["--results-dir", "text.txt/x"], "text.txt is a file; name a folder"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(name, more, message, folder):
    fill(folder)
    command = COMMANDS[name]
    code, said = outcome(command.module, [*command.needed, *more])
    assert code == 2
    assert message in said
    assert said.count("\n") == 1
