# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour of the mixers
#
# You will see what the layers of this library do to a sequence, in pictures: what a token still
# counts for many tokens later, convolution kernels and the eigenvalues behind them, the "attention
# maps" of layers without attention, the bytes of state that each carries, and one thing that most
# of them cannot do. Nothing is trained. It takes about 20 seconds on one CPU core.
#
# All of them map $x \in \mathbb{R}^{L \times D}$ to $y \in \mathbb{R}^{L \times D}$, and $y_t$
# depends on $x_1, \ldots, x_t$ only. Attention keeps all of the past; the others keep a state:
#
# $$S_t = A_t\, S_{t-1} + \text{(what token } t \text{ writes)}, \qquad
# y_t = \text{read}(S_t, x_t).$$
#
# They differ in $A_t$, the *decay* or *transition*: constant or chosen by the token; a number, a
# diagonal or a matrix. That is what this tour is about.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from pallas_kernels import delta_rule, linear_attention, linear_scan
from seqmodels.mixers import REGISTRY, build

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.constrained_layout.use": True, "font.size": 10})
print(", ".join(REGISTRY))

# %% [markdown]
# ## What a token still counts for
#
# Two rows of random tokens that differ in the first token only go through one layer, as
# initialised. How much their outputs differ after $t$ tokens is how much of that token is left.

# %%
LENGTH, WIDTH = 256, 32
SETTINGS = {
    "attention": {"heads": 2},
    "retnet": {"heads": 2},
    "lru": {"state_size": 64},
    "rg_lru": {"heads": 2},
    "gla": {"heads": 2, "init_std": WIDTH**-0.5},
    "mamba2": {"state_size": 16, "head_size": 16},
}


def layer(name, width=WIDTH, **settings):
    """A mixer of the registry."""
    return build(REGISTRY[name][0](**settings), width)


@jax.jit(static_argnums=0)
def initialised(mixer, x):
    """Outputs of a mixer with its initial parameters, and these."""
    (y, _), params = mixer.init_with_output(jax.random.key(0), x)
    return y, params["params"]


x = jax.random.normal(jax.random.key(1), (LENGTH, WIDTH))
rows = jnp.stack([x, x.at[0].set(jax.random.normal(jax.random.key(2), (WIDTH,)))])
left = {}
for name, settings in SETTINGS.items():
    y, _ = initialised(layer(name, **settings), rows)
    difference = jnp.linalg.norm(y[0] - y[1], axis=-1)
    left[name] = difference / difference[0]

# %%
figure, axes = plt.subplots(figsize=(9, 4.2))
smooth = np.ones(9) / 9
for number, (name, values) in enumerate(left.items()):
    style = ("-", "--")[number % 2]
    values = np.convolve(np.asarray(values), smooth, mode="valid")
    axes.loglog(np.arange(1, len(values) + 1), values, style, label=name)
axes.set(xlabel="tokens since", ylabel="difference of the outputs, from 1", ylim=(1e-6, 2))
axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left")
axes.set_title("What is left of the first token, at initialisation (mean of 9 tokens)")
plt.show()
# %% [markdown]
# ## Constant decays: a recurrence is a convolution
#
# In S4D, S5 and the LRU the decays are learned but do not depend on the token. Such a layer is
# linear and the same at every position, so it is a convolution with its *impulse response*
# $K_j = 2\,\mathrm{Re} \sum_n C_n B_n \lambda_n^j$. The eigenvalues $\lambda$ are in the unit disc:
# the radius says how long a state lasts (it is halved after $\ln 2 / -\ln|\lambda|$ tokens), the
# angle at which frequency it turns.

# %%
systems = {
    "s4d": layer("s4d", width=8, state_size=32),
    "s5": layer("s5", width=8, state_size=64),
    "lru": layer("lru", width=8, state_size=64),
}
u = jax.random.normal(jax.random.key(3), (200, 8))
inputs = jnp.stack([u, jnp.zeros_like(u).at[0].set(1.0)])  # a row of noise, and an impulse
outputs, parameters = {}, {}
for name, mixer in systems.items():
    outputs[name], parameters[name] = jax.tree.map(np.asarray, initialised(mixer, inputs))


def eigenvalues(name, p):
    """Decays per token, complex, by the definition of each layer."""
    if name == "lru":
        return np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    if name == "s5":
        return np.exp((p["Lambda_re"] + 1j * p["Lambda_im"]) * np.exp(p["log_step"]))
    continuous = -np.exp(p["log_A_real"]) + 1j * p["A_imag"]
    return np.exp(continuous * np.exp(p["log_dt"])[:, None])


