"""Known results of the field, each checked against ours: seen, not seen, not told, not run."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Result = Mapping[str, Any]
Results = Sequence[Result]
Verdict = Literal["seen", "not seen", "not told", "not run"]
"""Not told: the runs are there, and would look the same if it were otherwise."""

SOLVED = 0.95
"""Accuracy from which a task counts as solved."""
GAP = 0.1
"""Difference of accuracies that counts as one."""

DECAY = ("gla", "hgrn2", "lightning", "mamba", "mamba2", "retnet")
"""A decayed sum of keys and values, or of inputs, and no delta rule."""
TIME_INVARIANT = ("lru", "s4", "s4d", "s5")
"""The same recurrence at every token."""
DIAGONAL = ("lru", "mamba", "rg_lru", "s4d", "s5")
NOT_SOLVABLE = ("a5", "a5-2steps", "s5", "s5-swaps")
"""Tasks of groups that no diagonal model of a fixed depth tracks: A5, and S5, which contains it."""
FIXED_FILTERS = ("conv", "gated_conv", "hyena", "monarch", "sgconv")
SELECTIVE = ("gla", "mamba", "mamba2")
NEGATIVE = ("deltanet-negative", "gated_deltanet-negative", "kda-negative")


@dataclasses.dataclass(frozen=True)
class Finding:
    """A known result, with the source, and what ours say of it."""

    claim: str
    source: str
    check: Callable[[Results], tuple[Verdict, str]]


@dataclasses.dataclass(frozen=True)
class Checked:
    """A finding, after the check."""

    claim: str
    source: str
    verdict: Verdict
    evidence: str


def accuracy(result: Result, multiple: int = 1) -> float:
    """At a multiple of the trained length."""
    value: float = result["tests"][multiple]["accuracy"]
    return value


def select(results: Results, task: str, mixers: Sequence[str]) -> list[Result]:
    """Results of a task that was neither changed nor read twice, of these mixers."""
    return [
        result
        for result in results
        if result["task"] == task and result["mixer"] in mixers and result["repeats"] == 1
    ]


def best(results: Results) -> Result:
    """The result of the highest accuracy at the trained length."""
    return max(results, key=accuracy)


def named(result: Result, multiple: int = 1) -> str:
    """``gla (16) 0.93``."""
    return f"{result['mixer']} ({result['size']}) {accuracy(result, multiple):.2f}"


def _verdict(seen: bool) -> Verdict:
    return "seen" if seen else "not seen"


def attention_recalls(results: Results) -> tuple[Verdict, str]:
    found = select(results, "mqar", ("attention",))
    if not found:
        return "not run", "needs mqar with attention"
    top = best(found)
    return _verdict(accuracy(top) >= SOLVED), f"{named(top)}, solved is {SOLVED}"


def small_states_saturate(results: Results) -> tuple[Verdict, str]:
    """The smallest state is below the largest by a gap, in the median of the mixers."""
    gains, evidence = [], []
    for mixer in DECAY:
        found = sorted(select(results, "mqar", (mixer,)), key=lambda r: r["state_bytes"])
        if len({result["size"] for result in found}) > 1:
            gains.append(accuracy(found[-1]) - accuracy(found[0]))
            evidence.append(f"{named(found[0])} to {named(found[-1])}")
    if not gains:
        return "not run", "needs mqar with a decay model of two sizes"
    return _verdict(statistics.median(gains) >= GAP), "; ".join(evidence)


def _gains(
    results: Results, tasks: Sequence[str], mixer: str, other: str, multiple: int = 1
) -> tuple[list[float], str]:
    """By how much a mixer is ahead of another on each task, at each size that both have."""
    gains, evidence = [], []
    for task in tasks:
        sizes = {r["size"]: r for r in select(results, task, (other,))}
        for result in select(results, task, (mixer,)):
            rival = sizes.get(result["size"])
            if rival is not None:
                gains.append(accuracy(result, multiple) - accuracy(rival, multiple))
                pair = f"{named(result, multiple)} against {named(rival, multiple)}"
                evidence.append(f"{pair} on {task}")
    return gains, "; ".join(evidence)


def delta_beats_decay(results: Results) -> tuple[Verdict, str]:
    """At each size, of a pair with equal matrices, decays and convolutions (GLA has none)."""
    gains, evidence = _gains(results, ("mqar",), "gated_deltanet", "mamba2")
    if not gains:
        return "not run", "needs mqar with gated_deltanet and mamba2 of one size"
    return _verdict(statistics.mean(gains) >= GAP and min(gains) > -GAP), evidence


def diagonal_fails(results: Results) -> tuple[Verdict, str]:
    """Where some model does not fail."""
    found = [result for task in NOT_SOLVABLE for result in select(results, task, DIAGONAL)]
    if not found:
        return "not run", "needs s5-swaps with a diagonal model"
    top, leader = best(found), best([r for r in results if r["task"] in NOT_SOLVABLE])
    evidence = f"the best of {len(found)}: {named(top)} on {top['task']}"
    if accuracy(leader) < SOLVED:
        return "not told", f"{evidence}; of all: {named(leader)} on {leader['task']}"
    return _verdict(accuracy(top) < SOLVED - GAP), evidence


def negative_tracks(results: Results) -> tuple[Verdict, str]:
    """A swap is one reflection, an element of A5 is two."""
    found = [result for task in NOT_SOLVABLE for result in select(results, task, NEGATIVE)]
    if not found:
        return "not run", "needs s5-swaps with a delta rule with negative eigenvalues"
    top = best(found)
    evidence = f"the best of {len(found)}: {named(top)} on {top['task']}"
    return _verdict(accuracy(top) >= SOLVED), evidence


def negative_tracks_parity(results: Results) -> tuple[Verdict, str]:
    """At four times the length, where what was only remembered is wrong."""
    plain = [name.removesuffix("-negative") for name in NEGATIVE]
    with_, without = (select(results, "parity", names) for names in (NEGATIVE, plain))
    if not with_ or not without:
        return "not run", "needs parity with a delta rule, with and without negative eigenvalues"
    pair = [max(group, key=lambda r: accuracy(r, 4)) for group in (with_, without)]
    seen = accuracy(pair[0], 4) - accuracy(pair[1], 4) >= GAP
    return _verdict(seen), f"at 4 x the length {named(pair[0], 4)}; {named(pair[1], 4)}"


def selection_copies(results: Results) -> tuple[Verdict, str]:
    able = select(results, "selective-copy", SELECTIVE)
    unable = select(results, "selective-copy", TIME_INVARIANT)
    if not able or not unable:
        return "not run", "needs selective-copy with e.g. mamba and s4d"
    seen = accuracy(best(able)) - accuracy(best(unable)) >= GAP
    return _verdict(seen), f"the best: {named(best(able))}; {named(best(unable))}"


def mamba_collapses(results: Results) -> tuple[Verdict, str]:
    """What was right at the trained length is wrong at 16 times it, on some task."""
    tasks = ("passkey", "mqar", "induction", "selective-copy", "niah-multikey")
    found = [
        result
        for task in tasks
        for result in select(results, task, ("mamba", "mamba2"))
        if 16 in result["tests"] and accuracy(result) >= 0.5
    ]
    if not found:
        return "not run", "needs a mamba that does a task at its trained length, tested at 16 x"
    worst = min(found, key=lambda r: accuracy(r, 16) / accuracy(r))
    seen = accuracy(worst, 16) < accuracy(worst) / 2
    lost = f"{named(worst)} at 1 x, {accuracy(worst, 16):.2f} at 16 x"
    return _verdict(seen), f"most is lost on {worst['task']}: {lost}"


def reading_twice_helps(results: Results) -> tuple[Verdict, str]:
    """Models trained to read the lists twice, against the same ones that read them once."""
    task = "disjointness-long-first"
    twice = [r for r in results if (r["task"], r["repeats"]) == (task, 2)]
    gains, evidence = [], []
    for result in select(results, task, [r["mixer"] for r in twice]):
        for other in twice:
            if (other["mixer"], other["size"]) == (result["mixer"], result["size"]):
                gains.append(accuracy(other) - accuracy(result))
                evidence.append(f"{named(result)} to {accuracy(other):.2f}")
    if not gains:
        return "not run", f"needs {task} with and without --repeats 2"
    return _verdict(statistics.median(gains) >= GAP), "; ".join(evidence)


def prefix_helps(results: Results) -> tuple[Verdict, str]:
    """JRT against Based, which is its decoder alone."""
    gains, evidence = _gains(results, ("disjointness-long-first", "mqar"), "jrt", "based")
    if not gains:
        return "not run", "needs jrt and based on disjointness-long-first or mqar"
    return _verdict(statistics.mean(gains) >= GAP), evidence


def memories_help(results: Results) -> tuple[Verdict, str]:
    """MoM against the rule that its memories follow."""
    gains, evidence = _gains(results, ("mqar",), "mom", "gated_deltanet")
    if not gains:
        return "not run", "needs mqar with mom and gated_deltanet of one size"
    return _verdict(statistics.mean(gains) >= GAP and min(gains) > -GAP), evidence


def rotation_tracks_parity(results: Results) -> tuple[Verdict, str]:
    """Mamba-3 against Mamba-2 at four times the length."""
    gains, evidence = _gains(results, ("parity",), "mamba3", "mamba2", 4)
    if not gains:
        return "not run", "needs parity with mamba3 and mamba2 of one size"
    return _verdict(max(gains) >= GAP), f"at 4 x the length {evidence}"


def fixed_filters_do_not_recall(results: Results) -> tuple[Verdict, str]:
    """Where attention recalls."""
    found = select(results, "mqar", FIXED_FILTERS)
    attention = select(results, "mqar", ("attention",))
    if not found or not attention:
        return "not run", "needs mqar with attention and a convolution"
    pair = best(attention), best(found)
    evidence = f"{named(pair[0])}; the best of {len(found)}: {named(pair[1])}"
    if accuracy(pair[0]) < SOLVED:
        return "not told", evidence
    return _verdict(accuracy(pair[0]) - accuracy(pair[1]) >= GAP), evidence


def mitigations_help(evaluations: Results) -> tuple[Verdict, str]:
    """Some mitigation keeps half of the accuracy up to a longer length than the model as it is."""
    evidence, moved = [], []
    for each in evaluations:
        models = {e["model"]: e["tests"] for e in each["evaluations"] if e["repeats"] == 1}
        plain = models.pop("as trained", {})
        if not models or "1" not in plain:
            continue
        half = plain["1"]["accuracy"] / 2

        def reach(tests: Mapping[str, Any], half: float = half) -> int:
            kept = [int(m) for m, test in tests.items() if test["accuracy"] >= half]
            return max(kept, default=0)

        for kind in ("decay", "norm", "window"):
            own = {name: reach(tests) for name, tests in models.items() if name.startswith(kind)}
            if own:
                name = max(own, key=own.__getitem__)
                moved.append(own[name] > reach(plain))
                evidence.append(f"{each['run']}: {reach(plain)} x to {own[name]} x with {name}")
    if not evidence:
        return "not run", "needs `seqmodels recall eval` of a mamba2 with --decay, --norm, --window"
    return _verdict(any(moved)), "; ".join(evidence)


FINDINGS = (
    Finding("Attention solves MQAR", "Arora et al. 2023, 2312.04927", attention_recalls),
    Finding(
        "Decay models of a small state saturate on MQAR",
        "Arora et al. 2024, 2402.18668",
        small_states_saturate,
    ),
    Finding(
        "The delta rule beats decay alone at equal state",
        "Yang et al. 2024, 2406.06484",
        delta_beats_decay,
    ),
    Finding(
        "Diagonal models fail A5 and S5",
        "Merrill et al. 2024, 2404.08819",
        diagonal_fails,
    ),
    Finding(
        "Delta rules with negative eigenvalues track A5 or S5",
        "Grazzi et al. 2024, 2411.12537",
        negative_tracks,
    ),
    Finding(
        "Delta rules need negative eigenvalues for parity",
        "Grazzi et al. 2024, 2411.12537",
        negative_tracks_parity,
    ),
    Finding(
        "Selective models copy, time-invariant ones do not",
        "Gu & Dao 2023, 2312.00752",
        selection_copies,
    ),
    Finding(
        "Mamba collapses beyond its trained length",
        "Chen et al. 2024, 2410.07145",
        mamba_collapses,
    ),
    Finding(
        "Reading the lists twice helps when the long one comes first",
        "Arora et al. 2024, 2407.05483",
        reading_twice_helps,
    ),
    Finding(
        "An encoder over the context recalls more than the causal decoder alone",
        "Arora et al. 2024, 2407.05483",
        prefix_helps,
    ),
    Finding(
        "Several memories recall more than one of them",
        "Du et al. 2025, 2502.13685",
        memories_help,
    ),
    Finding(
        "Complex rotations track parity, where decays alone do not",
        "Lahoti et al. 2026, 2603.15569",
        rotation_tracks_parity,
    ),
    Finding(
        "Gated convolutions with fixed filters recall less than attention",
        "Arora et al. 2023, 2312.04927",
        fixed_filters_do_not_recall,
    ),
)
OF_EVALUATIONS = (
    Finding(
        "Mitigations without training move the length at which Mamba-2 collapses",
        "Chen et al. 2024, 2410.07145",
        mitigations_help,
    ),
)


def check(results: Results, evaluations: Results = ()) -> list[Checked]:
    """All findings, against results of `seqmodels recall train` and numbers of .eval."""
    pairs = [(each, results) for each in FINDINGS]
    pairs += [(each, evaluations) for each in OF_EVALUATIONS]
    return [Checked(each.claim, each.source, *each.check(given)) for each, given in pairs]
