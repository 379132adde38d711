"""TPU kernels: heads as blocks of lanes, a chunk of time at once, states in VMEM.

Grid, operands and calls are those of `matrix_state.tpu`; what happens inside a chunk is in
`tpu_scalar_decay` and `tpu_vector_decay`.
"""

from __future__ import annotations

from pallas_kernels.delta_rule import tpu_scalar_decay, tpu_vector_decay
from pallas_kernels.matrix_state.tpu import Kernels, KernelShape, backend


def _score_scratch(dims: KernelShape) -> dict[str, tuple[int, ...]]:
    """Scratch for the scores of every head of a step."""
    shape = (dims.tiles.heads, dims.tiles.chunk, dims.tiles.chunk)
    return dict.fromkeys(("A_qk", "A_kk", "inverse"), shape)


def _solve_flops(dims: KernelShape) -> int:
    """Operations for a token and head."""
    return 2 * dims.tiles.chunk * (dims.key_size + 2 * dims.value_size + dims.tiles.chunk)


KERNELS = Kernels(
    "delta_rule",
    (tpu_scalar_decay.forward, tpu_scalar_decay.backward),
    (tpu_vector_decay.forward, tpu_vector_decay.backward),
    rows=("beta",),
    scratch=_score_scratch,
    flops=_solve_flops,
)
BACKEND = backend(KERNELS)
