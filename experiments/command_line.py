"""Command lines: parsing, errors of one line, options that change any field of a config."""

import contextlib
import io
import itertools
import json
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

from experiments import terminal
from experiments.commands import as_typed, typed
from experiments.errors import UsageError
from seqmodels import ranges
from seqmodels.training.errors import TrainingError

Config = TypeVar("Config")
Arguments = TypeVar("Arguments")


def run_command(
    kind: type[Arguments],
    action: Callable[..., None],
    arguments: Sequence[str] | None,
    *,
    description: str | None,
    prog: str,
    config_fields: bool = False,
    **options: Any,
) -> int:
    """Parses a command line and acts; errors the user can act on become one line on stderr.

    Args:
      kind: the command's arguments; with a field ``traceback``, which asks for the whole traceback
        of an error as well.
      action: the program, called with the arguments.
      arguments: the command line; None for that of the process.
      description: for the help.
      prog: the module of the command, "experiments.lra.train"; the help has it as it was typed.
      config_fields: ``action`` takes the options that ``kind`` does not know too, which are to
        change the fields of a config, see ``changed``.
      options: more of ``tyro.cli``'s.

    Returns:
      The exit code: 0, or the error's.
    """
    show_traceback = False
    try:
        parsed, rest = parse(
            kind,
            arguments,
            description=description and terminal.help_text(as_typed(description)),
            prog=prog,
            strict=not config_fields,
            **options,
        )
        show_traceback = getattr(parsed, "traceback", False)
        action(parsed, rest) if config_fields else action(parsed)
    except (
        ValueError, OSError, MemoryError, TrainingError, NotImplementedError,
        jax.errors.JaxRuntimeError,
    ) as error:  # fmt: skip
        if show_traceback:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except ModuleNotFoundError as error:
        if show_traceback:
            traceback.print_exc()
        print(
            f"error: this needs {error.name}, which is not installed: pip install {error.name}, "
            "or 'seqmodels[dev]' for all that comparisons need",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


def parse(
    kind: type[Arguments],
    arguments: Sequence[str] | None,
    *,
    prog: str,
    strict: bool = False,
    help_option: str = "--help",
    **options: Any,
) -> tuple[Arguments, list[str]]:
    """``tyro.cli`` whose complaints are one line: the arguments, and the options left over.

    Args:
      kind: the dataclass to make.
      arguments: the command line; None for that of the process.
      prog: the module of the command.
      strict: refuse options that ``kind`` does not know.
      help_option: which shows the options, for messages.
      options: of ``tyro.cli``.

    Raises:
      UsageError: what tyro says of the command line, or an empty path.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    _refuse_empty_paths(kind, given)
    complaint = io.StringIO()
    options["prog"] = typed(prog) if prog else None
    try:
        with contextlib.redirect_stderr(complaint):
            if strict:
                return tyro.cli(kind, args=given, **options), []
            return tyro.cli(kind, args=given, return_unknown_args=True, **options)
    except SystemExit as exit:
        if not exit.code:  # --help
            raise
        said = _one_line(complaint.getvalue()).removeprefix("Error parsing ")
        said = said.replace(f"{kind.__name__}: ", "").rstrip(".")
        raise UsageError(f"{said}; see {help_option}") from None


def _refuse_empty_paths(kind: type, arguments: Sequence[str]) -> None:
    """``Path("")`` is the current directory, which is not what an empty variable means."""
    paths = {f"--{name}" for name, hint in ranges.hints(kind).items() if Path in _members(hint)}
    for option, value in itertools.zip_longest(arguments, arguments[1:]):
        name, equals, inline = option.partition("=")
        if name.replace("-", "_").replace("__", "--", 1) in paths and (
            (equals and not inline) or (not equals and value == "")
        ):
            raise UsageError(f"{name} '' must name a file or a folder")


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if ranges.is_union(hint) else (hint,)


def _one_line(box: str) -> str:
    """The first paragraph of what tyro draws a box around, and the option it suggests."""
    lines = [line.strip("\u2502| ") for line in box.splitlines()[1:]]  # without the title
    borders = "\u2500\u2570\u256f-"  # dashes where the terminal has no others
    while lines and not lines[0].strip(borders):
        del lines[0]
    ends = [number for number, line in enumerate(lines) if not line.strip(borders)]
    text = " ".join(lines[: ends[0]] if ends else lines)
    if "Perhaps you meant:" in lines:
        options = lines[lines.index("Perhaps you meant:") + 1 :]
        suggested = next((line for line in options if line.startswith("--")), None)
        text += f". Perhaps you meant {suggested}" if suggested else ""
    return text


def changed(config: Config, options: Sequence[str], *, prog: str = "") -> Config:
    """The config with the fields changed that options name, e.g. ``["--train.steps", "10"]``.

    All at once: what the fields must have in common is checked at the end.

    Raises:
      UsageError: there is no such field, or the value does not fit it.
    """
    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return parse(
        type(config),
        options,
        prog=prog,
        strict=True,
        help_option="--help-fields",
        default=config,
        config=markers,
    )[0]


def as_options(settings: Sequence[str]) -> list[str]:
    """``["train.steps=10"]``, of --set, as the options ``["--train.steps=10"]``.

    A value is JSON, or else plain text; a list becomes as many values.

    Raises:
      UsageError: there is no "=", or the value is an object.
    """
    options = []
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path or path.startswith("-"):
            raise UsageError(f"--set {setting!r} must look like train.learning_rate=0.001")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        if isinstance(value, dict):
            raise UsageError(f"--set {setting!r}: set each field of it, e.g. train.mesh.data=1")
        if isinstance(value, list):
            options += [f"--{path}", *map(str, value)]
        else:
            # As it was written where that is more than JSON keeps: 1e-3, not 0.001.
            plain = value if isinstance(value, str | bool) or value is None else text
            options.append(f"--{path}={plain}")
    return options
