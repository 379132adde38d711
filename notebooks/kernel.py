# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How one kernel works: `linear_scan` on a TPU
#
# You will see how a recurrence, one step after another, becomes a program that does eight steps at
# a time in registers and moves every number once: the maths of one tile, the blocks and the grid,
# the kernel run on this machine by Pallas' TPU interpreter, the same kernel compiled for a TPU that
# is not here, and what its compiler says of the time. It takes about 20 seconds on one CPU core.
#
# The operator is the diagonal recurrence, for each of $D$ channels by itself:
#
# $$h_t = a_t\, h_{t-1} + b_t, \qquad t = 1, \ldots, L.$$

# %%
import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import experiments
from pallas_kernels import linear_scan
from pallas_kernels.linear_scan import shapes, tile, tpu
from pallas_kernels.tools import aot, testing

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.constrained_layout.use": True, "font.size": 10})

# %% [markdown]
# ## From steps to maps
#
# Step $t$ is a map, $h \mapsto a_t h + b_t$, and two maps in a row are one:
#
# $$(a_2, b_2) \circ (a_1, b_1) = (a_2 a_1,\; a_2 b_1 + b_2).$$
#
# This is associative, so that the maps from the start to each of 8 rows take $\log_2 8 = 3$ rounds
# instead of 8 steps: in round $k$ each row joins its map with that of the row $2^k$ above it
# (Hillis and Steele). `tile.prefix` does that, on values; every backend shares it. To see what each
# row knows after each round, let all decays be 1 and the inputs be the identity.

# %%
index = jnp.arange(8)[:, None] * jnp.ones((1, 8), jnp.int32)
ones, inputs = (jnp.ones((8, 8)),), (jnp.eye(8),)  # planes: one for real numbers, two for complex


def down(x, by):
    return jnp.roll(x, by, axis=0)


figure, plots = plt.subplots(1, 4, figsize=(10, 2.9), sharey=True)
for rounds, axes in enumerate(plots):
    _, (known,) = tile.prefix(ones, inputs, down, index, 2**rounds, segmented=False)
    axes.imshow(known, cmap="cividis", vmin=0, vmax=1)
    axes.set(title=f"after {rounds} rounds", xlabel="input of step")
plots[0].set_ylabel("row of the tile")
figure.suptitle("Which inputs each row has summed: the window doubles in each round")
plt.show()
# %% [markdown]
# Eight rows of 128 channels are exactly one vector register of a TPU, and to move rows inside it is
# one instruction (a *sublane roll*). That is why the kernel holds 8 steps at once: no step touches
# memory. What the 8 rows need from before is one row, the state, which the maps are applied to:

# %%
rng = np.random.default_rng(0)
a8, b8 = rng.uniform(0.5, 1, (8, 8)).astype("f"), rng.normal(size=(8, 8)).astype("f")
state = rng.normal(size=(1, 8)).astype("f")
maps = tile.prefix((a8,), (b8,), down, index, 8, segmented=False)
(tiled,) = tile.apply(*maps, (state,), segmented=False)
h, stepwise = state[0], []
for a_t, b_t in zip(a8, b8, strict=True):
    h = a_t * h + b_t
    stepwise.append(h)
print(f"largest difference from 8 single steps: {np.abs(tiled - np.stack(stepwise)).max():.1e}")

# %% [markdown]
# ## Blocks and grid
#
# A TPU core works on blocks in its fast memory (VMEM), while the next block is fetched from the
# slow one (HBM). The sizes are chosen so that the blocks of the backward kernel, the larger one,
# fit twice. For the recurrence of RecurrentGemma-2B:

