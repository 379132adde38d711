"""Checks of arguments: numbers, prompts with padding, and segment ids on every way in."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.arguments import floating, integer, prompt_rows, real, token_batch, token_ids
from seqmodels.mixers import S4Config, S5Config, Segments, build
from seqmodels.models import BackboneConfig, Classifier, ClassifierConfig
from seqmodels.models.backbone import Backbone
from seqmodels.parallel.mesh import make_mesh, put_batch

LEFT = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], np.int32)
ORDER = r"padding \(id 0\) may stand only at the end of a row"


@pytest.mark.parametrize("value", [3, np.int64(3), np.array(3), jnp.int32(3)])
def test_whole_numbers_of_any_kind_become_pythons(value):
    number = integer("n", value, 0)
    assert (number, type(number)) == (3, int)


@pytest.mark.parametrize("value", [-1, 2**31, True, 3.0, "3", None, [3], np.array([3, 4])])
def test_what_is_no_whole_number_in_range_is_refused(value):
    with pytest.raises(ValueError, match=r"^n=.* must be an integer from 0 to 2147483647$"):
        integer("n", value, 0)


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.array(1.0), jnp.bfloat16(1)])
def test_real_numbers_of_any_kind_become_pythons(value):
    number = real("x", value)
    assert (number, type(number)) == (1.0, float)


@pytest.mark.parametrize(
    "value",
    [np.nan, np.inf, 10**400, True, "1", None, [1.0], np.ones(1), 1j, [[1], [1, 2]]],
)
def test_what_is_no_real_number_is_refused(value):
    with pytest.raises(ValueError, match=r"^x=.* must be a concrete, finite number$"):
        real("x", value)


def test_a_traced_number_is_refused_by_name():
    for check in (lambda x: real("x", x), lambda x: integer("x", x, 0)):
        with pytest.raises(ValueError, match=r"^x=.*must be"):
            jax.eval_shape(check, jnp.int32(1))


@pytest.mark.parametrize("value", [[3, 5], (3, 5), np.array([3, 5]), jnp.array([3, 5])])
def test_ids_become_a_tuple(value):
    assert token_ids("stop_tokens", value) == (3, 5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "stop_tokens=3 must be a sequence of token ids"),
        ("3", "stop_tokens='3' must be a sequence of token ids"),
        (None, "stop_tokens=None must be a sequence of token ids"),
        (np.ones((1, 1), int), "must have one axis"),
        ([1, -3], r"stop_tokens\[1\]=-3 must be an integer from 0"),
        ([1.5], r"stop_tokens\[0\]=1.5 must be an integer from 0"),
    ],
)
def test_what_are_no_ids_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        token_ids("stop_tokens", value)


def test_dtypes_of_caches_are_floating_point():
    assert floating("dtype", jnp.bfloat16) == jnp.bfloat16
    for value in ("int8", "nonsense", 3.5):
        with pytest.raises(ValueError, match=r"^dtype=.* must be a floating-point dtype"):
            floating("dtype", value)


UNPADDED = [[1, 2, 3], [4]]


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, np.ndarray.tolist])
@pytest.mark.parametrize(
    ("tokens", "mask"),
    [
        ([[1, 2, 3], [4, 99, 99]], [[1, 1, 1], [1, 0, 0]]),
        ([[1, 2, 3], [99, -1, 4]], [[1, 1, 1], [0, 0, 1]]),
        ([[-1, 1, 2, 3], [99, 4, 99, 99]], [[0, 1, 1, 1], [0, 1, 0, 0]]),
    ],
    ids=["right", "left", "both"],
)
def test_padding_is_taken_away_on_either_side(kind, tokens, mask):
    rows = prompt_rows(kind(np.array(tokens)), kind(np.array(mask)), 5)
    assert [row.tolist() for row in rows] == UNPADDED


@pytest.mark.parametrize(
    ("prompts", "mask"),
    [
        (UNPADDED, None),
        (tuple(map(tuple, UNPADDED)), None),
        ([np.array([1, 2, 3]), jnp.array([4])], None),
        (UNPADDED, [[1, 1, 1], [True]]),
    ],
)
def test_prompts_of_different_lengths(prompts, mask):
    rows = prompt_rows(prompts, mask, 5)
    assert [row.tolist() for row in rows] == UNPADDED


@pytest.mark.parametrize(
    ("prompts", "mask", "message"),
    [
        ([], None, "prompts is empty"),
        (np.ones((0, 3), int), None, "prompts is empty"),
        ([[1], []], None, r"prompts\[1\] is empty"),
        (np.ones((2, 0), int), None, r"prompts\[0\] is empty"),
        ([[1, 5]], None, r"prompts\[0\] has ids from 1 to 5; the vocabulary has ids from 0 to 4"),
        ([[-1]], None, r"prompts\[0\] has ids from -1 to -1"),
        ([[2**40]], None, r"prompts\[0\] has ids from 1099511627776"),
        ([[2**70]], None, r"prompts\[0\]=\[1180591620717411303424\] must be a list of integers"),
        ([[1.0]], None, r"prompts\[0\]=\[1.0\] must be a list of integers"),
        ([[True]], None, r"prompts\[0\]=\[True\] must be a list of integers"),
        ([["a"]], None, r"prompts\[0\]=\['a'\] must be a list of integers"),
        ([[[1]]], None, r"prompts\[0\]=\[\[1\]\] must be a list of integers"),
        ([[[1], [1, 2]]], None, r"prompts\[0\]=\[\[1\], \[1, 2\]\] must be a list of integers"),
        ([1, 2], None, r"prompts\[0\]=1 must be a list of integers"),
        (np.array([1, 2]), None, r"prompts=array\(\[1, 2\]\) must be a list of lists"),
        (np.ones((1, 2)), None, r"prompts\[0\]=array\(\[1., 1.\]\) must be a list of integers"),
        ("text", None, "prompts='text' must be a list of lists"),
        (None, None, "prompts=None must be a list of lists"),
        ({"input_ids": [[1]]}, None, r"prompts=tokens\['input_ids'\]"),
        ([[1, 2, 3]], [[1, 0, 1]], r"attention_mask\[0\] has padding among .* at token 1;"),
        ([[1, 2]], [[0, 0]], r"attention_mask\[0\] has no real token"),
        ([[1, 2]], [[1, 2]], r"attention_mask\[0\]=array\(\[1, 2\]\) must be 1 on real tokens"),
        ([[1, 2]], [[1.0, 1.0]], r"attention_mask\[0\]=\[1.0, 1.0\] must be a list of integers"),
        ([[1, 2]], [[1]], r"attention_mask\[0\] has 1 entries, prompts\[0\] has 2 tokens"),
        ([[1, 2]], [[1, 1]] * 2, "attention_mask has 2 rows, prompts has 1"),
        ([[1, 2]], [1, 1], r"attention_mask\[0\]=1 must be a list of integers"),
    ],
)
def test_what_are_no_prompts_is_refused(prompts, mask, message):
    with pytest.raises(ValueError, match=message) as caught:
        prompt_rows(prompts, mask, 5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_tokens_outside_the_vocabulary_are_refused(kind):
    for tokens in ([[1, 5]], [[-1, 1]]):
        with pytest.raises(ValueError, match="tokens has ids from"):
            token_batch("tokens", kind(tokens), 5)
    for tokens in ([[1.0]], [1], [[]]):
        with pytest.raises(ValueError, match=r"give integer ids \(B, L\)"):
            token_batch("tokens", kind(tokens), 5)


def left_padded():
    """Segments that were built without a check, as under jit."""
    ids = jnp.asarray(LEFT)
    return Segments(ids=ids, index=ids, positions=ids, single=True)


def through_mixer():
    x = jnp.zeros((2, 5, 4))
    build(S4Config(state_size=4), 4).init(jax.random.key(0), x, segments=left_padded())


def through_scanned_backbone():
    stack = BackboneConfig(("s5",) * 4, (S5Config(state_size=4),), width=4)
    Backbone(stack).init(jax.random.key(0), jnp.zeros((2, 5, 4)), segments=left_padded())


def through_classifier():
    stack = BackboneConfig(("s5",), (S5Config(state_size=4),), width=4)
    model = Classifier(ClassifierConfig(stack, num_classes=3, vocabulary_size=7))
    model.init(jax.random.key(0), np.ones_like(LEFT), LEFT)


@pytest.mark.parametrize(
    "way",
    [
        lambda: Segments.from_ids(LEFT),
        lambda: Segments.from_ids(jnp.asarray(LEFT)),
        lambda: jax.jit(lambda: Segments.from_ids(LEFT).segment_index)(),
        through_mixer,
        through_scanned_backbone,
        through_classifier,
        lambda: put_batch({"segment_ids": LEFT}, make_mesh(devices=jax.devices()[:1])),
        lambda: put_batch({"segment_ids": LEFT[None]}, make_mesh(devices=jax.devices()[:1])),
    ],
    ids=["numpy", "jax", "constant", "mixer", "scan", "classifier", "batch", "pairs"],
)
def test_left_padding_is_refused_on_every_way_in(way):
    with pytest.raises(ValueError, match=ORDER):
        way()


@pytest.mark.parametrize(
    ("ids", "single", "message"),
    [
        ([[1, 2, 0]], True, "one document a row here, but row 0 has another at token 1"),
        ([[1, -2]], False, "got -2 in row 0 at token 1"),
        ([[1, 2**32]], False, "must fit int32"),
        ([[1.0, 1.0]], False, "must be integers"),
        ([1, 1], False, re.escape("shape (B, L)")),
    ],
)
def test_other_wrong_segment_ids(ids, single, message):
    with pytest.raises(ValueError, match=message):
        Segments.from_ids(np.array(ids), single=single)


def test_traced_ids_are_held_to_shape_and_dtype_only():
    segments = jax.eval_shape(Segments.from_ids, jnp.asarray(LEFT))
    assert segments.index.shape == LEFT.shape
    with pytest.raises(ValueError, match="must be integers"):
        jax.eval_shape(Segments.from_ids, jnp.ones((1, 2)))
