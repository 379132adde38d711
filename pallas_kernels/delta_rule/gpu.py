"""GPU kernels (Triton lowering): all chunks at once, but for the walk of the state through them.

See `gpu_forward` and `gpu_backward`. Forward keeps its arguments and the state that enters each
chunk; what else backward needs of a chunk is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.backend import Backend, beyond_addresses, no_wide_numbers
from pallas_kernels.delta_rule import gpu_backward, gpu_forward
from pallas_kernels.delta_rule.gpu_tile import Job, Tiles
from pallas_kernels.matrix_state import chunks
from pallas_kernels.matrix_state.chunks_gpu import block_size
from pallas_kernels.matrix_state.config import Config


def choose_tiles(length: int, key_size: int, value_size: int, by_key: bool, narrow: bool) -> Tiles:
    """Blocks that keep the forward kernels in registers: smaller where every key has its decay,
    where numbers are float32, and where a state has many keys.
    """
    small = by_key or not narrow or key_size > 128
    return Tiles(
        chunk=block_size(length, 32 if small else 64),
        keys=block_size(key_size, 32 if by_key else 64),
        values=block_size(value_size, 64),
        walked=block_size(value_size, 32),
    )


def _job(config: Config, q, v, log_decay, runs) -> Job:
    batch, length, heads, value_size = v.shape
    decay: Literal["head", "key"] | None = None
    if log_decay is not None:
        decay = "key" if log_decay.ndim == 4 else "head"
    key_size, narrow = q.shape[3], v.dtype == jnp.bfloat16
    tiles = choose_tiles(length, key_size, value_size, decay == "key", narrow)
    if config.chunk:
        tiles = tiles._replace(chunk=config.chunk)
    return Job(
        batch, length, q.shape[2], heads, key_size, value_size, decay, runs is not None,
        config.scale, v.dtype, tiles,
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


def _prepare(job: Job, q, k, beta, log_decay, documents) -> dict[str, Any]:
    """What `prepare`, `invert` and `reach` make; with `beta` and `documents`, for others."""
    squares = (job.batch, job.heads, job.chunks, job.chunk, job.chunk)
    outputs = {"pairs": (squares, job.dtype), "keys": (squares, jnp.float32)}
    factors = {}
    if job.decay is not None:
        factors = dict.fromkeys(("into", "out"), (log_decay.shape, jnp.float32))
    made = _call(
        gpu_forward.prepare,
        job,
        (job.chunks, job.batch, job.heads),
        {"q": q, "k": k, "g": log_decay, **documents},
        outputs | (factors if job.decay == "head" else {}),
        warps=8 if job.decay == "key" else 4,
        flops=4 * job.chunk * job.key_size,
    )
    made |= _call(
        gpu_forward.invert,
        job,
        (job.chunks, job.batch, job.heads),
        {"keys": made["keys"], "beta": beta},
        {"inverse": (squares, job.dtype)},
        warps=2,
        flops=job.chunk**2,
    )
    if job.decay == "key":
        made |= _call(
            gpu_forward.reach,
            job,
            (job.chunks, job.batch, job.heads * job.key_blocks),
            {"g": log_decay, **documents},
            factors,
            warps=4,
            flops=4 * job.chunk * job.key_size,
        )
    return {**made, "beta": beta, **documents}


def _factors(made: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of what `_prepare` made that a kernel reads, as far as there are."""
    return {name: made[name] for name in (*names, "runs", "entering_run") if name in made}