# %%
shape = shapes.SHAPES["recurrentgemma-2b"]
tiles = tpu.choose_tiles(shape.length, shape.width, planes=1)
grid = (shape.batch, -(-shape.width // tiles.width), -(-shape.length // tiles.steps))
print(f"{shape.length} steps of {shape.width} channels")
print(f"block: {tiles.steps} steps x {tiles.width} channels; grid: {grid}")
print(f"VMEM of the backward kernel's blocks: {tpu.vmem_bytes(tiles, 1) / 2**20:.1f} MiB")

# %%
figure, axes = plt.subplots(figsize=(8, 3.6))
order = np.arange(grid[1] * grid[2]).reshape(grid[1], grid[2])
axes.imshow(order, cmap="cividis", aspect="auto")
for row in range(grid[1]):
    for column in (0, 1, 2, grid[2] - 1):
        colour = "white" if order[row, column] < order.max() / 2 else "black"
        axes.text(
            column, row, order[row, column], ha="center", va="center", color=colour, fontsize=8
        )
axes.set(
    xlabel=f"block of {tiles.steps} steps",
    ylabel=f"block of {tiles.width} channels",
    yticks=range(grid[1]),
    title="Order of the grid: along time first, the state stays in VMEM; then the next channels",
)
plt.show()
# %% [markdown]
# ## The kernel
#
# What Pallas runs for each block. `tile` has the maths; the rest is loads, stores and the state,
# whose block is the same for all blocks of a row, so that it stays where it is. Step codes say
# where documents begin and where padding is.

# %%
source = inspect.getsource(tpu)
begin = source.index("def _forward_kernel")
print(source[begin : source.index("\n\n\n", begin)])

# %% [markdown]
# ## Run it here
#
# Pallas has an interpreter of TPUs. Memory begins as NaN, reads outside of it raise, grid steps
# that may run in parallel are shuffled, and races are errors. The tests hold the kernel to a
# sequential oracle this way; here with two documents in a row.

# %%
L, D = 48, 128
a = jax.random.uniform(jax.random.key(0), (1, L, D), minval=0.8)
b = jax.random.normal(jax.random.key(1), (1, L, D))
ids = jnp.repeat(jnp.array([[1, 2]], jnp.int32), L // 2, axis=1)

with testing.interpret():
    kernel, _ = linear_scan(a, b, segment_ids=ids, implementation="tpu")
    kernel.block_until_ready()
reference, _ = linear_scan(a, b, segment_ids=ids, implementation="reference")
print(f"RMS error over RMS: {testing.rmse_ratio(kernel, reference):.1e}")
assert testing.rmse_ratio(kernel, reference) < testing.FLOAT32_TOLERANCE

# %%
figure, axes = plt.subplots(figsize=(9, 2.8))
axes.plot(reference[0, :, 0], color="lightgray", linewidth=5, label="one step at a time")
axes.plot(kernel[0, :, 0], label="TPU kernel, interpreted")
axes.axvline(L // 2 - 0.5, color="gray", linestyle="--", linewidth=1)
axes.set(xlabel="step", ylabel="state", title="One channel; the second document begins at the line")
axes.legend()
plt.show()
# %% [markdown]
# ## What it must cost, and what it costs
#
# The recurrence does two operations for three numbers that move, so memory sets the pace: the
# *floor* is the time in which the chip's memory can deliver every input and take every output once.
# The block specs alone tell how much the kernel moves; no compiler is needed for that.

# %%
program, *operands = shapes.case("recurrentgemma-2b", "tpu", "forward")
moved = aot.kernel_bytes(program, *operands)
leaves = jax.tree.leaves((operands, jax.eval_shape(program, *operands)))
least = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
chip = aot.TPUS["v5e"]
print(f"the blocks move {moved:,} bytes; inputs and outputs are {least:,}")
print(f"at {chip.bandwidth} GB/s, as a v5e has: {least / chip.bandwidth / 1e3:.0f} µs")

# %% [markdown]
# The TPU compiler is a Python package, `libtpu`; it compiles for chips that are not there. Its
# static profile says how many cycles its own schedule has. That is a model and not a measurement.

# %%
reason = aot.missing("v5e")
if reason is None:
    profile = aot.estimate(
        "v5e", "pallas_kernels.linear_scan.shapes:case", "recurrentgemma-2b", "tpu", "forward"
    )
    print(f"compiled for v5e: {profile.kernels} kernel, {profile.cycles:,} cycles")
    print(f"its schedule takes {profile.static_us:.0f} µs, its traffic {profile.us:.0f} µs")
    print(f"{profile.times_floor:.2f} times the floor of {profile.floor_us:.0f} µs")
else:
    print(f"not compiled here: {reason}")

# %% [markdown]
# The schedule is shorter than the traffic: the kernel waits for memory, which is all one can ask.
#
# ## All shapes
#
# `seqmodels kernels aot` compiles each named shape for each chip. Its committed figures
# for this kernel, static estimates by the TPU compiler for a v5e:

# %%
path = Path(experiments.__file__).parent / "results" / "kernels" / "aot.json"
cells = [
    cell
    for cell in json.loads(path.read_text())["cells"]
    if cell["family"] == "linear_scan" and cell["chip"] == "v5e" and cell["figures"]
]
names = list(dict.fromkeys(cell["shape"] for cell in cells))[::-1]
figure, axes = plt.subplots(figsize=(9, 4.6))
for mode, marker in (("forward", "o"), ("forward+backward", "s")):
    chosen = [cell for cell in cells if cell["mode"] == mode]
    axes.scatter(
        [cell["figures"]["times_floor"] for cell in chosen],
        [names.index(cell["shape"]) for cell in chosen],
        marker=marker,
        label=mode,
    )
axes.axvline(1, color="gray", linestyle="--", linewidth=1)
axes.set_yticks(range(len(names)), names)
axes.set(xscale="log", xlabel="static time over the floor (1 cannot be beaten)")
axes.xaxis.set_major_formatter("{x:g}")
axes.set_title("Wide models are near the floor; small and odd shapes are not")
axes.grid(axis="x", alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# No kernel of this library has run on a TPU yet: these are estimates.
#
# ## Next
#
# - `pallas_kernels/linear_scan/` has the same files as every family: `reference.py`, `xla.py`,
#   `tile.py`, `tpu.py`, `gpu.py`, `shapes.py`.
# - [A sequence over eight devices](sequence_parallel.ipynb): the same recurrence, split.
