"""TPU kernels: heads as blocks of lanes, a chunk of time at once, states in VMEM.

Which block of which array a step sees is said in `tpu_heads`; what happens inside a chunk is in
`tpu_head` and `tpu_key`.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels.common.backend import Backend, no_wide_numbers
from pallas_kernels.common.compat import pl
from pallas_kernels.delta_rule import tpu_head, tpu_key
from pallas_kernels.matrix_state import tpu_heads as layout
from pallas_kernels.matrix_state.config import Config
from pallas_kernels.matrix_state.tpu_heads import Job, Tiles

_CHUNK = 128
_HEADS, _HEADS_BY_KEY = 16, 4  # unrolled in a step
_VMEM_BUDGET = 2**25  # half of the smallest memory, 64 MiB on tpu7x


def vmem_bytes(job: Job) -> int:
    """Bytes of VMEM of the backward kernel, the larger one, with segments.

    Blocks count twice, so that the next is fetched while one is worked on; scratch counts once.
    """
    size, heads = job.tiles
    width, groups = jnp.dtype(job.dtype).itemsize, job.step_groups
    tokens = 4 * groups * job.key_size + 3 * heads * job.value_size  # with gradients
    blocks = size * tokens * width
    rows = 4 * math.prod(layout.rows_shape(job))
    blocks += 2 * rows  # beta
    if job.decay == "head":
        blocks += 2 * rows
    if job.decay == "key":
        blocks += 2 * 4 * size * heads * job.key_size
    state = 4 * math.prod(job.state)
    blocks += 3 * heads * state  # entering, and the gradients at both ends
    blocks += 4 * size * layout.LANES  # runs
    scratch = job.parts * heads * state + 2 * 4 * size * groups * job.key_size
    scratch += sum(4 * math.prod(shape) for shape in layout.between(job).values())
    scratch += sum(4 * math.prod(shape) for shape in _pairs(job).values())
    between = 12 * 4 * size * max(size, job.key_size, job.value_size)  # what one head works on
    return 2 * blocks + scratch + between


def choose_tiles(job: Job) -> Tiles | None:
    """As many heads as are worth unrolling and fit; None if a group has more heads than fit."""
    most = _HEADS_BY_KEY if job.decay == "key" else _HEADS
    return layout.choose_tiles(job, most, lambda job: vmem_bytes(job) <= _VMEM_BUDGET)


def _job(config: Config, q, v, log_decay, runs) -> Job:
    job = layout.job_of(q, v, log_decay, runs, config.scale, config.chunk or _CHUNK)
    return job._replace(tiles=choose_tiles(job) or job.tiles)


def _pairs(job: Job) -> dict[str, tuple[int, ...]]:
    """Scratch for the pairs of tokens of every head of a step."""
    shape = (job.tiles.heads, job.tiles.chunk, job.tiles.chunk)
    return dict.fromkeys(("queries", "keys", "inverse"), shape)


def _operands(job: Job, q, k, v, beta, log_decay, runs) -> dict[str, tuple[Any, pl.BlockSpec]]:
    operands = {
        "q": (layout.to_lanes(q), layout.group_tokens(job)),
        "k": (layout.to_lanes(k), layout.group_tokens(job)),
        "v": (layout.to_lanes(v), layout.tokens(job, job.value_size)),
        "beta": (layout.to_rows(job, beta), layout.rows(job)),
    }
    if job.decay == "key":
        operands["g"] = (layout.to_lanes(log_decay), layout.decays(job))
    if job.decay == "head":
        operands["g"] = (layout.to_rows(job, log_decay), layout.decays(job))
    return operands | (layout.run_operands(job, runs) if job.segmented else {})


def _call(kernel, job: Job, name: str, operands, out, scratch):
    size = job.tiles.chunk
    solving = 2 * size * (job.key_size + 2 * job.value_size + size)
    scratch = scratch | layout.between(job) | _pairs(job)
    return layout.call(kernel, job, f"delta_rule_{name}", operands, out, scratch, solving)


def forward(
    config: Config, q, k, v, beta, log_decay, initial_state, runs, *, return_residuals: bool
):
    """`((o, final_state), residuals)`: the arguments and the state that enters each chunk."""
    job = _job(config, q, v, log_decay, runs)
    operands = _operands(job, q, k, v, beta, log_decay, runs)
    operands["initial"] = (layout.inside(job, initial_state), layout.end(job, last=False))
    ends = (job.batch, job.heads, *job.state)
    values = layout.struct(layout.to_lanes(v).shape, v.dtype)
    out = {
        "o": (values, layout.tokens(job, job.value_size)),
        "final": (layout.struct(ends), layout.end(job, last=True)),
    }
    if return_residuals:
        kept = layout.struct((job.batch, job.chunks, job.heads, *job.state), v.dtype)
        out["states"] = (kept, layout.states(job))
    scratch = {"state": (job.parts * job.tiles.heads, *job.state)}
    kernel = tpu_key.forward if job.decay == "key" else tpu_head.forward
    result = _call(kernel, job, "forward", operands, out, scratch)
    outputs = result["o"].reshape(v.shape), layout.inside(job, result["final"])
    if not return_residuals:
        return outputs, None
    return outputs, (q, k, v, beta, log_decay, runs, result["states"])


def backward(config: Config, residuals, cotangents):
    """The gradients of all arguments."""
    q, k, v, beta, log_decay, runs, states = residuals
    do, dfinal = cotangents
    job = _job(config, q, v, log_decay, runs)._replace(backward=True)
    operands = _operands(job, q, k, v, beta, log_decay, runs)
    operands["do"] = (layout.to_lanes(do), layout.tokens(job, job.value_size))
    operands["states"] = (states, layout.states(job))
    operands["dfinal"] = (layout.inside(job, dfinal), layout.end(job, last=False))
    queries = layout.struct(layout.to_lanes(q).shape, q.dtype)
    values = layout.struct(layout.to_lanes(v).shape, v.dtype)
    out = {
        "dq": (queries, layout.group_tokens(job)),
        "dk": (queries, layout.group_tokens(job)),
        "dv": (values, layout.tokens(job, job.value_size)),
        "dbeta": (layout.struct(operands["beta"][0].shape), layout.rows(job)),
        "dinitial": (layout.struct(dfinal.shape[:2] + job.state), layout.end(job, last=True)),
    }
    if job.decay is not None:
        g, _ = operands["g"]
        out["dg"] = (layout.struct(g.shape, g.dtype), layout.decays(job))
    scratch: dict[str, tuple[int, ...]] = {"dstate": (job.parts * job.tiles.heads, *job.state)}
    if job.parts > 1:
        scratch |= dict.fromkeys(("dq_sum", "dk_sum"), (job.tiles.chunk, job.key_size))
    kernel = tpu_key.backward if job.decay == "key" else tpu_head.backward
    result = _call(kernel, job, "backward", operands, out, scratch)
    dlog_decay = None
    if job.decay == "key":
        dlog_decay = result["dg"].reshape(log_decay.shape).astype(log_decay.dtype)
    if job.decay == "head":
        dlog_decay = layout.of_rows(job, result["dg"]).astype(log_decay.dtype)
    dq, dk, dv = (result[n].reshape(x.shape) for n, x in (("dq", q), ("dk", k), ("dv", v)))
    dbeta = layout.of_rows(job, result["dbeta"]).astype(beta.dtype)
    return dq, dk, dv, dbeta, dlog_decay, layout.inside(job, result["dinitial"]), None


def prepare(config: Config, q, k, v, beta, log_decay, initial_state, runs):
    """The arguments, padded to whole tiles; `restore` cuts the outputs. See `Backend.prepare`.

    Raises:
      ValueError: one head does not fit into a TPU's memory.
    """
    length, key_size, value_size = v.shape[1], q.shape[3], v.shape[3]
    pad = layout.padding(config.chunk or _CHUNK, length, key_size, value_size)
    q, k = pad(q, "tokens", None, "keys"), pad(k, "tokens", None, "keys")
    v, beta = pad(v, "tokens", None, "values"), pad(beta, "tokens")
    log_decay, runs = pad(log_decay, "tokens", None, "keys"), pad(runs, "tokens")
    # The states of a group stay in VMEM together: a group that is too large becomes several.
    copies = layout.copies(
        "delta_rule", q, v, lambda q: choose_tiles(_job(config, q, v, log_decay, runs))
    )
    if copies > 1:
        q, k = (jnp.repeat(x, copies, axis=2) for x in (q, k))
    state = pad(initial_state, None, "keys", "values")

    def restore(outputs):
        o, final = outputs
        return o[:, :length, :, :value_size], final[:, :, :key_size, :value_size]

    return (q, k, v, beta, log_decay, state, runs), restore


def unsupported(config: Config, q, k, v, *rest) -> str | None:
    """Why the kernels cannot serve these arrays."""
    return no_wide_numbers(v)


BACKEND = Backend(forward, backward, prepare, unsupported)
