"""The device mesh, and where batches and parameters live on it."""

from seqmodels.parallel.mesh import (
    MESH_AXES,
    batch_sharding,
    make_mesh,
    on_mesh,
    put_batch,
    replicated,
)

__all__ = ["MESH_AXES", "batch_sharding", "make_mesh", "on_mesh", "put_batch", "replicated"]
