"""A result file of `seqmodels recall train`, checked before anything is read from it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from experiments.run import check_record, read_object
from seqmodels.ranges import Count, NonNegative, Range, Seed, Size

Accuracy = Annotated[float, Range("in [0, 1]", 0, 1)]
FIELDS: dict[str, Any] = {
    "task": str, "mixer": str, "size": Size, "preset": str, "repeats": Size, "seed": Seed,
    "tests": dict[str, dict[str, Any]], "chance": Accuracy, "trained_tokens": Size,
    "state_bytes": Size, "steps": Count, "complete": bool, "parameters": Count,
    "wall_seconds": NonNegative, "environment": dict[str, Any], "config": dict[str, Any],
}  # fmt: skip
TEST: dict[str, Any] = {
    "accuracy": Accuracy, "rows_right": Accuracy, "counted": Count, "tokens": Size,
}  # fmt: skip


def read_result(path: Path) -> dict[str, Any]:
    """The result in a file, its tests by the multiple of the trained length, a number.

    Raises:
      ValueError: it is not one: a field is missing or no such value, or a name is not that of its
        config.
    """
    result = read_object(path)
    try:
        check_record(result, FIELDS)
        for test in result["tests"].values():
            check_record(test, TEST)
        result["tests"] = {int(multiple): test for multiple, test in result["tests"].items()}
        check_record({"multiple": min(result["tests"], default=0)}, {"multiple": Size})
        if 1 not in result["tests"]:
            raise ValueError("tests has none at the trained length")
        check_record(result["config"], {"train": dict[str, Any]})
        config = {**result["config"], "seed": result["config"]["train"].get("seed")}
        for name in ("task", "mixer", "size", "preset", "repeats", "seed"):
            if result[name] != config.get(name):
                raise ValueError(f"{name}={result[name]!r}, its config has {config.get(name)!r}")
    except ValueError as error:
        raise ValueError(
            f"{path} is not a result of `seqmodels recall train`, move it away: {error}"
        ) from error
    return result


def read_results(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """All results of the folders, by task, mixer and size.

    Raises:
      ValueError: there is none, or a file is not a result.
    """
    folders = list(folders)
    found = [read_result(path) for folder in folders for path in sorted(folder.glob("*.json"))]
    if not found:
        raise ValueError(
            f"no results in {', '.join(map(str, folders))}; make some with "
            "seqmodels recall sweep, or name another --results-dir"
        )
    keys = ("task", "repeats", "mixer", "size", "seed")
    return sorted(found, key=lambda result: [result[key] for key in keys])


EVALUATION: dict[str, Any] = {"run": str, "task": str, "evaluations": list[dict[str, Any]]}
ONE: dict[str, Any] = {"model": str, "repeats": Size, "tests": dict[str, dict[str, Any]]}


def read_evaluations(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """What `seqmodels recall eval` wrote into ``evaluations`` of the folders; none is no error.

    Raises:
      ValueError: a file there is something else.
    """
    found = []
    for path in (path for each in folders for path in sorted(each.glob("evaluations/*.json"))):
        record = read_object(path)
        try:
            check_record(record, EVALUATION)
            for one in record["evaluations"]:
                check_record(one, ONE)
                for test in one["tests"].values():
                    check_record(test, TEST)
        except ValueError as error:
            raise ValueError(f"{path} is not of experiments.recall.eval: {error}") from error
        found.append(record)
    return found
