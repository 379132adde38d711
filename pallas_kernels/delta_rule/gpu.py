"""GPU kernels (Triton lowering): all chunks at once, but for the walk of the state through them.

See `gpu_forward` and `gpu_backward`. Forward keeps its arguments and the state that enters each
chunk; what else backward needs of a chunk is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.backend import Backend
from pallas_kernels.delta_rule import gpu_backward, gpu_forward
from pallas_kernels.delta_rule.gpu_tile import Tiles, all_keys
from pallas_kernels.matrix_state import decay_sums
from pallas_kernels.matrix_state import gpu as matrix_gpu
from pallas_kernels.matrix_state.config import Config
from pallas_kernels.matrix_state.gpu import KernelShape, block_size


def choose_tiles(dims: KernelShape) -> Tiles:
    """Blocks that keep the forward kernels in registers: smaller where every key has its decay,
    where numbers are float32, and where a state has many keys.
    """
    vector_decay = dims.decay == "key"
    small = vector_decay or dims.dtype != jnp.bfloat16 or dims.key_size > 128
    return Tiles(
        chunk=block_size(dims.length, 32 if small else 64),
        keys=block_size(dims.key_size, 32 if vector_decay else 64),
        values=block_size(dims.value_size, 64),
        state_values=block_size(dims.value_size, 32),
    )


def _kernel_shape(config: Config, q, v, log_decay, segment_index) -> KernelShape:
    return matrix_gpu.kernel_shape(config, q, v, log_decay, segment_index, choose_tiles)


def largest_array(config: Config, q: Any, v: Any, log_decay: Any) -> int:
    """Elements of the largest array that a kernel addresses."""
    dims = _kernel_shape(config, q, v, log_decay, None)
    tokens = dims.chunks * dims.tiles.chunk * dims.tiles.chunk
    states = dims.chunks * dims.key_size * dims.value_size
    heads = max(tokens, states, dims.length * max(dims.key_size, dims.value_size))
    return dims.batch * dims.heads * heads


def _call(kernel: Callable[..., None], dims: KernelShape, *args, **options) -> dict[str, jax.Array]:
    return matrix_gpu.call(kernel, dims, f"delta_rule_{kernel.__name__}", *args, **options)


def _log_decay(log_decay, segment_index):
    """Log decays as kernels take them: one of all keys is clamped, which is cheap here."""
    if log_decay is None or log_decay.ndim == 4:
        return log_decay
    g = jnp.maximum(log_decay.astype(jnp.float32), decay_sums.MIN_LOG_DECAY)
    return g if segment_index is None else jnp.where((segment_index > 0)[..., None], g, 0.0)


def _intra_chunk(dims: KernelShape, q, k, beta, log_decay, documents) -> dict[str, Any]:
    """What `chunk_scaled_dot_kkt`, `solve_tril` and `chunk_local_cumsum` make, for other kernels.

    `beta` and `documents` are passed on with it.
    """
    squares = (dims.batch, dims.heads, dims.chunks, dims.tiles.chunk, dims.tiles.chunk)
    outputs = {"A_qk": (squares, dims.dtype), "A_kk": (squares, jnp.float32)}
    factors = {}
    if dims.decay is not None:
        factors = dict.fromkeys(("from_start", "to_end"), (log_decay.shape, jnp.float32))
    made = _call(
        gpu_forward.chunk_scaled_dot_kkt,
        dims,
        (dims.chunks, dims.batch, dims.heads),
        {"q": q, "k": k, "g": log_decay, **documents},
        outputs | (factors if dims.decay == "head" else {}),
        warps=8 if dims.decay == "key" else 4,
        flops=4 * dims.tiles.chunk * dims.key_size,
    )
    made |= _call(
        gpu_forward.solve_tril,
        dims,
        (dims.chunks, dims.batch, dims.heads),
        {"A_kk": made["A_kk"], "beta": beta},
        {"inverse": (squares, dims.dtype)},
        warps=2,
        flops=dims.tiles.chunk**2,
    )
    if dims.decay == "key":
        made |= _call(
            gpu_forward.chunk_local_cumsum,
            dims,
            (dims.chunks, dims.batch, dims.heads * dims.key_blocks),
            {"g": log_decay, **documents},
            factors,
            warps=4,
            flops=4 * dims.tiles.chunk * dims.key_size,
        )
    return {**made, "beta": beta, **documents}


def _factors(made: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of what `_intra_chunk` made that a kernel reads, as far as there are."""
    return {
        name: made[name] for name in (*names, "segment_index", "entering_segment") if name in made
    }


