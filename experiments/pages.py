"""Fills the tables of the documentation from the committed results and from the code.

    python -m experiments.pages            rewrites README.md and the pages of docs/
    python -m experiments.pages --check    names the pages that are not current; 1 if any is

A table stands between two comments, `<!-- table NAME: begin -->` and the same with `end`; some
names have an argument, as in `benchmarks linear_scan`. No figure between them is typed.
"""

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import places
from experiments.command_line import run_command
from experiments.kernels import aot
from experiments.kernels.results import STATIC, TIMED
from experiments.lm import table as lm
from experiments.recall import report as recall_report
from experiments.recall.findings import check
from experiments.recall.result import read_evaluations, read_results
from pallas_kernels.tools.families import TABULATED
from seqmodels.mixers import REGISTRY, build
from seqmodels.models.published import PUBLISHED
from seqmodels.ranges import Checked
from seqmodels.training.metrics import write_atomically

REPOSITORY = places.ROOT
RESULTS = REPOSITORY / "experiments" / "results"
WIDTH = 2048
"""Width of the layers whose states are compared."""
LENGTHS = (4_096, 1_048_576)
"""Tokens after which they are."""

_MARKED = re.compile(r"(<!-- table (.+?): begin -->\n)(.*?)(<!-- table \2: end -->)", re.DOTALL)

Rows = Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Whether pages are written or only compared."""

    check: bool = False
    """Only name the pages that are not current; exits with 1 if there are any."""

    traceback: bool = False
    """Show the whole traceback of an error."""


def markdown(names: Sequence[str], rows: Rows, numbers: int = 0) -> str:
    """A table; the last `numbers` columns are aligned to the right."""
    rules = ["---"] * (len(names) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, rules, *rows))


def read(path: str) -> Any:
    """A committed result."""
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


@functools.cache
def cells() -> aot.Cells:
    """What is known of the named shapes."""
    return aot.load(aot.RESULTS)


@functools.cache
def support_matrix() -> str:
    """What became of the named shapes of every family on every chip."""
    return aot.matrix(cells())


def support(family: str) -> str:
    """The row of one family."""
    head, rules, *rows = support_matrix().splitlines()
    return "\n".join((head, rules, *(row for row in rows if f"`{family}`" in row)))


def shapes(family: str) -> str:
    """The named shapes of a family, with what is known of their cost on chips that are absent."""
    now = aot.digests([family])

    def figure(name: str, mode: str, chip: str) -> str:
        key = aot.Key(family, name, mode, chip)
        state = aot.state(key, cells(), now)
        return aot.describe(cells()[key]) if state == aot.PASSED else state

    columns = [(mode, chip) for chip in ("v5e", "h100") for mode in aot.modes(chip)]
    rows = [
        [f"`{name}`", shape.source, f"{shape.batch} x {shape.length:,}"]
        + [figure(name, mode, chip) for mode, chip in columns]
        for name, shape in TABULATED[family].shapes.items()
    ]
    return markdown(["shape", "source", "B x L", *(f"{c}, {m}" for m, c in columns)], rows)


_DETAILS = ("layout copies", "share of")  # what only the file shows


def benchmarks(name: str) -> str:
    """Rows of a benchmark's file: what was measured, and ratios with their targets."""
    rows = []
    for case in read(f"{name}.json")["cases"]:
        if case["kind"] not in (TIMED, STATIC):
            continue
        shown = (of for of in case["ratios"] if not of.startswith(_DETAILS))
        ratios = "; ".join(_ratio(case, of) for of in shown)
        rows.append([case["case"], case["shape"], case["device"], _measured(case), ratios])
    return markdown(["case", "shape", "device", "measured", "ratio"], rows)


def _measured(case: dict[str, Any]) -> str:
    figures = case["figures"]
    if case["kind"] == STATIC:
        us = figures.get("us", figures.get("static_us"))
        return f"{us:,.0f} us, estimated"
    first = [f"{n.removesuffix(' ms')}: {figures[n]:,.2f} ms" for n in figures if n.endswith(" ms")]
    sizes = {n: figures.get(f"{n} bytes") for n in ("state", "temporary")}
    memory = [f"{name}: {size / 1e6:,.1f} MB" for name, size in sizes.items() if size is not None]
    return "; ".join([*first[:1], *memory])


