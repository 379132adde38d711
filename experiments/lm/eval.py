"""Bits per byte of a trained model on any text; needs nothing but the run directory.

    seqmodels lm eval --checkpoint runs/lm/gla-cpu-seed0 --data other.txt
    seqmodels lm eval --checkpoint runs/lm/gla-cpu-seed0 --data other.txt --context 256

The text is read once from the beginning to the end with the states carried through, in memory that
does not grow with it. Models whose cache grows (attention) see windows of --context bytes instead,
by default as long as in training; so does any model with --context.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from experiments import terminal
from experiments.command_line import run_command
from experiments.lm.run import Trained, bits_per_byte, load_trained, require_next
from experiments.run import mesh_of, say_padding
from seqmodels.data import text
from seqmodels.models import param_labels
from seqmodels.ranges import Checked, Size
from seqmodels.training.evaluation import evaluate
from seqmodels.training.language import growing_mixers, language
from seqmodels.training.state import variable_shardings
from seqmodels.training.step import make_eval_step


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    checkpoint: Path
    """A run directory, its checkpoints/ or one step in there."""
    data: Path
    """A text file, or a folder with *.txt files."""
    context: Size | None = None
    """Evaluate independent windows of so many bytes; default: carry the states if possible."""
    chunk: Size = 1024
    """Tokens read at a time where states are carried."""
    batch_size: Size = 8
    """Windows read at a time."""
    mesh: str | None = None
    """Devices by axis, e.g. data=2,model=2,seq=4: rows of a batch are split over data, heads and
    channels over model, the length of each row over seq; default: one device."""
    average: bool = True
    """Take the average of the parameters, if the run has one."""
    progress: bool = True
    """Draw a progress bar."""
    traceback: bool = False
    """Show the whole traceback of an error."""


def evaluate_text(trained: Trained, data: text.Text, arguments: Arguments) -> dict[str, Any]:
    """Figures of one text.

    Returns:
      ``bits_per_byte``, ``loss`` (nats a token), ``accuracy``, ``bytes``, ``documents``,
      ``context`` (None where states were carried), ``seconds``.

    Raises:
      ValueError: the mixers do not take several documents a row, or arguments out of range.
    """
    context = arguments.context
    if context is None and growing_mixers(trained.model):
        context = trained.config.data.length
    carried = context is None
    length = context or min(arguments.chunk, data.predictions)
    batches = text.eval_batches(
        data,
        length=length,
        batch_size=1 if carried else arguments.batch_size,
        streams=carried,
    )
    mesh = mesh_of(arguments.mesh)
    say_padding([length], mesh.shape["seq"])
    task = language(
        trained.model,
        lambda params: param_labels(trained.config.model, params),
        # Segments tell padding from the text, of which a state has to know.
        packed=data.documents > 1 or (carried and mesh.shape["seq"] > 1),
        carry_state=carried,
    )
    variables = jax.device_put(trained.variables, variable_shardings(task, mesh))
    start = time.perf_counter()
    with tqdm(batches, unit="batch", disable=not arguments.progress, dynamic_ncols=True) as bar:
        result = evaluate(make_eval_step(task, mesh), variables, bar, mesh, task.start)
    return {
        "bits_per_byte": bits_per_byte(result.loss, data),
        "loss": result.loss,
        "accuracy": result.accuracy,
        "bytes": data.bytes,
        "documents": data.documents,
        "context": context,
        "seconds": time.perf_counter() - start,
    }


def report(arguments: Arguments) -> None:
    """Prints the figures.

    Raises:
      ValueError, OSError, TrainingError: with a message for the user.
    """
    trained = load_trained(arguments.checkpoint, average=arguments.average)
    require_next(trained, "evaluated byte by byte")
    documents = text.read_documents(arguments.data, trained.config.data.separator)
    result = evaluate_text(trained, text.encode(documents), arguments)
    context = result["context"]
    how = "states carried through" if context is None else f"windows of {context} bytes"
    terminal.say(
        f"step {trained.step}: {result['bits_per_byte']:.4f} bits per byte over "
        f"{result['bytes']:,} bytes, {how}; accuracy {result['accuracy']:.4f}, "
        f"{result['seconds']:.1f} s"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        Arguments, report, arguments, description=__doc__, prog="experiments.lm.eval"
    )


if __name__ == "__main__":
    sys.exit(main())
