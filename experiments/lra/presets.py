"""What each experiment is: the published settings, and what a CPU run changes in them.

Sources: S5, Smith et al. 2023, lindermanlab/S5 (bin/run_experiments); S4D, Gu et al. 2022,
state-spaces/s4 at v3, the version of the paper.
"""

import dataclasses
import itertools
from typing import Annotated, Literal, get_args

from tyro.conf import Fixed

from experiments.command_line import UsageError
from seqmodels.data.lra import ListOpsConfig, TextConfig
from seqmodels.data.lra.listops import SYMBOLS
from seqmodels.mixers import S4DConfig, S5Config
from seqmodels.models import BackboneConfig, ClassifierConfig
from seqmodels.ranges import Checked, Size
from seqmodels.training.config import TrainConfig

Task = Literal["listops", "text"]
Model = Literal["s4d", "s5"]
Preset = Literal["paper", "cpu"]

# Vocabulary, padding included, and classes of each task.
SIZES: dict[str, tuple[int, int]] = {"listops": (len(SYMBOLS), 10), "text": (257, 2)}


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(Checked):
    """One experiment, complete: data, model and training.

    Attributes:
      task: "listops" or "text"; names what ``data`` are, and does not change them.
      model: name of the mixer in ``classifier``; likewise.
      preset: "paper" or "cpu", what this config was made from.
      data: which data.
      lengths: the padded lengths, increasing; the last one holds the longest row. Padding is
        masked everywhere, so that they change the speed only.
      classifier: the model.
      train: the training; its seed also orders the batches.
    """

    task: Annotated[Task, Fixed]
    model: Annotated[Model, Fixed]
    preset: Annotated[Preset, Fixed]
    data: ListOpsConfig | TextConfig
    lengths: tuple[Size, ...]
    classifier: ClassifierConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.data, DATA[self.task]):
            raise ValueError(f"task={self.task!r} does not have data={self.data}")
        layout = self.classifier.backbone.layout
        if set(layout) != {self.model}:
            raise ValueError(f"model={self.model!r} is not what layout={layout} consists of")
        self._check_data()
        sizes = dict(zip(("vocabulary_size", "num_classes"), SIZES[self.task], strict=True))
        for name, needed in sizes.items():
            size = getattr(self.classifier, name)
            if size is None or size < needed:
                raise ValueError(
                    f"classifier.{name}={size} is too small for task={self.task!r}, which has "
                    f"{needed}"
                )

    def _check_data(self) -> None:
        """What is trained on, selected by and tested on is there and whole."""
        data, lengths = self.data, self.lengths
        if not lengths or any(a >= b for a, b in itertools.pairwise(lengths)):
            raise ValueError(f"lengths={lengths} must be increasing, and at least one")
        if lengths[-1] < longest(data):
            raise ValueError(
                f"lengths={lengths} would cut rows of up to {longest(data)} tokens: end with that "
                f"or more, or change data.max_length={data.max_length}"
            )
        if not data.validation and self.train.select != "last":
            raise ValueError(
                f"data.validation=0 leaves nothing for train.select={self.train.select!r}: hold "
                "some out, or take train.select='last'"
            )
        if isinstance(data, ListOpsConfig):
            if not data.test:
                raise ValueError("data.test=0 leaves nothing to test on")
            if self.train.batch_size > data.train:
                raise ValueError(
                    f"train.batch_size={self.train.batch_size} is more than data.train={data.train}"
                )

    @property
    def name(self) -> str:
        """``<task>-<model>-<preset>-seed<k>``: of the run directory and of the result."""
        return f"{self.task}-{self.model}-{self.preset}-seed{self.train.seed}"


DATA: dict[str, type[ListOpsConfig | TextConfig]] = {"listops": ListOpsConfig, "text": TextConfig}


def longest(data: ListOpsConfig | TextConfig) -> int:
    """The most tokens a row has; the limit of ListOps is exclusive."""
    return data.max_length - isinstance(data, ListOpsConfig)


def _steps(examples: int, batch_size: int, epochs: int) -> int:
    return examples // batch_size * epochs


def _s5_listops() -> ExperimentConfig:
    mixer = S5Config(
        state_size=16, blocks=8, c_init="lecun_normal", bidirectional=True, decay="BfastandCdecay"
    )
    return ExperimentConfig(
        task="listops",
        model="s5",
        preset="paper",
        data=ListOpsConfig(),
        lengths=(1024, 1536, 2048),
        classifier=ClassifierConfig(
            backbone=BackboneConfig(
                layout=("s5",) * 8, mixers=(mixer,), width=128, norm="batch", gate="half_glu2"
            ),
            num_classes=10,
            vocabulary_size=len(SYMBOLS),
        ),
        train=TrainConfig(
            steps=_steps(96_000, 50, 40),
            batch_size=50,
            learning_rate=3e-3,
            group_learning_rates={"ssm": 1e-3},
            weight_decay=0.04,
            warmup_steps=_steps(96_000, 50, 1),
            eval_every=_steps(96_000, 50, 1),
            checkpoint_every=_steps(96_000, 50, 1),
        ),
    )


