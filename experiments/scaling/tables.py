"""The report's tables, from its cells."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.scaling import step
from experiments.scaling.cells import Cells
from experiments.scaling.collectives import DIRECTIONS
from experiments.scaling.programs import EXCHANGES, WIDTH, Key
from seqmodels.parallel.strategies import strategy_of

HBM = {"v5e": 15.75 * 2**30, "v5p": 95.0 * 2**30}
"""Bytes of a chip that its compiler plans with."""
LAYERS = 24
"""Blocks of the models whose longest row is asked for."""
STATE_BYTES = 16
"""Bytes a parameter takes: itself, its gradient and Adam's two moments, float32."""
RIVALS = ("ring", "ulysses", "gather")
DEFAULT = "default of GLA"


class Fit(NamedTuple):
    """Memory of one block on each of so many chips, ``constant + slope x tokens of the chip``."""

    constant: float
    slope: float
    parameters: int


def fit(cells: Cells, exchange: str, chips: int) -> Fit | None:
    """By least squares over the cells of all lengths and numbers of chips.

    Memory is ``a + b T + c P`` where states are exchanged, and ``a + b T + c T P`` elsewhere, for T
    tokens on each of P chips. None unless there are three cells, and two lengths among them.
    """
    found = [
        (key, cell.bytes)
        for key, cell in sorted(cells.items())
        if (key.exchange, key.chip, key.layers) == (exchange, "v5e", 1) and cell.bytes is not None
    ]
    if len(found) < 3 or len({key.tokens for key, _ in found}) < 2:
        return None
    recurrent = EXCHANGES[exchange].recurrent

    def terms(tokens: float, number: int) -> list[float]:
        return [1.0, tokens, number if recurrent else tokens * number]

    lines = np.array([terms(key.tokens, key.chips) for key, _ in found])
    scale = lines.max(axis=0)
    memory = np.array([size for _, size in found], float)
    a, b, c = np.linalg.lstsq(lines / scale, memory, rcond=None)[0] / scale
    parameters = next(cells[key].figures["parameters"] for key, _ in found)
    if recurrent:
        return Fit(a + c * chips, b, parameters)
    return Fit(a, b + c * chips, parameters)


def stack(
    one: Fit, layers: int, tokens: float, *, state: int = STATE_BYTES, split: int = 1
) -> float:
    """Bytes on each chip of so many blocks, each recomputed in the backward pass.

    One block at its peak, the inputs of the others (bfloat16), and what each parameter takes, over
    ``split`` chips, less the 8 bytes of it and its gradient that the program of one block has.
    """
    inputs = (layers - 1) * tokens * WIDTH * 2
    parameters = one.parameters * (layers * state / split - 8)
    return one.constant + one.slope * tokens + inputs + parameters


def longest(one: Fit, chips: int, *, split: bool = False) -> int:
    """Tokens of the longest row of ``LAYERS`` blocks that fits; 0 where none does."""
    parts = chips if split else 1
    empty = stack(one, LAYERS, 0, split=parts)
    a_token = stack(one, LAYERS, 1, split=parts) - empty
    return max(0, int((HBM["v5e"] - empty) / a_token)) * chips


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    rows = list(rows)
    if not rows:
        return "Not yet compiled."
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def size(number: float | None) -> str:
    """Bytes for people."""
    if number is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"
        number /= 1000
    raise AssertionError


def exchanges(cells: Cells, tokens: int) -> str:
    """Collectives and bytes of each exchange on each number of chips."""
    rows = []
    for name, key in itertools.product(EXCHANGES, _grid(cells, tokens)):
        cell = cells.get(Key(name, *key, tokens, 1))
        if cell is None or key[1] == 1:
            continue
        where = f"{key[1]} {key[0]}"
        if cell.reason:
            rows.append([name, where, cell.reason[:60], "", "", "", ""])
            continue
        said = []
        for direction in DIRECTIONS:
            kinds = [c for c in cell.collectives if c.direction == direction]
            said.append(
                ", ".join(f"{c.count} {c.kind}" for c in kinds if c.kind != "all-reduce") or "none"
            )
            said.append(size(cell.exchanged(direction)))
        reduced = sum(c.bytes for c in cell.collectives if c.kind == "all-reduce")
        memory = size(cell.bytes) + ("" if cell.memory else " (does not fit)")
        rows.append([name, where, *said, size(reduced), memory])
    head = [
        "exchange", "chips", "forward", "bytes", "backward", "bytes", "all-reduce", "memory",
    ]  # fmt: skip
    return _table(head, rows)


def _grid(cells: Cells, tokens: int) -> list[tuple[str, int]]:
    return sorted({(k.chip, k.chips) for k in cells if k.tokens == tokens and k.layers == 1})


def weak_scaling(cells: Cells, tokens: int) -> str:
    """Memory on a chip when the row grows with the chips: of GLA by default, and each exchange."""
    rows = []
    for name in (DEFAULT, *EXCHANGES):
        found = {}
        for chips in (4, 16, 64, 256):
            taken = strategy_of("linear_attention", chips) if name == DEFAULT else name
            if (key := Key(taken, "v5e", chips, tokens, 1)) in cells:
                found[chips] = cells[key].bytes
        known = [value for value in found.values() if value]
        if len(known) < 2:
            continue
        grows = f"{100 * (max(known) / min(known) - 1):.1f} %"
        rows.append([name, *(size(found.get(c)) for c in (4, 16, 64, 256)), grows])
    return _table(["exchange", "4", "16", "64", "256", "largest over smallest"], rows)


