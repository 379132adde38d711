"""GPU kernels (Triton lowering): one pass over the states, then all chunks in parallel.

The first kernel hands blocks `(values, keys)` of the states from chunk to chunk, in order, and
keeps the state that enters each; the second lets every chunk answer its queries. Backward does the
same against time: the gradients of the states, then of every chunk's values, then of its queries,
keys and decays. A residual is one state a chunk, in the dtype of the values.

What a chunk computes is in `matrix_state.tile`, here in blocks of keys and of values, so that what
a program holds stays in registers. Heads of one group read the same queries and keys; their
gradients are written a head and summed after the kernel.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels.common.backend import Backend
from pallas_kernels.linear_attention import gpu_kernels
from pallas_kernels.linear_attention.gpu_kernels import KernelShape, Tiles
from pallas_kernels.matrix_state import gpu as matrix_gpu
from pallas_kernels.matrix_state.config import Config

_PROGRAMS_THAT_FILL_A_GPU = 512  # several for each multiprocessor


def choose_tiles(dims: KernelShape) -> Tiles:
    """Blocks that keep the forward kernels in registers, and as many heads a program as leave the
    GPU full."""
    size, narrow = matrix_gpu.block_size, dims.dtype == jnp.bfloat16
    group = dims.heads // dims.groups
    chunk = size(dims.length, 64 if narrow and dims.decay != "key" else 32)
    tiles = Tiles(
        chunk,
        values=size(dims.value_size, 128 if narrow else 64),
        keys=size(dims.key_size, 64 if narrow and group == 1 else 32),
        inner=32,
        state=32 if narrow else 16,
        heads=1,
        warps=8,
    )
    programs = math.prod(dims._replace(tiles=tiles).key_grid)
    heads = [n for n in range(1, group + 1) if group % n == 0]
    fitting = [n for n in heads if programs // n >= _PROGRAMS_THAT_FILL_A_GPU]
    return tiles._replace(heads=max(fitting, default=1))


# The calls.


def _call(kernel, dims: KernelShape, name: str, *args, **options) -> dict[str, Any]:
    sizes = dims.key_size + dims.value_size
    flops = 2 * dims.key_size * dims.value_size + dims.tiles.chunk * sizes
    name = f"linear_attention_{name}"
    return matrix_gpu.call(kernel, dims, name, *args, **options, flops=flops)


def _kernel_shape(config: Config, q, v, log_decay, segment_index) -> KernelShape:
    def tiles(dims):
        return choose_tiles(KernelShape(*dims))

    return KernelShape(*matrix_gpu.kernel_shape(config, q, v, log_decay, segment_index, tiles))


def _operands(dims: KernelShape, q, k, v, log_decay, segment_index) -> dict[str, Any]:
    return {"q": q, "k": k, "v": v, "g": log_decay, **matrix_gpu.run_operands(dims, segment_index)}


def forward(
    config: Config, q, k, v, log_decay, initial_state, segment_index, *, return_residuals: bool
):
    """`((o, final_state), residuals)`: the arguments and the state that enters each chunk."""
    dims = _kernel_shape(config, q, v, log_decay, segment_index)
    operands = _operands(dims, q, k, v, log_decay, segment_index)
    initial = initial_state.swapaxes(2, 3)
    passed = _call(
        gpu_kernels.chunk_fwd_h,
        dims,
        "chunk_fwd_h",
        dims.state_grid,
        operands | {"q": None, "initial": initial},
        {"states": (dims.states, v.dtype), "final": (initial.shape, jnp.float32)},
        warps=4,
        stages=3,
    )
    states = passed["states"]
    read = _call(
        functools.partial(gpu_kernels.chunk_fwd_o_or_bwd_dv, backward=False),
        dims,
        "chunk_fwd_o",
        dims.value_grid,
        operands | {"states": states},
        {"o": (v.shape, v.dtype)},
        warps=dims.tiles.warps,
    )
    outputs = read["o"], passed["final"].swapaxes(2, 3)
    return outputs, (q, k, v, log_decay, segment_index, states) if return_residuals else None


def backward(config: Config, residuals, cotangents):
    """The gradients of all arguments."""
    q, k, v, log_decay, segment_index, states = residuals
    do, dfinal = cotangents
    dims = _kernel_shape(config, q, v, log_decay, segment_index)
    operands = _operands(dims, q, k, v, log_decay, segment_index) | {"do": do}
    dfinal = dfinal.swapaxes(2, 3)
    passed = _call(
        gpu_kernels.chunk_bwd_dh,
        dims,
        "chunk_bwd_dh",
        dims.state_grid,
        operands | {"k": None, "v": None, "dfinal": dfinal},
        {"dstates": (dims.states, v.dtype), "dinitial": (dfinal.shape, jnp.float32)},
        warps=4,
        stages=3,
    )
    dstates = passed["dstates"]
    dv = _call(
        functools.partial(gpu_kernels.chunk_fwd_o_or_bwd_dv, backward=True),
        dims,
        "chunk_bwd_dv",
        dims.value_grid,
        operands | {"v": None, "dstates": dstates},
        {"dv": (v.shape, v.dtype)},
        warps=dims.tiles.warps,
    )["dv"]
    head_blocks = dims.heads // dims.tiles.heads
    partial = q.dtype if head_blocks == dims.groups else jnp.float32
    per_head_block = ((dims.batch, dims.length, head_blocks, dims.key_size), partial)
    outputs = {"dq": per_head_block, "dk": per_head_block}
    if dims.decay == "key":
        outputs["dg"] = (log_decay.shape, log_decay.dtype)
    if dims.decay == "head":
        outputs["dg"] = ((*log_decay.shape, dims.key_blocks), jnp.float32)
    out = _call(
        gpu_kernels.chunk_bwd_dqkg,
        dims,
        "chunk_bwd_dqkg",
        dims.key_grid,
        operands | {"states": states, "dstates": dstates},
        outputs,
        warps=dims.tiles.warps,
    )
    dq, dk = (matrix_gpu.sum_over_group(out[name], q) for name in ("dq", "dk"))
    dlog_decay = out.get("dg")
    if dims.decay == "head":
        dlog_decay = out["dg"].sum(3).astype(log_decay.dtype)
    return dq, dk, dv, dlog_decay, passed["dinitial"].swapaxes(2, 3), None


def largest_array(config: Config, q, v, log_decay) -> int:
    """Elements of the largest array that a kernel addresses."""
    dims = _kernel_shape(config, q, v, log_decay, None)
    tokens = dims.batch * dims.length * dims.heads
    return max(tokens * max(dims.key_size, dims.value_size), math.prod(dims.states))


def unsupported(config: Config, q, k, v, log_decay, *rest) -> str | None:
    """Why the kernels cannot serve these arrays."""
    return matrix_gpu.unsupported(v.shape[0], v, lambda: largest_array(config, q, v, log_decay))


BACKEND = Backend(forward, backward, unsupported=unsupported)
