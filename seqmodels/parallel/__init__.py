"""The device mesh, where batches and parameters live on it, and what its shards tell each other."""

from seqmodels.parallel.mesh import (
    MESH_AXES,
    batch_sharding,
    make_mesh,
    on_mesh,
    put_batch,
    replicated,
    rows_of_process,
    token_sharding,
)
from seqmodels.parallel.parameters import RULES, parameter_shardings
from seqmodels.parallel.strategies import STRATEGIES

__all__ = [
    "MESH_AXES",
    "RULES",
    "STRATEGIES",
    "batch_sharding",
    "make_mesh",
    "on_mesh",
    "parameter_shardings",
    "put_batch",
    "replicated",
    "rows_of_process",
    "token_sharding",
]
