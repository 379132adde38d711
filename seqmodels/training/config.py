"""What a training run does, as data."""

import dataclasses
from typing import Annotated, Literal

from jax.sharding import Mesh

from seqmodels.parallel.mesh import make_mesh
from seqmodels.parallel.strategies import check as check_exchange
from seqmodels.ranges import (
    Between,
    Checked,
    Count,
    NonNegative,
    Positive,
    Range,
    Seed,
    Share,
    Size,
)

# Fields of an experiment's config, by path, that may change when a run is resumed, with all below
# them: they do not touch the sequence of updates, but that another mesh rounds otherwise.
RESUMABLE = frozenset(
    f"train.{name}"
    for name in (
        "log_every", "eval_every", "checkpoint_every", "keep", "on_nan", "max_skips", "max_minutes",
        "mesh",
    )
) | {"memory.loss_tile", "memory.chunk"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked):
    """Sizes of the mesh's axes; their product is the number of devices."""

    data: Annotated[int, Range("positive, or -1 for all devices", -1, 2**31 - 1)] = -1
    """Rows of a batch are split over this axis; -1 takes all devices that are left."""
    model: Size = 1
    """Heads, channels and the hidden layers of MLPs are split over this axis."""
    seq: Size = 1
    """The length of each row is split over this axis."""
    exchange: dict[str, str] = dataclasses.field(default_factory=dict)
    """By the name of an op, how its shards exchange what they know where the length is split, e.g.
    {"linear_attention": "chain"}; the others take the default of seqmodels.parallel.STRATEGIES."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data == 0:
            raise ValueError("MeshConfig: data=0 must be positive, or -1 for all devices")
        check_exchange(self.exchange)

    def make(self) -> Mesh:
        """The mesh of all devices; ValueError unless their number fits."""
        return make_mesh(self.data, self.model, self.seq)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Checked):
    """How to train."""

    steps: Size = 1000
    """Number of optimizer steps; the schedule spans all of them."""
    batch_size: Size = 32
    """Examples in one step, over all devices and micro-batches."""
    accumulate: Size = 1
    """Micro-batches in one step. BatchNorm sees micro-batches; everything else the whole batch."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of the parameters whose group is not named below."""
    group_learning_rates: dict[str, NonNegative] = dataclasses.field(default_factory=dict)
    """Peak learning rate of each named parameter group, e.g. {"ssm": 1e-3}."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of the parameters that are marked for it, times the learning rate."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from 0 to the peak."""
    schedule: Literal["cosine", "linear", "constant", "rsqrt"] = "cosine"
    """After the warm-up: "cosine" or "linear" to `min_lr` at the last step, "constant", or "rsqrt",
    the peak times the root of warm-up steps over steps."""
    min_lr: NonNegative = 0.0
    """Learning rate that cosine and linear end with, in each group."""
    clip_norm: Positive | None = None
    """Largest global norm of the gradient; None does not clip."""
    adam_b1: Share = 0.9
    """Decay of Adam's first moment."""
    adam_b2: Share = 0.999
    """Decay of Adam's second moment."""
    adam_eps: Positive = 1e-8
    """Added to the root of Adam's second moment."""
    ema_decay: Between | None = None
    """Decay per step of an average of the parameters, which evaluation then uses; None for none.
    The average is unbiased: after n steps it weighs those n, and not the initial parameters."""
    log_every: Size = 50
    """Steps between two lines of training metrics (averages over these steps)."""
    eval_every: Size = 500
    """Steps between two evaluations on the validation split."""
    checkpoint_every: Size = 500
    """Steps between two checkpoints."""
    select: Literal["accuracy", "loss", "last"] = "accuracy"
    """The checkpoint to test: on the validation split of highest "accuracy" or of lowest "loss", or
    the "last" one."""
    keep: Size = 2
    """Latest checkpoints to keep, beside the best one."""
    seed: Seed = 0
    """Seed of the parameters and of dropout."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: "stop" the run, or "skip" the batch and count it."""
    max_skips: Count = 100
    """With on_nan="skip": stop after this many skipped batches."""
    max_minutes: Positive | None = None
    """Stop cleanly, with a checkpoint, after this much training time (resumed time included).
    The schedule still follows `steps`; how far the run gets depends on the machine."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """The devices' arrangement."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"TrainConfig: accumulate={self.accumulate} must divide "
                f"batch_size={self.batch_size}"
            )
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"TrainConfig: warmup_steps={self.warmup_steps} must be at most steps={self.steps}"
            )
