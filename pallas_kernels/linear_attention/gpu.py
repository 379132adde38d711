"""GPU kernels (Triton lowering): one pass over the states, then all chunks in parallel.

The first kernel hands blocks `(values, keys)` of the states from chunk to chunk, in order, and
keeps the state that enters each; the second lets every chunk answer its queries. Backward does the
same against time: the gradients of the states, then of every chunk's values, then of its queries,
keys and decays. A residual is one state a chunk, in the dtype of the values.

What a chunk computes is in `tile`, here in blocks of keys and of values, so that what a program
holds stays in registers. Heads of one group read the same queries and keys; their gradients are
written a head and summed behind the kernel.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.backend import Backend, beyond_addresses, no_wide_numbers
from pallas_kernels.linear_attention import gpu_kernels
from pallas_kernels.linear_attention.gpu_kernels import Job, Tiles
from pallas_kernels.matrix_state import chunks, chunks_gpu
from pallas_kernels.matrix_state.config import Config

_ENOUGH_PROGRAMS = 512  # several for each multiprocessor


def choose_tiles(job: Job) -> Tiles:
    """Blocks that keep the forward kernels in registers, and as many heads a program as leave the
    GPU full."""
    size, narrow, group = chunks_gpu.block_size, job.dtype == jnp.bfloat16, job.heads // job.groups
    chunk = size(job.length, 64 if narrow and job.decay != "key" else 32)
    tiles = Tiles(
        chunk,
        values=size(job.value_size, 128 if narrow else 64),
        keys=size(job.key_size, 64 if narrow and group == 1 else 32),
        inner=32,
        state=32 if narrow else 16,
        heads=1,
        warps=8,
    )
    programs = math.prod(job._replace(tiles=tiles).key_grid)
    heads = [n for n in range(1, group + 1) if group % n == 0]
    fitting = [n for n in heads if programs // n >= _ENOUGH_PROGRAMS]
    return tiles._replace(heads=max(fitting, default=1))


# The calls.


def _call(kernel, job: Job, name: str, grid, operands, outputs, *, warps: int, stages: int = 1):
    """Run `kernel(job, refs)` on named operands, None left out; `outputs` are structs by name."""
    operands = {key: x for key, x in operands.items() if x is not None}
    names = (*operands, *outputs)

    def body(*refs):
        kernel(job, dict(zip(names, refs, strict=True)))

    flops = 2 * job.key_size * job.value_size + job.tiles.chunk * (job.key_size + job.value_size)
    out = compat.pallas_call(
        body,
        backend="gpu",
        name=f"linear_attention_{name}",
        grid=grid,
        out_shape=[compat.out_struct(*x, *operands.values()) for x in outputs.values()],
        compiler_params=compat.triton.CompilerParams(num_warps=warps, num_stages=stages),
        flops=flops * job.batch * job.length * job.heads,
    )(*operands.values())
    return dict(zip(outputs, out, strict=True))


def _job(config: Config, q, v, log_decay) -> Job:
    (batch, length, groups, key_size), (heads, value_size) = q.shape, v.shape[2:]
    decay: Literal["head", "key"] | None = None
    if log_decay is not None:
        decay = "key" if log_decay.ndim == 4 else "head"
    sizes = batch, length, groups, heads, key_size, value_size
    job = Job(*sizes, decay, v.dtype, config.scale, Tiles(0, 0, 0, 0, 0))
    tiles = choose_tiles(job)
    return job._replace(tiles=tiles._replace(chunk=config.chunk or tiles.chunk))


def _operands(job: Job, q, k, v, log_decay, runs) -> dict[str, Any]:
    entering = None
    if runs is not None:
        padding = job.chunks * job.tiles.chunk - job.length
        entering = chunks.entering_runs(jnp.pad(runs, ((0, 0), (0, padding))), job.tiles.chunk)
    return {"q": q, "k": k, "v": v, "g": log_decay, "runs": runs, "entering_run": entering}


def forward(config: Config, q, k, v, log_decay, initial_state, runs, *, return_residuals: bool):
    """`((o, final_state), residuals)`: the arguments and the state that enters each chunk."""
    job = _job(config, q, v, log_decay)
    operands = _operands(job, q, k, v, log_decay, runs)
    initial = initial_state.swapaxes(2, 3)
    passed = _call(
        gpu_kernels.states_kernel,
        job,
        "forward_states",
        job.state_grid,
        operands | {"q": None, "initial": initial},
        {"states": (job.states, v.dtype), "final": (initial.shape, jnp.float32)},
        warps=4,
        stages=3,
    )
    states = passed["states"]
    read = _call(
        functools.partial(gpu_kernels.read_kernel, backward=False),
        job,
        "forward_outputs",
        job.value_grid,
        operands | {"states": states},
        {"o": (v.shape, v.dtype)},
        warps=job.tiles.warps,
    )
    outputs = read["o"], passed["final"].swapaxes(2, 3)
    return outputs, (q, k, v, log_decay, runs, states) if return_residuals else None


def backward(config: Config, residuals, cotangents):
    """The gradients of all arguments."""
    q, k, v, log_decay, runs, states = residuals
    do, dfinal = cotangents
    job = _job(config, q, v, log_decay)
    operands = _operands(job, q, k, v, log_decay, runs) | {"do": do}
    dfinal = dfinal.swapaxes(2, 3)
    passed = _call(
        gpu_kernels.state_gradients_kernel,
        job,
        "backward_states",
        job.state_grid,
        operands | {"k": None, "v": None, "dfinal": dfinal},
        {"dstates": (job.states, v.dtype), "dinitial": (dfinal.shape, jnp.float32)},
        warps=4,
        stages=3,
    )
    dstates = passed["dstates"]
    dv = _call(
        functools.partial(gpu_kernels.read_kernel, backward=True),
        job,
        "backward_values",
        job.value_grid,
        operands | {"v": None, "dstates": dstates},
        {"dv": (v.shape, v.dtype)},
        warps=job.tiles.warps,
    )["dv"]
    parts = job.heads // job.tiles.heads
    partial = q.dtype if parts == job.groups else jnp.float32
    per_part = ((job.batch, job.length, parts, job.key_size), partial)
    outputs = {"dq": per_part, "dk": per_part}
    if job.decay == "key":
        outputs["dg"] = (log_decay.shape, log_decay.dtype)
    if job.decay == "head":
        outputs["dg"] = ((*log_decay.shape, job.key_blocks), jnp.float32)
    out = _call(
        gpu_kernels.keys_kernel,
        job,
        "backward_keys",
        job.key_grid,
        operands | {"states": states, "dstates": dstates},
        outputs,
        warps=job.tiles.warps,
    )
    dq, dk = out["dq"], out["dk"]
    if parts > job.groups:
        grouped = (*q.shape[:3], -1, job.key_size)
        dq, dk = (x.reshape(grouped).sum(3).astype(q.dtype) for x in (dq, dk))
    dlog_decay = out.get("dg")
    if job.decay == "head":
        dlog_decay = dlog_decay.sum(3).astype(log_decay.dtype)
    return dq, dk, dv, dlog_decay, passed["dinitial"].swapaxes(2, 3), None


def largest_array(q, v, log_decay) -> int:
    """Elements of the largest array that a kernel addresses."""
    job = _job(Config(1.0), q, v, log_decay)
    tokens = job.batch * job.length * job.heads
    return max(tokens * max(job.key_size, job.value_size), math.prod(job.states))


def unsupported(config: Config, q, k, v, log_decay, *rest) -> str | None:
    """Why the kernels cannot serve these arrays."""
    return no_wide_numbers(v) or beyond_addresses(
        v.shape[0], lambda: largest_array(q, v, log_decay)
    )


BACKEND = Backend(forward, backward, unsupported=unsupported)
