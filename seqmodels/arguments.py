"""Checks of arguments before any work; every message names the argument, its value and the rule."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import segments

INT32 = 2**31 - 1
SEED = 2**32 - 1
"""The largest seed: JAX keeps 32 bits of one, and greater ones would repeat smaller ones."""


def known(x: Any) -> bool:
    """Whether the values of ``x`` can be read: it is not traced, and this process has all of it."""
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def integer(name: str, value: Any, least: int, most: int = INT32) -> int:
    """``value`` as an ``int``: of Python, or a concrete scalar of numpy or JAX.

    Raises:
      ValueError: it is no integer, or not from ``least`` to ``most``.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        raise ValueError(f"{name}={shown(value)} must be an integer from {least} to {most}")
    return number


def real(name: str, value: Any) -> float:
    """``value`` as a finite ``float``: of Python, or a concrete scalar of numpy or JAX.

    Raises:
      ValueError: it is no number, or not finite.
    """
    try:
        # A string would be parsed and an array of one entry unpacked.
        scalar = not isinstance(value, str | bytes | bool | np.bool_) and np.ndim(value) == 0
        number = float(value) if scalar else np.nan
    except (TypeError, ValueError, OverflowError):
        number = np.nan
    if not np.isfinite(number):
        raise ValueError(f"{name}={shown(value)} must be a concrete, finite number")
    return number


def floating(name: str, dtype: Any) -> Any:
    """``dtype``, if it is a floating-point one; else ValueError."""
    try:
        good = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"{name}={shown(dtype)} must be a floating-point dtype, such as float32")
    return dtype


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """``value`` as a tuple of ids that are not negative; a sequence or a concrete 1-D array.

    Raises:
      ValueError: it is something else.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{name}={shown(value)} must be a sequence of token ids, such as (0,)")
    if getattr(value, "ndim", 1) != 1:
        raise ValueError(f"{name}={shown(value)} must have one axis, such as (0,)")
    return tuple(integer(f"{name}[{place}]", id, 0) for place, id in enumerate(value))


def token_batch(name: str, tokens: Any, vocabulary_size: int) -> Any:
    """``tokens`` as an integer array ``(B, L)``, all of it in the vocabulary where it is `known`.

    Raises:
      ValueError: it is something else.
    """
    if not isinstance(tokens, jax.Array):
        tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or not tokens.size:
        raise ValueError(
            f"{name} have shape {tokens.shape} and dtype {tokens.dtype}; give integer ids (B, L), "
            "at least one a row"
        )
    if known(tokens):
        in_vocabulary(name, np.asarray(tokens), vocabulary_size)
    return tokens


def in_vocabulary(name: str, ids: np.ndarray, vocabulary_size: int) -> None:
    """Raises ValueError unless all ``ids``, at least one, are in the vocabulary."""
    if not 0 <= ids.min() <= ids.max() < vocabulary_size:
        raise ValueError(
            f"{name} has ids from {ids.min()} to {ids.max()}; the vocabulary has ids from 0 to "
            f"{vocabulary_size - 1}"
        )


def segment_order(ids: Any, single: bool) -> None:
    """Checks segment ids; their values only where they are `known`.

    Args:
      ids: ``(B, L)`` integers; 0 is padding.
      single: whether a row holds one document and padding.

    Raises:
      ValueError: what ``segments.check`` refuses, or several documents in a row
        that is ``single``.
    """
    if not known(ids):
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"segment_ids must be integers of shape (B, L), got {ids.dtype} {ids.shape}"
            )
        return
    ids = np.asarray(ids)
    segments.check(ids)
    several = (ids[:, 1:] != ids[:, :1]) & (ids[:, 1:] != 0)
    if single and several.any():
        row, token = np.argwhere(several)[0]
        raise ValueError(
            f"segment_ids must name one document a row here, but row {row} has another at token "
            f"{token + 1}; give it a row of its own"
        )


def prompt_rows(prompts: Any, attention_mask: Any, vocabulary_size: int) -> list[np.ndarray]:
    """The token ids of each prompt, one ``(n,)`` integer array a prompt, without padding.

    Args:
      prompts: a sequence of sequences of ids, or an integer array ``(B, L)``.
      attention_mask: None, or as ``prompts``: 1 on real tokens and 0 on padding, which may stand
        before them, behind them or both.
      vocabulary_size: real tokens are below it.

    Raises:
      ValueError: something else, no prompt, one without tokens, padding among its tokens, or ids
        outside the vocabulary.
    """
    rows = _rows("prompts", prompts, "iu")
    if not rows:
        raise ValueError("prompts is empty; give at least one list of token ids")
    if attention_mask is not None:
        masks = _rows("attention_mask", attention_mask, "iub")
        if len(masks) != len(rows):
            raise ValueError(f"attention_mask has {len(masks)} rows, prompts has {len(rows)}")
        pairs = enumerate(zip(rows, masks, strict=True))
        rows = [row[_real_tokens(place, row, mask)] for place, (row, mask) in pairs]
    for place, row in enumerate(rows):
        if not row.size:
            raise ValueError(f"prompts[{place}] is empty; begin it with a start token")
        in_vocabulary(f"prompts[{place}]", row, vocabulary_size)
    return rows


def _rows(name: str, value: Any, kinds: str) -> list[np.ndarray]:
    """The rows of a 2-D array or of a sequence of sequences, of these kinds of dtype."""
    if isinstance(value, Mapping):
        raise ValueError(
            f"{name} is a mapping; give its arrays, prompts=tokens['input_ids'] and "
            "attention_mask=tokens['attention_mask']"
        )
    if hasattr(value, "ndim"):
        value = np.asarray(value)
    sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not sequence and getattr(value, "ndim", 0) != 2:
        raise ValueError(
            f"{name}={shown(value)} must be a list of lists of integers, or an integer array (B, L)"
        )
    return [_row(f"{name}[{place}]", row, kinds) for place, row in enumerate(value)]


def _row(name: str, value: Any, kinds: str) -> np.ndarray:
    try:
        row = np.asarray(value)
    except ValueError:  # rows within the row
        row = np.zeros((0, 0))
    if row.shape == (0,):
        return row.astype(np.int32)
    if row.ndim != 1 or row.dtype.kind not in kinds:
        raise ValueError(f"{name}={shown(value)} must be a list of integers below 2**63")
    return row


def _real_tokens(place: int, row: np.ndarray, mask: np.ndarray) -> slice:
    name = f"attention_mask[{place}]"
    if mask.shape != row.shape:
        raise ValueError(f"{name} has {mask.size} entries, prompts[{place}] has {row.size} tokens")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(f"{name}={shown(mask)} must be 1 on real tokens and 0 on padding")
    places = np.flatnonzero(mask)
    if not places.size:
        raise ValueError(f"{name} has no real token; begin the prompt with a start token")
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 != places.size:
        hole = first + int(np.argmin(mask[first:]))
        raise ValueError(
            f"{name} has padding among the real tokens, at token {hole}; padding may stand before "
            "or behind them"
        )
    return slice(first, last + 1)


def shown(value: Any) -> str:
    """``repr(value)`` in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