def mixer_speeds() -> str:
    """Every mixer's layer at one size, and the memory of a model's training step."""
    rows = []
    for case in read("models/mixers-cpu.json")["cases"]:
        figures, ratios = case["figures"], case["ratios"]
        times = [f"{figures[f'{what} ms']:,.0f}" for what in ("forward", "forward+backward")]
        attention = [f"{ratio:.2f} x" for ratio in ratios.values()]
        sizes = [f"{figures[what] / 1e6:,.2f}" for what in ("parameters of a layer", "state bytes")]
        step = f"{figures['bytes of a step'] / 1e9:.1f}"
        link = f"[`{case['case']}`](mixers/{_page_of(case['case'])}#{case['case']})"
        rows.append([link, *times, *attention, *sizes, step])
    titles = [
        "mixer", "forward, ms", "with backward, ms", "x attention", "with backward",
        "parameters, M", "state, MB", "training step, GB",
    ]  # fmt: skip
    return markdown(titles, rows, numbers=7)


def _ratio(case: dict[str, Any], of: str) -> str:
    target = case["targets"].get(of)
    bound = "" if target is None else f" ({target}{'' if case['met'].get(of) else ', missed'})"
    return f"{case['ratios'][of]:.2f} x {of}{bound}"


def machine(name: str) -> str:
    """Where, when and with what a benchmark was run."""
    record = read(f"{name}.json")
    versions = record["versions"]
    return (
        f"{record['cpu']}, {record['cpu_cores']} cores; jax {versions['jax']}; "
        f"{record['started'][:10]}; commit {record['commit'][:7]}; `{record['command']}`"
    )


def mixer_table() -> str:
    """All mixers: a layer's state, and what the committed language models say."""
    trained = read("lm/mixers.json")["rows"]
    times = {case["case"].split(", ")[1]: case for case in read(_TOKENS)["cases"]}
    rows = []
    for name in sorted(REGISTRY):
        if name == "bidirectional":
            continue
        row, case = trained.get(name), times.get(name)
        learned = "-" if row is None else f"{row['bits_per_byte']:.3f}"
        speed = "-" if case is None else _token_times(case)
        link = f"[`{name}`]({_page_of(name)}#{name})"
        rows.append([link, *_states(name), learned, speed])
    states = [f"state bytes at {length:,}" for length in LENGTHS]
    return markdown(["mixer", *states, "bits per byte", "ms a token"], rows, numbers=4)


_TOKENS = "models/token-time-cpu.json"


def _token_times(case: dict[str, Any]) -> str:
    times = [(k.split()[1], v) for k, v in case["figures"].items() if k.endswith(" ms")]
    (first, fast), (last, slow) = times[0], times[-1]
    return f"{fast:.2f} at {first}, {slow:.2f} at {int(last):,}"


def _page_of(name: str) -> str:
    """The page of docs/mixers that has the card of a mixer."""
    for path in sorted((REPOSITORY / "docs" / "mixers").glob("*.md")):
        if f"\n## `{name}`" in path.read_text(encoding="utf-8"):
            return path.name
    raise ValueError(f"no page of docs/mixers has a section for {name}")


def _states(name: str) -> list[str]:
    """Bytes of the default layer's state after `LENGTHS`; a bidirectional layer has none."""
    layer = build(REGISTRY[name][0](), WIDTH)
    if not layer.stateful:
        return ["none"] * len(LENGTHS)
    return [f"{layer.state_bytes(length):,}" for length in LENGTHS]


def state(name: str) -> str:
    """The default layer of one mixer."""
    small, large = _states(name)
    if small == "none":
        return "No state is carried."
    grows = f"{small} bytes after {LENGTHS[0]:,} tokens, {large} after {LENGTHS[1]:,}"
    size = grows if small != large else f"{small} bytes, whatever the length"
    return f"One row of the default layer at a width of {WIDTH:,}: {size}."


def language_models() -> str:
    """The committed comparison of all mixers at equal parameters and tokens."""
    rows = []
    for name, row in lm.ranked(read("lm/mixers.json")):
        speed = row.get("tokens_per_second", row["tokens_per_second_in_training"])
        counts = row["parameters"], speed, *(row["state_bytes"][str(n)] for n in lm.CONTEXTS)
        label = f"`{name}`{lm.COUNTED[lm.objective_of(name)]}"
        rows.append([label, f"{row['bits_per_byte']:.3f}", *(f"{n:,.0f}" for n in counts)])
    states = [f"state bytes at {length:,}" for length in lm.CONTEXTS]
    return markdown(["mixer", "bits per byte", "parameters", "tokens/s", *states], rows, numbers=5)


