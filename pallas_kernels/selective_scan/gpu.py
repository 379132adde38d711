"""GPU kernels (Triton lowering): states in registers, spans of time in parallel.

A program is one warp with a strip of channels, all their states in registers, and walks one span
of time in groups of a few steps. Where the batch alone fills the GPU there is one span. Otherwise
the spans are first reduced to their maps `h -> product h + flow`, a second kernel chains the maps,
and all spans walk again from the state that enters each.

The forward pass keeps the state before each group. The backward pass walks the groups from the last
to the first, computes the states of a group again in registers and takes it backwards (see `xla`).

Inside the kernels everything is two-dimensional: `(N, 1)` of a token's B and C, `(1, W)` of its
channels, `(N, W)` of states. A token that does not exist, or is padding, is one of zeros: its dt of
0 keeps the state to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat, segments
from pallas_kernels.common.backend import Backend, no_wide_numbers
from pallas_kernels.common.compat import pl
from pallas_kernels.common.gpu import beyond_addresses, by_chunks, masked_places
from pallas_kernels.selective_scan.tile import Config

_WARPS_TO_FILL_A_GPU = 2048  # about 16 for each multiprocessor since Ampere
_STATES_A_WARP = 256  # 8 registers a thread
_STATES_A_GROUP = 2048  # 64 registers a thread in the backward pass


class Tiles(NamedTuple):
    """`span` steps of time and `width` channels a program, `group` steps unrolled."""

    span: int
    width: int
    group: int


def choose_tiles(batch: int, length: int, width: int, states: int) -> Tiles:
    """One span if the batch fills the GPU, else spans of at least 128 steps."""
    padded = pl.next_power_of_2(states)
    strip = max(2, min(_STATES_A_WARP // padded, pl.next_power_of_2(width)))
    group = max(1, min(8, _STATES_A_GROUP // (padded * strip), pl.next_power_of_2(length)))
    programs = batch * -(-width // strip)
    spans = max(1, min(_WARPS_TO_FILL_A_GPU // programs, length // 128))
    groups = -(-length // group)
    return Tiles(-(-groups // spans) * group, strip, group)


def largest_array(batch: int, length: int, width: int, states: int) -> int:
    """Elements of the largest array that a kernel addresses."""
    tiles = choose_tiles(batch, length, width, states)
    kept = -(-length // tiles.group) * states * width
    partial_sums = -(-width // tiles.width) * length * states
    return batch * max(length * width, kept, partial_sums)


class _KernelShape(NamedTuple):
    """What is static about one kernel."""

    batch: int
    length: int
    width: int
    states: int
    tiles: Tiles
    dt_softplus: bool
    segmented: bool
    reverse: bool  # the direction of travel of the forward pass

    @property
    def spans(self) -> int:
        return -(-self.length // self.tiles.span)

    @property
    def groups(self) -> int:
        """Groups a span."""
        return self.tiles.span // self.tiles.group

    @property
    def strips(self) -> int:
        return -(-self.width // self.tiles.width)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.spans, self.batch, self.strips


# Loads and stores. References are whole arrays, named; a tile is the states of one program.


class _Tile(NamedTuple):
    refs: Mapping[str, Any]
    span: jax.Array
    row: jax.Array
    strip: jax.Array
    states: slice | pl.Slice
    channels: slice | pl.Slice
    real_states: jax.Array  # (N, 1)
    real_channels: jax.Array  # (1, W)

    def load(self, name: str, *index, live=True) -> jax.Array:
        """What an array holds at `index` of the axes before its last two, for this tile."""
        ref, lanes, mask = self._place(name, live)
        values = compat.triton.load(ref.at[(*index, *lanes)], mask=mask, other=0.0)
        return values.astype(jnp.float32)

    def store(self, name: str, index, values: jax.Array, live=True) -> None:
        ref, lanes, mask = self._place(name, live)
        compat.triton.store(ref.at[(*index, *lanes)], values.astype(ref.dtype), mask=mask)

    def _place(self, name, live):
        """The reference, its last two indices and a mask: `(N, 1)`, `(1, W)` or `(N, W)`."""
        ref, one = self.refs[name], pl.ds(0, 1)
        if name in _OF_STATES:
            return ref, (self.states, one), self.real_states & live
        if name in _OF_CHANNELS:
            return ref, (one, self.channels), self.real_channels & live
        return ref, (self.states, self.channels), self.real_states & self.real_channels & live


# By how their last axes are viewed: (N, 1), (1, D); all others are (N, D).
_OF_STATES = {"B", "C", "dB", "dC"}
_OF_CHANNELS = {"x", "dt", "gate", "y", "dy", "dx", "ddt", "dgate"}
_OF_CHANNELS |= {"D", "dt_bias", "dD", "ddt_bias"}


def _tile(dims: _KernelShape, names, refs) -> _Tile:
    span, row, strip = map(pl.program_id, range(3))
    start = strip * dims.tiles.width
    padded = pl.next_power_of_2(dims.states)
    return _Tile(
        dict(zip(names, refs, strict=True)),
        span,
        row,
        strip,
        masked_places(0, padded, dims.states, row),
        pl.ds(start, dims.tiles.width),
        (jnp.arange(padded) < dims.states)[:, None],
        (start + jnp.arange(dims.tiles.width) < dims.width)[None, :],
    )


class _Token(NamedTuple):
    """One token of one program; zeros if it is not `live`."""

    place: tuple[Any, Any]  # row and time
    live: jax.Array
    inside: jax.Array  # it is one of the row's, perhaps padding
    reset: jax.Array | None
    x: jax.Array  # (1, W)
    raw_dt: jax.Array  # (1, W): with the bias, before the softplus
    dt: jax.Array  # (1, W)
    B: jax.Array  # (N, 1)

    def kept(self, h):
        """`h`, zero where a document begins."""
        return h if self.reset is None else jnp.where(self.reset, jnp.zeros_like(h), h)

    def advance(self, A, h):
        """The state after this token from the one that enters it, and the decay between."""
        decay = jnp.exp(self.dt * A)
        return decay * h + (self.dt * self.x) * self.B, decay


def _load_token(dims: _KernelShape, tile: _Tile, t) -> _Token:
    inside = t < dims.length
    live, reset = inside, None
    if dims.segmented:
        code = compat.triton.load(
            tile.refs["codes"].at[tile.row, t], mask=inside, other=segments.SKIP
        )
        live, reset = code != segments.SKIP, code == segments.RESET
    place = tile.row, t
    raw = tile.load("dt", *place, live=live)
    if "dt_bias" in tile.refs:
        raw = raw + tile.load("dt_bias")
    dt = _softplus(raw) if dims.dt_softplus else raw
    dt = jnp.where(live & tile.real_channels, dt, jnp.zeros_like(dt))
    x, B = tile.load("x", *place, live=live), tile.load("B", *place, live=live)
    return _Token(place, live, inside, reset, x, raw, dt, B)


def _group(dims: _KernelShape, tile: _Tile, index, *, backward: bool = False):
    """`(place of the group, its times)` of this program's index-th group in the order of travel."""
    forwards = dims.reverse == backward
    place = index if forwards else dims.groups - 1 - index
    place = tile.span * dims.groups + place
    times = [place * dims.tiles.group + i for i in range(dims.tiles.group)]
    return place, times if forwards else times[::-1]


