"""Goes on training a published checkpoint on a text, in tokens of its own tokenizer.

    seqmodels lm finetune --from mamba-130m-hf --data notes.txt --steps 200
    seqmodels lm finetune --from mamba-130m-hf --data notes/ --train.learning-rate 1e-5 \\
        --data.length 1024 --model.backbone.remat full
    seqmodels lm finetune --from mamba-130m-hf --data notes.txt --lora 8 --lora.layers in_proj
    seqmodels lm finetune --resume --run-dir runs/lm/mamba-130m-hf-finetune-seed0
    seqmodels lm generate --from runs/lm/mamba-130m-hf-finetune-seed0/published

--from is a folder as transformers writes it, with its tokenizer.json (`pip install
'seqmodels[tokenizers]'`); docs/checkpoints.md lists the families that load. --data is a file, or a
folder whose *.txt files are one document each; the last tenth of the bytes is for validation.
Documents stand apart by the token that begins a text, or else the one that ends it.

All parameters are trained, or with --lora two narrow matrices beside each dense layer's, which at
the end are added to it. The run directory holds config, metrics (metrics.jsonl, TensorBoard) and
checkpoints; at the end the parameters of the best validation go to its folder published/, as
transformers reads them, and the tokenizer's files with them. Any field of the config can be
changed; --help-fields lists them.
"""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from jax.sharding import Mesh
from tyro.conf import Fixed

from experiments import terminal
from experiments.allocator import keep_freed_memory
from experiments.command_line import changed, run_command
from experiments.errors import UsageError
from experiments.lm.presets import TRAIN, DataConfig, MemoryConfig
from experiments.lm.published import Published, load_published
from experiments.lm.run import TextData, bits_per_byte, task_of
from experiments.run import (
    Locations,
    absolute,
    history,
    mesh_sizes,
    require_names,
    restore,
    result_path,
    selection,
    unescaped,
    validation,
    write_result,
)
from seqmodels.config import from_dict, to_dict
from seqmodels.data import text
from seqmodels.data.text import Text
from seqmodels.interop.huggingface import load, read_model, save
from seqmodels.models import LanguageModel, LanguageModelConfig
from seqmodels.parallel.mesh import rows_of_process
from seqmodels.ranges import Checked, Positive, Seed, Share, Size
from seqmodels.training.config import TrainConfig
from seqmodels.training.evaluation import Evaluation, evaluate
from seqmodels.training.loop import Outcome, fit
from seqmodels.training.lora import ADAPTERS, BASE, LoRAConfig, adapted, merged
from seqmodels.training.run_directory import Run, open_run, read_config
from seqmodels.training.step import make_eval_step
from seqmodels.training.task import Task

PROG = "experiments.lm.finetune"
OUTPUT = "published"
"""Folder of a run directory that has the tuned checkpoint."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(Checked):
    """One run, complete.

    Attributes:
      source: name of the checkpoint's folder.
      data: how the text is cut; a length is of tokens, ``decompose`` is not for this.
      model: the checkpoint's; fields that change its parameters must stay.
      train: the training; its seed also orders the windows.
      memory: what training keeps.
      balance: weight of the loss that has a mixture's experts used alike, where ``model`` has some.
      lora: None to train all parameters; or narrow matrices beside those of dense layers.
    """

    source: Annotated[str, Fixed]
    data: DataConfig
    model: LanguageModelConfig
    train: TrainConfig
    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
    balance: Share = 0.01
    lora: LoRAConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.decompose is not None:
            raise ValueError("data.decompose must be None: rows are shuffled windows")
        if self.model.backbone.scan_layers:
            raise ValueError("model.backbone.scan_layers must be False: layers load one by one")

    @property
    def name(self) -> str:
        """``<source>-<finetune or lora>-seed<k>``: of the run directory and the result."""
        how = "finetune" if self.lora is None else "lora"
        return f"{self.source}-{how}-seed{self.train.seed}"


RECIPE = dataclasses.replace(
    TRAIN,
    learning_rate=2e-5,
    weight_decay=0.0,
    steps=200,
    warmup_steps=10,
    batch_size=4,
    log_every=10,
    eval_every=50,
    checkpoint_every=50,
)


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """The published checkpoint's folder; needed unless --resume."""
    data: Path | None = None
    """A text file, or a folder with *.txt files; needed unless --resume."""
    separator: str | None = None
    """What stands between the documents of a file, e.g. "<|endoftext|>"; default: one document."""
    seed: Seed | None = None
    """Seed of dropout and data order; default 0."""
    run_dir: Path | None = None
    """Where the run goes; default runs/lm/<folder>-finetune-seed<k>."""
    results_dir: Path = Path("runs/results/lm")
    """Where the result goes."""
    steps: Size | None = None
    """Number of steps, instead of 200; the schedule follows."""
    max_minutes: Positive | None = None
    """Stop after this much training time, with a checkpoint, and write what there is."""
    lora: Size | None = None
    """Train matrices of this rank beside those of dense layers, and nothing else (LoRA), at ten
    times the learning rate; --lora.alpha and --lora.layers are then fields of the config."""
    mesh: str | None = None
    """Devices by axis, e.g. data=2,model=2,seq=4; default: all devices are data."""
    resume: bool = False
    """Continue the run in --run-dir; everything else comes from there."""
    help_fields: bool = False
    """Show the options that change the fields of this config, with their values, and exit."""
    progress: bool = True
    """Draw a progress bar."""
    traceback: bool = False
    """Show the whole traceback of an error."""


