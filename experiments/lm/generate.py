"""Continues a prompt: with a model trained here, byte by byte, or with a published checkpoint.

    seqmodels lm generate --checkpoint runs/lm/mamba2-cpu-seed0 --prompt "ROMEO:"
    seqmodels lm generate --checkpoint runs/lm/mamba2-cpu-seed0 --prompt "ROMEO:" \\
        --temperature 0.8 --top-p 0.95 --stop "\\n\\n" --length 1000
    seqmodels lm generate --from mamba-130m-hf --prompt "Long sequences" --temperature 0

Text appears as it is made. It ends after --length bytes, where the model ends the document, or at a
--stop (which is not printed). A model of states needs the same memory for any length.

--from takes a folder as transformers writes it, with its tokenizer.json (`pip install
'seqmodels[tokenizers]'`): --length then counts tokens, and the text ends where the checkpoint's own
end token is drawn. Which families load: docs/checkpoints.md.
"""

import codecs
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from experiments.command_line import run_command
from experiments.errors import UsageError
from experiments.lm.published import load_published
from experiments.lm.run import Trained, load_trained, make_task, require_next
from experiments.run import mesh_of, unescaped
from seqmodels.arguments import SEED, integer
from seqmodels.data import text
from seqmodels.generation import Sampling, Stream, decode, feed, start
from seqmodels.mixers import JRTConfig
from seqmodels.models.language import LanguageModel
from seqmodels.ranges import Checked, Seed, Size
from seqmodels.training.language import growing_mixers
from seqmodels.training.state import variable_shardings

BLOCK = 16
"""Tokens decoded between two looks at the text."""
CHUNK = 512
"""Tokens of the prompt read at a time, at most."""


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    checkpoint: Path | None = None
    """A run directory, its checkpoints/ or one step in there."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A published checkpoint's folder, instead of --checkpoint."""
    prompt: str = ""
    """What the text begins with, taken as it is."""
    length: Size = 256
    """Bytes to add, at most; with --from, tokens."""
    temperature: float = 1.0
    """0 takes the most likely one each time."""
    top_k: Size | None = None
    """Draw from the k most likely ones."""
    top_p: float | None = None
    """Draw from the fewest most likely ones whose probabilities reach this."""
    stop: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """End before this text; may be repeated. \\n, \\t, \\r and \\\\ are understood, as in
    --separator of `seqmodels lm train`."""
    seed: Seed = 0
    """Seed of the draws, from 0 to 2**32 - 1."""
    max_length: Size | None = None
    """Room for prompt and text in caches that grow (attention); default: as much as is needed."""
    mesh: str | None = None
    """Devices by axis, e.g. seq=4: the prompt is read in shards; default: one device."""
    average: bool = True
    """Take the average of the parameters, if the run has one."""
    traceback: bool = False
    """Show the whole traceback of an error."""


def continuation(
    trained: Trained,
    prompt: bytes,
    *,
    length: int,
    sampling: Sampling,
    seed: int = 0,
    max_length: int | None = None,
    mesh: Mesh | None = None,
) -> Iterator[bytes]:
    """The bytes that follow, some at a time.

    Args:
      trained: the model.
      prompt: may be empty.
      length: bytes, at most; fewer if the model ends the document.
      sampling: how bytes are drawn; its stop tokens are not used.
      seed: of the draws.
      max_length: tokens that caches which grow have room for, the document's start included.
      mesh: default: of the first device.

    Raises:
      ValueError: ``length`` is not positive, the seed is out of its range, the cache is too small,
        or the mesh splits a prompt that goes into a cache, or rows, of which there is one.
    """
    length, seed = integer("length", length, 1), integer("seed", seed, 0, SEED)
    if trained.config.objective == "mlm":
        require_next(trained, "continued")
    tokens = [text.BOUNDARY, *prompt]
    growing = growing_mixers(trained.model)
    if growing and max_length is not None and len(tokens) + length > max_length:
        raise ValueError(
            f"max_length={max_length} is too small: the cache of mixer={growing[0]!r} needs room "
            f"for the prompt's {len(prompt)} bytes, one token for its start and length={length} "
            f"more; use max_length={len(tokens) + length} or more, or a shorter prompt or length"
        )
    mesh = mesh_of(None) if mesh is None else mesh
    if mesh.shape["data"] > 1:
        raise ValueError(f"mesh axis data={mesh.shape['data']} must be 1: there is one row")
    # Whole along seq: gathered for every token they would cost more than the token.
    places = variable_shardings(make_task(trained.config, packed=False), mesh, over=("model",))
    trained = dataclasses.replace(trained, variables=jax.device_put(trained.variables, places))
    ending = dataclasses.replace(sampling, stop_tokens=(text.BOUNDARY,))
    for block in token_blocks(
        trained.model,
        trained.variables,
        tokens,
        length=length,
        sampling=ending,
        seed=seed,
        mesh=mesh,
    ):
        yield text.decode(block)