figure, plots = plt.subplots(1, 3, figsize=(10, 3.6), sharey=True)
turn = np.exp(1j * np.linspace(0, 2 * np.pi, 200))
for axes, name in zip(plots, systems, strict=True):
    values = np.ravel(eigenvalues(name, parameters[name]))
    values = np.concatenate([values, values.conj()])
    axes.plot(turn.real, turn.imag, color="gray", linewidth=0.8)
    axes.scatter(values.real, values.imag, s=8)
    axes.set(xlabel="real part", aspect="equal", title=f"{name}: |λ| from {abs(values).min():.3f}")
plots[0].set_ylabel("imaginary part")
figure.suptitle("Eigenvalues at initialisation, in the unit circle")
plt.show()
# %%
figure, plots = plt.subplots(1, 3, figsize=(10, 2.8))
kernels = {}
for axes, name in zip(plots, systems, strict=True):
    kernels[name] = outputs[name][1].copy()
    kernels[name][0] -= parameters[name]["D"]  # the skip connection is no part of it
    axes.plot(kernels[name][:, :3], linewidth=1)
    axes.set(xlabel="tokens since the impulse", title=name)
plots[0].set_ylabel("output")
figure.suptitle("Impulse responses of three channels: these are the layers' convolution kernels")
plt.show()
# %% [markdown]
# The claim holds to rounding. S4D convolves each channel by itself:

# %%
kernel, skip = kernels["s4d"], parameters["s4d"]["D"]
convolved = np.stack([np.convolve(u[:, d], kernel[:, d])[:200] for d in range(8)], axis=1)
error = np.abs(outputs["s4d"][0] - (convolved + skip * u)).max()
print(f"largest difference between layer and convolution: {error:.1e}")
assert error < 1e-4

# %% [markdown]
# ## Maps of linear layers
#
# Linear attention, and all its descendants, keeps a matrix that is written with keys and values and
# read with queries: $S_t = S_{t-1} + k_t v_t^\top$, $y_t = S_t^\top q_t$. Given queries and keys it
# is linear in the values, $y = M v$, and $M_{ts}$ is what attention would call the weight of token
# $s$ for token $t$. To see $M$, let the values be the identity matrix.
#
# The 24 tokens below are of four kinds, A to D, with one-hot queries. The key of a token is the
# kind of the token *before* it: so a token reads what came after earlier tokens of its own kind,
# which is what predicts the next one in a text that repeats itself.

# %%
L = 24
tokens = np.random.default_rng(3).integers(0, 4, L)
one_hot = np.eye(16, dtype=np.float32)[tokens]
queries = one_hot[None, :, None]  # (1, L, 1, 16)
keys = np.concatenate([np.zeros((1, 16), np.float32), one_hot[:-1]])[None, :, None]
by_token = np.where(tokens == 0, np.log(0.2), np.log(0.97)).astype(np.float32)  # an A forgets


@jax.jit
def maps(q, k, by_token):
    """Name -> weights (L, L)."""
    v = jnp.eye(L)[None, :, None]  # (1, L, 1, L)
    scores = jnp.where(np.tri(L, dtype=bool), 6.0 * q[0, :, 0] @ k[0, :, 0].T, -jnp.inf)
    constant = jnp.log(jnp.array([0.9]))
    found = {
        "linear attention": linear_attention(q, k, v, scale=1.0),
        "constant decay (RetNet)": linear_attention(q, k, v, constant, scale=1.0),
        "decay by token (Mamba-2)": linear_attention(q, k, v, by_token[None, :, None], scale=1.0),
        "delta rule (DeltaNet)": delta_rule(q, k, v, jnp.ones((1, L, 1)), scale=1.0),
    }
    softmax = {"softmax attention": jax.nn.softmax(scores, axis=-1)}
    return softmax | {name: o[0, :, 0] for name, (o, _) in found.items()}


names = ("softmax attention", "linear attention", "constant decay (RetNet)",
         "decay by token (Mamba-2)", "delta rule (DeltaNet)")  # fmt: skip
found = jax.tree.map(np.asarray, maps(queries, keys, by_token))
figure, plots = plt.subplots(1, 5, figsize=(13, 3.3), sharey=True)
letters = ["ABCD"[kind] for kind in tokens]
for axes, name in zip(plots, names, strict=True):
    image = axes.imshow(found[name], cmap="cividis", vmin=0, vmax=1)
    axes.set_xticks(range(L), letters, fontsize=6)
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("token s")
plots[0].set_yticks(range(L), letters, fontsize=6)
plots[0].set_ylabel("token t")
figure.colorbar(image, ax=plots, label="weight", shrink=0.8)
plt.show()
# %% [markdown]
# Softmax shares one unit of weight, most of it among the tokens that match. Linear attention adds
# the matches up, so that what it reads grows with every repetition. A constant decay forgets with
# distance. In the fourth, every A wipes out most of what came before it. The delta rule first takes
# away what the state holds under the key: only the *latest* match is left, as in a dictionary.