@dataclasses.dataclass(frozen=True)
class Tokens(TextData):
    """The two splits of a text in a checkpoint's tokens.

    Attributes:
      validation_bytes: of the text behind ``validation``.
    """

    validation_bytes: int

    def bits_per_byte(self, loss: float) -> float:
        """Converts a mean loss in nats over the validation's tokens."""
        return bits_per_byte(loss, self.validation, self.validation_bytes)


def load_tokens(config: DataConfig, path: str, published: Published) -> Tokens:
    """The text at ``path``; ValueError if there is none, or nothing keeps documents apart."""
    ends = published.stop_tokens[0] if published.stop_tokens else None
    boundary = ends if published.first_token is None else published.first_token
    if boundary is None:
        raise ValueError(
            "the checkpoint names no token that begins or ends a text; add bos_token_id to its "
            "config.json"
        )
    documents = text.read_documents(Path(path), config.separator)
    train, held_out = text.split_documents(documents, config.validation)

    def encoded(documents: list[bytes]) -> Text:
        ids = [
            published.tokenizer.encode(part.decode(errors="replace"), add_special_tokens=False).ids
            for part in documents
        ]
        return text.joined(ids, boundary)

    one, two = encoded(train), encoded(held_out)
    digest = one.digest[:32] + two.digest[:32]
    return Tokens(one, two, digest, validation_bytes=sum(map(len, held_out)))


def resolve(arguments: Arguments, fields: Sequence[str]) -> tuple[FinetuneConfig, Path, Locations]:
    """The experiment, its run directory, and where its text and its checkpoint are.

    Raises:
      UsageError: a path is missing, a field or its value does not fit, or there is no such run.
      ValueError: the checkpoint is not one that loads.
    """
    given = {
        "data.separator": None if arguments.separator is None else unescaped(arguments.separator),
        "train.steps": arguments.steps,
        "train.seed": arguments.seed,
        "train.max_minutes": arguments.max_minutes,
    }
    given |= {f"train.mesh.{axis}": n for axis, n in mesh_sizes(arguments.mesh).items()}
    options = [f"--{path}={value}" for path, value in given.items() if value is not None]
    options = [*fields, *options, *["--help"] * arguments.help_fields]
    found = Locations("", absolute(arguments.data), "", absolute(arguments.from_) or "")
    if arguments.resume:
        if arguments.run_dir is None:
            raise UsageError("--resume needs the --run-dir of the run to continue")
        config = from_dict(FinetuneConfig, read_config(arguments.run_dir), where="config")
        rank = None if config.lora is None else config.lora.rank
        saved_names = {"seed": config.train.seed, "lora": rank}
        require_names(arguments, saved_names, arguments.run_dir)
        saved = Locations.read(arguments.run_dir)
        found = dataclasses.replace(
            saved, data_dir=found.data_dir or saved.data_dir, source=found.source or saved.source
        )
        return changed(config, options, prog=PROG), arguments.run_dir, found
    if not found.source or found.data_dir is None:
        raise UsageError(
            "a new run needs --from and --data, e.g. --from mamba-130m-hf --data notes.txt; a run "
            "to --resume needs its --run-dir. See --help"
        )
    model = dataclasses.replace(read_model(found.source), dtype="float32")
    recipe, lora = RECIPE, None
    if arguments.lora is not None:
        recipe, lora = dataclasses.replace(RECIPE, learning_rate=2e-4), LoRAConfig(arguments.lora)
    name = Path(found.source).name
    config = FinetuneConfig(name, DataConfig(length=512), model, recipe, lora=lora)
    config = changed(config, options, prog=PROG)
    return config, arguments.run_dir or Path("runs/lm") / config.name, found


def make_task(config: FinetuneConfig, source: str, mesh: Mesh, *, packed: bool) -> Task:
    """The config's model, whose parameters begin as the checkpoint's; raises as ``language``."""
    task = plain_task(config, packed=packed)
    # Read when training begins, so that nobody else keeps them.
    task = dataclasses.replace(task, begin=lambda: {"params": load(source, mesh=mesh)[1]})
    return task if config.lora is None else adapted(task, config.lora, config.train.seed)


def plain_task(config: FinetuneConfig, *, packed: bool) -> Task:
    """The task of the checkpoint's own parameters."""
    return task_of(config.model, config.memory, config.balance, packed=packed)


