"""Text generation: prefill in chunks, a compiled decoding loop, and streams without end.

States are all that is carried: a model of recurrent mixers needs the same memory and time for each
token, however long the context is.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seqmodels.mixers import Segments, State
from seqmodels.models.language import LanguageModel


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
      temperature: 0 takes the most likely token; else logits are divided by it.
      top_k: None, or only the k most likely tokens stay.
      top_p: None, or only the fewest most likely tokens whose probabilities reach it stay.
      stop_tokens: ids that end a row; they are part of the output.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"Sampling: temperature={self.temperature} must not be negative")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"Sampling: top_k={self.top_k} must be None or positive")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p={self.top_p} must be None or in (0, 1]")


def sample(logits: Float[Array, "b v"], key: Array, sampling: Sampling) -> Int[Array, " b"]:
    """One token a row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    lowest = jnp.finfo(logits.dtype).min  # of tokens that are out; finite, as any mark is
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= least, logits, lowest)
    if sampling.top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays if those before it do not reach top_p yet; the first always stays.
        stays = jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p
        least = jnp.min(jnp.where(stays, ordered, -lowest), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, lowest)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


@flax.struct.dataclass
class Stream:
    """Where a batch of texts stands.

    Attributes:
      state: of the model.
      logits: ``(B, V)`` float32, of the token after the last real one; zeros before the first.
    """

    state: Any
    logits: Any


def start(
    model: LanguageModel,
    batch_size: int,
    *,
    max_length: int | None = None,
    dtype: Any = jnp.bfloat16,
) -> Stream:
    """A stream before its first token.

    Args:
      model: the model.
      batch_size: rows.
      max_length: tokens that models with a growing cache make room for; others ignore it.
      dtype: of cached activations, if any.
    """
    state = model.initial_state(batch_size, max_length=max_length, dtype=dtype)
    return Stream(state, jnp.zeros((batch_size, model.config.vocabulary_size), jnp.float32))


def feed(
    model: LanguageModel,
    variables: Any,
    stream: Stream,
    tokens: Int[Array | np.ndarray, "b l"],
    segment_ids: Int[Array | np.ndarray, "b l"] | None = None,
) -> Stream:
    """The stream after more tokens: chunk by chunk for input without end.

    Models whose caches grow end at their stream's ``max_length``; others do not, see
    ``seqmodels.layers.positions`` for what is counted.

    Args:
      model: the model.
      variables: its parameters.
      stream: from ``start`` or an earlier call.
      tokens: the next tokens of every row.
      segment_ids: 1 on real tokens, 0 on padding at a row's end; None for no padding.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    ids = None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    return _feed(model, variables, stream, tokens, ids)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _feed(model: LanguageModel, variables: Any, stream: Stream, tokens: Array, ids: Any) -> Stream:
    segments = None if ids is None else Segments.from_ids(ids, single=True)

    def last(model: LanguageModel) -> tuple[Array, tuple[State, ...]]:
        x, state = model.hidden(tokens, segments=segments, state=stream.state)
        if segments is None:
            return model.logits(x[:, -1]), state
        place = jnp.maximum(segments.lengths - 1, 0)
        logits = model.logits(jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0])
        return jnp.where(segments.lengths[:, None] > 0, logits, stream.logits), state

    logits, state = model.apply(variables, method=last)
    return Stream(state, logits)


def decode(
    model: LanguageModel,
    variables: Any,
    stream: Stream,
    key: Array,
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> tuple[Int[Array, "b n"], Int[Array, " b"], Stream]:
    """``(tokens, lengths, stream)``: continues every row until it stops, in one compiled loop.

    ``tokens (B, max_new_tokens)`` is 0 behind a row's ``lengths``. The loop ends with the last row.
    The stream has been fed all tokens but those behind a stop.

    Raises:
      ValueError: ``max_new_tokens`` is not positive.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be positive")
    return _decode(model, max_new_tokens, sampling, variables, stream, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _decode(model, count, sampling, variables, stream, key):
    batch = stream.logits.shape[0]
    stops = jnp.asarray(sampling.stop_tokens, jnp.int32)

    def going(carry):
        step, _, _, done, _ = carry
        return (step < count) & ~jnp.all(done)

    def body(carry):
        step, tokens, lengths, done, stream = carry
        token = sample(stream.logits, jax.random.fold_in(key, step), sampling)
        token = jnp.where(done, 0, token)
        tokens = tokens.at[:, step].set(token)
        lengths = lengths + ~done
        # A row that is done is padding: its state stays.
        ids = (~done).astype(jnp.int32)[:, None]
        stream = _feed(model, variables, stream, token[:, None], ids if stops.size else None)
        done = done | jnp.any(token[:, None] == stops[None], axis=1)
        return step + 1, tokens, lengths, done, stream

    zeros = jnp.zeros((batch,), jnp.int32)
    tokens = jnp.zeros((batch, count), jnp.int32)
    carry = (jnp.zeros((), jnp.int32), tokens, zeros, zeros > 0, stream)
    _, tokens, lengths, _, stream = jax.lax.while_loop(going, body, carry)
    return tokens, lengths, stream


def generate(
    model: LanguageModel,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    chunk: int = 512,
    dtype: Any = jnp.float32,
) -> list[list[int]]:
    """Continuations of prompts of any lengths, without the prompts.

    Args:
      model: the model.
      variables: its parameters.
      prompts: token ids, at least one a prompt.
      max_new_tokens: at most so many tokens for each prompt.
      sampling: how tokens are drawn.
      seed: of the draws.
      chunk: prompts are read in chunks of so many tokens, so that memory does not grow with them.
      dtype: of cached activations, if any.

    Raises:
      ValueError: no prompt, an empty one, ids outside the vocabulary, or a size that is not
        positive.
    """
    check_prompts(prompts, model.config.vocabulary_size)
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be positive")
    longest = max(map(len, prompts))
    stream = start(model, len(prompts), max_length=longest + max_new_tokens, dtype=dtype)
    chunk = min(chunk, longest)
    width = -(-longest // chunk) * chunk
    tokens, ids = (np.zeros((len(prompts), width), np.int32) for _ in range(2))
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], ids[row, : len(prompt)] = prompt, 1
    for at in range(0, width, chunk):
        part = slice(at, at + chunk)
        stream = feed(model, variables, stream, tokens[:, part], ids[:, part])
    new, lengths, _ = decode(
        model, variables, stream, jax.random.key(seed),
        max_new_tokens=max_new_tokens, sampling=sampling,
    )  # fmt: skip
    rows = zip(np.asarray(new), np.asarray(lengths), strict=True)
    return [row[:length].tolist() for row, length in rows]


def check_prompts(prompts: Sequence[Sequence[int]], vocabulary_size: int) -> None:
    """Raises ValueError unless every prompt has tokens, all of them in the vocabulary."""
    if not prompts:
        raise ValueError("prompts is empty; give at least one list of token ids")
    for place, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{place}] is empty; begin it with a start token")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary_size:
            raise ValueError(
                f"prompts[{place}] has ids from {min(prompt)} to {max(prompt)}; the vocabulary "
                f"has ids from 0 to {vocabulary_size - 1}"
            )
