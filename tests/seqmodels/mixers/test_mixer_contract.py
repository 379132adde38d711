"""The contract of every registered mixer, in every mode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.mixers import REGISTRY, S4DConfig, S5Config, Segments, build
from seqmodels.mixers.base import RecurrentState
from tests.seqmodels.mixers.cases import CASES, FLAGS, GROWING
from tests.tiers import one_of_many

WIDTH = 4
from_ids = jax.jit(Segments.from_ids, static_argnames="single")

STREAMING = [case for case, flags in FLAGS.items() if flags[1]]
PACKING = [case for case, flags in FLAGS.items() if flags[2]]
UNPACKING = [case for case, flags in FLAGS.items() if not flags[2]]
STREAMING_SINGLE = [
    (case, single) for case in STREAMING for single in (False, True) if single or case in PACKING
]
BIDIRECTIONAL = [case for case, flags in FLAGS.items() if not flags[0]]

# Two documents of one id each side of another, and padding; one row full; one row of padding only.
IDS = np.array([[1] * 5 + [2] * 3 + [1] * 4 + [0] * 2, [3] * 9 + [4] * 5, [0] * 14], np.int32)
LENGTH = IDS.shape[1]
# One document a row, what mixers that do not pack are given.
ALONE = np.where(np.arange(LENGTH)[None] < np.array([[9], [LENGTH], [0]]), 7, 0)


# Variants of a mixer that take the same paths as its other cases.
VARIANTS = {
    "s5-bilinear", "s4-bidirectional", "s4d-tied-legs", "s4d-bidirectional", "lru-bidirectional",
    "rat-chunks-of-one", "scout-mamba", "bidirectional-tied",
}  # fmt: skip


def each(cases):
    """Cases as parameters; variants only run in `test-all`."""
    names = [case if isinstance(case, str) else case[0] for case in cases]
    return one_of_many(cases, [c for c, n in zip(cases, names, strict=True) if n not in VARIANTS])


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@functools.cache
def setup(case):
    """A mixer, its parameters, an input, and the jitted call ``run(x, segments, state)``."""
    mixer = build(CASES[case], WIDTH)
    x = jax.random.normal(jax.random.key(1), (*IDS.shape, WIDTH))
    variables = jax.jit(mixer.init)(jax.random.key(0), x)

    @jax.jit
    def run(x, segments=None, state=None):
        if state is None and case in GROWING:
            state = start(mixer, x.shape[0])
        return mixer.apply(variables, x, segments=segments, state=state)

    return mixer, variables, x, run


def start(mixer, batch):
    return mixer.initial_state(batch, max_length=2 * LENGTH, dtype=jnp.float32)


def close(actual, expected, tolerance=2e-6):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    error = np.sqrt(np.mean(np.abs(actual - expected) ** 2))
    assert error <= tolerance * max(np.sqrt(np.mean(np.abs(expected) ** 2)), 1e-3)


def close_states(actual, expected):
    jax.tree.map(close, actual.state, expected.state)
    np.testing.assert_array_equal(actual.position, expected.position)
    np.testing.assert_array_equal(actual.segment, expected.segment)


def in_pieces(mixer, run, x, ids, cuts):
    """Outputs and last state when the row is fed in pieces that end at ``cuts``."""
    single = not mixer.supports_packing
    state, outputs = start(mixer, x.shape[0]), []
    for begin, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        segments = None if ids is None else from_ids(ids[:, begin:end], single=single)
        y, state = run(x[:, begin:end], segments, state)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), state


def test_every_registered_mixer_is_covered():
    assert {config.mixer for config in CASES.values()} == set(REGISTRY)
    assert CASES.keys() == FLAGS.keys()
    for name, (config_class, _) in REGISTRY.items():
        assert config_class.mixer == name


@pytest.mark.parametrize("case", each(list(CASES)))
def test_flags(case):
    mixer = build(CASES[case], WIDTH)
    assert (mixer.causal, mixer.stateful, mixer.supports_packing) == FLAGS[case]


@pytest.mark.parametrize("case", each(list(CASES)))
def test_shapes_dtypes_and_marks(case):
    _, variables, x, run = setup(case)
    y, _ = run(x)
    assert (y.shape, y.dtype) == (x.shape, jnp.float32)
    low, _ = run(x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    close(low.astype(jnp.float32), y, 2e-2)
    paths = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    names = {"/".join(entry.key for entry in path) for path, _ in paths}
    assert set(CASES[case].param_labels()) <= names
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("case", each(list(CASES)))
def test_causality(case):
    mixer, _, x, run = setup(case)
    early = np.abs(run(x.at[:, 7].add(1.0))[0] - run(x)[0])[:, :7].max()
    assert (early < 1e-5) == mixer.causal


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("case", each(STREAMING))
def test_whole_is_split_is_step_by_step(case, named):
    mixer, _, x, run = setup(case)
    ids, positions, names = None, [LENGTH] * 3, [1] * 3
    if named and mixer.supports_packing:
        ids, positions, names = IDS, [4, 5, 0], [1, 4, 0]
    elif named:
        ids, positions, names = ALONE, [9, LENGTH, 0], [7, 7, 0]
    whole, state = run(x, None if ids is None else from_ids(ids, single=not mixer.supports_packing))
    # 5 is a document boundary of row 0, 4 and 9 a token beside one. Few lengths, for each compiles.
    for cuts in ([5, 9], [5, 10], [4, 9], list(range(1, LENGTH))):
        pieces, last = in_pieces(mixer, run, x, ids, cuts)
        close(pieces, whole)
        close_states(last, state)
    np.testing.assert_array_equal(state.position, positions)
    np.testing.assert_array_equal(state.segment, names)


@pytest.mark.parametrize("case", each(PACKING))
def test_packed_equals_unpacked(case):
    _, _, x, run = setup(case)
    packed, _ = run(x, from_ids(IDS))
    expected = np.zeros_like(packed)
    for row, begin, end in [(0, 0, 5), (0, 5, 8), (0, 8, 12), (1, 0, 9), (1, 9, 14)]:
        expected[row, begin:end] = run(x[row : row + 1, begin:end])[0][0]
    close(packed, expected)
    assert not np.any(np.asarray(packed)[IDS == 0])


@pytest.mark.parametrize("case", each(PACKING))
def test_documents_are_isolated_bit_for_bit(case):
    _, _, x, run = setup(case)
    segments = from_ids(IDS)
    cotangent = jax.random.normal(jax.random.key(5), x.shape)

    @jax.jit
    def outputs_and_gradient(x):
        y, vjp = jax.vjp(lambda x: run(x, segments)[0], x)
        return y, vjp(cotangent)[0]

    for document in ((0, slice(0, 5)), (0, slice(5, 8)), (1, slice(9, 14))):
        other = x.at[document].set(1e4 * x[document] + 3.0)
        inside = np.zeros(IDS.shape, bool)
        inside[document] = True
        before, after = outputs_and_gradient(x), outputs_and_gradient(other)
        for one, two in zip(before, after, strict=True):
            np.testing.assert_array_equal(one[~inside], two[~inside])
        assert np.any(before[0][inside] != after[0][inside])


@pytest.mark.parametrize("case", each(PACKING))
def test_single_document_rows_agree_with_the_general_path(case):
    mixer, _, x, run = setup(case)
    cotangent = jax.random.normal(jax.random.key(5), x.shape)

    @jax.jit
    def differentiate(x, segments):
        y, vjp, state = jax.vjp(lambda x: run(x, segments), x, has_aux=True)
        return y, vjp(cotangent)[0], state

    single = differentiate(x, from_ids(ALONE, single=True))
    general = differentiate(x, from_ids(ALONE))
    close(single[0], general[0])
    close(single[1], general[1])
    assert not np.any(np.asarray(single[0])[ALONE == 0])
    assert not np.any(np.asarray(single[1])[ALONE == 0])
    if mixer.stateful:
        close_states(single[2], general[2])
        np.testing.assert_array_equal(single[2].position, [9, LENGTH, 0])


@pytest.mark.parametrize("case", each(UNPACKING))
def test_mixers_of_single_documents_refuse_packed_rows_and_ignore_padding(case):
    _, _, x, run = setup(case)
    with pytest.raises(ValueError, match=r"several documents a row are not supported"):
        run(x, from_ids(IDS))
    cotangent = jax.random.normal(jax.random.key(5), x.shape)

    @jax.jit
    def differentiate(x, cotangent, segments=None):
        y, vjp = jax.vjp(lambda x: run(x, segments)[0], x)
        return y, vjp(cotangent)[0]

    segments = from_ids(ALONE, single=True)
    padded = differentiate(x, cotangent, segments)
    for part, whole, short in zip(
        padded,
        differentiate(x, cotangent),
        differentiate(x[:1, :9], cotangent[:1, :9]),
        strict=True,
    ):
        close(part[1], whole[1])
        close(part[0, :9], short[0])
        assert not np.any(np.asarray(part)[ALONE == 0])


@pytest.mark.parametrize(("case", "single"), each(STREAMING_SINGLE))
def test_padding_leaves_the_state_untouched(case, single):
    _, _, x, run = setup(case)
    _, state = run(x)
    padding = from_ids(np.zeros_like(IDS), single=single)
    y, after = run(x, padding, state)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert not np.any(np.asarray(y))


@pytest.mark.parametrize(("case", "single"), each(STREAMING_SINGLE))
def test_carried_state_is_used_and_zeroed_by_a_new_document(case, single):
    mixer, _, x, run = setup(case)
    _, state = run(x, from_ids(np.full_like(IDS, 3), single=not mixer.supports_packing))
    second = np.repeat(np.array([[3], [8], [0]], np.int32), LENGTH, axis=1)
    y, after = run(x, from_ids(second, single=single), state)
    whole, _ = run(jnp.concatenate([x, x], axis=1))
    fresh, _ = run(x)
    close(y[0], whole[0, LENGTH:])
    close(y[1], fresh[1])
    assert np.abs(whole[1, LENGTH:] - fresh[1]).max() > 1e-3
    np.testing.assert_array_equal(after.position, [2 * LENGTH, LENGTH, LENGTH])
    np.testing.assert_array_equal(after.segment, [3, 8, 3])


@pytest.mark.parametrize("case", each(STREAMING))
def test_gradients_flow_through_the_carried_state(case):
    _, _, x, run = setup(case)

    def whole(x):
        return jnp.sum(jnp.sin(run(x)[0]))

    def split(x):
        first, state = run(x[:, :4])
        second, _ = run(x[:, 4:], None, state)
        return jnp.sum(jnp.sin(first)) + jnp.sum(jnp.sin(second))

    close(jax.jit(jax.grad(split))(x), jax.jit(jax.grad(whole))(x))


@pytest.mark.parametrize("case", each(STREAMING))
def test_state_size_is_that_of_the_real_state(case):
    mixer = build(CASES[case], WIDTH)
    leaves = jax.tree.leaves(mixer.initial_state(1, max_length=100))
    assert mixer.state_bytes(100) == sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize("case", each(sorted(GROWING)))
def test_growing_states_need_a_length(case):
    mixer, variables, x, run = setup(case)
    y, state = jax.jit(mixer.apply)(variables, x, segments=from_ids(IDS))
    close(y, run(x, from_ids(IDS))[0])
    with pytest.raises(ValueError, match=r"holds no cache; begin with initial_state\(.*max_length"):
        run(x, None, state)
    with pytest.raises(ValueError, match="max_length=None must be positive"):
        mixer.initial_state(3)
    assert mixer.state_bytes(200) > mixer.state_bytes(100)
    room = mixer.initial_state(3, max_length=LENGTH - 6, dtype=jnp.float32)
    late, _ = run(x, None, room)
    assert np.all(np.isfinite(late[:, : LENGTH - 6]))
    assert np.all(np.isnan(late[:, -1]))


@pytest.mark.parametrize("case", each(STREAMING))
def test_states_can_be_donated(case):
    mixer, _, x, run = setup(case)
    places = []
    for leaf in jax.tree.leaves(start(mixer, 3)) + jax.tree.leaves(run(x)[1]):
        places.append(leaf.unsafe_buffer_pointer())
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("case", each(list(CASES)))
def test_bad_arguments_are_refused(case):
    mixer, _, x, run = setup(case)
    with pytest.raises(ValueError, match=r"x has shape .* expected \(batch, length, 4\)"):
        run(x[..., :3])
    with pytest.raises(ValueError, match=r"segments.ids has shape \(3, 6\)"):
        run(x, from_ids(IDS[:, :6]))
    if mixer.stateful:
        with pytest.raises(ValueError, match=r"state is for a batch of 2, .* initial_state\(3\)"):
            run(x, None, start(mixer, 2))


@pytest.mark.parametrize("case", each(BIDIRECTIONAL))
def test_bidirectional_mixers_refuse_a_state(case):
    mixer, _, x, run = setup(case)
    assert run(x)[1] is None
    state = RecurrentState.start(jnp.zeros((3, 4), jnp.complex64), 3)
    fix = "(set bidirectional=False|take [a-z0-9]+( alone)?) to stream"
    with pytest.raises(ValueError, match=f"mixer: state is refused.*{fix}"):
        run(x, None, state)
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
    with pytest.raises(ValueError, match="n_ssm=3 must divide the width 4"):
        mixer.init(jax.random.key(0), jnp.zeros((1, 2, WIDTH)))
