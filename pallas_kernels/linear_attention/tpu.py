"""TPU kernels: heads as blocks of lanes, a chunk of time at once, states in VMEM.

Grid, operands and calls are those of `matrix_state.tpu`; what happens inside a chunk is in
`tpu_scalar_decay` and `tpu_vector_decay`.
"""

from __future__ import annotations

from pallas_kernels.linear_attention import tpu_scalar_decay, tpu_vector_decay
from pallas_kernels.matrix_state.tpu import Kernels, backend

KERNELS = Kernels(
    "linear_attention",
    (tpu_scalar_decay.forward, tpu_scalar_decay.backward),
    (tpu_vector_decay.forward, tpu_vector_decay.backward),
)
BACKEND = backend(KERNELS)