# The maths of one token besides the recurrence. Exponentials are taken of non-positives only.


def _softplus(v):
    return jnp.maximum(v, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(v)))


def _sigmoid(v):
    small = jnp.exp(-jnp.abs(v))
    return jnp.where(v >= 0, jnp.ones_like(v), small) / (1.0 + small)


def _gated(tile: _Tile, token: _Token, dy):
    """The cotangent of what the gate multiplies, from that of y."""
    if "gate" not in tile.refs:
        return dy
    gate = tile.load("gate", *token.place, live=token.live)
    return dy * gate * _sigmoid(gate)


def _read(tile: _Tile, token: _Token, C, h):
    """`C h + D x`, `(1, W)`."""
    y = jnp.sum(C * h, axis=0)[None, :]
    return y + tile.load("D") * token.x if "D" in tile.refs else y


# The kernels.


def _reduce_kernel(*refs, dims: _KernelShape, names, backward: bool):
    """The map of each span, of the state or, backward, of its cotangent: `(B, spans, N, D)`."""
    tile = _tile(dims, names, refs)
    A = tile.load("A")

    def group(index, carry):
        product, flow = carry
        for t in _group(dims, tile, index, backward=backward)[1]:
            token = _load_token(dims, tile, t)
            if backward:
                dy = _gated(tile, token, tile.load("dy", *token.place, live=token.live))
                C = tile.load("C", *token.place, live=token.live)
                decay = jnp.exp(token.dt * A)
                flow = token.kept(decay * (flow + C * dy))
            else:
                flow, decay = token.advance(A, token.kept(flow))
            product = token.kept(product * decay)
        return product, flow

    zero = jnp.zeros_like(A)
    product, flow = jax.lax.fori_loop(0, dims.groups, group, (zero + 1.0, zero))
    span = tile.row, tile.span
    tile.store("product", span, product)
    tile.store("flow", span, flow)


