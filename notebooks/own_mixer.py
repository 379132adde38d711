# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write your own mixer
#
# You will see a new layer in 60 lines, a gated moving average; then what the library makes of it
# without another line: a language model, training on packed documents, decoding from a carried
# state, kernels for TPU and GPU, and the contract's own checks, which find a fault that we build
# in. It takes about 20 seconds on one CPU core.
#
# The layer averages the past with weights that decay, over a span of its own for each channel, and
# lets the current token decide what of the average to use:
#
# $$h_t = a \odot h_{t-1} + (1 - a) \odot W_v x_t, \qquad
# y_t = W_o\,(\mathrm{silu}(W_g x_t) \odot h_t), \qquad a = 1 - 1/\mathrm{span}.$$

# %%
import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from pallas_kernels import explain
from seqmodels import ops
from seqmodels.data import text
from seqmodels.generation import Sampling, generate
from seqmodels.mixers import REGISTRY, Mixer, MixerConfig, RecurrentState, Segments, build
from seqmodels.mixers.base import NO_DECAY_LABEL, mask_padding
from seqmodels.mixers.contract import ContractError, check_contract
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig
from seqmodels.ranges import Positive

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.constrained_layout.use": True, "font.size": 10})

# %% [markdown]
# ## The mixer
#
# The contract has two parts. A frozen config says what the layer is; its fields are checked against
# their types, here `Positive`. A Flax module has one call for everything:
#
# - training: no `state`, whole rows, perhaps several documents a row (`segments`);
# - reading a prompt in chunks: `state` in, `state` out;
# - decoding: the same with one token.
#
# `RecurrentState` keeps the books of documents: `reset_at_document_start` zeroes what must not go
# on, `update` counts positions. Outputs are zero on padding.


# %%
@dataclasses.dataclass(frozen=True)
class EMAConfig(MixerConfig):
    """A gated moving average; spans, in tokens, are log-uniform in a range at first."""

    mixer: ClassVar[str] = "ema"

    shortest: Positive = 2.0
    longest: Positive = 100.0

    def param_labels(self):
        return {"log_span": NO_DECAY_LABEL}  # no weight decay, always float32


class EMA(Mixer[EMAConfig]):
    """``h_t = a h_{t-1} + (1 - a) v_t``, ``y_t = out(silu(gate(x_t)) * h_t)``."""

    @nn.compact
    def __call__(self, x, *, segments=None, state=None, deterministic=True):
        self.check(x, segments, state)
        if state is None:
            state = self.initial_state(x.shape[0])
        value = nn.Dense(self.width, use_bias=False, name="value")(x).astype(jnp.float32)
        gate = nn.silu(nn.Dense(self.width, use_bias=False, name="gate")(x))

        decay = 1.0 - 1.0 / jnp.exp(self.param("log_span", self.log_spans, (self.width,)))
        h, final = ops.linear_scan(
            decay,
            jnp.broadcast_to(1.0 - decay, value.shape) * value,
            initial_state=self.entering(state, segments),
            segments=segments,
        )
        y = nn.Dense(self.width, use_bias=False, name="out")(gate * h.astype(x.dtype))
        return mask_padding(y, segments), state.update(final, segments, x.shape[1])

    def entering(self, state, segments):
        return state.reset_at_document_start(segments)

    def initial_state(self, batch_size, *, max_length=None, dtype=jnp.bfloat16):
        return RecurrentState.start(jnp.zeros((batch_size, self.width), jnp.float32), batch_size)

    def log_spans(self, key, shape):
        low, high = np.log(self.config.shortest), np.log(self.config.longest)
        return jax.random.uniform(key, shape, jnp.float32, low, high)


REGISTRY["ema"] = (EMAConfig, EMA)

# %% [markdown]
# That is all. A bad value is refused with its name before anything runs:

# %%
try:
    EMAConfig(longest=-1.0)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Does it keep the contract?
#
# `check_contract` initialises the layer and tries each rule on short rows.

# %%
WIDTH = 32
for rule in check_contract(build(EMAConfig(), WIDTH)):
    print("kept:", rule)

# %% [markdown]
# The rules can fail. This one forgets to reset its state where a new document begins. Training
# would not show it, because rows there begin without a state; the check does:


# %%
class Leaky(EMA):
    def entering(self, state, segments):
        return state.state


try:
    check_contract(Leaky(EMAConfig(), WIDTH))
except ContractError as error:
    print(error)

# %% [markdown]
# ## Training
#
# The name in `layout` is all that a model needs to know. The loop is plain optax; the command line
# and `seqmodels.training.loop.fit` take the same model.

# %%
NUMBERS = ["no", "one", "two", "three", "four", "five", "six"]
NUMBERS += ["seven", "eight", "nine", "ten", "eleven", "twelve"]
lines = [f"{NUMBERS[n]} bottles hang on the wall.\n".encode() for n in range(1, 13)]
order = np.random.default_rng(0).integers(0, 12, 500)
corpus = text.encode([lines[n] for n in order])
batches = iter(text.train_batches(corpus, length=64, batch_size=8))