def finetune(arguments: Arguments, fields: Sequence[str] = ()) -> None:
    """Trains, evaluates, writes the tuned checkpoint and the result; arguments as ``resolve``.

    Raises:
      ValueError, OSError, TrainingError: with a message for the user.
    """
    config, run_dir, found = resolve(arguments, fields)
    path = result_path(arguments.results_dir, config.name, config)
    mesh = config.train.mesh.make()
    published = load_published(Path(found.source), mesh)
    _require_parameters(config.model, published)
    data = load_tokens(config.data, found.data_dir or "", published)
    if found.digest not in ("", data.digest):
        raise ValueError(
            f"data={found.data_dir!r} is not the text that the run in {run_dir} began with; give "
            "that as --data, or start in another --run-dir"
        )
    run = open_run(run_dir, to_dict(config), resume=arguments.resume)
    terminal.say(f"{config.name}: {run_dir}")
    keep_freed_memory()
    task = make_task(config, found.source, mesh, packed=data.packed)
    plain = plain_task(config, packed=data.packed)
    before = _validate(plain, data, config, published.variables, mesh)
    terminal.say(f"before: {data.bits_per_byte(before.loss):.4f} bits per byte")
    own = rows_of_process(mesh, config.train.batch_size)
    cut: dict[str, Any] = {"length": config.data.length, "batch_size": config.train.batch_size}
    locations = dataclasses.replace(found, digest=data.digest)
    published.variables.clear()
    outcome = fit(
        task,
        text.train_batches(data.train, seed=config.train.seed, own=own, **cut),
        config.train,
        run,
        validation=text.eval_batches(data.validation, own=own, **cut),
        mesh=mesh,
        show_progress=arguments.progress,
        on_event=lambda what, _: locations.write(run_dir) if what == "prepared" else None,
    )
    output = write_checkpoint(config, run, task, outcome, published, Path(found.source))
    result = make_result(config, run, data, outcome, before)
    terminal.say(
        f"after step {outcome.chosen_step}: {result['bits_per_byte']:.4f} bits per byte; "
        f"checkpoint: {output}"
        if result["bits_per_byte"] is not None
        else f"stopped before the first validation; checkpoint: {output}"
    )
    write_result(result, run_dir, path)
    terminal.say(f"result: {path}")


def _require_parameters(model: LanguageModelConfig, published: Published) -> None:
    """Raises ValueError unless a model has the checkpoint's parameters."""

    def shapes(config: LanguageModelConfig) -> Any:
        tokens = jax.ShapeDtypeStruct((1, 2), "int32")
        tree = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)
        return jax.tree.map(lambda leaf: leaf.shape, tree["params"])

    if shapes(model) != shapes(published.model.config):
        raise ValueError(
            "model: a field was changed that changes the parameters; leave those of the checkpoint"
        )


def _validate(
    task: Task, data: Tokens, config: FinetuneConfig, variables: Any, mesh: Mesh
) -> Evaluation:
    batches = text.eval_batches(
        data.validation, length=config.data.length, batch_size=config.train.batch_size
    )
    return evaluate(make_eval_step(task, mesh), variables, batches, mesh, task.start)


def write_checkpoint(
    config: FinetuneConfig,
    run: Run,
    task: Task,
    outcome: Outcome,
    published: Published,
    source: Path,
) -> Path:
    """The chosen parameters in the checkpoint's own format, beside the tokenizer's files."""
    output = run.directory / OUTPUT
    state = restore(
        task, config.train, run.config_dict, run.directory / "checkpoints", outcome.chosen_step
    )
    part = run.directory / f"{OUTPUT}.part"
    shutil.rmtree(part, ignore_errors=True)
    params = state.averaged["params"]
    if config.lora is not None:
        params = merged(params[BASE], params[ADAPTERS], config.lora)
    save(published.model, params, part)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, part / name)
    shutil.rmtree(output, ignore_errors=True)  # of the same run, before it went on
    part.rename(output)
    return output


def make_result(
    config: FinetuneConfig, run: Run, data: Tokens, outcome: Outcome, before: Evaluation
) -> dict[str, Any]:
    """What is published of a run: no path of the machine it ran on."""
    progress, how = outcome.progress, history(run.directory)
    best = validation(how["curve"], outcome.chosen_step)  # none if time ended the run before one
    return {
        "source": config.source,
        "seed": config.train.seed,
        "bits_per_byte_before": data.bits_per_byte(before.loss),
        "bits_per_byte": data.bits_per_byte(best["loss"]) if best else None,
        "validation_loss_before": before.loss,
        "validation_loss": best.get("loss"),
        "validation_bytes": data.validation_bytes,
        "test_step": outcome.chosen_step,
        "selection": selection(config.train, outcome),
        "steps": progress.step,
        "complete": outcome.complete,
        "tokens": progress.tokens,
        "skipped": progress.skipped,
        "parameters": outcome.parameters,
        "wall_seconds": progress.wall_seconds,
        "compile_seconds": progress.compile_seconds,
        "config": run.config_dict,
        "data": {"sha256_of_tokens": data.digest},
        **how,
    }


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(
        Arguments, finetune, arguments, description=__doc__, prog=PROG, config_fields=True
    )


if __name__ == "__main__":
    sys.exit(main())
