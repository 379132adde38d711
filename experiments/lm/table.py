"""Compares the registered mixers at equal parameters and equal tokens on one text.

    seqmodels lm table --data book.txt
    seqmodels lm table --data book.txt --mixers mamba2 gla --steps 1000
    seqmodels lm table --print-only

Every causal mixer gets four blocks of mixer and MLP, as wide as makes about a million parameters
(the width is chosen so that the MLP is about twice as wide; the MLP's width then takes up the
rest), and the same batches. The budget is small on purpose: the table says what a mixer learns
first, not what it can learn. JRT reads the first half of each row whole and predicts the second:
its bits per byte are of that half. Hydra and Orchid, which see both sides, learn bytes that are
hidden, 15 of 100: theirs are bits of a hidden byte, and not for comparison with the others.

The table goes to --results-dir as mixers.json and mixers.png after every row; rows that are there
are kept, and a killed row goes on from its checkpoint. Tokens per second are the median over the
training; --speed replaces them by a training step of every mixer that has a row, timed all in turn.
"""

import dataclasses
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from rich.table import Table

from experiments import terminal
from experiments.command_line import run_command
from experiments.errors import UsageError
from experiments.lm import presets
from experiments.lm.presets import ExperimentConfig, ModelSize, Objective
from experiments.lm.run import TextData, load_data, make_task
from experiments.lm.train import train_and_evaluate
from experiments.run import Locations, absolute, check_record, read_object
from seqmodels.config import to_dict
from seqmodels.data import text
from seqmodels.mixers import REGISTRY
from seqmodels.parallel.mesh import make_mesh, put_batch
from seqmodels.ranges import Between, Checked, Count, NonNegative, Positive, Seed, Size
from seqmodels.training.metrics import finite, read_jsonl, write_atomically
from seqmodels.training.run_directory import environment, open_run
from seqmodels.training.state import create_state, optimizer_of
from seqmodels.training.step import make_train_step

PARAMETERS = 1_000_000
LAYERS = 4
CONTEXTS = (256, 65_536)
"""Tokens at which the states are measured."""
OBJECTIVES: dict[str, Objective] = {"jrt": "prefix", "hydra": "mlm", "orchid": "mlm"}
"""What mixers that do not predict every byte are trained for."""
COUNTED: dict[Objective, str] = {"next": "", "prefix": " (second half)", "mlm": " (hidden bytes)"}
"""Whose bits a row counts."""

