"""The contract of every registered mixer, in every mode, on the path that users get.

`test_a_mixer_as_users_get_it` makes all checks on a few programs of each mixer; a check of its own
for what only some modules could get wrong runs with `--everything`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tools import testing
from seqmodels.mixers import REGISTRY, S4DConfig, S5Config, build
from seqmodels.mixers.base import RecurrentState
from tests import tolerances
from tests.seqmodels.mixers import calls
from tests.seqmodels.mixers.calls import LENGTH, PIECE, WIDTH
from tests.seqmodels.mixers.cases import CASES, FLAGS, GROWING, KINDS, READ_WHOLE
from tests.tiers import one_of_many

STREAMING = [case for case, flags in FLAGS.items() if flags[1] and case not in READ_WHOLE]
PACKING = [case for case, flags in FLAGS.items() if flags[2]]
UNPACKING = [case for case, flags in FLAGS.items() if not flags[2]]
BIDIRECTIONAL = [case for case, flags in FLAGS.items() if not flags[1]]
# Mixers that take other paths where a row is promised to be one document.
SHORTCUTS = {"s5", "s5-bidirectional", "lru", "bidirectional", "s4d-bidirectional"}

# No op of ours in them, or, in S4 with a state, one step for each token: what they are held against
# is each other's way, `trains_as_it_streams`, and the mixers' own oracles.
WITHOUT_REFERENCE = {case for case in CASES if case.startswith(("attention", "sliding"))}
WITHOUT_REFERENCE |= {"s4", "orchid"}

# Those of `KINDS` that are always tried in bfloat16 and in training too; the others compile long.
TRAINED = KINDS - {"hydra", "mamba"}

# Variants of a mixer that take the same paths as its other cases.
VARIANTS = {
    "s5-bilinear", "s4-bidirectional", "s4d-tied-legs", "s4d-bidirectional", "lru-bidirectional",
    "rat-chunks-of-one", "scout-mamba", "bidirectional-tied", "attention-grouped",
    "sliding_window-sinks", "scout-window", "s4d-weighted", "mamba-blocks", "mamba3-rank",
    "mom-gla", "sgconv-bidirectional", "monarch-bidirectional",
}  # fmt: skip


def each(cases):
    """Cases as parameters; variants only run in `test-all`."""
    return one_of_many(cases, [case for case in cases if case not in VARIANTS])


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


CACHED = (
    calls.program, calls.parameters, calls.abstract_parameters, calls.entered, calls.whole
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _forget():
    yield
    for kept in CACHED:
        kept.cache_clear()


def close_values(actual, expected):
    """Outputs and states of two results."""
    testing.assert_close(actual.y, expected.y, tolerances.FLOAT32)
    if actual.state is not None:
        testing.assert_close(actual.state, expected.state, tolerances.FLOAT32)


def close_gradients(case, actual, expected, names=("params", "x")):
    tolerance = tolerances.FLOAT32_MIXER_GRADIENTS
    if case in ("s4", "s4-bidirectional", "bidirectional-tied", "s4d-weighted"):
        tolerance = tolerances.FLOAT32_S4_GRADIENTS
    for name in names:
        testing.assert_close(actual.gradients[name], expected.gradients[name], tolerance)


def parallel(case, x, ids, **options):
    """A call without a state, as in training."""
    run = calls.program(case, **options)
    return run(calls.parameters(case), x, ids, None, np.float32(0))


def fresh(case, x=None):
    """A call with documents that begins with the state before the first token, if there is one.

    It compiles nothing new: `trains_as_it_streams` sees to it that a call without a state, as in
    training, is the same.
    """
    ids, x = calls.ids_of(calls.documents_of(case)), calls.inputs() if x is None else x
    return calls.program(case)(calls.parameters(case), x, ids, calls.start(case), np.float32(0))


def test_every_registered_mixer_is_covered():
    assert {config.mixer for config in CASES.values()} == set(REGISTRY)
    assert CASES.keys() == FLAGS.keys()
    for name, (config_class, _) in REGISTRY.items():
        assert config_class.mixer == name


@pytest.mark.parametrize("case", one_of_many(CASES, KINDS))
def test_a_mixer_as_users_get_it(case):
    has_the_shapes_and_marks(case)
    if case not in WITHOUT_REFERENCE:
        equals_the_reference(case)
    keeps_to_documents_and_padding(case)
    is_causal_or_not(case)
    if case in STREAMING:
        is_the_same_in_pieces_and_step_by_step(case)
        uses_the_carried_state(case)
    if case in PACKING:
        isolates_documents_bit_for_bit(case)
        gives_each_document_what_it_gives_it_alone(case)
    if case in SHORTCUTS:
        takes_single_documents_as_general_ones(case)
    if case in TRAINED:
        rounds_and_trains(case)


@pytest.mark.full
@pytest.mark.parametrize("case", sorted(CASES.keys() - TRAINED))
def test_every_mixer_rounds_and_trains(case):
    rounds_and_trains(case)


def rounds_and_trains(case):
    rounds_in_bfloat16(case)
    trains_without_documents(case)
    if case in STREAMING:
        trains_as_it_streams(case)


def has_the_shapes_and_marks(case):
    y, params = calls.whole(case).y, calls.parameters(case)
    assert (y.shape, y.dtype) == ((3, LENGTH, WIDTH), np.float32)
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    names = {"/".join(entry.key for entry in path) for path, _ in paths}
    assert set(CASES[case].param_labels()) <= names
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def equals_the_reference(case):
    """Values and every gradient, with documents, padding and a carried state."""
    actual, expected = calls.whole(case), calls.whole(case, "reference")
    close_values(actual, expected)
    close_gradients(case, actual, expected, ("params", "x", "state"))


def reference(case):
    return None if case in WITHOUT_REFERENCE else "reference"


def rounds_in_bfloat16(case):
    """The same program, in bfloat16 against float32; gradients as one vector."""
    actual, expected = calls.whole(case, dtype="bfloat16"), calls.whole(case, reference(case))
    assert actual.y.dtype == jnp.bfloat16
    testing.assert_close(actual.y, expected.y, tolerances.BFLOAT16_MIXER)
    one, two = (
        np.concatenate([np.ravel(leaf).astype(np.float32) for leaf in jax.tree.leaves(gradients)])
        for gradients in (
            [result.gradients[name] for name in ("params", "x")] for result in (actual, expected)
        )
    )
    testing.assert_close(one, two, tolerances.BFLOAT16_MIXER)


def keeps_to_documents_and_padding(case):
    result, entering = calls.whole(case), calls.entered(case)
    padding = calls.ids_of(calls.documents_of(case)) == 0
    for part in (result.y, result.gradients["x"]):
        assert not np.any(part[padding])
        assert np.all(np.any(part[~padding], -1))
    if entering is None:
        assert result.state is None
        return
    packs = case in PACKING
    np.testing.assert_array_equal(
        result.state.position, [57 if packs else LENGTH + 190, 72 if packs else LENGTH, LENGTH]
    )
    np.testing.assert_array_equal(result.state.segment, [1, 4, 5])
    for before, after, gradient in zip(
        *map(jax.tree.leaves, (entering.state, result.state.state, result.gradients["state"])),
        strict=True,
    ):
        np.testing.assert_array_equal(after[2], before[2])  # a row of padding
        assert not np.any(gradient[1])  # a new document
    assert any(np.any(gradient[0]) for gradient in jax.tree.leaves(result.gradients["state"]))


def is_causal_or_not(case):
    at = (1, PIECE + 3)
    x = calls.inputs()
    x[at] += 1.0
    early = np.abs(fresh(case, x).y - fresh(case).y)[1, : at[1]].max()
    assert (early < tolerances.FLOAT32_LOOK_AHEAD) == calls.mixer_of(case).causal


def is_the_same_in_pieces_and_step_by_step(case):
    result, ids = calls.whole(case), calls.ids_of(calls.documents_of(case))
    thirds = [PIECE, 2 * PIECE]
    for cuts in (thirds, [*range(PIECE, 2 * PIECE), 2 * PIECE]):
        y, state = calls.in_pieces(case, calls.inputs(), ids, calls.entered(case), cuts)
        close_values(calls.Result(y, state), result)


def uses_the_carried_state(case):
    """Row 0 goes on with its document, the others do not."""
    carried, others = calls.whole(case).y, fresh(case).y
    assert np.abs(carried - others)[0, :PIECE].max() > 1e-3
    np.testing.assert_array_equal(carried[1], others[1])


def trains_as_it_streams(case):
    """Without a state, and with that before the first token."""
    ids = calls.ids_of(calls.documents_of(case))
    training, streaming = parallel(case, calls.inputs(), ids), fresh(case)
    testing.assert_close(training.y, streaming.y, tolerances.FLOAT32)
    close_gradients(case, training, streaming)


def trains_without_documents(case):
    """Row 1 is full; the others count on as if they were."""
    full = calls.ids_of((((3, 0, LENGTH),),) * 3)
    without, named = (parallel(case, calls.inputs(), ids) for ids in (None, full))
    testing.assert_close(without.y, named.y, tolerances.FLOAT32)
    close_gradients(case, without, named)


def isolates_documents_bit_for_bit(case):
    x = calls.inputs()
    ids = calls.ids_of(calls.DOCUMENTS)
    before = fresh(case, x)
    for row, begin, end in ((0, 67, 133), (1, 129, LENGTH), (0, 0, 67)):
        other, inside = x.copy(), np.zeros(ids.shape, bool)
        inside[row, begin:end] = True
        other[inside] = 1e4 * x[inside] + 3.0
        after = fresh(case, other)
        for one, two in ((before.y, after.y), (before.gradients["x"], after.gradients["x"])):
            np.testing.assert_array_equal(one[~inside], two[~inside])
            assert np.isfinite(two[~inside]).all()
        assert np.any(before.y[inside] != after.y[inside])


def gives_each_document_what_it_gives_it_alone(case):
    x, packed = calls.inputs(), fresh(case).y
    spans = [(row, *span) for row, names in enumerate(calls.DOCUMENTS) for _, *span in names]
    for some in (spans[:3], spans[3:]):
        moved, documents = np.zeros_like(x), [()] * 3
        for i, (row, begin, end) in enumerate(some):
            moved[i, : end - begin] = x[row, begin:end]
            documents[i] = ((7, 0, end - begin),)
        args = calls.parameters(case), moved, calls.ids_of(documents), calls.start(case)
        alone = calls.program(case)(*args, np.float32(0)).y
        for i, (row, begin, end) in enumerate(some):
            testing.assert_close(
                alone[i, : end - begin], packed[row, begin:end], tolerances.FLOAT32
            )


def takes_single_documents_as_general_ones(case):
    ids = calls.ids_of(calls.ALONE)
    single, general = (parallel(case, calls.inputs(), ids, single=s) for s in (True, False))
    close_values(single, general)
    close_gradients(case, single, general)
    for part in (single.y, single.gradients["x"]):
        assert not np.any(part[ids == 0])


@pytest.mark.full
@pytest.mark.parametrize("case", sorted(set(PACKING) - SHORTCUTS))
def test_single_document_rows_agree_with_the_general_path(case):
    takes_single_documents_as_general_ones(case)


@pytest.mark.parametrize("case", one_of_many(UNPACKING, ["s4"]))
def test_mixers_of_single_documents_refuse_packed_rows_and_ignore_padding(case):
    x, end = calls.inputs(), calls.ALONE[0][0][2]
    with pytest.raises(ValueError, match=r"several documents a row are not supported"):
        traced(case, x, calls.ids_of(calls.DOCUMENTS), single=False)
    padded = parallel(case, x, calls.ids_of(calls.ALONE))
    short = parallel(case, x[:1, :end], None)
    testing.assert_close(padded.y[0, :end], short.y[0], tolerances.FLOAT32)
    other = x.copy()
    other[0, end:], other[2] = 1e4, 1e4
    again = parallel(case, other, calls.ids_of(calls.ALONE))
    for one, two in zip(jax.tree.leaves(padded), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.full
@pytest.mark.parametrize("cuts", [[5, 130], [66, 68, 128], [1, 200]], ids=str)
@pytest.mark.parametrize("case", STREAMING)
def test_whole_is_split_anywhere(case, cuts):
    ids = calls.ids_of(calls.documents_of(case))
    y, state = calls.in_pieces(case, calls.inputs(), ids, calls.entered(case), cuts)
    close_values(calls.Result(y, state), calls.whole(case))


@pytest.mark.full
@pytest.mark.parametrize("case", STREAMING)
def test_gradients_flow_through_the_carried_state(case):
    params, x = calls.parameters(case), calls.inputs()

    def split(x, cuts):
        state, total = calls.start(case), 0.0
        for begin, end in zip([0, *cuts], [*cuts, LENGTH], strict=True):
            result = calls.forward(case, params, x[:, begin:end], None, state)
            state, total = result.state, total + jnp.sum(jnp.sin(result.y))
        return total

    pieces, whole = (jax.jit(jax.grad(functools.partial(split, cuts=c)))(x) for c in ([70], []))
    testing.assert_close(pieces, whole, tolerances.FLOAT32_MIXER_GRADIENTS)


@pytest.mark.parametrize("case", each(CASES))
def test_flags_and_the_size_of_the_state(case):
    mixer = calls.mixer_of(case)
    assert (mixer.causal, mixer.stateful, mixer.supports_packing) == FLAGS[case]
    if mixer.stateful:
        start = jax.eval_shape(functools.partial(mixer.initial_state, 1, max_length=100))
        sizes = (leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(start))
        assert mixer.state_bytes(100) == sum(sizes)


@pytest.mark.parametrize("case", one_of_many(sorted(GROWING), ["attention", "rat", "scout"]))
def test_growing_states_need_a_length(case):
    mixer, params, x = calls.mixer_of(case), calls.parameters(case), calls.inputs()[:, :14]
    run = calls.program(case, calls.forward)
    with pytest.raises(ValueError, match=r"holds no cache; begin with initial_state\(.*max_length"):
        run(params, x, None, RecurrentState.start(None, 3))
    with pytest.raises(ValueError, match="max_length=None must be positive"):
        mixer.initial_state(3)
    assert mixer.state_bytes(200) > mixer.state_bytes(100)
    late = run(params, x, None, mixer.initial_state(3, max_length=8, dtype=jnp.float32)).y
    assert np.all(np.isfinite(late[:, :8]))
    assert np.all(np.isnan(late[:, -1]))


@pytest.mark.parametrize(
    "case", one_of_many(STREAMING, ["s5", "mamba2", "gated_deltanet", "sliding_window", "rat"])
)
def test_states_can_be_donated(case):
    run = jax.jit(functools.partial(calls.forward, case))
    after = run(calls.parameters(case), calls.inputs()[:, :1], None, calls.start(case)).state
    leaves = jax.tree.leaves((calls.start(case), after))
    places = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(places)) == len(places)


def traced(case, x, ids=None, state=None, **options):
    """What a call returns, without its numbers."""
    call = functools.partial(calls.forward, case, **options)
    return jax.eval_shape(call, calls.abstract_parameters(case), x, ids, state)


@pytest.mark.parametrize("case", each(CASES))
def test_bad_arguments_are_refused(case):
    x, ids = calls.inputs(), calls.ids_of(calls.ALONE)
    with pytest.raises(ValueError, match=rf"x has shape .* expected \(batch, length, {WIDTH}\)"):
        traced(case, x[..., :3])
    with pytest.raises(ValueError, match=r"segments.ids has shape \(3, 6\)"):
        traced(case, x, ids[:, :6])
    if case in STREAMING:
        few = functools.partial(calls.mixer_of(case).initial_state, 2, max_length=9)
        with pytest.raises(ValueError, match=r"state is for a batch of 2, .* initial_state\(3\)"):
            traced(case, x, None, jax.eval_shape(few))


@pytest.mark.parametrize("case", each(BIDIRECTIONAL))
def test_bidirectional_mixers_refuse_a_state(case):
    mixer, x = calls.mixer_of(case), calls.inputs()
    assert traced(case, x).state is None
    state = RecurrentState.start(jnp.zeros((3, 4), jnp.complex64), 3)
    fix = "(set bidirectional=False|take [a-z0-9]+( alone)?) to stream"
    with pytest.raises(ValueError, match=f"mixer: state is refused.*{fix}"):
        traced(case, x, None, state)
    with pytest.raises(ValueError, match=f"initial_state is refused.*{fix}"):
        mixer.initial_state(3)
    with pytest.raises(ValueError, match=fix):
        mixer.state_bytes(10)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (S5Config, {"state_size": 12, "blocks": 4}, "state_size=12 must be a positive multiple"),
        (S5Config, {"dt_min": 0.2}, "0 < dt_min <= dt_max"),
        (S5Config, {"step_rescale": 0.0}, "step_rescale=0.0 must be positive"),
        (S4DConfig, {"state_size": 7}, "state_size=7 must be an even number"),
        (S4DConfig, {"n_ssm": 0}, "n_ssm=0 must be positive"),
    ],
)
def test_bad_configs_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config(), **change)


def test_unregistered_names_and_indivisible_widths_are_refused():
    class Unknown(S5Config):
        mixer = "unknown"

    with pytest.raises(ValueError, match=r"mixer='unknown' is not registered; known: .*s4d, s5"):
        build(Unknown(), WIDTH)
    mixer = build(S4DConfig(n_ssm=3), WIDTH)
    with pytest.raises(ValueError, match=f"n_ssm=3 must divide the width {WIDTH}"):
        mixer.init(jax.random.key(0), jnp.zeros((1, 2, WIDTH)))
