"""A result file of `seqmodels lra train`, checked before anything is read from it."""

from pathlib import Path
from typing import Annotated, Any

from experiments.lra.experiment import ExperimentConfig
from experiments.run import check_record, read_object
from seqmodels.config import from_dict
from seqmodels.ranges import Count, NonNegative, Range, Seed

Accuracy = Annotated[float, Range("in [0, 1]", 0, 1)]
Tokens = Annotated[int, Range("at least 0", 0, 2**63 - 1)]
Value = float | int | str  # a number that is not finite is a word, see `metrics.finite`
FIELDS: dict[str, Any] = {
    "task": str, "model": str, "preset": str, "seed": Seed, "test_accuracy": Accuracy,
    "baselines": dict[str, Accuracy], "steps": Count, "parameters": Count,
    "wall_seconds": NonNegative, "tokens": Tokens, "environment": dict[str, Any],
    "data": dict[str, Any], "curve": list[dict[str, Any]],
}  # fmt: skip
RECORD: dict[str, Any] = {"kind": str, "step": Count, "loss": Value, "accuracy": Value}
ENVIRONMENT = {"device": str, "devices": Count, "cpu": str, "cpu_cores": Count | None}


def read_result(path: Path) -> dict[str, Any]:
    """The result in a file.

    Raises:
      ValueError: it is not one: a field is missing or no such value, or a name is not that of its
        config.
    """
    result = read_object(path)
    try:
        check_record(result, FIELDS)
        check_record(result["environment"], ENVIRONMENT)
        for number, record in enumerate(result["curve"]):
            try:
                check_record(record, RECORD | ({"tokens": Tokens} if "tokens" in record else {}))
            except ValueError as error:
                raise ValueError(f"curve[{number}]: {error}") from error
        if not result["baselines"]:
            raise ValueError("baselines is empty")
        config = from_dict(ExperimentConfig, result.get("config"), where="config")
        names = {name: getattr(config, name) for name in ("task", "model", "preset")}
        for name, value in (names | {"seed": config.train.seed}).items():
            if result[name] != value:
                raise ValueError(f"{name}={result[name]!r}, its config has {value!r}")
    except ValueError as error:
        raise ValueError(
            f"{path} is not a result of `seqmodels lra train`, move it away: {error}"
        ) from error
    return result
