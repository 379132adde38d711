"""Prints a script that completes commands, options and names with the Tab key.

    source <(seqmodels completion bash)                     # in ~/.bashrc
    source <(seqmodels completion zsh)                      # in ~/.zshrc, after compinit
    seqmodels completion fish > ~/.config/fish/completions/seqmodels.fish

The script holds every word itself, so that Tab is quick: print it again after an upgrade. Where an
option has no names to choose from, files are completed.
"""

import dataclasses
import importlib
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import tyro

from experiments.command_line import run_command
from experiments.commands import ALONE, GROUPS, MODULES
from experiments.kernels import aot
from experiments.lm import presets as lm_presets
from experiments.lra import experiment
from experiments.recall import mixers, presets
from pallas_kernels.tools.families import FAMILIES, TABULATED
from seqmodels import ranges
from seqmodels.ranges import Checked

Options = dict[str, tuple[str, ...] | None]
"""The options and other words of a command, each with the values that may follow it: none after a
flag, None where it is a file or free text."""


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """bash, zsh or fish."""
    traceback: bool = False
    """Show the whole traceback of an error."""


def complete(arguments: Arguments) -> None:
    """Prints the script."""
    commands = {words: options(words) for words in MODULES}
    print({"bash": bash, "zsh": zsh, "fish": fish}[arguments.shell](commands))


def options(words: tuple[str, ...]) -> Options:
    """What may follow a command, read from the declaration of its arguments."""
    *group, name = words
    command = GROUPS[group[0]].commands[name] if group else ALONE[name]
    module = importlib.import_module(MODULES[words])
    found: Options = {"--help": (), **dict(_options(getattr(module, command.arguments)))}
    known = _names(group[0] if group else "")
    return {word: known.get(word) if values is None else values for word, values in found.items()}


def _options(kind: type, prefix: str = "--") -> Iterator[tuple[str, tuple[str, ...] | None]]:
    for name, hint in ranges.hints(kind).items():
        option = prefix + name.replace("_", "-")
        if hint is bool:
            yield option, ()
            yield f"{prefix}no-{name.replace('_', '-')}", ()
        elif dataclasses.is_dataclass(hint):
            yield from _options(typing.cast(type, hint), f"{option}.")
        elif positional := list(_positional(hint)):
            yield from ((word, ()) for word in positional)
        else:
            yield option, tuple(_choices(hint)) or None


def _positional(hint: Any) -> Iterator[str]:
    """The words that are given without an option: choices, and names of subcommands."""
    if typing.get_origin(hint) is typing.Annotated:
        inner, *markers = typing.get_args(hint)
        positional: Any = tyro.conf.Positional
        if positional[inner] == hint:
            yield from _choices(inner)
        yield from (marker.name for marker in markers if getattr(marker, "name", None))
    elif ranges.is_union(hint):
        for member in typing.get_args(hint):
            yield from _positional(member)


def _choices(hint: Any) -> Iterator[str]:
    """The texts that a declaration lists, at any depth."""
    if typing.get_origin(hint) is Literal:
        yield from (str(value) for value in typing.get_args(hint))
    else:
        for part in typing.get_args(hint):
            yield from _choices(part)


def _names(group: str) -> Mapping[str, tuple[str, ...]]:
    """The names that a group's commands check themselves, by option."""
    values: Mapping[str, Mapping[str, Iterable[str]]] = {
        "": {"ops": FAMILIES},
        "lra": {
            "task": typing.get_args(experiment.Task),
            "model": typing.get_args(experiment.Model),
            "preset": typing.get_args(experiment.Preset),
        },
        "lm": {"mixer": mixers.CAUSAL, "preset": lm_presets.PRESETS},
        "recall": {"task": presets.TASKS, "mixer": mixers.NAMES, "preset": presets.PRESETS},
        "kernels": {"family": TABULATED, "chip": aot.CHIPS, "mode": aot.MODES},
    }
    return {
        option: tuple(names)
        for name, names in values.get(group, {}).items()
        for option in (f"--{name}", f"--{name}s")
    }


def bash(commands: Mapping[tuple[str, ...], Options]) -> str:
    """For bash."""
    groups = [
        f'        {group}) options="{" ".join(commands)} --help" ;;'
        for group, (_, commands) in GROUPS.items()
    ]
    words, values = [], []
    for command, found in commands.items():
        place = ":".join(command)
        words.append(f'        {place}) options="{" ".join(found)}" ;;')
        for option, choices in found.items():
            if choices != ():
                text = FILES if choices is None else " ".join(choices)
                values.append(f'        {place}:{option}) values="{text}" ;;')
    return BASH.format(
        first=" ".join([*ALONE, *GROUPS, "--help", "--version"]),
        alone="|".join(f"2:{name}" for name in ALONE),
        words="\n".join([*groups, *words]),
        values="\n".join(values),
        files=FILES,
    )


FILES = "/"
"""Stands for no words, so that files are completed."""

BASH = """\
# bash completion of seqmodels, made by `seqmodels completion bash`
_seqmodels() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
    local place="" option="" options="{first}" values="" word index
    for ((index = 1; index < COMP_CWORD; index++)); do
        word="${{COMP_WORDS[index]}}"
        case "$index:$place" in
            1:*) place="$word" ;;
            {alone}) ;;
            2:*) place="$place:$word" ;;
        esac
        case "$word" in
            --*) option="$word" ;;
        esac
    done
    case "$place" in
{words}
    esac
    case "$place:$option" in
{values}
    esac
    case "$current:$previous:$values" in
        -*) values="" ;;
        *:"$option":{files}) options="" values="" ;;
        *:"$option":?*) options="" ;;
        *:{files}) values="" ;;
    esac
    COMPREPLY=( $(compgen -W "$values $options" -- "$current") )
}}
complete -o default -F _seqmodels seqmodels"""


def zsh(commands: Mapping[tuple[str, ...], Options]) -> str:
    """For zsh."""
    return f"autoload -U +X bashcompinit && bashcompinit\n{bash(commands)}"


def fish(commands: Mapping[tuple[str, ...], Options]) -> str:
    """For fish, whose lines are the conditions under which a word is offered."""
    lines = ["# fish completion of seqmodels, made by `seqmodels completion fish`"]
    start = "complete -c seqmodels -n"
    none = "test (count (commandline -opc)) -eq 1"
    summaries: dict[str, str] = {name: command.summary for name, command in ALONE.items()}
    summaries |= {group: summary for group, (summary, _) in GROUPS.items()}
    for name, summary in summaries.items():
        lines.append(f'{start} "{none}" -f -a {name} -d "{summary}"')
    for group, (_, listed) in GROUPS.items():
        within = f"test (count (commandline -opc)) -eq 2; and __fish_seen_subcommand_from {group}"
        lines += [
            f'{start} "{within}" -f -a {name} -d "{command.summary}"'
            for name, command in listed.items()
        ]
    for words, found in commands.items():
        within = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in words)
        for word, values in found.items():
            what = f"-l {word[2:]}" if word.startswith("--") else f"-f -a {word}"
            choices = " -r" if values is None else f' -x -a "{" ".join(values)}"' if values else ""
            lines.append(f'{start} "{within}" {what}{choices}')
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        Arguments, complete, arguments, description=__doc__, prog="experiments.completion"
    )


if __name__ == "__main__":
    sys.exit(main())
