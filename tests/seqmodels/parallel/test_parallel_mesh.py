"""Mesh construction and where batches land."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from seqmodels.parallel.mesh import MESH_AXES, make_mesh, put_batch, replicated


def test_all_devices_go_to_data():
    mesh = make_mesh()
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 8, "model": 1, "seq": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 2}, "data=2, model=1 and seq=1 need 2 devices, there are 8; use data"),
        ({"data": 0}, "data=0 must be at least 1"),
        ({"model": 0}, "model=0 must be at least 1"),
        ({"model": 3}, "model=3 does not divide the 8 devices; use model=2"),
        ({"model": 2, "seq": 8}, "seq=8 does not divide the 4 devices that model=2 leaves; use"),
        ({"seq": 3}, "seq=3 does not divide the 8 devices; use seq=2"),
        ({"data": 4, "seq": 4}, "data=4, model=1 and seq=4 need 16 devices, there are 8"),
        ({"seq": 0}, "seq=0 must be at least 1"),
    ],
)
def test_sizes_that_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_rows_are_split_over_data():
    mesh = make_mesh(4, devices=jax.devices()[:4])
    rows = np.arange(16).reshape(8, 2)
    placed = put_batch({"inputs": rows}, mesh)["inputs"]
    assert placed.sharding.spec == PartitionSpec("data", "seq")
    assert placed.addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(placed, rows)


def test_a_length_is_split_over_seq_and_padded_where_it_does_not_divide():
    mesh = make_mesh(2, seq=4)
    tokens = np.arange(1, 25, dtype=np.int32).reshape(2, 2, 6)
    ids = np.ones_like(tokens)
    placed = put_batch({"inputs": tokens, "segment_ids": ids, "labels": np.zeros(2)}, mesh)
    assert placed["inputs"].sharding.spec == PartitionSpec("data", None, "seq")
    assert placed["labels"].sharding.spec == PartitionSpec("data")
    assert placed["inputs"].addressable_shards[0].data.shape == (1, 2, 2)
    np.testing.assert_array_equal(placed["inputs"][:, :, :6], tokens)
    assert (placed["segment_ids"][:, :, 6:] == 0).all()
    with pytest.raises(ValueError, match=r"'inputs'.*length of 6.*seq axis of 4.*choose 8"):
        put_batch({"inputs": tokens[0]}, mesh)


def test_rows_that_do_not_divide_name_the_fix():
    with pytest.raises(ValueError, match=r"'labels'.*6 rows.*batch_size.*multiple of 8"):
        put_batch({"labels": np.zeros(6)}, make_mesh())


def test_replicated_is_whole_on_each_device():
    value = jax.device_put(np.arange(3), replicated(make_mesh()))
    assert [shard.data.shape for shard in value.addressable_shards] == [(3,)] * 8