# What a table that is there must have to be read.
TABLE: dict[str, Any] = {
    "settings": dict[str, Any] | None,
    "rows": dict[str, dict[str, Any]],
    "left_out": dict[str, str],
}
SETTINGS: dict[str, Any] = {
    "steps": Size, "batch_size": Size, "length": Size, "tokens": Size, "layers": Size,
    "learning_rate": Positive,
}  # fmt: skip
ROW: dict[str, Any] = {
    "bits_per_byte": NonNegative, "parameters": Size, "width": Size, "mlp": Size,
    "tokens_per_second_in_training": NonNegative, "state_bytes": dict[str, Any],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    data: Path | None = None
    """A text file; needed to train and to time."""
    mixers: tuple[str, ...] = ()
    """Names of mixers; default: all that are registered."""
    steps: Size = 120
    """Optimizer steps of each mixer."""
    batch_size: Size = 4
    """Rows in a step."""
    length: Size = 256
    """Tokens in a row."""
    learning_rate: Positive = 3e-3
    """Peak learning rate; that of state-space parameters is the presets'."""
    validation: Between = 0.03
    """Share of the text, at its end, for validation."""
    seed: Seed = 0
    """Seed of parameters and data order."""
    runs_dir: Path = Path("runs/lm/table")
    """Where the runs go."""
    results_dir: Path = Path("experiments/results/lm")
    """Where mixers.json and mixers.png go."""
    speed: bool = False
    """Only time training steps of the mixers that have a row."""
    print_only: bool = False
    """Only print the table that is there."""
    progress: bool = True
    """Draw progress bars."""
    traceback: bool = False
    """Show the whole traceback of an error."""


def size_of(mixer: str) -> ModelSize:
    """The widths at which a model of this mixer has about ``PARAMETERS`` parameters.

    Raises:
      UsageError: the mixer is unknown or has no causal mode.
    """

    def count(width: int, mlp: int) -> int:
        size = ModelSize(LAYERS, width, mlp, head=width // 4)
        return presets.parameters(presets.language_model(mixer, size, objective_of(mixer)))

    # Nearly all parameters are in matrices; what is left is for the MLP's width to even out.
    probe = 128
    scale = (PARAMETERS / count(probe, 2 * probe)) ** 0.5
    width = max(16 * round(probe * scale / 16), 32)
    base, step = count(width, 1), LAYERS * (2 * width + 1)
    mlp = max(1 + round((PARAMETERS - base) / step), 1)
    return ModelSize(layers=LAYERS, width=width, mlp=mlp, head=width // 4)


def objective_of(mixer: str) -> Objective:
    """What a mixer is trained for."""
    return OBJECTIVES.get(mixer, "next")


def name_of(mixer: str) -> str:
    """A row's name, and whose bits it counts where that is not every byte's."""
    return mixer + COUNTED[objective_of(mixer)]


def config_of(mixer: str, arguments: Arguments) -> ExperimentConfig:
    """The experiment of one row; raises as ``size_of``."""
    size, objective = size_of(mixer), objective_of(mixer)
    if objective == "prefix":  # half of a row
        size = dataclasses.replace(size, length=arguments.length)
    return ExperimentConfig(
        mixer=mixer,
        preset="table",
        objective=objective,
        data=presets.DataConfig(length=arguments.length, validation=arguments.validation),
        carry_state=False,
        model=presets.language_model(mixer, size, objective),
        train=dataclasses.replace(
            presets.TRAIN,
            group_learning_rates=presets.group_rates(mixer, size, objective),
            learning_rate=arguments.learning_rate,
            steps=arguments.steps,
            warmup_steps=arguments.steps // 10,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            log_every=max(arguments.steps // 20, 1),
            eval_every=arguments.steps,
            checkpoint_every=max(arguments.steps // 3, 1),
            keep=1,
        ),
    )


def settings_of(arguments: Arguments, digest: str) -> dict[str, Any]:
    """What all rows have in common; a table of other settings is another table."""
    names = ("steps", "batch_size", "length", "learning_rate", "validation", "seed")
    return {
        **{name: getattr(arguments, name) for name in names},
        "tokens": arguments.steps * arguments.batch_size * arguments.length,
        "parameters": PARAMETERS,
        "layers": LAYERS,
        "data_sha256": digest,
    }


def read_table(path: Path) -> dict[str, Any]:
    """The table in a file; an empty one if there is none.

    Raises:
      ValueError: the file is not a table.
    """
    if not path.exists():
        return {"settings": None, "rows": {}, "left_out": {}}
    table = read_object(path)
    try:
        check_record(table, TABLE)
        check_record(table["settings"] or {}, SETTINGS if table["rows"] else {})
        for row in table["rows"].values():
            check_record(row, ROW)
            check_record(row["state_bytes"], {str(length): Count for length in CONTEXTS})
    except ValueError as error:
        raise ValueError(f"{path} is not a table of experiments.lm.table: {error}") from error
    return table


def make_row(
    config: ExperimentConfig, data: TextData, arguments: Arguments, locations: Locations
) -> dict[str, Any]:
    """Trains one mixer, or goes on with a run that was killed."""
    run_dir = arguments.runs_dir / config.mixer
    result = train_and_evaluate(
        config,
        data,
        open_run(run_dir, to_dict(config), resume=(run_dir / "config.json").exists()),
        locations=locations,
        show_progress=arguments.progress,
    )
    backbone = config.model.backbone
    speeds = [
        record["tokens_per_second"]
        for record in read_jsonl(run_dir / "metrics.jsonl")
        if record["kind"] == "train"
    ]
    if result["bits_per_byte"] is None:  # each byte that is predicted is a token
        result["bits_per_byte"] = result["validation_loss"] / math.log(2)
    kept = ("bits_per_byte", "validation_loss", "validation_accuracy", "parameters", "tokens",
            "wall_seconds", "compile_seconds", "environment", "config", "curve")  # fmt: skip
    return {
        "width": backbone.width,
        "mlp": backbone.mlp,
        "tokens_per_second_in_training": statistics.median(speeds),
        "state_bytes": {
            str(length): presets.state_bytes(config.model, length) for length in CONTEXTS
        },
        **{name: result[name] for name in kept},
    }


def train_rows(arguments: Arguments, table: dict[str, Any], data: TextData, path: Path) -> None:
    """Fills the table in, and writes it after every row."""
    locations = Locations("", absolute(arguments.data), data.digest)
    for mixer in arguments.mixers or tuple(REGISTRY):
        if mixer in table["rows"]:
            continue
        try:
            config = config_of(mixer, arguments)
        except UsageError as error:
            if mixer in arguments.mixers:
                raise
            table["left_out"][mixer] = str(error).split(";", 1)[0]
            continue
        table["left_out"].pop(mixer, None)
        print(f"{mixer}: {config.model.backbone.width} wide", file=sys.stderr)
        table["rows"][mixer] = make_row(config, data, arguments, locations)
        write(table, path)


def time_rows(arguments: Arguments, table: dict[str, Any], data: TextData, rounds: int = 7) -> None:
    """Tokens per second of a training step: the median, all mixers in turn."""
    mesh = make_mesh(devices=jax.devices()[:1])
    rows, length = arguments.batch_size, arguments.length
    batches = text.train_batches(data.train, length=length, batch_size=rows, prefetch=0)
    batch = put_batch(next(iter(batches)), mesh)
    yes = jnp.asarray(True)
    steps, states = {}, {}
    seconds: dict[str, list[float]] = {}
    for mixer in table["rows"]:
        config = config_of(mixer, arguments)
        task = make_task(config, packed=data.packed)
        steps[mixer] = make_train_step(task, optimizer_of(task, config.train), mesh)
        states[mixer], _ = steps[mixer](create_state(task, config.train, mesh), batch, yes)
        seconds[mixer] = []
    for _ in range(rounds):
        for mixer, step in steps.items():
            jax.block_until_ready(states[mixer])
            start = time.perf_counter()
            states[mixer], metrics = step(states[mixer], batch, yes)
            jax.block_until_ready((states[mixer].params, metrics))
            seconds[mixer].append(time.perf_counter() - start)
    for mixer, times in seconds.items():
        rate = rows * length / statistics.median(times)
        table["rows"][mixer]["tokens_per_second"] = rate
    now, kept = environment(), ("commit", "dirty", "versions", "device", "cpu", "cpu_cores")
    table["speed"] = {
        "what": f"a training step, median of {rounds}, all mixers in turn",
        **{name: now[name] for name in kept},
    }


def write(table: Mapping[str, Any], path: Path) -> None:
    """Writes the table, and its plot beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(finite(table), indent=1, allow_nan=False) + "\n")
    plot(ranked(table), path.with_suffix(".png"))


def ranked(table: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Rows, the best first; behind them those whose bits are not every byte's."""

    def rank(item: tuple[str, Mapping[str, Any]]) -> tuple[str, float]:
        return COUNTED[objective_of(item[0])], item[1]["bits_per_byte"]

    return sorted(table["rows"].items(), key=rank)


def printed(table: Mapping[str, Any]) -> Table:
    """The table for a terminal."""
    settings = table["settings"]
    left_out = "".join(f"\nLeft out: {reason}." for reason in table["left_out"].values())
    shown = terminal.table(
        f"Bits per byte after {settings['tokens']:,} tokens: a small budget",
        f"{settings['steps']} steps of {settings['batch_size']} x {settings['length']} bytes, "
        f"{settings['layers']} blocks, one seed, learning rate {settings['learning_rate']:g}, "
        f"of state-space parameters {presets.SSM_RATE:g}. States of one row, caches in "
        f"bfloat16.{left_out}",
    )
    states = [f"state bytes\nat {length:,}" for length in CONTEXTS]
    names = ("mixer", "bits per\nbyte", "parameters", "width", "MLP", "tokens/s", *states)
    terminal.add_columns(shown, *names, left=("mixer",))
    for mixer, row in ranked(table):
        speed = row.get("tokens_per_second", row["tokens_per_second_in_training"])
        shown.add_row(
            name_of(mixer),
            f"{row['bits_per_byte']:.3f}",
            f"{row['parameters']:,}",
            str(row["width"]),
            str(row["mlp"]),
            f"{speed:,.0f}",
            *(f"{row['state_bytes'][str(length)]:,}" for length in CONTEXTS),
        )
    return shown


def plot(rows: Sequence[tuple[str, Mapping[str, Any]]], path: Path) -> None:
    """Bits per byte and bytes of state, a line for each mixer."""
    figure = Figure(figsize=(9, 0.24 * len(rows) + 1.2), layout="constrained")
    names, places = [name_of(name) for name, _ in rows], range(len(rows))
    bits, states = figure.subplots(1, 2, sharey=True)
    bits.plot([row["bits_per_byte"] for _, row in rows], places, "o")
    bits.set_yticks(places, names)
    bits.invert_yaxis()
    bits.set_xlabel("validation bits per byte")
    for length, marker in zip(CONTEXTS, "ox", strict=True):
        sizes = [row["state_bytes"][str(length)] for _, row in rows]
        states.plot(sizes, places, marker, fillstyle="none", label=f"at {length:,} tokens")
    states.set_xscale("log")
    states.set_xlabel("bytes of state")
    figure.legend(loc="outside upper right", ncols=len(CONTEXTS))
    for axes in (bits, states):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def run(arguments: Arguments) -> None:
    """Fills in, times or prints the table.

    Raises:
      ValueError, OSError, TrainingError: with a message for the user.
    """
    path = arguments.results_dir / "mixers.json"
    table = read_table(path)
    if not arguments.print_only:
        if arguments.data is None:
            raise UsageError("--data is needed, e.g. --data book.txt; or --print-only")
        for mixer in arguments.mixers:
            presets.mixer_config(mixer, presets.SIZES["cpu"], objective_of(mixer))
        config = presets.DataConfig(length=arguments.length, validation=arguments.validation)
        data = load_data(config, arguments.data)
        digest = hashlib.sha256(arguments.data.expanduser().read_bytes()).hexdigest()
        settings = settings_of(arguments, digest)
        if table["settings"] not in (None, settings):
            raise UsageError(
                f"{path} is a table of other settings ({table['settings']}); "
                "choose another --results-dir, or move it away"
            )
        table["settings"], table["data"] = settings, arguments.data.name
        if arguments.speed:
            time_rows(arguments, table, data)
            write(table, path)
        else:
            train_rows(arguments, table, data, path)
            write(table, path)
    if not table["rows"]:
        raise ValueError(f"no rows in {path}; make them with --data")
    terminal.console().print(printed(table))
    terminal.say(f"figure: {path.with_suffix('.png')}")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(Arguments, run, arguments, description=__doc__, prog="experiments.lm.table")


if __name__ == "__main__":
    sys.exit(main())
