"""Tokens of neighbouring shards against slices of whole rows, and a convolution made of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from seqmodels.parallel.halo import halo_after, halo_before
from seqmodels.parallel.zigzag import from_zigzag, to_zigzag
from tests.seqmodels.parallel import split_rows as rows
from tests.tiers import one_of_many

WIDTHS = (0, 1, 7, 13, 60)
"""Over 8 shards the halo is of one shard, two, three, and more than all; over 3 of one or all."""


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def split_halos(args, data, *, packed):
    runs = data["segments"] if packed else None
    halos = {}
    for width in WIDTHS:
        for side, halo in (("before", halo_before), ("after", halo_after)):
            initial = args["initial"][:, :width]
            halos[f"{side} {width}"] = halo(args["x"], width, segments=runs)
            halos[f"{side} {width}, initial"] = halo(
                args["x"], width, segments=runs, initial=initial
            )
    return halos


def whole_halos(args, _, *, runs, shards, initial):
    """The same for all shards of a row, one behind the other."""
    halos = {}
    length = rows.LENGTH // shards
    for width in WIDTHS:
        edge = args["initial"][:, :width]
        around = jnp.concatenate([edge, args["x"], edge], axis=1)
        ids = np.pad(runs, ((0, 0), (width, width)), mode="edge")
        for with_edge in (False, True):
            known = np.ones(around.shape[1], bool)
            known[:width] = known[around.shape[1] - width :] = with_edge
            for side in ("before", "after"):
                parts = []
                for shard in range(shards):
                    first = width + shard * length
                    if side == "before":
                        places, own = np.arange(first - width, first), ids[:, first]
                    else:
                        places = np.arange(first + length, first + length + width)
                        own = ids[:, first + length - 1]
                    seen = known[places][None] & (ids[:, places] == own[:, None])
                    if initial:
                        seen = seen & (own != 0)[:, None]
                    parts.append(jnp.where(seen[:, :, None], around[:, places], 0.0))
                name = f"{side} {width}" + (", initial" if with_edge else "")
                halos[name] = jnp.concatenate(parts, axis=1)
    return halos


@pytest.mark.full
@pytest.mark.parametrize(
    ("shards", "packed"),
    one_of_many([(p, packed) for p in (1, 2, 3, 8) for packed in (False, True)], [(8, True)]),
)
def test_halos(shards, packed):
    _, runs, _ = rows.documents()
    rng = np.random.default_rng(0)
    args = {
        "x": rng.normal(size=(4, rows.LENGTH, 3)).astype(np.float32),
        "initial": rng.normal(size=(4, max(WIDTHS), 3)).astype(np.float32),
    }
    data = {"segments": runs}
    cotangents = {
        f"{side} {width}{tail}": rng.normal(size=(4, shards * width, 3)).astype(np.float32)
        for width in WIDTHS
        for side in ("before", "after")
        for tail in ("", ", initial")
    }
    mesh = rows.mesh(shards, 2 if shards in (2, 3) else 1)
    specs = {"x": rows.TOKENS, "initial": rows.ROWS}
    split = rows.sharded(functools.partial(split_halos, packed=packed), mesh, specs)
    actual = rows.Program(split, args, data, cotangents)(args, data, cotangents)
    ids = runs if packed else np.ones_like(runs)
    oracle = functools.partial(whole_halos, runs=ids, shards=shards, initial=packed)
    wanted = rows.in_float64(oracle, args, {}, cotangents)
    for name, halo in wanted["outputs"].items():
        np.testing.assert_array_equal(actual["outputs"][name], np.float32(halo), err_msg=name)
    rows.assert_shards_close(actual["gradients"]["x"], wanted["gradients"]["x"], shards)
    rows.assert_shards_close(actual["gradients"]["initial"], wanted["gradients"]["initial"], 1)


def test_a_shard_that_is_reached_is_one_collective():
    def count(width, shards):
        op = rows.sharded(lambda args, _: halo_before(args, width), rows.mesh(shards))
        x = jax.ShapeDtypeStruct((1, 6 * shards, 2), jnp.float32)
        return rows.Program(op, x, {}, jax.ShapeDtypeStruct((1, shards * width, 2), x.dtype)).issued

    # And one back, with gradients.
    assert count(3, 3) == count(3, 8) == {"collective_permute": 2}
    assert count(7, 8) == {"collective_permute": 4}


def by_taps(args, _, *, runs):
    """A convolution of documents, one tap after the other."""
    x, weight = args["x"], args["weight"]
    y = jnp.zeros_like(x)
    for back in range(weight.shape[0]):
        moved = jnp.pad(x, ((0, 0), (back, 0), (0, 0)))[:, : x.shape[1]]
        same = np.pad(runs, ((0, 0), (back, 0)))[:, : x.shape[1]] == runs
        y = (
            y
            + jnp.where((same & (runs != 0))[..., None], moved, 0.0) * weight[None, None, -1 - back]
        )
    return y


@pytest.mark.parametrize(
    ("taps", "shards"), one_of_many([(4, 3), (4, 8), (9, 8)], [(4, 3), (9, 8)])
)
def test_convolution(taps, shards):
    _, runs, _ = rows.documents()
    rng = np.random.default_rng(taps)
    args = {
        "x": rng.normal(size=(4, rows.LENGTH, 3)).astype(np.float32),
        "weight": rng.normal(size=(taps, 3)).astype(np.float32),
    }
    data, cotangent = {"segments": runs}, rng.normal(size=args["x"].shape).astype(np.float32)

    def split(args, data):
        window = halo_before(args["x"], taps - 1, segments=data["segments"])
        y, _ = kernels.causal_conv1d(
            args["x"],
            args["weight"],
            initial_state=window,
            segment_ids=data["segments"],
            implementation="xla",
        )
        return y

    specs = {"x": rows.TOKENS, "weight": jax.sharding.PartitionSpec()}
    split = rows.sharded(split, rows.mesh(shards), specs)
    actual = rows.Program(split, args, data, cotangent)(args, data, cotangent)
    wanted = rows.in_float64(functools.partial(by_taps, runs=runs), args, {}, cotangent)
    # The one gradient that is not of tokens.
    mine, theirs = (x["gradients"].pop("weight") for x in (actual, wanted))
    rows.assert_shards_close(mine[None], theirs[None], 1)
    rows.assert_shards_close(actual, wanted, shards)


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_zigzag(shards):
    """Shard r has chunks r and 2P - 1 - r, and the way back is the inverse."""
    row = np.arange(rows.LENGTH, dtype=np.float32)[None]

    def there_and_back(x, _):
        there = to_zigzag(x)
        return there, from_zigzag(there)

    op = jax.jit(rows.sharded(there_and_back, rows.mesh(shards)))
    there, back = op(row, {})
    chunks = np.split(row[0], 2 * shards)
    wanted = [chunks[i] for r in range(shards) for i in (r, 2 * shards - 1 - r)]
    np.testing.assert_array_equal(there[0], np.concatenate(wanted))
    np.testing.assert_array_equal(back, row)


def test_what_is_refused_is_named():
    def refused(message, width, **options):
        op = rows.sharded(lambda x, _: halo_before(x, width, **options), rows.mesh(2))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(op, jax.ShapeDtypeStruct((1, 8, 3), jnp.float32), {})

    refused("width must be at least 0, got -1", -1)
    refused(r"initial must be \(1, 2, 3\) float32", 2, initial=jnp.zeros((1, 3, 3)))
    refused("axis='rows' is no mesh axis", 2, axis="rows")