def token_blocks(
    model: LanguageModel,
    variables: Any,
    tokens: list[int],
    *,
    length: int,
    sampling: Sampling,
    seed: int,
    mesh: Mesh,
) -> Iterator[list[int]]:
    """The tokens that follow, some at a time: ``length`` of them, or up to a stop token's first."""
    stream = _read(model, variables, tokens, len(tokens) + length + BLOCK, mesh)
    key = jax.random.key(seed)
    for at in range(0, length, BLOCK):
        with jax.set_mesh(mesh):
            new, count, stream = decode(
                model,
                variables,
                stream,
                jax.random.fold_in(key, at),
                max_new_tokens=BLOCK,
                sampling=sampling,
            )
        block = np.asarray(new)[0, : int(count[0])].tolist()
        yield block[: length - at]
        if block[-1] in sampling.stop_tokens:
            return


def _read(model: LanguageModel, variables: Any, tokens: list[int], room: int, mesh: Mesh) -> Stream:
    """The stream after the prompt, read in chunks; few different sizes are compiled."""
    stream = start(model, 1, max_length=room, dtype=model.config.dtype)
    shards = mesh.shape["seq"]
    whole = [mixer.prefix for mixer in model.config.backbone.mixers if isinstance(mixer, JRTConfig)]
    chunk = min(max([CHUNK, *whole]), 1 << (len(tokens) - 1).bit_length())
    chunk = -(-chunk // shards) * shards
    for at in range(0, len(tokens), chunk):
        part = tokens[at : at + chunk]
        padded, ids = (np.zeros((1, chunk), np.int32) for _ in range(2))
        padded[0, : len(part)], ids[0, : len(part)] = part, 1
        with jax.set_mesh(mesh):
            stream = feed(model, variables, stream, padded, ids)
    return stream


def until(pieces: Iterator[bytes], stops: list[bytes]) -> Iterator[bytes]:
    """The pieces up to the first of the stops; holds back what may be the beginning of one."""
    held, longest = b"", max((len(stop) for stop in stops), default=1)
    for piece in pieces:
        held += piece
        found = [at for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            yield held[: min(found)]
            return
        ready = max(len(held) - longest + 1, 0)
        yield held[:ready]
        held = held[ready:]
    yield held


def generate(arguments: Arguments) -> None:
    """Prints the prompt and what follows it.

    Raises:
      ValueError, OSError, TrainingError: with a message for the user.
    """
    sampling = checked(arguments)
    if arguments.from_ is not None:
        pieces = _published(arguments.from_, arguments, sampling)
    else:
        assert arguments.checkpoint is not None
        pieces = continuation(
            load_trained(arguments.checkpoint, average=arguments.average),
            _encoded(arguments.prompt),
            length=arguments.length,
            sampling=sampling,
            seed=arguments.seed,
            max_length=arguments.max_length,
            mesh=mesh_of(arguments.mesh),
        )
    stops = [_encoded(unescaped(stop)) for stop in arguments.stop]
    # A character may be cut in two by a piece's end, and a young model makes bytes that are none.
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    first = next(pieces := until(pieces, stops), b"")
    write(arguments.prompt)
    write(characters.decode(first))
    for piece in pieces:
        write(characters.decode(piece))
    write(characters.decode(b"", final=True) + "\n")


def _published(folder: Path, arguments: Arguments, sampling: Sampling) -> Iterator[bytes]:
    """The text that follows, of a published checkpoint."""
    published = load_published(folder)
    tokens = published.encode(arguments.prompt)
    ending = dataclasses.replace(sampling, stop_tokens=published.stop_tokens)
    blocks = token_blocks(
        published.model,
        published.variables,
        tokens,
        length=arguments.length,
        sampling=ending,
        seed=arguments.seed,
        mesh=mesh_of(None),
    )
    return (piece.encode() for piece in published.texts(tokens, blocks))


def checked(arguments: Arguments) -> Sampling:
    """The sampling that the arguments ask for; UsageError if one of them is out of its range."""
    if (arguments.checkpoint is None) == (arguments.from_ is None):
        raise UsageError(
            "give one of --checkpoint, a run of `seqmodels lm train`, and --from, a published "
            "checkpoint's folder"
        )
    if arguments.from_ is not None and (arguments.mesh or arguments.max_length):
        raise UsageError("--mesh and --max-length belong to --checkpoint, not to --from")
    if "" in arguments.stop:
        raise UsageError("--stop '' must have at least one character")
    try:
        return Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    except ValueError as error:
        raise UsageError(str(error)) from error


def write(text: str) -> None:
    """Shows the text at once; what the terminal's encoding lacks appears as ``\\u2026``."""
    encoding = sys.stdout.encoding or "utf-8"  # none where the output is held in memory
    print(text.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)


def _encoded(text: str) -> bytes:
    """The text's bytes, those of a command line that are no UTF-8 as they came."""
    return text.encode("utf-8", "surrogateescape")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        Arguments, generate, arguments, description=__doc__, prog="experiments.lm.generate"
    )


if __name__ == "__main__":
    sys.exit(main())
