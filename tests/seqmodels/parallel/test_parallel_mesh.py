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
        ({"data": 2}, "data=2 needs 2 devices, there are 8; use data=-1"),
        ({"data": 0}, "data=0 must be at least 1"),
        ({"model": 2}, "model=2 must be 1.*use data=-1"),
        ({"data": 4, "seq": 2}, "seq=2 must be 1.*use data=-1"),
        ({"seq": 0}, "seq=0 must be 1"),
    ],
)
def test_sizes_that_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_rows_are_split_over_data():
    mesh = make_mesh(4, devices=jax.devices()[:4])
    rows = np.arange(16).reshape(8, 2)
    placed = put_batch({"inputs": rows}, mesh)["inputs"]
    assert placed.sharding.spec == PartitionSpec("data")
    assert placed.addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(placed, rows)


def test_rows_that_do_not_divide_name_the_fix():
    with pytest.raises(ValueError, match=r"'labels'.*6 rows.*batch_size.*multiple of 8"):
        put_batch({"labels": np.zeros(6)}, make_mesh())


def test_replicated_is_whole_on_each_device():
    value = jax.device_put(np.arange(3), replicated(make_mesh()))
    assert [shard.data.shape for shard in value.addressable_shards] == [(3,)] * 8
