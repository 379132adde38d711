"""config.json: every field is read, known to change no logit, or refused with the reason."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Kind = TypeVar("Kind", int, float, bool, str, list, dict)

_MISSING = object()
_FLOAT = "__float__"  # transformers' mark of a number that JSON has no form for

WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "where the files come from and which class opens them": (
        "_commit_hash", "_name_or_path", "architectures", "auto_map", "custom_pipelines",
        "model_type", "name_or_path", "processor_class", "tokenizer_class",
        "transformers_version", "unsloth_fixed", "unsloth_version",
    ),
    "how tensors are stored, which their own files say": ("dtype", "torch_dtype"),
    "what becomes of tokens and logits outside the model": (
        "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id",
        "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
        "eos_token_id", "exponential_decay_length_penalty", "forced_bos_token_id",
        "forced_eos_token_id", "is_decoder", "length_penalty", "max_length",
        "max_position_embeddings", "max_sequence_length", "min_length", "model_max_length",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
        "pad_token_id", "prefix", "remove_invalid_values", "repetition_penalty", "sep_token_id",
        "suppress_tokens", "task_specific_params", "temperature", "top_k", "top_p", "typical_p",
        "unk_token_id",
    ),
    "what else a call returns or keeps": (
        "output_attentions", "output_hidden_states", "output_scores", "return_dict",
        "return_dict_in_generate", "torchscript", "use_cache", "use_return_dict",
    ),
    "which code computes the same": (
        "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled",
        "attn_implementation", "chunk_size_feed_forward",
    ),
    "initial values and training": ("gradient_checkpointing", "initializer_range"),
    "heads of classifiers": (
        "finetuning_task", "id2label", "label2id", "num_labels", "problem_type",
    ),
}  # fmt: skip
"""Reason -> fields of any model that change neither its parameters nor its logits."""

_REASONS = {
    "quantization_config": "quantized tensors are not read; call `model.dequantize()` and "
    "`save_pretrained` in transformers and load what it writes",
}
"""Why a field is refused that any model may have."""


class Fields:
    """The fields of one config.json, from which a family takes those it knows."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source
        self.taken: set[str] = {name for names in WITHOUT_EFFECT.values() for name in names}

    def take(self, name: str, kind: type[Kind], default: Any = _MISSING) -> Any:
        """The field called ``name``, or ``default``; ValueError if it is not of ``kind``."""
        self.taken.add(name)
        value = self.values.get(name, default)
        if value is _MISSING:
            raise ValueError(f"{self.source}: the field {name!r} is missing")
        if value is default:
            return value
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{self.source}: {name}={value!r} is not a {kind.__name__}")
        return value

    def take_size(self, name: str) -> int | None:
        """The whole number called ``name``; None where it is absent or "auto"."""
        self.taken.add(name)
        return None if self.values.get(name, "auto") == "auto" else self.take(name, int)

    def require(self, name: str, only: Any, *, same: tuple[Any, ...] = ()) -> None:
        """Refuses any value but ``only``, and what is the ``same``, for a field that may be absent.

        Args:
          name: of the field.
          only: the value that is supported.
          same: other spellings of it.
        """
        self.taken.add(name)
        if name in self.values and self.values[name] not in (only, *same):
            raise ValueError(
                f"{self.source}: {name}={self.values[name]!r} is not supported, only {only!r} is"
            )

    def ignore(self, *names: str) -> None:
        """Declares fields that this family has and that change no logit."""
        self.taken.update(names)

    def finish(self) -> None:
        """Raises ValueError for fields that nobody took, unless they are off or empty."""
        unknown = {
            name: value
            for name, value in self.values.items()
            if name not in self.taken and value not in (None, False, [], {}, "")
        }
        for name in unknown:
            if name in _REASONS:
                raise ValueError(f"{self.source}: {name} is not supported: {_REASONS[name]}")
        if unknown:
            name, value = next(iter(unknown.items()))
            raise ValueError(
                f"{self.source}: {name}={value!r} is not supported"
                + (f"; nor are {', '.join(list(unknown)[1:])}" if len(unknown) > 1 else "")
                + "; remove from the file what changes no logit"
            )

    def checked(self, build: Callable[[], Any]) -> Any:
        """What ``build`` makes of the fields; its ValueError names the file too."""
        try:
            return build()
        except ValueError as error:
            if str(error).startswith(self.source):
                raise
            raise ValueError(f"{self.source}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; infinities as transformers writes them, or bare, are floats.

    Raises:
      ValueError: no such file, not an object, not JSON, or a NaN in it.
    """
    try:
        value = parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def parsed(text: str) -> Any:
    """The value of a JSON text, read as `read_json` does; ValueError for what is none."""
    return json.loads(text, parse_constant=_number, object_hook=_decoded)


def json_text(values: Mapping[str, Any]) -> str:
    """JSON that `read_json` gives back, infinities as transformers 5 writes them.

    Raises:
      ValueError: a NaN.
    """
    return json.dumps(_encoded(values), indent=2, allow_nan=False) + "\n"


def _number(name: str) -> float:
    value = float(name)
    if math.isnan(value):
        raise ValueError("it holds a NaN")
    return value


def _decoded(values: dict[str, Any]) -> Any:
    if set(values) == {_FLOAT} and isinstance(values[_FLOAT], str):
        return _number(values[_FLOAT])
    return values


def _encoded(value: Any) -> Any:
    if isinstance(value, float) and math.isinf(value):
        return {_FLOAT: "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        return {key: _encoded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(part) for part in value]
    return value