def two_lengths(cells: Cells) -> str:
    """Bytes that the recurrent mixers exchange, at two lengths of the row."""
    rows = []
    for name, exchange in EXCHANGES.items():
        if not exchange.recurrent:
            continue
        for chips in (4, 16, 64, 256):
            pair = sorted(
                (key.tokens, cell)
                for key, cell in cells.items()
                if (key.exchange, key.chip, key.chips, key.layers) == (name, "v5e", chips, 1)
                and not cell.reason
            )
            if len(pair) < 2:
                continue
            values = [sum(c.exchanged(d) for d in DIRECTIONS) for _, c in pair]
            equal = "equal" if len(set(values)) == 1 else "differ"
            rows.append(
                [
                    name,
                    chips,
                    *(f"{size(v)} at {t * chips}" for v, (t, _) in zip(values, pair, strict=True)),
                    equal,
                ]
            )
    return _table(["exchange", "chips", "tokens of the row", "and twice as many", ""], rows)


def lengths(cells: Cells) -> str:
    """The longest row of each model on each number of chips."""
    rows = []
    for name in EXCHANGES:
        if fit(cells, name, 1) is None:
            continue
        line: list[str] = []
        for chips in (1, 4, 64, 256):
            one = fit(cells, name, chips)
            whole = "-" if one is None else f"{longest(one, chips):,}"
            parts = "-" if one is None else f"{longest(one, chips, split=True):,}"
            line.append(whole if chips == 1 or one is None else f"{whole} ({parts})")
        rows.append([name, EXCHANGES[name].mixer.mixer, *line])
    return _table(["exchange", "mixer", "1 chip", "4", "64", "256"], rows)


def linearity(cells: Cells) -> str:
    """Memory of two blocks as compiled, beside what one block says of two."""
    rows = []
    for key, cell in sorted(cells.items()):
        if key.layers != 2 or cell.bytes is None:
            continue
        one = fit(cells, key.exchange, key.chips)
        if one is None:
            continue
        said = stack(one, 2, key.tokens, state=8)
        rows.append(
            [key.exchange, key.chips, size(cell.bytes), size(said), f"{said / cell.bytes:.2f}"]
        )
    return _table(["exchange", "chips", "compiled", "from one block", "ratio"], rows)


def markdown(cells: Cells, steps: dict[str, Any], missing: Sequence[Key] = ()) -> str:
    """The whole report; it names how many cells are still missing."""
    tokens = min((key.tokens for key in cells), default=0)
    failed = [cell for cell in cells.values() if cell.reason]
    parts = [
        "# A row split over many chips",
        "",
        "Static figures of the TPU compiler for chips that are not there: nothing has run. One "
        f"block of width {WIDTH}, forward and backward, bfloat16 activations, one row; each chip "
        f"has {tokens} tokens of it. By `python -m experiments.scaling.report`.",
        "",
        "## What moves",
        "",
        "Collectives as often as they run, and bytes that each chip receives, a layer. ring, "
        "ulysses and gather are the same softmax attention; all_gather, doubling and chain the "
        "same GLA; affine is Gated DeltaNet's state by doubling, halo a window of 1024, "
        "checkpoints RAT's, channels S4's. All-reduces, which sum the gradients of parameters and "
        "give all shards the last state, stand apart. reduce-scatter* is one, of float32 gradients "
        "of what was gathered, that the compiler has made an all-reduce of, twice the bytes.",
        "",
        exchanges(cells, tokens),
        "",
        "## The exchange of states does not grow with the length",
        "",
        two_lengths(cells),
        "",
        "## Memory on each chip when the row grows with the chips",
        "",
        weak_scaling(cells, tokens),
        "",
        f"## The longest row of {LAYERS} blocks on v5e",
        "",
        "Extrapolated: memory of one block is linear in the tokens of a chip and, where all chips "
        "hold something of all others, in their number (least squares over the cells; also for one "
        "chip); a stack whose blocks are recomputed in the backward pass needs one block at its "
        "peak, the inputs of the others, "
        f"and {STATE_BYTES} bytes a parameter (float32, gradient, Adam's moments), here whole on "
        "each chip; in brackets with parameters split over all chips. No embedding, no loss, no "
        "MLP.",
        "",
        lengths(cells),
        "",
        "Two blocks, compiled, against that rule (without Adam's moments):",
        "",
        linearity(cells),
        "",
    ]
    if missing:
        parts += [f"{len(missing)} cells are not yet compiled; the command goes on with them.", ""]
    if failed:
        parts += ["## Refused or failed", ""]
        parts += [f"- {' '.join(map(str, c.key))}: {c.reason}" for c in failed] + [""]
    if steps:
        parts += [
            "## A training step of 1.3 billion parameters on 64 v5e chips",
            "",
            step.table(steps),
            "",
        ]
    return "\n".join(parts)