def sequence_tasks() -> str:
    """The committed runs of Long Range Arena and its kind."""
    rows = []
    for path in sorted((RESULTS / "lra").glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        window = f", window {run['window']}" if run.get("window") else ""
        baseline, trivial = max(run["baselines"].items(), key=lambda item: item[1])
        scores = f"{100 * run['test_accuracy']:.2f} %", f"{100 * trivial:.2f} %"
        counts = run["parameters"], run["steps"], run["wall_seconds"] / 60
        rows.append(
            [
                f"{run['task']}, `{run['model']}`{window}",
                f"[{path.stem}](../{path.relative_to(REPOSITORY)})",
                scores[0],
                f"{scores[1]} ({baseline.replace('_', ' ')})",
                *(f"{count:,.0f}" for count in counts),
            ]
        )
    names = ["run", "file", "test accuracy", "best baseline", "parameters", "steps", "minutes"]
    return markdown(names, rows, numbers=3)


@functools.cache
def recall_results() -> list[dict[str, Any]]:
    """The committed runs of the synthetic tasks."""
    return read_results([RESULTS / "recall"])


def known_results() -> str:
    """What the field knows of recall, and what the committed runs say of it."""
    found = check(recall_results(), read_evaluations([RESULTS / "recall"]))
    rows = [[f"{each.claim} ({each.source})", each.verdict, each.evidence] for each in found]
    return markdown(["known result", "here", "the runs"], rows)


def recall(task: str) -> str:
    """Accuracy on one task, at multiples of the trained length."""
    results = [result for result in recall_results() if result["task"] == task]
    results.sort(key=lambda result: -result["tests"][1]["accuracy"])
    names = recall_report.header(results)[1:]
    rows = []
    for result, (_, mixer, *numbers) in zip(results, recall_report.rows(results), strict=True):
        times = f", read {result['repeats']} times" if result["repeats"] > 1 else ""
        rows.append([f"`{mixer}`{times}", *numbers])
    return markdown(names, rows, numbers=len(names) - 1)


def memory() -> str:
    """The longest row in 4 GiB, by what is computed again."""
    rows = []
    for case in read("models/memory-cpu.json")["cases"]:
        options = ", ".join(f"`{part}`" for part in re.split(r",\s*", case["case"]))
        figures = case["figures"]
        counts = figures["bytes a token"], figures["longest tokens"]
        rows.append([options.replace("`nothing`", "none"), *(f"{n:,.0f}" for n in counts)])
    return markdown(["options", "bytes a token", "longest row"], rows, numbers=2)


def published() -> str:
    """The sizes of published language models that have a configuration."""
    rows = []
    for name, config in PUBLISHED.items():
        stack = config.backbone
        kinds = ", ".join(f"{stack.layout.count(k)} `{k}`" for k in sorted({*stack.layout}))
        rows.append([f"`{name}`", kinds, f"{stack.width:,}", f"{config.vocabulary_size:,}"])
    return markdown(["name", "blocks", "width", "vocabulary"], rows, numbers=2)


TABLES: dict[str, Callable[..., str]] = {
    "support matrix": support_matrix,
    "support": support,
    "shapes": shapes,
    "benchmarks": benchmarks,
    "mixer speeds": mixer_speeds,
    "machine": machine,
    "mixers": mixer_table,
    "state": state,
    "language models": language_models,
    "sequence tasks": sequence_tasks,
    "known results": known_results,
    "recall": recall,
    "memory": memory,
    "published": published,
}
"""By name; the words after it are the arguments."""


def filled(text: str) -> str:
    """A page with what stands between its marks made again.

    Raises:
      ValueError: a table that there is not.
    """

    def fill(found: re.Match[str]) -> str:
        begin, name, _, end = found.groups()
        known = next((n for n in sorted(TABLES, key=len, reverse=True) if name.startswith(n)), None)
        if known is None:
            raise ValueError(f"table {name!r} is unknown; one of {', '.join(TABLES)}")
        return f"{begin}{TABLES[known](*name.removeprefix(known).split())}\n{end}"

    return _MARKED.sub(fill, text)


def pages() -> Iterator[tuple[Path, str, str]]:
    """Each page that has tables, as it is and as it should be."""
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if _MARKED.search(text):
            yield path, text, filled(text)


def rewrite(arguments: Arguments) -> None:
    """Writes the pages that are not current, or names them.

    Raises:
      ValueError: with --check, some are not.
    """
    stale = [(path, text) for path, before, text in pages() if before != text]
    if arguments.check and stale:
        names = ", ".join(str(path.relative_to(REPOSITORY)) for path, _ in stale)
        raise ValueError(f"not current: {names}; run python -m experiments.pages")
    for path, text in stale:
        write_atomically(path, text)
        print(f"rewritten: {path.relative_to(REPOSITORY)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(
        Arguments, rewrite, arguments, description=__doc__, prog="python -m experiments.pages"
    )


if __name__ == "__main__":
    sys.exit(main())
