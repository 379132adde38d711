"""GPU kernels (Triton lowering): all chunks at once, but for the walk of the state through them.

See `gpu_forward` and `gpu_backward`. Forward keeps its arguments and the state that enters each
chunk; what else backward needs of a chunk is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import chunks, compat, vjp
from pallas_kernels.chunks_gpu import block_size
from pallas_kernels.delta_rule import gpu_forward
from pallas_kernels.delta_rule.config import Config
from pallas_kernels.delta_rule.gpu_tile import Job

_CHUNK, _WIDE_CHUNK = 64, 32  # of bfloat16 and of float32


def _job(config: Config, q, v, log_decay, runs) -> Job:
    batch, length, heads, value_size = v.shape
    most = _CHUNK if v.dtype == jnp.bfloat16 else _WIDE_CHUNK
    decay: Literal["head", "key"] | None = None
    if log_decay is not None:
        decay = "key" if log_decay.ndim == 4 else "head"
    return Job(
        batch, length, q.shape[2], heads, q.shape[3], value_size, decay, runs is not None,
        config.scale, v.dtype, config.chunk or block_size(length, most),
    )  # fmt: skip


def largest_array(q: Any, v: Any, log_decay: Any) -> int:
    """Elements of the largest array that a kernel addresses."""
    job = _job(Config(1.0), q, v, log_decay, None)
    tokens = job.chunks * job.chunk * job.chunk
    states = job.chunks * job.key_size * job.value_size
    heads = max(tokens, states, job.length * max(job.key_size, job.value_size))
    return job.batch * job.heads * heads


def _call(
    kernel: Callable[[Job, Mapping[str, Any]], None],
    job: Job,
    grid: tuple[int, int, int],
    operands: Mapping[str, Any],
    outputs: Mapping[str, tuple[tuple[int, ...], Any]],
    *,
    warps: int,
    stages: int = 1,
    flops: int,
) -> dict[str, jax.Array]:
    """Run a kernel on named operands, None left out; `outputs` are shapes and dtypes by name."""
    operands = {name: x for name, x in operands.items() if x is not None}
    names = (*operands, *outputs)
    out = compat.pallas_call(
        lambda *refs: kernel(job, dict(zip(names, refs, strict=True))),
        backend="gpu",
        name=f"delta_rule_{kernel.__name__}",
        grid=grid,
        out_shape=[compat.out_struct(*s, *operands.values()) for s in outputs.values()],
        compiler_params=compat.triton.CompilerParams(num_warps=warps, num_stages=stages),
        flops=flops * job.batch * job.heads * job.length,
    )(*operands.values())
    return dict(zip(outputs, out, strict=True))


def _log_decay(log_decay, runs):
    """Log decays as kernels take them: one of all keys is clamped, which is cheap here."""
    if log_decay is None or log_decay.ndim == 4:
        return log_decay
    g = jnp.maximum(log_decay.astype(jnp.float32), chunks.MIN_LOG_DECAY)
    return g if runs is None else jnp.where((runs > 0)[..., None], g, 0.0)


def _documents(job: Job, runs) -> dict[str, Any]:
    if runs is None:
        return {}
    filled = jnp.pad(runs, ((0, 0), (0, job.chunks * job.chunk - job.length)))
    return {"runs": runs, "entering_run": chunks.entering_runs(filled, job.chunk)}


def _prepare(job: Job, q, k, beta, log_decay, documents, *, keys: bool) -> dict[str, Any]:
    """What `gpu_forward.prepare` makes, and `beta` and `documents` with it, for other kernels."""
    square = ((job.batch, job.heads, job.chunks, job.chunk, job.chunk), job.dtype)
    outputs = dict.fromkeys(["pairs", "inverse", *["keys"] * keys], square)
    if job.decay is not None:
        outputs |= dict.fromkeys(("into", "out"), (log_decay.shape, jnp.float32))
    made = _call(
        gpu_forward.prepare,
        job,
        (job.chunks, job.batch, job.heads),
        {"q": q, "k": k, "beta": beta, "g": log_decay, **documents},
        outputs,
        warps=4,
        flops=4 * job.chunk * job.key_size + job.chunk**2,
    )
    return {**made, "beta": beta, **documents}


def _factors(made: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of what `_prepare` made that a kernel reads, as far as there are."""
    return {name: made[name] for name in (*names, "runs", "entering_run") if name in made}


def forward(config: Config, q, k, v, beta, log_decay, initial_state, runs):
    """`((o, final_state), residuals)`; arguments as in `reference.delta_rule`."""
    job = _job(config, q, v, log_decay, runs)
    documents = _documents(job, runs)
    made = _prepare(job, q, k, beta, _log_decay(log_decay, runs), documents, keys=False)
    matrix = (job.key_size, job.value_size)
    walked = _call(
        gpu_forward.walk,
        job,
        (-(-job.value_size // job.walked), job.batch, job.heads),
        {"k": k, "v": v, "initial": initial_state}
        | _factors(made, "inverse", "beta", "into", "out"),
        {
            "corrected": (v.shape, v.dtype),
            "states": ((job.batch, job.chunks, job.heads, *matrix), v.dtype),
            "final": (initial_state.shape, jnp.float32),
        },
        warps=8 if job.all_keys > 128 else 4,
        flops=4 * job.key_size * job.value_size + 2 * job.chunk * job.value_size,
    )
    out = _call(
        gpu_forward.read,
        job,
        (job.chunks, job.batch, job.heads * job.value_blocks),
        {"q": q, "corrected": walked["corrected"], "states": walked["states"]}
        | _factors(made, "pairs", "into"),
        {"o": (v.shape, v.dtype)},
        warps=4,
        flops=2 * job.key_size * job.value_size + 2 * job.chunk * job.value_size,
    )
    residuals = (q, k, v, beta, log_decay, runs, walked["states"])
    return (out["o"], walked["final"]), residuals


def backward(config: Config, residuals, cotangents):
    raise NotImplementedError


delta_rule = vjp.join(lambda *args: forward(*args)[0], forward, backward)
