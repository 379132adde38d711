"""The commands of `seqmodels`: which module each of them is. Nothing heavy is imported here."""

import re
import sys
from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    """A command.

    Attributes:
      summary: what it does, in a line.
      arguments: the dataclass of its module that has its options.
    """

    summary: str
    arguments: str = "Arguments"


class Group(NamedTuple):
    """Commands on one subject, each in the module `experiments.<group>.<command>`."""

    summary: str
    commands: dict[str, Command]


GROUPS = {
    "lra": Group(
        "Long Range Arena, and tasks of its kind",
        {
            "train": Command("train one model on one task, test it, write the result"),
            "sweep": Command("train a grid of models, tasks and seeds"),
            "data": Command("prepare and check a task's data, draw samples"),
            "eval": Command("test a checkpoint"),
            "baselines": Command("what predictors without a sequence model reach", "Args"),
            "report": Command("one page of our results beside the published ones"),
        },
    ),
    "lm": Group(
        "language models over bytes",
        {
            "train": Command("train a language model on a text"),
            "eval": Command("bits per byte of a text"),
            "finetune": Command("go on training a published checkpoint"),
            "generate": Command("go on with a prompt"),
            "table": Command("every causal mixer in the same model, compared"),
        },
    ),
    "recall": Group(
        "synthetic tasks: recall, copying, state tracking",
        {
            "train": Command("train one mixer on one task, test it on longer rows"),
            "sweep": Command("train a grid of mixers and sizes of their states"),
            "eval": Command("read the context twice, keep a state from collapsing"),
            "report": Command("accuracy against bytes of state and against length"),
        },
    ),
    "kernels": Group(
        "the sequence operators",
        {
            "bench": Command("time a family of kernels against plain JAX", "BenchConfig"),
            "aot": Command("compile every named shape for chips that are not here", "AotConfig"),
            "between": Command("time the portable path in two checkouts", "BetweenConfig"),
        },
    ),
    "models": Group(
        "layers and whole models",
        {"bench": Command("time them, and what rows fit into memory", "ModelBenchConfig")},
    ),
    "scaling": Group(
        "rows split over many chips",
        {"report": Command("what moves between chips, what each of them holds", "ScalingConfig")},
    ),
}

ALONE = {
    "doctor": Command("check this installation: versions, devices, a test of each op"),
    "gpu": Command("check, time and train on this machine's GPU: 12 minutes"),
    "completion": Command("print a script that completes commands with the Tab key"),
}
"""Commands without a group, in the module `experiments.<command>`."""

MODULES: dict[tuple[str, ...], str] = {
    **{(name,): f"experiments.{name}" for name in ALONE},
    **{
        (group, name): f"experiments.{group}.{name}"
        for group, (_, commands) in GROUPS.items()
        for name in commands
    },
}
"""The module of each command, by the words that are typed."""


def launcher() -> str | None:
    """How this process was started: `seqmodels`, `python -m seqmodels`; None: as neither."""
    path = Path(sys.argv[0])
    if path.stem == "seqmodels":
        return "seqmodels"
    return "python -m seqmodels" if path.parts[-2:] == ("seqmodels", "__main__.py") else None


def typed(module: str) -> str:
    """The command in a module as the user types it.

    `seqmodels lra train` or, if this process runs the module itself,
    `python -m experiments.lra.train`.
    """
    start = launcher()
    return " ".join([start, *module.split(".")[1:]]) if start else f"python -m {module}"


def as_typed(text: str) -> str:
    """A text with each `seqmodels lra train` in it as the user types it."""
    words = "|".join(" ".join(command) for command in MODULES)
    return re.sub(
        rf"\bseqmodels ({words})\b",
        lambda found: typed(f"experiments.{found[1].replace(' ', '.')}"),
        text,
    )
