"""TPU kernels: channels fill registers, one register tile a state, states carried in registers.

Grid `(B, D / width, L / steps)`, time last and in the direction of travel. A tile of up to 1024
channels is `(width / 128, 128)`: one register for each of the N states, so the sum over states is
N additions and no shuffle. What a step needs is brought into that shape through VMEM:

- a token's channels are a row of lane tiles; a staging area that holds a group of tokens of each
  lane tile one after the other gives `(width / 128, 128)` of one token by a strided load;
- a token's B_n and C_n are one lane of their transposed block; each is spread over 128 lanes by a
  masked sum, stored as a row, and loaded with that row in all sublanes.

The forward pass of a gradient keeps the state that enters each block. The backward pass walks the
blocks from the last to the first: it computes the states of one block again, keeps them in VMEM,
and walks back. Its sums over channels (dB, dC) load the states of a token lane tile by lane tile
(see `States`), again by strided loads, so that they too need no shuffle but a few sums over lanes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.backend import Backend, no_wide_numbers
from pallas_kernels.common.compat import pl
from pallas_kernels.common.tpu import (
    LANES,
    SUBLANES,
    VMEM_BUDGET,
    VMEM_LIMIT,
    round_up,
    sequence_begins,
)
from pallas_kernels.selective_scan import tile
from pallas_kernels.selective_scan.tile import Config
from pallas_kernels.selective_scan.tpu_layout import (
    KernelShape,
    Specs,
    Spread,
    Staged,
    States,
    Tiles,
    Tokens,
    group_tokens,
    pack_shared,
    tiled,
    unpack_shared,
    untiled,
)

_BACKWARD_GROUP = 8  # steps unrolled at a time


def vmem_bytes(tiles: Tiles, states: int) -> int:
    """Bytes of VMEM of the backward kernel, the larger one, with a gate and segments.

    Blocks count twice, so that the next is fetched while one is worked on; scratch counts once.
    """
    row = LANES * 4
    lane_tiles = tiles.width // LANES
    tokens = 7 * tiles.steps * lane_tiles * row  # x, dt, gate, dy and the gradients of three
    shared = 2 * round_up(2 * states + 1, SUBLANES) * row
    per_state = 5 * states * SUBLANES * row  # A, entering state, dh_final, dA, dh_initial
    per_channel = 4 * SUBLANES * lane_tiles * row  # D, dt_bias and their gradients
    kept = (tiles.steps + 1 + 2 * _BACKWARD_GROUP) * states * lane_tiles * row
    spread = tiles.steps * round_up(2 * states + 1, SUBLANES) * row
    staged = (2 * tiles.steps + 3 * tiles.group) * lane_tiles * row
    sums = 4 * states * row
    return 2 * (tokens + shared + per_state + per_channel) + kept + spread + staged + sums


def choose_tiles(length: int, width: int, states: int, budget: int = VMEM_BUDGET) -> Tiles:
    """As many steps as fit, up to a register's lanes; then the fewest, narrowest tiles."""
    for steps in (128, 64, 32, 16):
        steps = min(steps, round_up(length, 16))  # a tile of bfloat16 is 16 rows high
        for widest in (1024, 512, 256, 128):
            count = -(-width // widest)
            tiles = Tiles(steps, round_up(-(-width // count), LANES))
            if vmem_bytes(tiles, states) <= budget:
                return tiles
    raise ValueError(
        f"selective_scan: N={states} states a channel do not fit a TPU's memory; "
        "use implementation='xla'"
    )


# The kernels: maths on values between a load and a store.


def _forward_kernel(refs: dict[str, Any], dims: KernelShape):
    spread = Spread(refs["spread"], dims)
    dt_area, flow_area, y_area = (
        Staged(refs[name], dims) for name in ("dt_area", "flow_area", "area0")
    )

    @pl.when(sequence_begins())
    def _():
        refs["final"][...] = refs["initial"][...]

    if "boundaries" in refs:
        refs["boundaries"][...] = refs["final"][...]

    def walk(i, h):
        tiles = group_tokens(dims, refs, dims.place(i))
        spread.fill(refs["shared"], dims.place(i) * dims.group)
        live = spread.live()
        for j, at in enumerate(tiles):
            mask = at.exists(live)
            dt = at.step_size(mask)
            dt_area.put(j, dt)
            flow_area.put(j, dt * tile.select(mask, at.load("x")))
        h, y = _advance_states(refs, dims, spread, dt_area, flow_area, h)
        for k in dims.order:
            y_area.put_token(k, y[k])
        for j, at in enumerate(tiles):
            y = _skip(at, y_area.get(j))
            if "gate" in refs:
                y = y * tile.silu(at.load("gate"))
            at.store("y", tile.select(live, y))
        return h

    # The final state's block stays in VMEM over all of a sequence: it is the carry too.
    h = [refs["final"][n] for n in range(dims.states)]
    h = jax.lax.fori_loop(0, dims.groups, walk, h)
    for n in range(dims.states):
        refs["final"][n] = h[n]


def _advance_states(
    refs,
    dims: KernelShape,
    spread: Spread,
    dt_area,
    flow_area,
    h,
    *,
    with_y: bool = True,
    keep=None,
):
    """The states after a group, and y of its tokens; `keep(step, n, h)` sees each state.

    State by state, not token by token: fewer numbers are live at a time.
    """
    dt = [dt_area.token(k) for k in range(dims.group)]
    flow = [flow_area.token(k) for k in range(dims.group)]
    y: list[Any] = [None] * dims.group
    after = []
    for n in range(dims.states):
        A, state = refs["A"][n], h[n]
        for step, k in enumerate(dims.order):
            decay = tile.decay(dt[k], A)
            state = tile.advance(state, decay, flow[k] * spread.B(k, n), spread.inside(k))
            if keep is not None:
                keep(step, n, state)
            if with_y:
                term = state * spread.C(k, n)
                y[k] = term if n == 0 else y[k] + term
        after.append(state)
    return after, y


def _skip(at: Tokens, y: jax.Array) -> jax.Array:
    D = at.maybe("D")
    return y if D is None else y + D * at.load("x")


def _backward_kernel(refs: dict[str, Any], dims: KernelShape):
    @pl.when(sequence_begins())
    def _():
        refs["dinitial"][...] = refs["dfinal"][...]
        for name in ("dA", "dD", "dbias"):
            if name in refs:
                refs[name][...] = jnp.zeros_like(refs[name])

    refs["sums"][...] = jnp.zeros_like(refs["sums"])
    h = [refs["boundaries"][n] for n in range(dims.states)]
    for n in range(dims.states):
        _kept(refs, dims, 0, 0).put(n, h[n])
    again = dims._replace(group=dims.tiles.group)
    recompute = functools.partial(_recompute_group, refs, again)
    jax.lax.fori_loop(0, again.groups, recompute, h)
    at_once = _at_once(dims)

    def retreat(i, c):
        for slot in range(at_once):
            c = _retreat_group(refs, dims, dims.groups - 1 - (i * at_once + slot), slot, c)
        return c

    c = [refs["dinitial"][n] for n in range(dims.states)]
    c = jax.lax.fori_loop(0, dims.groups // at_once, retreat, c)
    fold = States.fold(dims)
    parts = (refs["sums"][pl.ds(p, 2 * dims.states, stride=fold), :] for p in range(fold))
    refs["dshared"][...] = sum(parts)[:, : dims.tiles.steps]
    for n in range(dims.states):
        refs["dinitial"][n] = c[n]


def _at_once(dims: KernelShape) -> int:
    """Groups that a loop takes at once: the sums of one wait while the next one works.

    Each has a slot of its own in what they store, or the next one would wait too.
    """
    return 2 if dims.groups % 2 == 0 else 1


def _kept(refs, dims: KernelShape, i, k: int) -> States:
    """The states before the k-th step of the i-th group."""
    return States(refs["kept"], dims, (i * dims.group + k) * dims.states * dims.rows)


def _recompute_group(refs, dims: KernelShape, i, h):
    """Keep the states of the i-th group of a block; with a gate, its gradient needs them too."""
    start = dims.place(i) * dims.group
    dt_area, flow_area = (Staged(refs[name], dims, start) for name in ("dt_area", "flow_area"))
    y_area = Staged(refs["area0"], dims)
    tiles = group_tokens(dims, refs, dims.place(i))
    spread = Spread(refs["spread"], dims, start)
    spread.fill(refs["shared"], start)
    live = spread.live()
    gated = "gate" in refs
    for j, at in enumerate(tiles):
        mask = at.exists(live)
        dt = at.step_size(mask)
        dt_area.put(j, dt)
        flow_area.put(j, dt * tile.select(mask, at.load("x")))

    def keep(step, n, state):
        _kept(refs, dims, i, step + 1).put(n, state)

    h, y = _advance_states(refs, dims, spread, dt_area, flow_area, h, with_y=gated, keep=keep)
    if gated:
        for k in dims.order:
            y_area.put_token(k, y[k])
        for j, at in enumerate(tiles):
            slope = tile.silu_gradient(at.load("gate"))
            dgate = at.load("dy") * _skip(at, y_area.get(j)) * slope
            at.store("dgate", tile.select(live, dgate))
    return h


def _retreat_group(refs, dims: KernelShape, i, slot: int, c):
    """Take the i-th group of a block backwards; `slot` is its place in scratch."""
    start = dims.place(i) * dims.group
    dt_area, flow_area = (Staged(refs[name], dims, start) for name in ("dt_area", "flow_area"))
    dy_area, dflow_area, slope_area = (
        Staged(refs[f"area{a}"], dims, slot * dims.group) for a in range(3)
    )
    cotangents = [_cotangents(refs, dims, slot, k) for k in range(dims.group)]
    tiles = group_tokens(dims, refs, dims.place(i))
    spread = Spread(refs["spread"], dims, start)
    live = spread.live()
    for j, at in enumerate(tiles):
        dy_area.put(j, _ungated(at, at.exists(live)))
    lane = jax.lax.broadcasted_iota(jnp.int32, refs["sums"].shape, 1) - start
    sums = jnp.zeros(refs["sums"].shape, jnp.float32)
    c, dflow, slope = _retreat_states(refs, dims, spread, i, dt_area, dy_area, cotangents, c)
    for step, k in enumerate(dims.order):
        dflow_area.put_token(k, dflow[k])
        slope_area.put_token(k, slope[k])
        h = _kept(refs, dims, i, step + 1)
        over_channels = _channel_sums(cotangents[k], h, k, flow_area, dy_area)
        sums = jnp.where(lane == k, over_channels, sums)
    refs["sums"][...] += sums
    for j, at in enumerate(tiles):
        mask = at.exists(live)
        _token_gradients(
            at, mask, dt_area.get(j), dy_area.get(j), dflow_area.get(j), slope_area.get(j)
        )
    return c


def _ungated(at: Tokens, mask) -> jax.Array:
    """The cotangent of y before its gate."""
    dy = at.load("dy")
    if "gate" in at.refs:
        dy = dy * tile.silu(at.load("gate"))
    return tile.select(mask, dy)


def _retreat_states(refs, dims: KernelShape, spread: Spread, i, dt_area, dy_area, cotangents, c):
    """A group backwards: `(c_before, d(dt x), sum_n A P)`; adds to dA, keeps G."""
    dt = [dt_area.token(k) for k in range(dims.group)]
    dy = [dy_area.token(k) for k in range(dims.group)]
    dflow: list[Any] = [None] * dims.group
    slope: list[Any] = [None] * dims.group
    before = []
    for n in range(dims.states):
        A, c_n, dA = refs["A"][n], c[n], refs["dA"][n]
        for step, k in reversed([*enumerate(dims.order)]):
            G = c_n + dy[k] * spread.C(k, n)
            cotangents[k].put(n, G)
            h_before = _kept(refs, dims, i, step).get(n)
            c_n, P = tile.retreat(G, tile.decay(dt[k], A), h_before, spread.inside(k))
            dA = dA + P * dt[k]
            to_flow, to_slope = G * spread.B(k, n), P * A
            dflow[k] = to_flow if n == 0 else dflow[k] + to_flow
            slope[k] = to_slope if n == 0 else slope[k] + to_slope
        refs["dA"][n] = dA
        before.append(c_n)
    return before, dflow, slope


def _cotangents(refs, dims: KernelShape, slot: int, k: int) -> States:
    """The G of token k of the group in a slot."""
    return States(refs["G"], dims, (slot * dims.group + k) * dims.states * dims.rows)


def _channel_sums(G: States, h: States, k: int, flow_area, dy_area) -> jax.Array:
    """dB and dC of token k, summed over the strip's channels: `(2 N fold, 1)`."""
    dB: Any = None
    dC: Any = None
    for j in range(G.stride):
        to_B = G.lane_tiles(j) * G.alike(flow_area, k, j)
        to_C = h.lane_tiles(j) * h.alike(dy_area, k, j)
        dB = to_B if dB is None else dB + to_B
        dC = to_C if dC is None else dC + to_C
    return jnp.sum(jnp.concatenate([dB, dC], axis=0), axis=1, keepdims=True)


def _token_gradients(at: Tokens, mask, dt, dy, dflow, slope) -> None:
    """dx and ddt of a group in a lane tile, and what they add to dD and the bias' gradient."""
    x = tile.select(mask, at.load("x"))
    D = at.maybe("D")
    dx = dt * dflow
    at.store("dx", dx if D is None else dx + D * dy)
    ddt = x * dflow + tile.LN_2 * slope
    ddt = tile.step_size_gradient(at.load("dt"), at.maybe("bias"), ddt, softplus=at.dims.softplus)
    ddt = tile.select(mask, ddt)
    at.store("ddt", ddt)
    at.add("dD", dy * x)
    at.add("dbias", ddt)


# The calls.


def _kernel_shape(config: Config, x, A, segment_index, *, backward: bool) -> KernelShape:
    batch, length, width = x.shape
    tiles = config.tiles or choose_tiles(length, width, A.shape[1])
    return KernelShape(
        batch,
        length,
        width,
        A.shape[1],
        tiles,
        _BACKWARD_GROUP if backward else tiles.group,
        config.dt_softplus,
        config.reverse,
        segment_index is not None,
    )


def _call(
    kernel, dims: KernelShape, name: str, operands, out, scratch, flops: int
) -> dict[str, jax.Array]:
    """Run a kernel on named operands: name -> (array, spec); out: name -> (struct, spec)."""
    names = [*operands, *out, *scratch]

    def body(*refs):
        kernel(dict(zip(names, refs, strict=True)), dims)

    results = compat.pallas_call(
        body,
        backend="tpu",
        name=name,
        grid=dims.grid,
        in_specs=[spec for _, spec in operands.values()],
        out_specs=[spec for _, spec in out.values()],
        out_shape=[struct for struct, _ in out.values()],
        scratch_shapes=[compat.tpu.VMEM((rows, LANES), jnp.float32) for rows in scratch.values()],
        compiler_params=compat.tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        flops=flops * dims.batch * dims.length * dims.width * dims.states,
    )(*(array for array, _ in operands.values()))
    return dict(zip(out, results, strict=True))


def _operands(
    dims: KernelShape, specs: Specs, x, dt, A, B, C, D, gate, bias, segment_index
) -> dict[str, Any]:
    operands = {
        "shared": (pack_shared(dims, B, C, segment_index), specs.shared()),
        "x": (x, specs.tokens()),
        "dt": (dt, specs.tokens()),
        "A": (tiled(dims, A * tile.LOG2_E), specs.decays()),
    }
    if gate is not None:
        operands["gate"] = gate, specs.tokens()
    for name, vector in (("D", D), ("bias", bias)):
        if vector is not None:
            operands[name] = vector[None], specs.channels()
    return operands


def _scratch(dims: KernelShape, *, backward: bool) -> dict[str, int]:
    """Rows of 128 lanes of each scratch array."""
    steps = dims.tiles.steps if backward else dims.group
    # Of the backward kernel: what it recomputes, then the gradients of as many groups.
    area = max(dims.tiles.group, _at_once(dims) * dims.group) * dims.rows
    rows = {f"area{i}": area for i in range(3 if backward else 1)}
    rows |= {"dt_area": steps * dims.rows, "flow_area": steps * dims.rows}
    rows["spread"] = steps * round_up(dims.shared, SUBLANES)
    if backward:
        rows["kept"] = (steps + 1) * dims.states * dims.rows
        rows["G"] = _at_once(dims) * dims.group * dims.states * dims.rows
        rows["sums"] = 2 * dims.states * States.fold(dims)
    return rows


def forward(config: Config, *arrays, return_residuals: bool):
    """`((y, final_state), residuals)`; the state that enters each block is kept for `backward`."""
    x, dt, A, B, C, D, gate, bias, initial_state, segment_index = arrays
    dims = _kernel_shape(config, x, A, segment_index, backward=False)
    specs = Specs(dims, backward=False)
    operands = _operands(dims, specs, x, dt, A, B, C, D, gate, bias, segment_index)
    operands["initial"] = tiled(dims, initial_state), specs.state()
    given = [array for array, _ in operands.values()]
    state = operands["initial"][0].shape
    out = {
        "y": (compat.out_struct(x.shape, x.dtype, *given), specs.tokens()),
        "final": (compat.out_struct(state, jnp.float32, *given), specs.state()),
    }
    if return_residuals:
        shape = (dims.batch, dims.blocks, *state[1:])
        out["boundaries"] = compat.out_struct(shape, jnp.float32, *given), specs.boundaries()
    result = _call(
        _forward_kernel,
        dims,
        "selective_scan_forward",
        operands,
        out,
        _scratch(dims, backward=False),
        flops=7,
    )
    outputs = result["y"], untiled(dims, result["final"])
    if not return_residuals:
        return outputs, None
    return outputs, (*arrays[:8], result["boundaries"], segment_index)


def backward(config: Config, residuals, cotangents):
    """The gradients of `selective_scan`'s arrays from the cotangents of its outputs."""
    x, dt, A, B, C, D, gate, bias, boundaries, segment_index = residuals
    dy, dfinal = cotangents
    dims = _kernel_shape(config, x, A, segment_index, backward=True)
    specs = Specs(dims, backward=True)
    operands = _operands(dims, specs, x, dt, A, B, C, D, gate, bias, segment_index)
    operands["dy"] = dy, specs.tokens()
    operands["boundaries"] = boundaries, specs.boundaries()
    operands["dfinal"] = tiled(dims, dfinal), specs.state()
    given = [array for array, _ in operands.values()]
    state, sums = operands["dfinal"][0].shape, (dims.batch, dims.group, dims.width)
    shared = (dims.strips, dims.batch, dims.blocks, 2 * dims.states, dims.tiles.steps)

    def struct(shape, dtype=jnp.float32):
        return compat.out_struct(shape, dtype, *given)

    out = {
        "dx": (struct(x.shape, x.dtype), specs.tokens()),
        "ddt": (struct(dt.shape, dt.dtype), specs.tokens()),
        "dA": (struct(state), specs.state()),
        "dshared": (struct(shared), specs.shared_gradient()),
        "dinitial": (struct(state), specs.state()),
    }
    if gate is not None:
        out["dgate"] = struct(gate.shape, gate.dtype), specs.tokens()
    for name, vector in (("dD", D), ("dbias", bias)):
        if vector is not None:
            out[name] = struct(sums), specs.channel_sums()
    scratch = _scratch(dims, backward=True)
    result = _call(
        _backward_kernel, dims, "selective_scan_backward", operands, out, scratch, flops=22
    )
    dB, dC = unpack_shared(dims, result["dshared"])
    dD, dbias = (result[n].sum((0, 1)) if n in result else None for n in ("dD", "dbias"))
    return (
        result["dx"],
        result["ddt"],
        untiled(dims, result["dA"]).sum(0),
        dB.astype(B.dtype),
        dC.astype(C.dtype),
        dD,
        result.get("dgate"),
        dbias,
        untiled(dims, result["dinitial"]),
        None,
    )


def unsupported(config: Config, x, *rest) -> str | None:
    """Why the kernels cannot serve these arrays."""
    return no_wide_numbers(x)


BACKEND = Backend(forward, backward, unsupported=unsupported)