def forward(
    config: Config, q, k, v, beta, log_decay, initial_state, runs, *, return_residuals: bool
):
    """`((o, final_state), residuals)`; arguments as in `reference.delta_rule`."""
    job = _job(config, q, v, log_decay, runs)
    documents = _documents(job, runs)
    made = _prepare(job, q, k, beta, _log_decay(log_decay, runs), documents)
    matrix = (job.key_size, job.value_size)
    walked = _call(
        gpu_forward.walk,
        job,
        (-(-job.value_size // job.tiles.walked), job.batch, job.heads),
        {"k": k, "v": v, "initial": initial_state}
        | _factors(made, "inverse", "beta", "into", "out"),
        {
            "corrected": (v.shape, v.dtype),
            "states": ((job.batch, job.chunks, job.heads, *matrix), v.dtype),
            "final": (initial_state.shape, jnp.float32),
        },
        warps=4 if job.all_keys <= 64 else 8,
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
    outputs = out["o"], walked["final"]
    if not return_residuals:
        return outputs, None
    return outputs, (q, k, v, beta, log_decay, runs, walked["states"])


def backward(config: Config, residuals, cotangents):
    """Gradients of `delta_rule`'s arrays from those of `(o, final_state)`."""
    q, k, v, beta, log_decay, runs, states = residuals
    do, dfinal = cotangents
    job = _job(config, q, v, log_decay, runs)
    g = _log_decay(log_decay, runs)
    made = _prepare(job, q, k, beta, g, _documents(job, runs))
    retreated = _call(
        gpu_backward.retreat,
        job,
        (-(-job.value_size // job.tiles.walked), job.batch, job.heads),
        {"q": q, "k": k, "do": do, "dfinal": dfinal}
        | _factors(made, "pairs", "inverse", "beta", "into", "out"),
        {
            "dstates": (states.shape, v.dtype),
            "dsolved": (v.shape, v.dtype),
            "dinitial": (dfinal.shape, jnp.float32),
        },
        warps=4 if job.all_keys <= 64 else 8,
        flops=6 * job.key_size * job.value_size + 4 * job.chunk * job.value_size,
    )
    square = (made["pairs"].shape, v.dtype)
    by_head = {"dg": (beta.shape, jnp.float32)} if job.decay == "head" else {}
    weighed = _call(
        gpu_backward.weigh,
        job,
        (job.chunks, job.batch, job.heads),
        {"k": k, "v": v, "do": do, "states": states, "dsolved": retreated["dsolved"]}
        | ({"g": g} if job.decay == "head" else {})
        | _factors(made, "pairs", "inverse", "keys", "beta", "into"),
        {
            "corrected": (v.shape, v.dtype),
            "dv": (v.shape, v.dtype),
            "dbeta": (beta.shape, beta.dtype),
            "dqueries": square,
            "dkeys": square,
            **by_head,
        },
        warps=8,
        flops=2 * job.key_size * job.value_size + 6 * job.chunk * job.value_size,
    )
    gradients = _attribute(job, q, k, do, g, states, retreated["dstates"], made, weighed)
    dq, dk, dg = gradients["dq"], gradients["dk"], gradients.get("dg")
    if job.heads != job.groups:
        each_group = (*q.shape[:3], -1, job.key_size)
        dq, dk = (x.reshape(each_group).sum(3).astype(q.dtype) for x in (dq, dk))
    if dg is not None and job.decay == "head":
        dg = chunks.clamp_transpose(log_decay, dg.sum(3) + weighed["dg"], None)
        dg = dg if runs is None else jnp.where((runs > 0)[..., None], dg, 0.0)
        dg = dg.astype(log_decay.dtype)
    return dq, dk, weighed["dv"], weighed["dbeta"], dg, retreated["dinitial"], None


def _attribute(job: Job, q, k, do, g, states, dstates, made, weighed) -> dict[str, jax.Array]:
    """`dq`, `dk` of each head, and `dg`, of a decay of all keys for each block of keys."""
    queries = (*do.shape[:3], job.key_size)
    dtype = q.dtype if job.heads == job.groups else jnp.float32
    outputs: dict[str, tuple[tuple[int, ...], Any]] = {
        "dq": (queries, dtype),
        "dk": (queries, dtype),
    }
    if job.decay == "head":
        outputs["dg"] = ((*do.shape[:3], job.key_blocks), jnp.float32)
    if job.decay == "key":
        outputs["dg"] = (g.shape, g.dtype)
    return _call(
        gpu_backward.attribute,
        job,
        (job.chunks, job.batch, job.heads * job.key_blocks),
        {"q": q, "k": k, "do": do, "states": states, "dstates": dstates}
        | ({"g": g} if job.decay == "key" else {})
        | _factors(made, "into", "out")
        | {name: weighed[name] for name in ("corrected", "dv", "dqueries", "dkeys")},
        outputs,
        warps=4,
        flops=6 * job.key_size * job.value_size + 8 * job.chunk * job.key_size,
    )


def unsupported(config: Config, q, k, v, beta, log_decay, *rest) -> str | None:
    """Why the kernels cannot serve these arrays."""
    return no_wide_numbers(v) or beyond_addresses(
        v.shape[0], lambda: largest_array(q, v, log_decay)
    )


BACKEND = Backend(forward, backward, unsupported=unsupported)
