"""Meshes, sharding rules and sequence-parallel strategies."""

from seqmodels.parallel.mesh import (
    MESH_AXES,
    batch_sharding,
    make_mesh,
    put_batch,
    replicated,
)

__all__ = ["MESH_AXES", "batch_sharding", "make_mesh", "put_batch", "replicated"]