def _chain_kernel(*refs, dims: _KernelShape, names, backward: bool):
    """What enters each span, `(B, spans, N, D)`."""
    tile = _tile(dims, names, refs)

    def body(i, h):
        span = tile.row, (i if dims.reverse == backward else dims.spans - 1 - i)
        tile.store("entering", span, h)
        product, flow = tile.load("product", *span), tile.load("flow", *span)
        # Behind a reset nothing of h is left, not even an infinity.
        return jnp.where(product == 0, flow, product * h + flow)

    jax.lax.fori_loop(0, dims.spans, body, tile.load("first", tile.row))


def _forward_kernel(*refs, dims: _KernelShape, names):
    tile = _tile(dims, names, refs)
    A = tile.load("A")

    def group(index, h):
        place, times = _group(dims, tile, index)
        tile.store("before", (tile.row, place), h)
        for t in times:
            token = _load_token(dims, tile, t)
            h, _ = token.advance(A, token.kept(h))
            y = _read(tile, token, tile.load("C", *token.place, live=token.live), h)
            if "gate" in tile.refs:
                gate = tile.load("gate", *token.place, live=token.live)
                y = y * gate * _sigmoid(gate)
            y = jnp.where(token.live, y, jnp.zeros_like(y))
            tile.store("y", token.place, y, token.inside)
        return h

    span = tile.row, tile.span
    h = jax.lax.fori_loop(0, dims.groups, group, tile.load("entering", *span))
    tile.store("leaving", span, h)


class _Sums(NamedTuple):
    """What the backward pass carries: the cotangent of the state, and sums over time."""

    c: jax.Array  # (N, W)
    dA: jax.Array  # (N, W)
    dD: jax.Array  # (1, W)
    ddt_bias: jax.Array  # (1, W)


def _backward_kernel(*refs, dims: _KernelShape, names):
    tile = _tile(dims, names, refs)
    A = tile.load("A")

    def group(index, sums):
        place, times = _group(dims, tile, index, backward=True)
        h = tile.load("before", tile.row, place)
        before = []
        for t in times[::-1]:
            token = _load_token(dims, tile, t)
            h = token.kept(h)
            before.append(h)
            h, _ = token.advance(A, h)
            _gradients_of_reading(tile, token, h)
        for t, h in zip(times, before[::-1], strict=True):
            sums = _retreat(dims, tile, _load_token(dims, tile, t), A, h, sums)
        return sums

    span = tile.row, tile.span
    c, zero = tile.load("entering", *span), jnp.zeros((1, dims.tiles.width), jnp.float32)
    sums = _Sums(c, jnp.zeros_like(A), zero, zero)
    sums = jax.lax.fori_loop(0, dims.groups, group, sums)
    tile.store("leaving", span, sums.c)
    tile.store("dA", span, sums.dA)
    for name in ("dD", "ddt_bias"):
        if name in tile.refs:
            tile.store(name, span, getattr(sums, name))


def _gradients_of_reading(tile: _Tile, token: _Token, h) -> None:
    """Those that need the state after the token: of the gate and of C."""
    dy = tile.load("dy", *token.place, live=token.live)
    if "gate" in tile.refs:
        C = tile.load("C", *token.place, live=token.live)
        gate = tile.load("gate", *token.place, live=token.live)
        slope = _sigmoid(gate) * (1.0 + gate * _sigmoid(-gate))
        dgate = jnp.where(token.live, dy * _read(tile, token, C, h) * slope, jnp.zeros_like(dy))
        tile.store("dgate", token.place, dgate, token.inside)
    dC = jnp.sum(_gated(tile, token, dy) * h, axis=1)[:, None]
    dC = jnp.where(token.live, dC, jnp.zeros_like(dC))
    tile.store("dC", (tile.row, tile.strip, token.place[1]), dC, token.inside)


