"""TPU kernels: heads as blocks of lanes, a chunk of time at once, states in VMEM.

What the two families share is in `matrix_state.tpu`; what happens inside a chunk is in
`tpu_scalar_decay` and `tpu_vector_decay`.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels.common.backend import Backend, no_wide_numbers
from pallas_kernels.common.compat import pl
from pallas_kernels.linear_attention import tpu_scalar_decay, tpu_vector_decay
from pallas_kernels.matrix_state import tpu as layout
from pallas_kernels.matrix_state.config import Config
from pallas_kernels.matrix_state.tpu import KernelShape, Tiles

_CHUNK = 128
_HEADS, _HEADS_VECTOR_DECAY = 16, 4  # unrolled in a step
_VMEM_BUDGET = 2**25  # half of the smallest memory, 64 MiB on tpu7x


def vmem_bytes(dims: KernelShape) -> int:
    """Bytes of VMEM of the backward kernel, the larger one, with segments.

    Blocks count twice, so that the next is fetched while one is worked on; scratch counts once.
    """
    size, heads = dims.tiles
    width, groups = jnp.dtype(dims.dtype).itemsize, dims.groups_per_step
    tokens = 4 * groups * dims.key_size + 3 * heads * dims.value_size  # with gradients
    blocks = size * tokens * width
    rows = 4 * math.prod(layout.rows_shape(dims))
    if dims.decay == "head":
        blocks += 2 * rows
    if dims.decay == "key":
        blocks += 2 * 4 * size * heads * dims.key_size
    state = 4 * math.prod(dims.state)
    blocks += 3 * heads * state  # entering, and the gradients at both ends
    blocks += 4 * size * layout.LANES  # runs
    scratch = dims.steps_per_group * heads * state + 2 * 4 * size * groups * dims.key_size
    working = 12 * 4 * size * max(size, dims.key_size, dims.value_size)  # what one head works on
    return 2 * blocks + scratch + working


def choose_tiles(dims: KernelShape) -> Tiles | None:
    """As many heads as are worth unrolling and fit; None if a group has more heads than fit."""
    most = _HEADS_VECTOR_DECAY if dims.decay == "key" else _HEADS
    return layout.choose_tiles(dims, most, lambda dims: vmem_bytes(dims) <= _VMEM_BUDGET)


def _kernel_shape(config: Config, q, v, log_decay, runs) -> KernelShape:
    """`KernelShape` of arguments as `prepare` leaves them."""
    dims = layout.kernel_shape(q, v, log_decay, runs, config.scale, config.chunk or _CHUNK)
    return dims._replace(tiles=choose_tiles(dims) or dims.tiles)


def _groups_repeated(config: Config, q, v, log_decay, runs) -> int:
    """How often to repeat each group's queries and keys so that its heads fit."""
    return layout.groups_repeated(
        "linear_attention",
        q,
        v,
        lambda q: choose_tiles(_kernel_shape(config, q, v, log_decay, runs)),
    )


def _operands(dims: KernelShape, q, k, v, log_decay, runs) -> dict[str, tuple[Any, pl.BlockSpec]]:
    operands = {
        "q": (layout.to_lanes(q), layout.group_tokens(dims)),
        "k": (layout.to_lanes(k), layout.group_tokens(dims)),
        "v": (layout.to_lanes(v), layout.tokens(dims, dims.value_size)),
    }
    if dims.decay == "key":
        operands["g"] = (layout.to_lanes(log_decay), layout.decays(dims))
    if dims.decay == "head":
        operands["g"] = (layout.to_rows(dims, log_decay), layout.decays(dims))
    return operands | (layout.run_operands(dims, runs) if dims.segmented else {})


def forward(config: Config, q, k, v, log_decay, initial_state, runs, *, return_residuals: bool):
    """`((o, final_state), residuals)`: the arguments and the state that enters each chunk."""
    dims = _kernel_shape(config, q, v, log_decay, runs)
    operands = _operands(dims, q, k, v, log_decay, runs)
    operands["initial"] = (layout.inside(dims, initial_state), layout.end(dims, last=False))
    ends = (dims.batch, dims.heads, *dims.state)
    out = {
        "o": (
            layout.struct(layout.to_lanes(v).shape, v.dtype),
            layout.tokens(dims, dims.value_size),
        ),
        "final": (layout.struct(ends), layout.end(dims, last=True)),
    }
    if return_residuals:
        kept = layout.struct((dims.batch, dims.chunks, dims.heads, *dims.state), v.dtype)
        out["states"] = (kept, layout.states(dims))
    scratch: dict[str, tuple[int, ...]] = {
        "state": (dims.steps_per_group * dims.tiles.heads, *dims.state)
    }
    scratch |= layout.pair_decay_scratch(dims)
    kernel = tpu_vector_decay.forward if dims.decay == "key" else tpu_scalar_decay.forward
    result = layout.call(kernel, dims, "linear_attention_forward", operands, out, scratch)
    outputs = result["o"].reshape(v.shape), layout.inside(dims, result["final"])
    if not return_residuals:
        return outputs, None
    return outputs, (q, k, v, log_decay, runs, result["states"])


