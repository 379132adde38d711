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
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.common import dispatch
from seqmodels.arguments import (
    INT32,
    SEED,
    floating,
    integer,
    prompt_rows,
    real,
    segment_order,
    shown,
    token_batch,
    token_ids,
)
from seqmodels.mixers import Segments, State
from seqmodels.models.language import LanguageModel

Scalar = np.number | np.ndarray | Array
LEAST_TEMPERATURE = 1e-6
"""Divided by less, logits of a usual size may leave float32."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Concrete scalars and arrays of numpy and JAX become Python's numbers: a ``Sampling`` is hashed.

    Attributes:
      temperature: 0 takes the most likely token; else logits are divided by it, 1e-6 or more.
      top_k: None, or only the k most likely tokens stay.
      top_p: None, or only the fewest most likely tokens whose probabilities reach it stay.
      stop_tokens: ids that end a row; they are part of the output.

    Raises:
      ValueError: a value of another type or out of its range.
    """

    temperature: float | int | Scalar = 1.0
    top_k: int | Scalar | None = None
    top_p: float | int | Scalar | None = None
    stop_tokens: Sequence[int] | np.ndarray | Array = ()

    def __post_init__(self) -> None:
        temperature = real("temperature", self.temperature)
        if temperature != 0 and temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature={temperature} must be 0, for the most likely token, or at least "
                f"{LEAST_TEMPERATURE}"
            )
        top_k = None if self.top_k is None else integer("top_k", self.top_k, 1)
        top_p = None if self.top_p is None else real("top_p", self.top_p)
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} must be None or in (0, 1]")
        stop_tokens = token_ids("stop_tokens", self.stop_tokens)
        for name, value in {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "stop_tokens": stop_tokens,
        }.items():  # fmt: skip
            object.__setattr__(self, name, value)


def sample(logits: Float[Array, "b v"], key: Array, sampling: Sampling) -> Int[Array, " b"]:
    """One token a row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / float(sampling.temperature)
    lowest = jnp.finfo(logits.dtype).min  # of tokens that are out; finite, as any mark is
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, min(int(sampling.top_k), logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= least, logits, lowest)
    if sampling.top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays if those before it do not reach top_p yet; the first always stays.
        stays = jnp.cumsum(probabilities, axis=-1) - probabilities < float(sampling.top_p)
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

    Raises:
      ValueError: a size that is not positive, a ``dtype`` that is not floating-point, or a model
        that does not stream.
    """
    batch_size = integer("batch_size", batch_size, 1)
    max_length = None if max_length is None else integer("max_length", max_length, 1)
    dtype = floating("dtype", dtype)
    state = model.initial_state(batch_size, max_length=max_length, dtype=dtype)
    return Stream(state, jnp.zeros((batch_size, model.config.vocabulary_size), jnp.float32))


def feed(
    model: LanguageModel,
    variables: Any,
    stream: Stream,
    tokens: Shaped[Array | np.ndarray, "..."],
    segment_ids: Shaped[Array | np.ndarray, "..."] | None = None,
) -> Stream:
    """The stream after more tokens: chunk by chunk for input without end.

    Values are checked where they are at hand, in numpy arrays and in JAX arrays outside of jit;
    the check waits for these. Models whose caches grow end at their stream's ``max_length``; others
    do not, see ``seqmodels.layers.positions`` for what is counted.

    Args:
      model: the model.
      variables: its parameters.
      stream: from ``start`` or an earlier call.
      tokens: the next tokens of every row, integers ``(B, L)``.
      segment_ids: integers ``(B, L)``, 1 on real tokens, 0 on padding at a row's end; None for no
        padding.

    Raises:
      ValueError: no integers ``(B, L)``, a batch that is not the stream's, tokens outside the
        vocabulary (padding included), or padding before a real token.
    """
    tokens = token_batch("tokens", tokens, model.config.vocabulary_size)
    rows = stream.logits.shape[0]
    if tokens.shape[0] != rows:
        raise ValueError(f"tokens have {tokens.shape[0]} rows, the stream has {rows}")
    ids = None
    if segment_ids is not None:
        segment_order(segment_ids, single=True)
        ids = jnp.asarray(segment_ids, jnp.int32)
        if ids.shape != tokens.shape:
            raise ValueError(f"segment_ids have shape {ids.shape}, tokens have {tokens.shape}")
    with dispatch.where(variables):
        return _feed(model, variables, stream, jnp.asarray(tokens, jnp.int32), ids)


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
      ValueError: ``max_new_tokens`` is not a positive integer, ``key`` is no key, or a stop token
        is outside the vocabulary.
    """
    count = integer("max_new_tokens", max_new_tokens, 1)
    check_sampling(sampling, model.config.vocabulary_size)
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
        raise ValueError(f"key={shown(key)} must be a key, such as jax.random.key(0)")
    with dispatch.where(variables):
        return _decode(model, count, sampling, variables, stream, key)


def check_sampling(sampling: Sampling, vocabulary_size: int) -> None:
    """Raises ValueError unless ``sampling`` is one, with stop tokens that the vocabulary has."""
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling={shown(sampling)} must be a Sampling(...)")
    for place, token in enumerate(sampling.stop_tokens):
        if token >= vocabulary_size:
            raise ValueError(
                f"stop_tokens[{place}]={token} is outside the vocabulary, whose ids are from 0 to "
                f"{vocabulary_size - 1}"
            )


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
    prompts: Sequence[Any] | Shaped[Array | np.ndarray, "..."],
    *,
    attention_mask: Sequence[Any] | Shaped[Array | np.ndarray, "..."] | None = None,
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
      prompts: token ids, at least one a prompt; lists or arrays of any lengths, or an integer array
        ``(B, L)``, such as the ``input_ids`` of a tokenizer of transformers.
      attention_mask: None, all of ``prompts`` are real tokens; or as ``prompts``, 1 on real tokens
        and 0 on padding, on either side. The padding is taken away: results are those of the
        prompts without it.
      max_new_tokens: at most so many tokens for each prompt.
      sampling: how tokens are drawn.
      seed: of the draws, from 0 to 2**32 - 1.
      chunk: prompts are read in chunks of so many tokens, so that memory does not grow with them.
      dtype: of cached activations, if any.

    Raises:
      ValueError: no prompt, an empty one, padding among its tokens, ids or stop tokens that are no
        integers or outside the vocabulary, or another argument out of its range.
    """
    rows = prompt_rows(prompts, attention_mask, model.config.vocabulary_size)
    check_sampling(sampling, model.config.vocabulary_size)
    longest = max(map(len, rows))
    max_new_tokens = integer("max_new_tokens", max_new_tokens, 1, INT32 - longest)
    seed = integer("seed", seed, 0, SEED)
    chunk = min(integer("chunk", chunk, 1), longest)
    stream = start(model, len(rows), max_length=longest + max_new_tokens, dtype=dtype)
    width = -(-longest // chunk) * chunk
    tokens, ids = (np.zeros((len(rows), width), np.int32) for _ in range(2))
    for row, prompt in enumerate(rows):
        tokens[row, : len(prompt)], ids[row, : len(prompt)] = prompt, 1
    for at in range(0, width, chunk):
        part = slice(at, at + chunk)
        stream = feed(model, variables, stream, tokens[:, part], ids[:, part])
    new, lengths, _ = decode(
        model, variables, stream, jax.random.key(seed),
        max_new_tokens=max_new_tokens, sampling=sampling,
    )  # fmt: skip
    pairs = zip(np.asarray(new), np.asarray(lengths), strict=True)
    return [row[:length].tolist() for row, length in pairs]
