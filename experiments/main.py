"""`seqmodels`: finds the command that is asked for and runs it; imports no other."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence

import seqmodels
from experiments.commands import ALONE, GROUPS, MODULES, Command, launcher
from experiments.errors import UsageError, check_name

ABOUT = """\
Long-sequence models in JAX: train, test and measure them.

  {start} doctor
  {start} lra train --task listops --model s5 --preset cpu
  {start} lm train --data book.txt --mixer mamba2 --preset cpu
  {start} lm generate --checkpoint runs/lm/mamba2-cpu-seed0
  {start} recall train --task mqar --mixer gla --preset cpu
  {start} lra report"""

EXIT_CODES = """\
exit codes:
  0    done
  1    an error, or a check that found something wrong
  2    a wrong command line
  3    the loss was not finite
  130  interrupted by Ctrl-C; training leaves a checkpoint to --resume from
  143  stopped by SIGTERM; likewise"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; None for that of the process. Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except UsageError as error:
        print(f"error: {error}; see {_start()} --help", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # while modules are imported; later the command sees to it
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone: `seqmodels --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(words: list[str]) -> int:
    first, *rest = words or [""]
    if first in ("-h", "--help"):
        print(overview())
        return 0
    if first == "--version":
        print(f"seqmodels {seqmodels.__version__}")
        return 0
    if not first:
        raise UsageError(f"name a command: {', '.join([*ALONE, *GROUPS])}")
    check_name("command", first, [*ALONE, *GROUPS])
    name: tuple[str, ...] = (first,)
    if first in GROUPS:
        commands = GROUPS[first].commands
        second, *rest = rest or [""]
        if second in ("-h", "--help"):
            print(group_help(first))
            return 0
        if not second:
            raise UsageError(f"{first}: name one of {', '.join(commands)}")
        check_name(f"{first} command", second, commands)
        name = (first, second)
    return importlib.import_module(MODULES[name]).main(rest)


def overview() -> str:
    """What --help says."""
    start = _start()
    usage = f"usage: {start} COMMAND [options]\n       {start} --version"
    lines = _listed("", ALONE)
    for group, (summary, commands) in GROUPS.items():
        lines += ["", f"  {group}: {summary}", *_listed(f"{group} ", commands)]
    listed = "commands:\n" + "\n".join(lines)
    more = f"`{start} COMMAND --help` explains a command, with examples."
    return "\n\n".join([usage, ABOUT.format(start=start), listed, more, EXIT_CODES])


def group_help(group: str) -> str:
    """What GROUP --help says."""
    summary, commands = GROUPS[group]
    start = f"{_start()} {group}"
    return "\n".join(
        [
            f"usage: {start} COMMAND [options]",
            "",
            f"{summary[:1].upper()}{summary[1:]}.",
            "",
            *_listed("", commands),
            "",
            f"`{start} COMMAND --help` explains a command, with examples.",
        ]
    )


def _listed(group: str, commands: Mapping[str, Command]) -> list[str]:
    return [f"  {group + name:<17}{command.summary}" for name, command in commands.items()]


def _start() -> str:
    return launcher() or "seqmodels"


if __name__ == "__main__":
    sys.exit(main())
