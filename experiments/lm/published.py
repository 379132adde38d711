"""A published checkpoint and its tokenizer."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from seqmodels.interop.fields import parsed
from seqmodels.interop.huggingface import load
from seqmodels.interop.origin import LoadedLanguageModel
from seqmodels.models.language import LanguageModel

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Published:
    """A model from a folder of transformers', with what its text is made of.

    Attributes:
      model, variables: for `seqmodels.generation`.
      tokenizer: a `tokenizers.Tokenizer`.
      stop_tokens: ids that end a text, by generation_config.json or else config.json.
      first_token: the id that a text begins with, None if neither file says.
    """

    model: LanguageModel
    variables: dict[str, Any]
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    first_token: int | None

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, as the tokenizer begins it; ValueError for none at all."""
        tokens: list[int] = self.tokenizer.encode(text).ids
        if not tokens and self.first_token is not None:
            tokens = [self.first_token]
        if not tokens:
            raise ValueError(
                f"prompt={text!r} has no tokens, and the checkpoint names no token that a text "
                "begins with; give a longer prompt"
            )
        return tokens

    def texts(self, prompt: list[int], blocks: Iterable[list[int]]) -> Iterator[str]:
        """What tokens say behind the prompt's, as soon as it is certain: a character may need
        several of them."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(ids=prompt, skip_special_tokens=True)
        for block in blocks:
            pieces = (stream.step(self.tokenizer, token) for token in block)
            yield "".join(piece for piece in pieces if piece is not None)


def load_published(folder: Path, mesh: Mesh | None = None) -> Published:
    """The model, its parameters, split over a mesh if there is one, and its tokenizer.

    Raises:
      ValueError: what `load` refuses, no tokenizer.json or one that cannot be read, a tokenizer of
        more tokens than the model has, or the library is not installed.
    """
    model, params = load(folder, mesh=mesh)
    assert isinstance(model, LoadedLanguageModel)
    tokenizer = _tokenizer(folder)
    size, known = tokenizer.get_vocab_size(), model.config.vocabulary_size
    if size > known:
        raise ValueError(
            f"{folder / TOKENIZER} has {size} tokens, the model's vocabulary is {known}: it is not "
            "this checkpoint's tokenizer; download both from one place"
        )
    fields = model.origin.values
    if model.origin.generation is not None:
        fields |= {k: v for k, v in parsed(model.origin.generation).items() if v is not None}
    stop = fields.get("eos_token_id")
    stops = stop if isinstance(stop, list) else [stop]
    first = fields.get("bos_token_id")
    return Published(
        model,
        {"params": params},
        tokenizer,
        tuple(token for token in stops if isinstance(token, int) and 0 <= token < known),
        first if isinstance(first, int) and 0 <= first < known else None,
    )


def _tokenizer(folder: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError(
            "--from needs the library tokenizers: pip install 'seqmodels[tokenizers]'"
        ) from error
    path = folder / TOKENIZER
    if not path.exists():
        raise ValueError(f"{path} is missing; download it with the checkpoint's other files")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no class of its own
        raise ValueError(f"{path} is no tokenizer: {error}") from error
