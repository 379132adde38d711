"""What a run needs of memory, before it is started."""

import jax
import jax.numpy as jnp

from experiments.recall.experiment import ExperimentConfig
from experiments.recall.run import make_task
from seqmodels.training.task import Variables

_OPTIMIZER = 4
"""Arrays of the size of the parameters: themselves, their gradient, Adam's two moments."""


def bytes_needed(config: ExperimentConfig) -> int:
    """About what a training step holds at once: parameters, moments, and what backward reads.

    Nothing is computed: the step is traced. The compiler needs up to as much again for arrays that
    live for a moment.
    """
    task = make_task(config)
    variables = jax.eval_shape(task.init, jax.random.key(0))
    rows = config.train.batch_size // config.train.accumulate
    shape = (rows, config.data.tokens * config.repeats)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype)
        for name, dtype in (
            ("inputs", jnp.int32), ("targets", jnp.int32), ("segment_ids", jnp.int32),
            ("weights", jnp.float32),
        )
    }  # fmt: skip

    def loss(variables: Variables, batch: dict[str, jax.Array]) -> jax.Array:
        return task.loss(variables, batch, jax.random.key(0), None)[0].loss

    def residuals(variables: Variables, batch: dict[str, jax.Array]) -> list[jax.Array]:
        _, backward = jax.vjp(lambda v: loss(v, batch), variables)
        return jax.tree.leaves(backward)

    kept = jax.eval_shape(residuals, variables, batch)
    return _size(kept) + _OPTIMIZER * _size(variables)


def _size(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_free() -> int | None:
    """Memory that the first device, or for a CPU the machine, has left; None where none says."""
    device = jax.devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
