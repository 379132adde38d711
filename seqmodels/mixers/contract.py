"""Checks of the mixer contract, for mixers that are not in this repository.

The rules are those of ``seqmodels.mixers.base``; tests/seqmodels/mixers/test_mixer_contract.py has
more of them, for the registered mixers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tools.testing import FLOAT32_LOOK_AHEAD, FLOAT32_TOLERANCE, rmse_ratio
from seqmodels.mixers.base import Mixer, Segments

PIECE = 24
LENGTH = 4 * PIECE

# Documents of each row, `(id, begin, end)`; the last row is padding. Row 0 goes on with the
# document of the state that enters, row 1 begins another.
DOCUMENTS = (((1, 0, 30), (2, 30, 60), (1, 60, 90)), ((3, 0, 48), (4, 48, LENGTH)), ())
ALONE = (((1, 0, 90),), ((4, 0, LENGTH),), ())
BEFORE = (((1, 0, LENGTH),), ((8, 0, LENGTH),), ((5, 0, LENGTH),))


class ContractError(AssertionError):
    """A mixer breaks a rule; the message names the rule and says what was seen."""


@dataclasses.dataclass(frozen=True)
class _Case:
    """A mixer with parameters, and its calls as compiled programs."""

    mixer: Mixer
    variables: Any
    packs: bool

    @functools.cached_property
    def forward(self) -> Callable[..., Any]:
        """``(x, ids, state) -> (y, state)``."""

        @jax.jit
        def forward(x: Any, ids: Any, state: Any) -> Any:
            segments = None if ids is None else Segments.from_ids(ids, single=not self.packs)
            return self.mixer.apply(self.variables, x, segments=segments, state=state)

        return forward

    @functools.cached_property
    def gradient(self) -> Callable[..., Any]:
        """``(x, ids, state) ->`` the gradient of a weighed sum of the outputs by ``x``."""

        def loss(x: Any, ids: Any, state: Any) -> Any:
            y, _ = self.forward(x, ids, state)
            return jnp.sum(y * jnp.cos(jnp.arange(y[0].size)).reshape(1, *y.shape[1:]))

        return jax.jit(jax.grad(loss))

    @property
    def documents(self) -> Any:
        return DOCUMENTS if self.packs else ALONE

    @functools.cached_property
    def ids(self) -> np.ndarray:
        return _ids(self.documents)

    @functools.cached_property
    def x(self) -> np.ndarray:
        return np.asarray(_inputs(self.mixer.width, 1))

    def start(self) -> Any:
        if not self.mixer.stateful:
            return None
        return self.mixer.initial_state(3, max_length=2 * LENGTH, dtype=jnp.float32)


def check_contract(mixer: Mixer, *, seed: int = 0) -> tuple[str, ...]:
    """Checks a mixer by the contract, on the default backend.

    Rows hold several documents and padding, are cut into pieces and single tokens, and are changed
    in places that must not matter. Sequences have 96 tokens; chunks of a kernel that are longer are
    not crossed.

    Args:
      mixer: of ``seqmodels.mixers.build``, or a module of one's own; float32.
      seed: of the parameters.

    Returns:
      Names of the rules that were checked; those of what the mixer declares absent (packing, a
      state, causality) are not.

    Raises:
      ContractError: a rule is broken.
    """
    variables = jax.jit(mixer.init)(jax.random.key(seed), jnp.zeros((1, 2, mixer.width)))
    case = _Case(mixer, variables, mixer.supports_packing)
    rules: list[tuple[str, bool, Callable[[_Case], None]]] = [
        ("shapes", True, _shapes),
        ("padding", True, _padding),
        ("causality", mixer.causal, _causality),
        ("isolated documents", case.packs, _isolation),
        ("packed as alone", case.packs, _alone),
        ("carried state", mixer.stateful, _carried),
        ("pieces and single tokens", mixer.stateful, _pieces),
        ("training as streaming", mixer.stateful, _training),
    ]
    for name, applies, check in rules:
        if applies:
            try:
                check(case)
            except AssertionError as error:
                raise ContractError(f"{mixer.config.mixer} mixer, {name}: {error}") from None
    return tuple(name for name, applies, _ in rules if applies)


def _shapes(case: _Case) -> None:
    y, state = case.forward(case.x, case.ids, case.start())
    _must(y.shape == case.x.shape, f"outputs have shape {y.shape}, inputs {case.x.shape}")
    _must(y.dtype == jnp.float32, f"outputs are {y.dtype}, inputs float32")
    _must((state is None) != case.mixer.stateful, "a state is returned if and only if stateful")
    paths = jax.tree_util.tree_flatten_with_path(case.variables.get("params", {}))[0]
    names = {"/".join(entry.key for entry in path) for path, _ in paths}
    unknown = sorted(set(case.mixer.config.param_labels()) - names)
    _must(not unknown, f"param_labels() names {unknown}; the parameters are {sorted(names)}")


def _padding(case: _Case) -> None:
    start = case.start()
    y, state = case.forward(case.x, case.ids, start)
    padding = case.ids == 0
    _must(not np.any(np.asarray(y)[padding]), "outputs are not zero; use mask_padding")
    gradient = np.asarray(case.gradient(case.x, case.ids, start))
    _must(not np.any(gradient[padding]), "inputs there have a gradient")
    if state is not None:
        for before, after in zip(*map(jax.tree.leaves, (start.state, state.state)), strict=True):
            _must(np.array_equal(before[2], after[2]), "a row of padding changes the state")


def _causality(case: _Case) -> None:
    at = (1, LENGTH // 2 + 3)
    other = case.x.copy()
    other[at] += 1.0
    one, two = (case.forward(x, case.ids, case.start())[0] for x in (case.x, other))
    seen = float(np.abs(one - two)[1, : at[1]].max())
    _must(seen < FLOAT32_LOOK_AHEAD, f"an output changes by {seen:.1e} with a later token")


def _isolation(case: _Case) -> None:
    for row, begin, end in ((0, 30, 60), (1, 48, LENGTH), (0, 0, 30)):
        inside = np.zeros(case.ids.shape, bool)
        inside[row, begin:end] = True
        other = np.where(inside[..., None], 1e4 * case.x + 3.0, case.x)
        for what, call in (("outputs", case.forward), ("gradients", case.gradient)):
            one, two = (
                np.asarray(jax.tree.leaves(call(x, case.ids, case.start()))[0])
                for x in (case.x, other)
            )
            same = np.array_equal(one[~inside], two[~inside])
            _must(same, f"{what} of a document change, in some bit, with another document")


def _alone(case: _Case) -> None:
    packed, _ = case.forward(case.x, case.ids, case.start())
    for row, names in enumerate(case.documents):
        for _, begin, end in names:
            moved, ids = np.zeros_like(case.x), np.zeros_like(case.ids)
            moved[0, : end - begin], ids[0, : end - begin] = case.x[row, begin:end], 7
            alone, _ = case.forward(moved, ids, case.start())
            _close(alone[0, : end - begin], packed[row, begin:end], "a document alone")


def _pieces(case: _Case) -> None:
    entering = _entered(case)
    whole, last = case.forward(case.x, case.ids, entering)
    for cuts in ([PIECE, 2 * PIECE, 3 * PIECE], [PIECE, *range(PIECE + 1, 2 * PIECE), 3 * PIECE]):
        state, outputs = entering, []
        for begin, end in zip([0, *cuts], [*cuts, LENGTH], strict=True):
            part = slice(begin, end)
            y, state = case.forward(case.x[:, part], case.ids[:, part], state)
            outputs.append(y)
        _close(np.concatenate(outputs, axis=1), whole, "outputs of a row in pieces")
        for one, two in zip(*map(jax.tree.leaves, (state, last)), strict=True):
            _close(one, two, "the last state of a row in pieces")
    ends = [90 - 60 if case.packs else LENGTH + 90, LENGTH - 48 if case.packs else LENGTH, LENGTH]
    _must(last.position.tolist() == ends, f"positions are {last.position}, tokens seen {ends}")
    _must(last.segment.tolist() == [1, 4, 5], f"segments are {last.segment}, not [1 4 5]")


def _carried(case: _Case) -> None:
    carried, _ = case.forward(case.x, case.ids, _entered(case))
    fresh, _ = case.forward(case.x, case.ids, case.start())
    _must(np.array_equal(carried[1], fresh[1]), "a new document sees the state of the one before")
    _must(bool(np.any(carried[0] != fresh[0])), "a document that goes on does not see its state")


def _training(case: _Case) -> None:
    (training, _), (streaming, _) = (
        case.forward(case.x, case.ids, state) for state in (None, case.start())
    )
    _close(training, streaming, "without a state and with the one before the first token, outputs")


def _entered(case: _Case) -> Any:
    return case.forward(_inputs(case.mixer.width, 2), _ids(BEFORE), case.start())[1]


def _ids(documents: Any) -> np.ndarray:
    ids = np.zeros((3, LENGTH), np.int32)
    for row, names in zip(ids, documents, strict=True):
        for name, begin, end in names:
            row[begin:end] = name
    return ids


def _inputs(width: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (3, LENGTH, width))


def _must(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _close(actual: Any, expected: Any, what: str) -> None:
    ratio = rmse_ratio(actual, expected)
    _must(ratio <= FLOAT32_TOLERANCE, f"{what} differ by {ratio:.1e} of their size")