def _retreat(dims: _KernelShape, tile: _Tile, token: _Token, A, h, sums: _Sums) -> _Sums:
    """One token backwards; `h` is the state that entered it."""
    dy = _gated(tile, token, tile.load("dy", *token.place, live=token.live))
    gradient = sums.c + tile.load("C", *token.place, live=token.live) * dy
    c = jnp.exp(token.dt * A) * gradient
    dexponent = c * h  # of dt A
    written = jnp.sum(gradient * token.B, axis=0)[None, :]
    dx = token.dt * written
    ddt = token.x * written + jnp.sum(dexponent * A, axis=0)[None, :]
    if dims.dt_softplus:
        ddt = ddt * _sigmoid(token.raw_dt)
    if "D" in tile.refs:
        dx = dx + tile.load("D") * dy
    dx, ddt = (jnp.where(token.live, g, jnp.zeros_like(g)) for g in (dx, ddt))
    tile.store("dx", token.place, dx, token.inside)
    tile.store("ddt", token.place, ddt, token.inside)
    dB = jnp.sum(gradient * (token.dt * token.x), axis=1)[:, None]
    tile.store("dB", (tile.row, tile.strip, token.place[1]), dB, token.inside)
    dA = sums.dA + token.dt * dexponent
    return _Sums(token.kept(c), dA, sums.dD + dy * token.x, sums.ddt_bias + ddt)


# The calls.


def _call(
    kernel, dims: _KernelShape, name: str, grid, operands, outputs, flops: int
) -> dict[str, Any]:
    """Run `kernel` on named operands, None left out; `outputs` are structs by name."""
    operands = {key: z for key, z in operands.items() if z is not None}
    out = compat.pallas_call(
        functools.partial(kernel, dims=dims, names=(*operands, *outputs)),
        backend="gpu",
        name=f"selective_scan_{name}",
        grid=grid,
        out_shape=[compat.out_struct(*s, *operands.values()) for s in outputs.values()],
        compiler_params=compat.triton.CompilerParams(num_warps=1, num_stages=1),
        flops=flops * dims.batch * dims.length * dims.width * dims.states,
    )(*operands.values())
    return dict(zip(outputs, out, strict=True))


def _kernel_shape(config: Config, x, A, segment_index) -> _KernelShape:
    (batch, length, width), states = x.shape, A.shape[1]
    tiles = config.tiles or choose_tiles(batch, length, width, states)
    segmented = segment_index is not None
    flags = config.dt_softplus, segmented, config.reverse
    return _KernelShape(batch, length, width, states, tiles, *flags)


def _operands(config: Config, x, dt, A, B, C, D, gate, dt_bias, segment_index) -> dict[str, Any]:
    """The inputs as the kernels view them: two axes last, A transposed, step codes."""
    channels = {"x": x, "dt": dt, "gate": gate, "D": D, "dt_bias": dt_bias}
    views = {name: None if z is None else z[..., None, :] for name, z in channels.items()}
    views |= {"A": A.T, "B": B[..., None], "C": C[..., None]}
    codes = (
        None
        if segment_index is None
        else segments.step_codes(segment_index, reverse=config.reverse)
    )
    return views | {"codes": codes}


def _entering(dims: _KernelShape, operands, first, *, backward: bool):
    """What enters each span, `(B, spans, N, D)`, from what enters the row, `(B, D, N)`."""
    whole, chained = _whole, functools.partial(_chained, dims, backward=backward)
    first = jnp.swapaxes(first, 1, 2)
    return by_chunks("selective_scan", dims.spans, whole, chained, operands, first)


def _whole(operands, first):
    return first[:, None]


def _chained(dims: _KernelShape, operands, first, *, backward: bool):
    per_span = ((dims.batch, dims.spans, dims.states, dims.width), jnp.float32)
    needed = ["x", "dt", "dt_bias", "A", "B", "codes"] + ["C", "gate", "dy"] * backward
    maps = _call(
        functools.partial(_reduce_kernel, backward=backward),
        dims,
        "reduce",
        dims.grid,
        {name: operands[name] for name in needed},
        {"product": per_span, "flow": per_span},
        flops=6,
    )
    return _call(
        functools.partial(_chain_kernel, backward=backward),
        dims,
        "chain",
        (1, *dims.grid[1:]),
        maps | {"first": first},
        {"entering": per_span},
        flops=0,
    )["entering"]