backbone = BackboneConfig(
    layout=("ema",), mixers=(EMAConfig(),), width=WIDTH, norm="rms", final_norm=True, mlp=64
)
config = LanguageModelConfig(
    backbone, text.VOCABULARY, tie_embeddings=False, embedding_std=WIDTH**-0.5,
    embedding_scale=WIDTH**0.5,
)  # fmt: skip
model = LanguageModel(config)
variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), int))
optimizer = optax.adam(1e-2)


@jax.jit
def step(variables, moments, batch):
    def loss(variables):
        segments = Segments.from_ids(batch["segment_ids"])
        logits, _ = model.apply(variables, batch["inputs"], segments=segments)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    value, gradient = jax.value_and_grad(loss)(variables)
    updates, moments = optimizer.update(gradient, moments)
    return optax.apply_updates(variables, updates), moments, value


moments, losses = optimizer.init(variables), []
for _ in range(150):
    variables, moments, value = step(variables, moments, next(batches))
    losses.append(float(value))

# %%
spans = np.exp(variables["params"]["backbone"]["block_0"]["mixer"]["log_span"])
figure, (one, two) = plt.subplots(1, 2, figsize=(10, 3))
one.plot(losses)
one.set(xlabel="training step", ylabel="loss in nats per token", yscale="log")
one.set_title(f"The moving average learns: {losses[0]:.1f} to {losses[-1]:.2f} nats")
two.hist(spans, bins=np.geomspace(1, 200, 16), edgecolor="white")
two.set(xlabel="span of a channel in tokens", ylabel="channels", xscale="log")
two.set_title("Spans after training")
plt.show()
# %% [markdown]
# ## Packed documents do not see each other
#
# One row holds three documents. We replace the bytes of the second. The outputs of the other two
# are the same to the last bit, although one program computes all of them.

# %%
row = np.concatenate([[text.BOUNDARY, *lines[n]] for n in (2, 6, 10)]).astype(np.int32)
ids = np.repeat([1, 2, 3], [1 + len(lines[n]) for n in (2, 6, 10)]).astype(np.int32)
other = np.where(ids == 2, ord("z"), row)


@jax.jit
def logits_of(variables, tokens, ids):
    return model.apply(variables, tokens, segments=Segments.from_ids(ids))[0]


one, two = (np.asarray(logits_of(variables, t[None], ids[None])[0]) for t in (row, other))
for document in (1, 2, 3):
    here = ids == document
    print(f"document {document}: bit for bit the same: {np.array_equal(one[here], two[here])}")

# %%
figure, axes = plt.subplots(figsize=(9, 2.6))
axes.plot(np.abs(one - two).max(axis=1))
for place in np.flatnonzero(np.diff(ids)) + 0.5:
    axes.axvline(place, color="gray", linestyle="--", linewidth=1)
axes.set(xlabel="token of the row", ylabel="largest change of a logit")
axes.set_title("Changing the second document changes the second document only")
plt.show()
# %% [markdown]
# ## Decoding is the same call
#
# Token by token, with the state carried along, the model computes what it computes for the whole.

# %%
tokens = jnp.asarray(row[ids == 1])[None]
whole, _ = jax.jit(model.apply)(variables, tokens)
one_token = jax.jit(lambda variables, token, state: model.apply(variables, token, state=state))
state, single = model.initial_state(1), []
for t in range(tokens.shape[1]):
    logits, state = one_token(variables, tokens[:, t : t + 1], state)
    single.append(logits)
difference = np.abs(np.concatenate(single, axis=1) - whole).max()
print(f"largest difference of a logit, of {np.abs(whole).max():.0f}: {difference:.1e}")
assert difference < 1e-3

# %%
stop = Sampling(temperature=0, stop_tokens=(text.BOUNDARY,))
prompts = [[text.BOUNDARY, *b"six"], [text.BOUNDARY, *b"eleven bot"]]
for prompt, new in zip(
    prompts, generate(model, variables, prompts, max_new_tokens=40, sampling=stop), strict=True
):
    print(text.decode(prompt + new).decode(), end="")

# %% [markdown]
# ## Which code runs
#
# The layer calls `ops.linear_scan`, which has kernels for TPU and GPU and a portable path.
# `explain` lists what is chosen on each platform, for this model at this length:

# %%
long = jax.ShapeDtypeStruct((2, 4096), jnp.int32)
for choice in explain(model.apply, variables, long):
    print(choice)

# %% [markdown]
# ## Into the repository
#
# A mixer that is to stay goes into `seqmodels/mixers/ema.py` and `REGISTRY`, a case of it into
# `tests/seqmodels/mixers/cases.py`: the tests of all mixers then run on it, with gradients against
# a reference, bfloat16 and carried gradients. See CONTRIBUTING.md.
