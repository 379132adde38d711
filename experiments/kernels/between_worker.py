"""Times one checkout for ``seqmodels kernels between``, which starts it with that checkout's path.

It imports nothing of the repository but `pallas_kernels.<family>.shapes:case`, which every checkout
has. A line of standard input is a program, `["linear_scan", "s5-listops", "forward", "0.5"]`, which
is compiled and run, or `null`: the last one is run again. Each is answered by a line, the seconds
that a run took.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def values(struct: jax.ShapeDtypeStruct, rng: np.random.Generator) -> np.ndarray:
    """Small negative numbers, which no operand objects to; one document for integers."""
    if np.issubdtype(struct.dtype, np.integer):
        return np.zeros(struct.shape, struct.dtype)
    return (-0.01 * (1 + np.abs(rng.standard_normal(struct.shape)))).astype(struct.dtype)


def serve() -> None:
    jax.config.update("jax_platforms", "cpu")
    run: Callable[..., Any] = tuple
    operands: Any = ()
    for line in sys.stdin:
        if program := json.loads(line):
            family, shape, mode, factor = program
            case = importlib.import_module(f"pallas_kernels.{family}.shapes").case
            fn, *structs = case(shape, "xla", mode, factor)
            rng = np.random.default_rng(0)
            operands = jax.tree.map(lambda s, rng=rng: jax.device_put(values(s, rng)), structs)
            run = jax.jit(fn)
            jax.block_until_ready(run(*operands))
        start = time.perf_counter()
        jax.block_until_ready(run(*operands))
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    serve()