def _leaving(dims: _KernelShape, leaving, *, backward: bool):
    """What leaves the last span in the direction of travel, `(B, D, N)`."""
    last = -1 if dims.reverse == backward else 0
    return jnp.swapaxes(leaving[:, last], 1, 2)


def forward(
    config: Config,
    x,
    dt,
    A,
    B,
    C,
    D,
    gate,
    dt_bias,
    initial_state,
    segment_index,
    *,
    return_residuals: bool,
):
    """`((y, final_state), residuals)`; arguments as in `reference.selective_scan`."""
    dims = _kernel_shape(config, x, A, segment_index)
    operands = _operands(config, x, dt, A, B, C, D, gate, dt_bias, segment_index)
    entering = _entering(dims, operands, initial_state, backward=False)
    state = (dims.states, dims.width)
    out = _call(
        _forward_kernel,
        dims,
        "forward",
        dims.grid,
        operands | {"entering": entering},
        {
            "y": ((dims.batch, dims.length, 1, dims.width), x.dtype),
            "before": ((dims.batch, dims.spans * dims.groups, *state), jnp.float32),
            "leaving": ((dims.batch, dims.spans, *state), jnp.float32),
        },
        flops=8,
    )
    outputs = out["y"][:, :, 0], _leaving(dims, out["leaving"], backward=False)
    if not return_residuals:
        return outputs, None
    return outputs, (x, dt, A, B, C, D, gate, dt_bias, segment_index, out["before"])


def backward(config: Config, residuals, cotangents):
    """Gradients of the arrays of `forward`, in its order, from those of `(y, final_state)`."""
    x, dt, A, B, C, D, gate, dt_bias, segment_index, before = residuals
    dy, dfinal_state = cotangents
    dims = _kernel_shape(config, x, A, segment_index)
    operands = _operands(config, x, dt, A, B, C, D, gate, dt_bias, segment_index)
    operands["dy"] = dy[:, :, None]
    entering = _entering(dims, operands, dfinal_state, backward=True)
    rows = (dims.batch, dims.length)
    per_span = (dims.batch, dims.spans)
    per_strip = ((dims.batch, dims.strips, dims.length, dims.states, 1), jnp.float32)
    outputs = {
        "dx": ((*rows, 1, dims.width), x.dtype),
        "ddt": ((*rows, 1, dims.width), dt.dtype),
        "dgate": None if gate is None else ((*rows, 1, dims.width), gate.dtype),
        "dA": ((*per_span, dims.states, dims.width), jnp.float32),
        "dB": per_strip,
        "dC": per_strip,
        "dD": None if D is None else ((*per_span, 1, dims.width), jnp.float32),
        "ddt_bias": None if dt_bias is None else ((*per_span, 1, dims.width), jnp.float32),
        "leaving": ((*per_span, dims.states, dims.width), jnp.float32),
    }
    out = _call(
        _backward_kernel,
        dims,
        "backward",
        dims.grid,
        operands | {"before": before, "entering": entering},
        {name: s for name, s in outputs.items() if s is not None},
        flops=24,
    )
    return (
        out["dx"][:, :, 0],
        out["ddt"][:, :, 0],
        out["dA"].sum((0, 1)).T,
        out["dB"].sum(1)[..., 0].astype(B.dtype),
        out["dC"].sum(1)[..., 0].astype(C.dtype),
        None if D is None else out["dD"].sum((0, 1))[0],
        None if gate is None else out["dgate"][:, :, 0],
        None if dt_bias is None else out["ddt_bias"].sum((0, 1))[0],
        _leaving(dims, out["leaving"], backward=True),
        None,
    )


def unsupported(config: Config, x, dt, A, *rest) -> str | None:
    """Why the kernels cannot serve these arrays."""
    batch, length, width = x.shape
    return no_wide_numbers(x) or beyond_addresses(
        batch, lambda: largest_array(batch, length, width, A.shape[1])
    )


BACKEND = Backend(forward, backward, unsupported=unsupported)
