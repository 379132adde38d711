"""What a training run does, as data."""

import dataclasses
import math

SCHEDULES = ("cosine", "constant", "linear")
NON_FINITE_POLICIES = ("stop", "skip")
SELECTIONS = ("accuracy", "loss")

# Fields that may change when a run is resumed: they do not touch the sequence of updates.
RESUMABLE = frozenset(
    {"log_every", "eval_every", "checkpoint_every", "keep", "on_nan", "max_skips", "max_minutes"}
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes; they multiply to the number of devices."""

    data: int = -1
    """Rows of a batch are split over this axis; -1 takes all devices the other axes leave."""
    model: int = 1
    """Parameters are split over this axis."""
    seq: int = 1
    """The length is split over this axis."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises ValueError, with the field's name, for values that cannot work."""

    steps: int = 1000
    """Number of optimizer steps; the schedule spans all of them."""
    batch_size: int = 32
    """Examples in one step, over all devices and micro-batches."""
    accumulate: int = 1
    """Micro-batches in one step. BatchNorm sees micro-batches; everything else the whole batch."""
    learning_rate: float = 1e-3
    """Peak learning rate of the parameters whose group is not named below."""
    group_learning_rates: dict[str, float] = dataclasses.field(default_factory=dict)
    """Peak learning rate of each named parameter group, e.g. {"ssm": 1e-3}."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the parameters that are marked for it, times the learning rate."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0 to the peak."""
    schedule: str = "cosine"
    """After the warm-up: "cosine" or "linear" to `min_lr` at the last step, or "constant"."""
    min_lr: float = 0.0
    """Learning rate that cosine and linear end with, in each group."""
    clip_norm: float | None = None
    """Largest global norm of the gradient; None does not clip."""
    adam_b1: float = 0.9
    """Decay of Adam's first moment."""
    adam_b2: float = 0.999
    """Decay of Adam's second moment."""
    adam_eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    ema_decay: float | None = None
    """Decay per step of an average of the parameters, which evaluation then uses; None for none.
    The average is unbiased: after n steps it weighs those n, and not the initial parameters."""
    log_every: int = 50
    """Steps between two lines of training metrics (averages over these steps)."""
    eval_every: int = 500
    """Steps between two evaluations on the validation split."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    select: str = "accuracy"
    """The best checkpoint on the validation split: highest "accuracy" or lowest "loss"."""
    keep: int = 2
    """Latest checkpoints to keep, beside the best one."""
    seed: int = 0
    """Seed of the parameters and of dropout."""
    on_nan: str = "stop"
    """A loss or gradient that is not finite: "stop" the run, or "skip" the batch and count it."""
    max_skips: int = 100
    """With on_nan="skip": stop after this many skipped batches."""
    max_minutes: float | None = None
    """Stop cleanly, with a checkpoint, after this much training time (resumed time included).
    The schedule still follows `steps`; how far the run gets depends on the machine."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """The devices' arrangement."""

    def __post_init__(self) -> None:
        for name in (
            "steps", "batch_size", "accumulate", "log_every", "eval_every", "checkpoint_every",
            "keep",
        ):  # fmt: skip
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("weight_decay", "warmup_steps", "min_lr", "max_skips"):
            value = getattr(self, name)
            self._require(name, 0 <= value < math.inf, "must be at least 0 and finite")
        for name in ("learning_rate", "adam_eps"):
            value = getattr(self, name)
            self._require(name, 0 < value < math.inf, "must be positive and finite")
        for name in ("adam_b1", "adam_b2"):
            self._require(name, 0 <= getattr(self, name) < 1, "must be in [0, 1)")
        for name in ("clip_norm", "max_minutes"):
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "must be positive, or None")
        for group, rate in self.group_learning_rates.items():
            if not 0 <= rate < math.inf:
                raise ValueError(f"group_learning_rates[{group!r}]={rate} must be at least 0")
        self._require(
            "ema_decay",
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "must be in (0, 1), or None",
        )
        self._choice("select", SELECTIONS)
        self._choice("schedule", SCHEDULES)
        self._choice("on_nan", NON_FINITE_POLICIES)
        self._require(
            "accumulate",
            self.batch_size % self.accumulate == 0,
            f"must divide batch_size={self.batch_size}",
        )
        self._require(
            "warmup_steps", self.warmup_steps <= self.steps, f"must be at most steps={self.steps}"
        )

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} {rule}")

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        self._require(name, getattr(self, name) in choices, f"must be one of {', '.join(choices)}")