def forward(
    config: Config,
    q,
    k,
    v,
    beta,
    log_decay,
    initial_state,
    segment_index,
    *,
    return_residuals: bool,
):
    """`((o, final_state), residuals)`; arguments as in `reference.delta_rule`."""
    dims = _kernel_shape(config, q, v, log_decay, segment_index)
    documents = matrix_gpu.run_operands(dims, segment_index)
    made = _intra_chunk(dims, q, k, beta, _log_decay(log_decay, segment_index), documents)
    matrix = (dims.key_size, dims.value_size)
    passed = _call(
        gpu_forward.chunk_fwd_h,
        dims,
        (-(-dims.value_size // dims.tiles.state_values), dims.batch, dims.heads),
        {"k": k, "v": v, "initial": initial_state}
        | _factors(made, "inverse", "beta", "from_start", "to_end"),
        {
            "v_new": (v.shape, v.dtype),
            "states": ((dims.batch, dims.chunks, dims.heads, *matrix), v.dtype),
            "final": (initial_state.shape, jnp.float32),
        },
        warps=4 if all_keys(dims) <= 64 else 8,
        flops=4 * dims.key_size * dims.value_size + 2 * dims.tiles.chunk * dims.value_size,
    )
    out = _call(
        gpu_forward.chunk_fwd_o,
        dims,
        (dims.chunks, dims.batch, dims.heads * dims.value_blocks),
        {"q": q, "v_new": passed["v_new"], "states": passed["states"]}
        | _factors(made, "A_qk", "from_start"),
        {"o": (v.shape, v.dtype)},
        warps=4,
        flops=2 * dims.key_size * dims.value_size + 2 * dims.tiles.chunk * dims.value_size,
    )
    outputs = out["o"], passed["final"]
    if not return_residuals:
        return outputs, None
    return outputs, (q, k, v, beta, log_decay, segment_index, passed["states"])


def backward(config: Config, residuals, cotangents):
    """Gradients of `delta_rule`'s arrays from those of `(o, final_state)`."""
    q, k, v, beta, log_decay, segment_index, states = residuals
    do, dfinal = cotangents
    dims = _kernel_shape(config, q, v, log_decay, segment_index)
    g = _log_decay(log_decay, segment_index)
    made = _intra_chunk(dims, q, k, beta, g, matrix_gpu.run_operands(dims, segment_index))
    passed = _call(
        gpu_backward.chunk_bwd_dhu,
        dims,
        (-(-dims.value_size // dims.tiles.state_values), dims.batch, dims.heads),
        {"q": q, "k": k, "do": do, "dfinal": dfinal}
        | _factors(made, "A_qk", "inverse", "beta", "from_start", "to_end"),
        {
            "dstates": (states.shape, v.dtype),
            "dsolved": (v.shape, v.dtype),
            "dinitial": (dfinal.shape, jnp.float32),
        },
        warps=4 if all_keys(dims) <= 64 else 8,
        flops=6 * dims.key_size * dims.value_size + 4 * dims.tiles.chunk * dims.value_size,
    )
    square = (made["A_qk"].shape, v.dtype)
    by_head = {"dg": (beta.shape, jnp.float32)} if dims.decay == "head" else {}
    wy_bwd = _call(
        gpu_backward.prepare_wy_repr_bwd,
        dims,
        (dims.chunks, dims.batch, dims.heads),
        {"k": k, "v": v, "do": do, "states": states, "dsolved": passed["dsolved"]}
        | ({"g": g} if dims.decay == "head" else {})
        | _factors(made, "A_qk", "inverse", "A_kk", "beta", "from_start"),
        {
            "v_new": (v.shape, v.dtype),
            "dv": (v.shape, v.dtype),
            "dbeta": (beta.shape, beta.dtype),
            "dA_qk": square,
            "dA_kk": square,
            **by_head,
        },
        warps=8,
        flops=2 * dims.key_size * dims.value_size + 6 * dims.tiles.chunk * dims.value_size,
    )
    gradients = _chunk_bwd_dqkwg(dims, q, k, do, g, states, passed["dstates"], made, wy_bwd)
    dq, dk = (matrix_gpu.sum_over_group(gradients[name], q) for name in ("dq", "dk"))
    dg = gradients.get("dg")
    if dg is not None and dims.decay == "head":
        dg = decay_sums.clamp_vjp(log_decay, dg.sum(3) + wy_bwd["dg"], None)
        dg = dg if segment_index is None else jnp.where((segment_index > 0)[..., None], dg, 0.0)
        dg = dg.astype(log_decay.dtype)
    return dq, dk, wy_bwd["dv"], wy_bwd["dbeta"], dg, passed["dinitial"], None


def _chunk_bwd_dqkwg(
    dims: KernelShape, q, k, do, g, states, dstates, made, wy_bwd
) -> dict[str, jax.Array]:
    """`dq`, `dk` of each head, and `dg`, of a decay of all keys for each block of keys."""
    queries = (*do.shape[:3], dims.key_size)
    dtype = q.dtype if dims.heads == dims.groups else jnp.float32
    outputs: dict[str, tuple[tuple[int, ...], Any]] = {
        "dq": (queries, dtype),
        "dk": (queries, dtype),
    }
    if dims.decay == "head":
        outputs["dg"] = ((*do.shape[:3], dims.key_blocks), jnp.float32)
    if dims.decay == "key":
        outputs["dg"] = (g.shape, g.dtype)
    return _call(
        gpu_backward.chunk_bwd_dqkwg,
        dims,
        (dims.chunks, dims.batch, dims.heads * dims.key_blocks),
        {"q": q, "k": k, "do": do, "states": states, "dstates": dstates}
        | ({"g": g} if dims.decay == "key" else {})
        | _factors(made, "from_start", "to_end")
        | {name: wy_bwd[name] for name in ("v_new", "dv", "dA_qk", "dA_kk")},
        outputs,
        warps=4,
        flops=6 * dims.key_size * dims.value_size + 8 * dims.tiles.chunk * dims.key_size,
    )


def unsupported(config: Config, q, k, v, beta, log_decay, *rest) -> str | None:
    """Why the kernels cannot serve these arrays."""
    return matrix_gpu.unsupported(v.shape[0], v, lambda: largest_array(config, q, v, log_decay))


BACKEND = Backend(forward, backward, unsupported=unsupported)
