# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: train a small language model and let it write
#
# You will see a text turned into batches, a model without attention trained for 400 steps, its
# loss, which bytes it finds hard, and text that it writes from a state of fixed size. It takes
# about 20 seconds on one CPU core.
#
# A *sequence model* reads tokens $x_1, x_2, \ldots$ and says for each prefix how likely every next
# token is. Attention does so by looking at the whole prefix again for each token. A *recurrent*
# layer keeps a state $h_t$ of fixed size instead, and everything it knows of the past is in there:
#
# $$h_t = \lambda \odot h_{t-1} + B x_t, \qquad y_t = \mathrm{Re}(C h_t) + D x_t,$$
#
# with complex decays $|\lambda| < 1$, one for each number of the state. The model below has such a
# layer, the LRU (*linear recurrent unit*). The text is chosen so that its memory can be checked.

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from seqmodels.config import to_dict
from seqmodels.data import text
from seqmodels.generation import Sampling, generate
from seqmodels.mixers import LRUConfig
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig, param_labels
from seqmodels.training.checkpoint import Checkpoints
from seqmodels.training.config import TrainConfig
from seqmodels.training.language import language
from seqmodels.training.loop import fit
from seqmodels.training.metrics import read_jsonl
from seqmodels.training.run_directory import open_run
from seqmodels.training.state import abstract_state

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.constrained_layout.use": True, "font.size": 10})

# %% [markdown]
# ## Text and batches
#
# Each document is a line of a song. The second number is one less than the first, 40 bytes earlier:
# only a model that carries the first number along can write it.

# %%
NUMBERS = ["no", "one", "two", "three", "four", "five", "six"]
NUMBERS += ["seven", "eight", "nine", "ten", "eleven", "twelve"]


def line(n):
    first, second = NUMBERS[n], NUMBERS[n - 1]
    return f"{first} bottles hang on the wall, one falls: {second} bottles.\n".encode()


rng = np.random.default_rng(0)
documents = [line(n) for n in rng.integers(1, len(NUMBERS), 600)]
corpus = text.encode(documents)
print(documents[0].decode())
print(f"{corpus.documents} documents, {corpus.bytes:,} bytes")

# %% [markdown]
# Tokens are bytes, and a boundary stands between documents. A row is a window of 64 tokens, so it
# holds parts of several documents. `segment_ids` says which token belongs to which: no state passes
# from one document to the next. (This is called *packing*; nothing is wasted on padding.)

# %%
LENGTH, ROWS = 64, 8
batches = text.train_batches(corpus, length=LENGTH, batch_size=ROWS)
batch = next(iter(batches))
print({name: (value.shape, str(value.dtype)) for name, value in batch.items()})

figure, axes = plt.subplots(figsize=(8, 2.2))
axes.imshow(batch["segment_ids"] % 2, aspect="auto", cmap="cividis", interpolation="nearest")
axes.set(xlabel="token of the row", ylabel="row of the batch")
axes.set_title("Rows are cut anywhere; the colour changes where another document begins")
plt.show()
# %% [markdown]
# ## Model and training
#
# A *mixer* mixes tokens along the length; everything else in a block acts on each token alone. To
# try another mixer, change `layout` and `mixers`; nothing else.

# %%
config = LanguageModelConfig(
    BackboneConfig(
        layout=("lru",),
        mixers=(LRUConfig(state_size=64, r_min=0.95, r_max=0.999, max_phase=0.3),),
        width=48,
        norm="rms",
        final_norm=True,
        mlp=96,
    ),
    vocabulary_size=text.VOCABULARY,
    tie_embeddings=False,
    embedding_std=48**-0.5,
    embedding_scale=48**0.5,
)
model = LanguageModel(config)
task = language(model, lambda params: param_labels(config, params), packed=True)

# %% [markdown]
# `fit` is the loop that all experiments use. It leaves everything in a run's directory: the config,
# metrics as JSON lines, checkpoints that a killed run goes on from.

# %%
train = TrainConfig(
    steps=400,
    batch_size=ROWS,
    learning_rate=1e-2,
    warmup_steps=10,
    clip_norm=1.0,
    adam_b2=0.98,
    log_every=10,
    select="last",
)
directory = Path(tempfile.mkdtemp()) / "run"
run = open_run(directory, {"model": to_dict(config), "train": to_dict(train)})
outcome = fit(task, batches, train, run, show_progress=False)
print(f"{outcome.parameters:,} parameters, {outcome.progress.tokens:,} tokens read")

# %%
lines = [line for line in read_jsonl(directory / "metrics.jsonl") if line["kind"] == "train"]
steps = [line["step"] for line in lines]
figure, axes = plt.subplots(figsize=(8, 3))
axes.plot(steps, [line["loss"] / np.log(2) for line in lines])
axes.axhline(np.log2(text.VOCABULARY), color="gray", linestyle="--", linewidth=1)
axes.annotate("all tokens equally likely", (steps[-1], 7.5), ha="right", va="top", color="gray")
axes.set(xlabel="training step", ylabel="loss in bits per token", yscale="log")
axes.yaxis.set_major_formatter("{x:g}")
axes.yaxis.set_minor_formatter("{x:g}")
axes.set_title(f"The loss falls from 8 bits to {lines[-1]['loss'] / np.log(2):.2f}")
plt.show()
# %% [markdown]
# ## Where is the loss?
#
# The checkpoint holds the parameters. With them, the loss of each byte of one line: the number that
# begins it cannot be known; the one near its end can.

# %%
template = abstract_state(task, train, train.mesh.make())
with Checkpoints(directory / "checkpoints", run.config_dict, read_only=True) as saved:
    variables = saved.restore(template, outcome.chosen_step)[0].variables


@jax.jit
def losses(variables, tokens):
    """Bits of each next token, (B, L - 1)."""
    logits, _ = model.apply(variables, tokens[:, :-1])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return -chosen[..., 0] / np.log(2)


song = line(9)
bits = losses(variables, jnp.array([[text.BOUNDARY, *song]]))[0]

figure, axes = plt.subplots(figsize=(9, 2.6))
axes.bar(range(len(song)), bits, width=0.9)
axes.set_xticks(range(len(song)), [chr(c).replace("\n", "\\n") for c in song], fontsize=8)
axes.set(xlim=(-1, len(song)), xlabel="byte that is predicted", ylabel="bits")
axes.set_title("The first letters of the line cost most; the second number costs little")
plt.show()
# %% [markdown]
# ## Writing
#
# `generate` reads the prompts, in chunks, then samples token by token. What it carries from token
# to token is the state: as many bytes after one token as after a million.

# %%
prompts = [[text.BOUNDARY, *f"{name} bottles".encode()] for name in NUMBERS[1:]]
boundary = Sampling(temperature=0, stop_tokens=(text.BOUNDARY,))
written = generate(model, variables, prompts, max_new_tokens=60, sampling=boundary)
for prompt, tokens in zip(prompts, written, strict=True):
    print(text.decode(prompt + tokens).decode(), end="")

# %%
songs = [text.decode(p + t) for p, t in zip(prompts, written, strict=True)]
right = [song == line(n) for n, song in enumerate(songs, 1)]
print(f"{sum(right)} of {len(right)} lines are right to the last byte")

size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.initial_state(1)))
print(f"{size:,} bytes of state, however long the text is")

# %% [markdown]
# ## Next
#
# - `seqmodels lm train --data book.txt --mixer mamba2 --preset cpu` does the same from
#   the command line, on your text.
# - [A tour of the mixers](tour.ipynb) shows what is inside the LRU and its relatives.
# - [Write your own mixer](own_mixer.ipynb) puts a layer of yours in place of it.
