"""Pathfinder's generator: what is in an image, and the statistics of the original program's."""

import functools

import numpy as np
import pytest
from scipy import ndimage

from seqmodels.data.lra import pathfinder, snakes
from seqmodels.data.lra.pathfinder import CONTOUR, SHAPES

generate = functools.partial(pathfinder.generate, processes=1)

# Of 2,000 (32 pixels) and 64 (128 pixels) images that the original program drew, both "hard":
# mean gray, share of pixels above 0, share above 64, each with its standard error.
ORIGINAL = {
    32: {"mean": (20.166, 0.044), "above 0": (0.34181, 0.00084), "above 64": (0.12568, 0.00027)},
    128: {"mean": (7.918, 0.039), "above 0": (0.13729, 0.00069), "above 64": (0.04082, 0.00027)},
}


@pytest.fixture(scope="module")
def drawn():
    return generate(32, 512, seed=1)


def statistics(images):
    values = images.reshape(len(images), -1).astype(float)
    each = {
        "mean": values.mean(1),
        "above 0": (values > 0).mean(1),
        "above 64": (values > 64).mean(1),
    }
    return {name: (per.mean(), per.std() / len(per) ** 0.5) for name, per in each.items()}


def check_statistics(images):
    ours, original = statistics(images), ORIGINAL[images.shape[1]]
    for name, (value, error) in original.items():
        mean, own_error = ours[name]
        assert abs(mean - value) < 4 * np.hypot(error, own_error), name


def test_statistics_are_those_of_the_original_program(drawn):
    images, labels = drawn
    assert (images.shape, images.dtype) == ((512, 32, 32), np.uint8)
    assert (labels.shape, labels.dtype) == ((512,), np.int32)
    check_statistics(images)
    assert abs(labels.mean() - 0.5) < 4 * 0.5 / 512**0.5
    assert (images.min(axis=(1, 2)) == 0).all()
    assert (images.max(axis=(1, 2)) == 255).all()


@pytest.mark.full
def test_statistics_of_path_x():
    check_statistics(generate(128, 256, seed=1)[0])


def test_neither_brightness_nor_place_tells_the_label(drawn):
    images, labels = drawn
    values = images.reshape(len(images), -1).astype(float)
    features = np.stack([values.mean(1), values.std(1), (values > 64).mean(1)], axis=1)
    for feature in features.T:
        difference = feature[labels == 1].mean() - feature[labels == 0].mean()
        error = feature.std() * (1 / (labels == 1).sum() + 1 / (labels == 0).sum()) ** 0.5
        assert abs(difference) < 4 * error


def test_the_discs_are_on_one_contour_exactly_when_the_label_says_so():
    """Contours found by closing the gaps between paddles; they may touch others in doing so."""
    images, labels = generate(256, 64, seed=3, difficulty="easy")
    together = []
    for image in images:
        bright = image > 100
        discs, found = ndimage.label(ndimage.binary_erosion(bright, iterations=3))
        assert found in (1, 2)  # 1: the discs touch
        closed, _ = ndimage.label(ndimage.binary_dilation(bright, np.ones((3, 3)), iterations=3))
        together.append(len({closed[discs == disc][0] for disc in range(1, found + 1)}) == 1)
    together = np.array(together)
    assert together[labels == 1].all()
    assert together[labels == 0].mean() < 0.3


@pytest.mark.parametrize("difficulty", CONTOUR)
def test_paddles_keep_apart_and_go_on(difficulty):
    shape = SHAPES[32]
    table = snakes.tables(shape, 1)
    rng = np.random.default_rng(0)
    _, paddles = pathfinder._long_snakes(shape, table, rng, CONTOUR[difficulty], 8)
    assert [len(own) for own in paddles] == [CONTOUR[difficulty]] * 2
    turns = np.concatenate([np.diff([tips.place for tips in own], axis=0) for own in paddles])
    distance = np.hypot(turns[..., 0], turns[..., 1])
    assert ((distance > 0) & (distance < 2 * shape.length + 6)).all()
    # A new footprint crosses none that is registered; one is when its snake grows again.
    for image in range(8):
        first, second = ([footprint(shape, table, tips, image) for tips in own] for own in paddles)
        for j in range(1, CONTOUR[difficulty]):
            for new, earlier in (
                (first[j], first[: j - 1] + second[: j - 1]),
                (second[j], first[:j] + second[: j - 1]),
            ):
                assert all((new + other).max() < 1.8 for other in earlier)


def footprint(shape, table, tips, image):
    """The footprint of one paddle on an image with a margin, in 0 .. 1."""
    canvas = np.zeros((shape.size + 2 * shape.border,) * 2)
    y, x = tips.place[image] + shape.border - table.reach
    side = 2 * table.reach + 1
    canvas[y : y + side, x : x + side] = table.masks[tips.angle[image]] / 255
    return canvas


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setitem(pathfinder._BLOCK, 32, 8)
    monkeypatch.setitem(pathfinder._TRIES, 32, 64)


def test_fewer_are_the_beginning_of_more(small_blocks):
    more, labels = generate(32, 20, seed=2, difficulty="easy")
    fewer, some = generate(32, 11, seed=2, difficulty="easy")
    assert np.array_equal(fewer, more[:11])
    assert np.array_equal(some, labels[:11])
    assert not np.array_equal(generate(32, 11, seed=3, difficulty="easy")[0], fewer)
    assert len(np.unique(more.reshape(20, -1), axis=0)) == 20


def test_a_killed_call_continues(small_blocks, tmp_path, monkeypatch):
    expected, labels = generate(32, 20, seed=2, difficulty="easy")
    generate(32, 12, seed=2, difficulty="easy", parts=tmp_path)
    drawn = []
    draw = pathfinder.draw_block
    monkeypatch.setattr(pathfinder, "draw_block", lambda *a: drawn.append(a[-1]) or draw(*a))
    images, answers = generate(32, 20, seed=2, difficulty="easy", parts=tmp_path)
    assert drawn == [2]
    assert np.array_equal(images, expected)
    assert np.array_equal(answers, labels)


@pytest.mark.full
def test_the_number_of_processes_does_not_matter(drawn):
    images, labels = generate(32, 1024, seed=1, processes=2)
    assert np.array_equal(images[:512], drawn[0])
    assert np.array_equal(labels[:512], drawn[1])
    assert np.array_equal(images, generate(32, 1024, seed=1)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 48}, "size=48 is not one of 32, 64, 128, 256"),
        ({"difficulty": "simple"}, "difficulty='simple' is not one of easy, intermediate, hard"),
        ({"count": -1}, "count=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"processes": 0}, "processes=0"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"size": 32, "count": 1, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        generate(arguments.pop("size"), arguments.pop("count"), **arguments)
