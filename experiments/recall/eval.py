"""Tests a trained model in other ways than it was trained in.

    seqmodels recall eval --checkpoint runs/recall/mqar-gla-16-cpu-seed0 --repeats 1 2
    seqmodels recall eval --checkpoint runs/recall/passkey-mamba2-16-cpu-seed0 \\
        --decay 1.0 0.99 0.95 --insert 1.0 0.5 --norm 1 4 16 --window 64 128

--repeats: how often the context is read before the question. "Just read twice" (JRT-Prompt, Arora
et al. 2024) is 2: a recurrent model that knows the question's kind, or the first list, reads the
second time for what matters. Tasks that ask while they go on have no context to repeat.

--decay, --insert, --norm and --window are the three ways of Chen et al. 2024 (Stuffed Mamba) to
keep a state from collapsing beyond the trained length, without training; only mamba2 has them.
Every --decay is tried with every --insert: factors of what is kept and of what is put in. --norm is
the largest norm of a head's state, --window the number of tokens whose state is read.

A table goes to the terminal, and with --output the numbers to a JSON file.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments import terminal
from experiments.command_line import run_command
from experiments.errors import UsageError
from experiments.recall.experiment import ExperimentConfig
from experiments.recall.run import load_trained, predictor, score_at
from seqmodels.mixers import Mamba2Config
from seqmodels.mixers.state_collapse import ForgetMore, Mitigation, NormaliseState, WindowState
from seqmodels.models import LanguageModelConfig
from seqmodels.ranges import Checked, Portion, Positive, Size
from seqmodels.training.metrics import finite, write_atomically
from seqmodels.training.run_directory import environment

PROG = "experiments.recall.eval"


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    checkpoint: Path
    """A run directory of `seqmodels recall train`, its checkpoints/ or one step in there."""
    multiples: tuple[Size, ...] = ()
    """Lengths, as multiples of the trained one; default: those of the run."""
    repeats: tuple[Size, ...] = (1,)
    """How often the context stands in a row."""
    decay: tuple[Portion, ...] = ()
    """mamba2: factors of the decay of every step."""
    insert: tuple[Portion, ...] = ()
    """mamba2: factors of every input of the state."""
    norm: tuple[Positive, ...] = ()
    """mamba2: largest norms of a head's state."""
    window: tuple[Size, ...] = ()
    """mamba2: tokens whose state is read."""
    output: Path | None = None
    """A JSON file for the numbers."""
    traceback: bool = False
    """Show the whole traceback of an error."""


def mitigations(arguments: Arguments) -> list[Mitigation | None]:
    """None, the model as it is, and what the command line asks for."""
    found: list[Mitigation | None] = [None]
    if arguments.decay or arguments.insert:
        pairs = itertools.product(arguments.decay or (1.0,), arguments.insert or (1.0,))
        found += [ForgetMore(*pair) for pair in pairs if pair != (1.0, 1.0)]
    found += [NormaliseState(limit) for limit in arguments.norm]
    return found + [WindowState(tokens) for tokens in arguments.window]


def mitigated(model: LanguageModelConfig, mitigation: Mitigation | None) -> LanguageModelConfig:
    """The model with the mitigation in all of its Mamba-2 layers.

    Raises:
      UsageError: it has none.
    """
    if mitigation is None:
        return model
    mixers = model.backbone.mixers
    if not any(isinstance(mixer, Mamba2Config) for mixer in mixers):
        raise UsageError(
            f"--decay, --insert, --norm and --window are for mamba2, the run has "
            f"{', '.join(mixer.mixer for mixer in mixers)}; leave them out"
        )
    changed = tuple(
        dataclasses.replace(mixer, mitigation=mitigation)
        if isinstance(mixer, Mamba2Config)
        else mixer
        for mixer in mixers
    )
    return dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, mixers=changed))


def describe(mitigation: Mitigation | None) -> str:
    """``decay 0.9, insert 1``."""
    if mitigation is None:
        return "as trained"
    if isinstance(mitigation, ForgetMore):
        return f"decay {mitigation.decay:g}, insert {mitigation.insert:g}"
    if isinstance(mitigation, NormaliseState):
        return f"norm {mitigation.limit:g}"
    return f"window {mitigation.tokens}"


def evaluate(arguments: Arguments) -> None:
    """Tests, prints and writes.

    Raises:
      ValueError, OSError, TrainingError: with a message for the user.
    """
    trained = load_trained(arguments.checkpoint)
    config = trained.config
    if arguments.multiples:
        multiples = tuple(dict.fromkeys((1, *arguments.multiples)))
        config = dataclasses.replace(config, multiples=multiples)
    models = [mitigated(config.model, each) for each in mitigations(arguments)]  # all are possible
    tests = list(scores(arguments, config, models, trained.variables))
    wanted = arguments.multiples or tuple(config.tests())
    terminal.say(f"{config.name}, step {trained.step}: accuracy at multiples of the trained length")
    view = terminal.table()
    terminal.add_columns(view, "model", "context", *(f"{m} x" for m in wanted), left=("model",))
    for test in tests:
        times = "once" if test["repeats"] == 1 else f"{test['repeats']} times"
        cells = (test["tests"].get(str(m)) for m in wanted)
        shown = ("-" if cell is None else f"{cell['accuracy']:.3f}" for cell in cells)
        view.add_row(test["model"], times, *shown)
    terminal.console().print(view)
    if arguments.output is not None:
        write(arguments.output, config, trained.step, tests)


def scores(
    arguments: Arguments,
    config: ExperimentConfig,
    models: list[LanguageModelConfig],
    variables: Any,
) -> Iterator[dict[str, Any]]:
    """One record for each model and number of repeats, with the score at each multiple."""
    wanted = arguments.multiples or config.multiples
    for mitigation, model in zip(mitigations(arguments), models, strict=True):
        predict = predictor(model)
        for repeats in arguments.repeats:
            yield {
                "model": describe(mitigation),
                "repeats": repeats,
                "tests": {
                    str(multiple): dataclasses.asdict(
                        score_at(config, predict, variables, multiple, data, repeats)
                    )
                    for multiple, data in config.tests().items()
                    if multiple in wanted
                },
            }


def write(path: Path, config: ExperimentConfig, step: int, tests: list[dict[str, Any]]) -> None:
    """Writes the numbers, with what they are of."""
    now, kept = environment(), ("commit", "dirty", "versions", "device", "cpu", "cpu_cores")
    record = {
        "run": config.name,
        "task": config.task,
        "mixer": config.mixer,
        "size": config.size,
        "seed": config.train.seed,
        "chance": config.data.chance,
        "step": step,
        "evaluations": tests,
        "environment": {name: now[name] for name in kept},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(finite(record), indent=1, allow_nan=False) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(Arguments, evaluate, arguments, description=__doc__, prog=PROG)


if __name__ == "__main__":
    sys.exit(main())
