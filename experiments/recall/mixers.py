"""The mixers at one width and states of several sizes, and their variants."""

import dataclasses
from typing import Any

from experiments.errors import UsageError, check_name
from experiments.lm import presets
from experiments.lm.presets import ModelSize, Objective
from seqmodels.mixers import REGISTRY, MixerConfig

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{mixer}-negative": (mixer, {"negative_eigenvalues": True})
    for mixer in ("deltanet", "gated_deltanet", "kda")
}
"""Name -> registered mixer, fields that differ from it."""

_OTHERS = ("bidirectional", "hydra", "jrt", "orchid", "parallel")
CAUSAL = tuple(name for name in REGISTRY if name not in _OTHERS)
"""One causal mixer at a time."""

BOTH_SIDES = ("hydra", "orchid")
"""Mixers that see whole rows: for tasks whose rows do not hold the answers."""

NAMES = (*CAUSAL, "jrt", *BOTH_SIDES, *VARIANTS)


def mixer_config(name: str, size: ModelSize, state: int, context: int) -> MixerConfig:
    """A mixer whose layer has about ``state`` numbers of state for each channel of the width.

    Matrix mixers have heads of ``state`` keys and values; Mamba and Hydra, twice as wide inside,
    half as many states a channel, Hydra each way; S4 and S4D as many real ones; S5 and LRU, whose
    states are the layer's, four times as many complex ones; a sliding window as many tokens.
    Attention, RAT, SCOUT and RG-LRU have the same state whatever it says, and so do Based, whose
    features are 16 a head, GAM and the long convolutions, which keep their inputs. JRT's encoder
    reads the ``context``, the tokens before the questions; in longer rows as many.

    Raises:
      UsageError: an unknown name (the message has the nearest known one), a size that it cannot
        have, or JRT without a context.
    """
    check_name("mixer", name, NAMES)
    registered, fields = VARIANTS.get(name, (name, {}))
    halves = max(state // 2, 1)
    special: dict[str, dict[str, Any]] = {
        "gla": {"expand_k": 1.0},
        "mamba": {"state_size": halves},
        "mamba2": {"state_size": halves, "head_size": 16},
        "hydra": {"state_size": halves, "head_size": 16},
        "mamba3": {"state_size": max(halves, 4), "head_size": 16},
        "s4": {"state_size": state},
        "s4d": {"state_size": state},
        "s5": {"state_size": 4 * state},
        "lru": {"state_size": 4 * state},
        "sliding_window": {"window": state},
    }
    heads = size.head if registered in ("attention", "sliding_window", "rat", "scout") else state
    objective: Objective = "mlm" if registered in BOTH_SIDES else "next"
    if registered == "jrt":
        if context == 0:
            raise UsageError(
                "mixer='jrt' reads what comes before the questions, and this task asks while it "
                "goes on; take 'based', or a task such as mqar, copy or disjointness"
            )
        objective, special["jrt"] = "prefix", {"prefix": context}
    config = presets.mixer_config(registered, dataclasses.replace(size, head=heads), objective)
    try:
        return dataclasses.replace(config, **special.get(registered, {}), **fields)
    except ValueError as error:
        raise UsageError(f"mixer={name!r} cannot have size={state}: {error}") from error
