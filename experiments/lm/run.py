"""What the commands share: data, the task of a config, a trained model, bits per byte."""

import dataclasses
import math
from pathlib import Path

from experiments.lm.presets import MASK, DataConfig, ExperimentConfig, MemoryConfig
from experiments.run import chosen_step, locate, restore
from seqmodels.config import from_dict
from seqmodels.data import text
from seqmodels.data.text import Text
from seqmodels.models import LanguageModel, LanguageModelConfig, param_labels
from seqmodels.training.language import language
from seqmodels.training.masked import masked_language, prefix_language
from seqmodels.training.run_directory import read_config
from seqmodels.training.task import Task, Variables


@dataclasses.dataclass(frozen=True)
class TextData:
    """The two splits of a text, and the digest of all of it."""

    train: Text
    validation: Text
    digest: str

    @property
    def packed(self) -> bool:
        """Whether a row may hold several documents."""
        return self.train.documents > 1 or self.validation.documents > 1


def load_data(config: DataConfig, path: Path | str) -> TextData:
    """The text at ``path``, split as the config says.

    Raises:
      ValueError: there is none, or it is too short.
    """
    documents = text.read_documents(Path(path), config.separator)
    train, validation = text.split_documents(documents, config.validation)
    return TextData(
        train=text.encode(train),
        validation=text.encode(validation),
        digest=text.encode(documents).digest,
    )


def make_task(config: ExperimentConfig, *, packed: bool) -> Task:
    """The config's model, for training; raises as the task of its objective does."""
    if config.objective == "next":
        return task_of(
            config.model,
            config.memory,
            config.balance,
            packed=packed,
            carry_state=config.carry_state,
        )
    kind = masked_language if config.objective == "mlm" else prefix_language
    return kind(
        LanguageModel(config.model),
        lambda params: param_labels(config.model, params),
        mask_token=MASK,
        share=config.masked,
        packed=packed,
        tile=config.memory.loss_tile,
    )


def task_of(
    model: LanguageModelConfig,
    memory: MemoryConfig,
    balance: float,
    *,
    packed: bool,
    carry_state: bool = False,
) -> Task:
    """The task of a model under what a config says of its training; raises as ``language``."""
    return language(
        LanguageModel(model),
        lambda params: param_labels(model, params),
        packed=packed or carry_state,
        carry_state=carry_state,
        tile=memory.loss_tile,
        chunk=memory.chunk,
        share=memory.share,
        balance=balance,
    )


def bits_per_byte(loss: float, data: Text, size: int | None = None) -> float:
    """Converts a mean loss in nats over all tokens of the text; the documents' ends count too.

    ``size``: bytes of the text, for tokens that are no bytes.
    """
    return loss * data.predictions / (data.bytes if size is None else size) / math.log(2)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model from a run directory."""

    config: ExperimentConfig
    step: int
    model: LanguageModel
    variables: Variables


def load_trained(checkpoint: Path, *, average: bool = True) -> Trained:
    """The model of a checkpoint.

    Args:
      checkpoint: a run directory, its checkpoints/ or one step in there; without a step, the one
        the run was tested at, or else the latest.
      average: take the average of the parameters, where the run has one.

    Raises:
      UsageError: the path is not in a run directory.
      ValueError: the run is not one of a language model.
      CheckpointError: the checkpoint cannot be read.
    """
    run_dir, step = locate(checkpoint)
    config_dict = read_config(run_dir)
    try:
        config = from_dict(ExperimentConfig, config_dict, where="config")
    except ValueError as error:
        raise ValueError(
            f"--checkpoint {checkpoint} is not a run of `seqmodels lm train`, or of another "
            f"version ({error}); give the directory of such a run"
        ) from error
    if step is None:
        step = chosen_step(run_dir, config_dict)
    task = make_task(config, packed=False)
    state = restore(task, config.train, config_dict, run_dir / "checkpoints", step)
    variables = state.averaged if average else state.variables
    return Trained(config, step, LanguageModel(config.model), variables)


def require_next(trained: Trained, what: str) -> None:
    """Raises ValueError unless the model was trained to say the next byte of any text."""
    if trained.config.objective != "next":
        raise ValueError(
            f"a model of objective={trained.config.objective!r} cannot be {what}: it was not "
            "trained to say the next one after any beginning; its validation figures are in its "
            "result"
        )
