# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A sequence over eight devices
#
# You will see rows whose *length* is split over devices, a model that computes the same on them as
# on one device, and what the devices tell each other: for a recurrent layer a state, however long
# the row is; for attention all keys and values. Eight devices are simulated on the CPU. It takes
# about 20 seconds on one core.
#
# To split rows of a batch is easy, they do not know of each other. Tokens of a row do. For a
# recurrence $h_t = a_t h_{t-1} + b_t$ the way out is that a whole shard of tokens is one map,
#
# $$h \mapsto A h + B, \qquad A = \prod_t a_t, \quad B = \text{last state from } 0,$$
#
# so that every device can work on its own tokens, and only the $(A, B)$ of the shards, their
# *summaries*, have to be exchanged to find the state that enters each.

# %%
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)  # before anything touches a device

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from experiments.scaling.collectives import collectives
from seqmodels.mixers import (
    AttentionConfig,
    GLAConfig,
    LRUConfig,
    RGLRUConfig,
    Segments,
    SlidingWindowConfig,
    build,
)
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig
from seqmodels.parallel import STRATEGIES, make_mesh, on_mesh, put_batch, replicated

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.constrained_layout.use": True, "font.size": 10})
print(len(jax.devices()), "devices")

# %% [markdown]
# ## Mesh and batch
#
# A mesh always has three axes: `data` splits the rows of a batch, `seq` their length, `model` heads
# and channels. Here rows are split over 2 and their length over 4.

# %%
mesh = make_mesh(data=2, seq=4)
ids = np.repeat([[1, 2, 3]] * 4, [30, 20, 14], axis=1).astype(np.int32)  # three documents a row
ids[1, 50:] = 0  # and padding in one
tokens = np.random.default_rng(0).integers(0, 64, ids.shape).astype(np.int32)
batch = put_batch({"inputs": tokens, "segment_ids": ids}, mesh)
print(batch["inputs"].shape, batch["inputs"].sharding.spec)


# %%
def owners(array):
    """Which device holds each element."""
    found = np.zeros(array.shape, int)
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        found[index] = device.id
    return found


figure, axes = plt.subplots(figsize=(9, 2.6))
where = owners(batch["inputs"])
axes.imshow(where, aspect="auto", cmap="cividis", interpolation="nearest")
for device in range(8):
    row, column = np.argwhere(where == device).mean(axis=0)
    colour = "white" if device < 4 else "black"
    axes.text(column, row, f"device {device}", ha="center", va="center", color=colour)
for row in range(4):
    for place in np.flatnonzero(np.diff(ids[row])) + 0.5:
        axes.plot([place, place], [row - 0.45, row + 0.45], color="tab:orange", linewidth=2)
axes.set(xlabel="token of the row", ylabel="row", yticks=range(4))
axes.set_title("Where each token is; orange: a document ends, wherever the shards are cut")
plt.show()
# %% [markdown]
# ## The same numbers
#
# Inside `on_mesh` a model is what it was. Its operators find the mesh and exchange what they must.

# %%
stack = BackboneConfig(
    layout=("rg_lru",), mixers=(RGLRUConfig(heads=4),), width=32, norm="rms", mlp=64
)
model = LanguageModel(LanguageModelConfig(stack, vocabulary_size=64))
variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), int))


def apply(variables, tokens, ids):
    return model.apply(variables, tokens, segments=Segments.from_ids(ids))[0]


one = jax.jit(apply)(variables, tokens, ids)
everywhere = jax.device_put(variables, replicated(mesh))
split = jax.jit(on_mesh(apply, mesh))(everywhere, batch["inputs"], batch["segment_ids"])
real = ids != 0
error = np.abs(np.asarray(split) - np.asarray(one))[real].max()
print(f"largest difference of a logit: {error:.1e}, of {np.abs(one)[real].max():.2f}")
print("where the logits are:", split.sharding.spec)
assert error < 1e-5

# %% [markdown]
# ## What the devices tell each other
#
# A *collective* is an operation in which devices exchange data. The compiled program names them
# all, with shapes, so they can be counted. Now the length is split over all eight, and one layer
# runs forward over one row, of two lengths.

# %%
WIDTH, LENGTHS = 32, (512, 2048)
line = make_mesh(data=1, seq=8)
LAYERS = {
    "gla": GLAConfig(heads=2),
    "rg_lru": RGLRUConfig(heads=2),
    "sliding_window": SlidingWindowConfig(heads=2, window=32),
    "attention": AttentionConfig(heads=2),
}


def exchanged(config, length):
    """The collectives of one layer's forward pass over a row of so many tokens."""
    mixer = build(config, WIDTH)
    params = jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 2, WIDTH)))
    where = jax.sharding.NamedSharding(line, jax.sharding.PartitionSpec(None, "seq"))
    whole = replicated(line)
    x = jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32, sharding=where)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=whole), params)
    run = on_mesh(lambda params, x: mixer.apply(params, x)[0], line)
    compiled = jax.jit(run, out_shardings=where).lower(params, x).compile()
    return collectives(compiled.as_text())


found = {
    name: {length: exchanged(config, length) for length in LENGTHS}
    for name, config in LAYERS.items()
}
print(f"{'layer':16}{'tokens':>8}  {'collective':20}{'count':>6}{'bytes a device receives':>26}")
for name, by_length in found.items():
    for length, seen in by_length.items():
        for c in seen:
            print(f"{name:16}{length:8}  {c.kind:20}{c.count:6}{c.bytes:26,}")

# %%
figure, (one, two) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(1.3, 1))
for number, (name, by_length) in enumerate(found.items()):
    sizes = [sum(c.bytes for c in seen) for seen in by_length.values()]
    one.loglog(list(by_length), sizes, ("o-", "s--", "^-.", "D:")[number], label=name)
one.set_xscale("log", base=2)
one.set(xlabel="tokens of the row", ylabel="bytes that a device receives")
one.set_title("Only attention's exchange grows with the row")
one.legend()
shortest, longest = LENGTHS
growth = [
    sum(c.bytes for c in seen[longest]) / sum(c.bytes for c in seen[shortest])
    for seen in found.values()
]
two.bar(list(found), growth)
two.set_ylabel("growth of the bytes")
two.set_title(f"From {shortest} to {longest} tokens")
plt.show()
# %% [markdown]
# A recurrent layer sends its state once; a sliding window, the last tokens of each shard to the
# neighbour. Attention has to bring every key and value to every device.
#
# ## Other ways
#
# For most operators there is a choice. The default comes first:

# %%
for op, strategies in STRATEGIES.items():
    print(f"{op}: {', '.join(strategies)}")

# %% [markdown]
# With `chain`, each device waits for the state of the one before; with `doubling`, summaries travel
# 1, 2, 4 devices far. They compute the same:

# %%
mixer = build(LRUConfig(state_size=32), WIDTH)
x = jax.random.normal(jax.random.key(1), (1, 256, WIDTH))
(alone, _), params = jax.jit(mixer.init_with_output)(jax.random.key(0), x)
placed = put_batch({"inputs": np.asarray(x)}, line)["inputs"]
params = jax.device_put(params, replicated(line))
for strategy in STRATEGIES["linear_scan"]:
    run = jax.jit(on_mesh(mixer.apply, line, {"linear_scan": strategy}))
    y, _ = run(params, placed)
    print(f"{strategy}: largest difference from one device {np.abs(y - alone).max():.1e}")

# %% [markdown]
# ## Next
#
# - Training does the same, forward and backward: every command takes `--mesh data=2,seq=4`.
# - What moves between real chips, as the TPU compiler plans it, on up to 256 of them:
#   `experiments/results/scaling/report.md`.