# %%
before = np.concatenate([[-1], tokens[:-1]])
matches = [[s for s in range(t + 1) if before[s] == tokens[t]] for t in range(L)]
delta = found["delta rule (DeltaNet)"]
latest = all(delta[t].argmax() == m[-1] for t, m in enumerate(matches) if m)
print("the delta rule reads the latest match alone:", latest)
print("weights of the last token, summed:")
for name in names:
    print(f"  {name}: {found[name][-1].sum():.2f}")

# %% [markdown]
# ## What it costs: bytes of state
#
# Every mixer says how many bytes one row carries after $L$ tokens, at width 256 with its default
# settings. Lines that go up are caches: memory, and time for each token, grow with the context.

# %%
contexts = 2 ** np.arange(6, 18)
sizes = {}
for name, (kind, _) in REGISTRY.items():
    fields = kind.__dataclass_fields__
    settings = {"heads": 4, "head_size": 64, "max_positions": 2**17}
    config = kind(**{k: v for k, v in settings.items() if k in fields})
    if config.stateful:
        sizes[name] = [build(config, 256).state_bytes(int(length)) for length in contexts]

growing = {name: values for name, values in sizes.items() if values[0] < values[-1]}
constant = sorted((values[0], name) for name, values in sizes.items() if name not in growing)
figure, (one, two) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1, 1.1))
for number, (name, values) in enumerate(growing.items()):
    one.loglog(contexts, values, ("-", "--", "-.", ":")[number % 4], label=name, base=2)
one.set_yscale("log", base=10)
one.set(xlabel="tokens of context", ylabel="bytes of state of a row", title="Growing caches")
one.legend()
two.barh([name for _, name in constant], [size for size, _ in constant])
two.set(xscale="log", xlabel="bytes of state of a row", title="The same after any number of tokens")
two.grid(axis="x", alpha=0.3)
plt.show()
# %% [markdown]
# ## What most cannot do: parity
#
# Is the number of ones so far even or odd? One bit of state is enough, if a one may *flip* it:
# $h_t = (-1)^{x_t} h_{t-1}$. Decays between 0 and 1, of whatever kind, cannot change a sign, and
# after many ones they have decayed away. The delta rule's transition $I - \beta_t k_t k_t^\top$ has
# the eigenvalue $1 - \beta_t$: with $\beta$ up to 2 (`negative_eigenvalues=True`) it reaches -1, a
# reflection. (Merrill et al. 2024; Grazzi et al. 2024.)

# %%
bits = np.random.default_rng(4).integers(0, 2, 400)
parity = 1.0 - 2.0 * (np.cumsum(bits) % 2)  # 1 for even, -1 for odd


@jax.jit
def scanned(decays):
    return linear_scan(decays, jnp.zeros_like(decays), initial_state=jnp.ones((1, 1)))[0][0, :, 0]


@jax.jit
def reflected(beta):
    key = jnp.ones((1, 400, 1, 1))
    start = jnp.ones((1, 1, 1, 1))
    o, _ = delta_rule(key, key, jnp.zeros_like(key), beta, scale=1.0, initial_state=start)
    return o[0, :, 0, 0]


ones = bits.astype(np.float32)[None, :, None]
states = {
    "decay 0.9 at a one": scanned(1.0 - 0.1 * ones),
    "decay -1 at a one": scanned(1.0 - 2.0 * ones),
    "delta rule, β = 2 at a one": reflected(2.0 * ones),
}
figure, plots = plt.subplots(3, 1, figsize=(9, 3.8), sharex=True)
for axes, (name, values) in zip(plots, states.items(), strict=True):
    axes.step(range(60), parity[:60], color="lightgray", linewidth=4, label="parity")
    axes.step(range(60), values[:60], label=name)
    axes.set(ylim=(-1.4, 1.4), yticks=(-1, 0, 1), ylabel="state")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    print(f"{name}: sign right at {np.mean(np.sign(values) == parity):.0%} of 400 tokens")
axes.set_xlabel("token")
plots[0].set_title("A state that may change sign tracks parity")
plt.show()
# %%
able = [
    n for n, (kind, _) in REGISTRY.items() if "negative_eigenvalues" in kind.__dataclass_fields__
]
print("negative_eigenvalues can be set in:", ", ".join(able))

# %% [markdown]
# Whether training finds such a solution is another question: `seqmodels recall train
# --task parity --mixer deltanet-negative` tries it, and `--task a5` a harder group.
#
# ## Next
#
# - [Write your own mixer](own_mixer.ipynb), in 60 lines.
# - [How one kernel works](kernel.ipynb): the recurrence on a TPU.