def backward(config: Config, residuals, cotangents):
    """The gradients of all arguments."""
    q, k, v, log_decay, runs, states = residuals
    do, dfinal = cotangents
    dims = _kernel_shape(config, q, v, log_decay, runs)._replace(backward=True)
    operands = _operands(dims, q, k, v, log_decay, runs)
    operands["do"] = (layout.to_lanes(do), layout.tokens(dims, dims.value_size))
    operands["states"] = (states, layout.states(dims))
    operands["dfinal"] = (layout.inside(dims, dfinal), layout.end(dims, last=False))
    queries = layout.struct(layout.to_lanes(q).shape, q.dtype)
    out = {
        "dq": (queries, layout.group_tokens(dims)),
        "dk": (queries, layout.group_tokens(dims)),
        "dv": (
            layout.struct(layout.to_lanes(v).shape, v.dtype),
            layout.tokens(dims, dims.value_size),
        ),
        "dinitial": (layout.struct(dfinal.shape[:2] + dims.state), layout.end(dims, last=True)),
    }
    if dims.decay is not None:
        g, _ = operands["g"]
        out["dg"] = (layout.struct(g.shape, g.dtype), layout.decays(dims))
    scratch: dict[str, tuple[int, ...]] = {
        "dstate": (dims.steps_per_group * dims.tiles.heads, *dims.state)
    }
    if dims.steps_per_group > 1:
        scratch |= dict.fromkeys(("dq_sum", "dk_sum"), (dims.tiles.chunk, dims.key_size))
    scratch |= layout.pair_decay_scratch(dims)
    kernel = tpu_vector_decay.backward if dims.decay == "key" else tpu_scalar_decay.backward
    result = layout.call(kernel, dims, "linear_attention_backward", operands, out, scratch)
    dlog_decay = None
    if dims.decay == "key":
        dlog_decay = result["dg"].reshape(log_decay.shape).astype(log_decay.dtype)
    if dims.decay == "head":
        dlog_decay = layout.of_rows(dims, result["dg"]).astype(log_decay.dtype)
    dq, dk, dv = (result[n].reshape(x.shape) for n, x in (("dq", q), ("dk", k), ("dv", v)))
    return dq, dk, dv, dlog_decay, layout.inside(dims, result["dinitial"]), None


def prepare(config: Config, q, k, v, log_decay, initial_state, runs):
    """The arguments, padded to whole tiles; `restore` cuts the outputs. See `Backend.prepare`.

    Raises:
      ValueError: one head does not fit into a TPU's memory.
    """
    length, value_size = v.shape[1], v.shape[3]
    key_size = q.shape[3]
    pad = layout.padding(config.chunk or _CHUNK, length, key_size, value_size)
    q, k, v = (
        pad(q, "tokens", None, "keys"),
        pad(k, "tokens", None, "keys"),
        pad(v, "tokens", None, "values"),
    )
    log_decay = pad(log_decay, "tokens", None, "keys")
    runs = pad(runs, "tokens")
    # The states of a group stay in VMEM together: a group that is too large becomes several.
    groups_repeated = _groups_repeated(config, q, v, log_decay, runs)
    if groups_repeated > 1:
        q, k = (jnp.repeat(x, groups_repeated, axis=2) for x in (q, k))
    state = pad(initial_state, None, "keys", "values")

    def restore(outputs):
        o, final = outputs
        return o[:, :length, :, :value_size], final[:, :, :key_size, :value_size]

    return (q, k, v, log_decay, state, runs), restore


def unsupported(config: Config, q, k, v, *rest) -> str | None:
    """Why the kernels cannot serve these arrays."""
    return no_wide_numbers(v)


BACKEND = Backend(forward, backward, prepare, unsupported)