def _s5_text() -> ExperimentConfig:
    mixer = S5Config(
        state_size=192, blocks=12, c_init="lecun_normal", bidirectional=True, dt_global=True
    )
    data = TextConfig()
    examples = 25_000 - data.validation
    return ExperimentConfig(
        task="text",
        model="s5",
        preset="paper",
        data=data,
        lengths=(512, 1024, 2048, 4096),
        classifier=ClassifierConfig(
            backbone=BackboneConfig(
                layout=("s5",) * 6,
                mixers=(mixer,),
                width=256,
                norm="batch",
                gate="half_glu2",
                dropout=0.1,
            ),
            num_classes=2,
            vocabulary_size=257,
        ),
        train=TrainConfig(
            steps=_steps(examples, 50, 35),
            batch_size=50,
            learning_rate=4e-3,
            group_learning_rates={"ssm": 1e-3},
            weight_decay=0.07,
            eval_every=_steps(examples, 50, 1),
            checkpoint_every=_steps(examples, 50, 1),
        ),
    )


def _s4d(
    task: Task, *, layers: int, width: int, prenorm: bool, batch_size: int, steps: int
) -> ExperimentConfig:
    """S4D-Lin of the paper; a tenth of the steps is warm-up, as in the authors' later configs."""
    listops = task == "listops"
    data = ListOpsConfig() if listops else TextConfig()
    examples = 96_000 if isinstance(data, ListOpsConfig) else 25_000 - data.validation
    mixer = S4DConfig(state_size=64, init="lin", n_ssm=1, bidirectional=True)
    return ExperimentConfig(
        task=task,
        model="s4d",
        preset="paper",
        data=data,
        lengths=(1024, 1536, 2048) if listops else (512, 1024, 2048, 4096),
        classifier=ClassifierConfig(
            backbone=BackboneConfig(
                layout=("s4d",) * layers,
                mixers=(mixer,),
                width=width,
                norm="batch",
                prenorm=prenorm,
                final_norm=prenorm,
                gate="glu",
                batchnorm_momentum=0.9,
            ),
            num_classes=10 if listops else 2,
            vocabulary_size=len(SYMBOLS) if listops else 257,
            embedding_std=1.0,
        ),
        train=TrainConfig(
            steps=steps,
            batch_size=batch_size,
            learning_rate=1e-2,
            group_learning_rates={"ssm": 1e-3},
            weight_decay=0.05,
            warmup_steps=steps // 10,
            eval_every=examples // batch_size,
            checkpoint_every=examples // batch_size,
        ),
    )


def _listops_on_cpu(paper: ExperimentConfig) -> ExperimentConfig:
    """Trees of 65 to 199 tokens instead of 501 to 1999: not the published task."""
    return dataclasses.replace(
        paper,
        preset="cpu",
        data=ListOpsConfig(min_length=64, max_length=200),
        lengths=(136, 200),
        classifier=_smaller(paper, layers=6),
        train=dataclasses.replace(
            paper.train, steps=2_500, warmup_steps=250, eval_every=500, checkpoint_every=500
        ),
    )


def _text_on_cpu(
    paper: ExperimentConfig, *, batch_size: int = 16, **mixer: int
) -> ExperimentConfig:
    """The first 1024 bytes of each review instead of 4096."""
    return dataclasses.replace(
        paper,
        preset="cpu",
        data=TextConfig(max_length=1024),
        lengths=(512, 768, 1024),
        classifier=_smaller(paper, layers=4, **mixer),
        train=dataclasses.replace(
            paper.train,
            batch_size=batch_size,
            steps=7_000,
            warmup_steps=500,
            eval_every=1_000,
            checkpoint_every=1_000,
        ),
    )


def _smaller(paper: ExperimentConfig, *, layers: int, **mixer: int) -> ClassifierConfig:
    """The model at width 64, with so many layers and these fields of its mixer changed."""
    backbone = paper.classifier.backbone
    (published,) = backbone.mixers
    return dataclasses.replace(
        paper.classifier,
        backbone=dataclasses.replace(
            backbone,
            layout=(paper.model,) * layers,
            mixers=(dataclasses.replace(published, **mixer),),
            width=64,
        ),
    )


_S5_LISTOPS, _S5_TEXT = _s5_listops(), _s5_text()
_S4D_LISTOPS = _s4d("listops", layers=8, width=128, prenorm=False, batch_size=50, steps=80_000)
_S4D_TEXT = _s4d("text", layers=6, width=256, prenorm=True, batch_size=16, steps=50_000)

EXPERIMENTS: dict[tuple[str, str], dict[str, ExperimentConfig]] = {
    ("listops", "s5"): {"paper": _S5_LISTOPS, "cpu": _listops_on_cpu(_S5_LISTOPS)},
    ("listops", "s4d"): {"paper": _S4D_LISTOPS, "cpu": _listops_on_cpu(_S4D_LISTOPS)},
    ("text", "s5"): {"paper": _S5_TEXT, "cpu": _text_on_cpu(_S5_TEXT, state_size=64, blocks=4)},
    ("text", "s4d"): {"paper": _S4D_TEXT, "cpu": _text_on_cpu(_S4D_TEXT, state_size=32)},
}
"""By task and model: "paper" has the published settings, "cpu" is what two cores do in an hour."""

PAPER = {names: presets["paper"] for names, presets in EXPERIMENTS.items()}


def experiment(task: str, model: str, preset: str, seed: int = 0) -> ExperimentConfig:
    """The experiment of a preset.

    Raises:
      UsageError: an unknown name; the message lists the known ones.
      ValueError: the seed is out of range.
    """
    for what, name, known in (
        ("task", task, get_args(Task)),
        ("model", model, get_args(Model)),
        ("preset", preset, get_args(Preset)),
    ):
        if name not in known:
            raise UsageError(f"{what}={name!r} is not known; choose one of {', '.join(known)}")
    config = EXPERIMENTS[task, model][preset]
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
