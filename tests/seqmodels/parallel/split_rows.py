"""Rows of documents that are split over shards, and what they are compared with."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from pallas_kernels.common import segments as segment_ops
from pallas_kernels.tools import testing
from tests import tolerances

LENGTH = 48
"""Over 1, 2, 3 and 8 shards: of 48, 24, 16 and 6 tokens."""

# Ends of documents. Row 0 is one document; in row 1 documents end at a shard's edge, one token
# before and one behind; row 2 has documents over two and three shards; the last shards of rows 2
# and 3 are nothing but padding.
_ENDS = ((48,), (5, 6, 17, 19, 24, 31, 41, 48), (3, 8, 14, 31, 40), (1, 2, 4, 7, 15))


def documents():
    """Ids ``(4, LENGTH)``, runs and positions."""
    ids = np.zeros((len(_ENDS), LENGTH), np.int32)
    for row, ends in enumerate(_ENDS):
        for number, (first, last) in enumerate(zip((0, *ends), ends, strict=False)):
            ids[row, first:last] = number + 1
    runs = jax.jit(segment_ops.index)(ids)
    return ids, np.asarray(runs), np.asarray(jax.jit(segment_ops.positions)(runs))


def mesh(shards, rows=1, model=1):
    """``rows`` times ``model`` times ``shards`` devices; the axes of `make_mesh`."""
    devices = np.asarray(jax.devices()[: rows * model * shards]).reshape(rows, model, shards)
    return Mesh(devices, ("data", "model", "seq"), axis_types=(AxisType.Auto,) * 3)


ROWS = PartitionSpec("data")
TOKENS = PartitionSpec("data", "seq")


def sharded(op, mesh, args=TOKENS, data=TOKENS, *, outputs=TOKENS, check_vma=True):
    """``op(args, data)`` on each shard, of trees of arrays that are split as the specs say."""
    return jax.shard_map(
        op, mesh=mesh, in_specs=(args, data), out_specs=outputs, check_vma=check_vma
    )


class Program:
    """``op(args, data)`` and its gradients, compiled.

    Attributes:
      asked: how often each collective stands in what is given to the compiler.
      issued: how often in what comes out, where equal ones have become one.
      temporary: bytes of memory besides arguments and results, on each device.
    """

    def __init__(self, op, args, data, cotangents):
        def run(args, data, cotangents):
            outputs, pullback = jax.vjp(lambda args: op(args, data), args)
            return {"outputs": outputs, "gradients": pullback(cotangents)[0]}

        lowered = jax.jit(run).lower(args, data, cotangents)
        self._run = lowered.compile()
        self.asked = Counter(_ASKED.findall(lowered.as_text()))
        self.issued = Counter(x.replace("-", "_") for x in _ISSUED.findall(self._run.as_text()))
        self.temporary = self._run.memory_analysis().temp_size_in_bytes

    def __call__(self, args, data, cotangents):
        return jax.tree.map(np.asarray, self._run(args, data, cotangents))


_KINDS = "collective.permute|all.gather|all.to.all|reduce.scatter|all.reduce"
_ASKED = re.compile(rf"stablehlo\.({_KINDS})\W")
_ISSUED = re.compile(rf" ({_KINDS})(?:-start)?\(")


def assert_shards_close(actual, expected, shards, tolerance=tolerances.FLOAT32):
    """Every shard of every leaf ``(B, L, ..)`` by itself, and every row."""

    def split(x):
        x = np.asarray(x, np.float64)
        return {
            f"shard {i}, row {row}": part
            for i, shard in enumerate(np.split(x, shards, axis=1))
            for row, part in enumerate(shard)
        }

    actual, expected = jax.tree.map(split, actual), jax.tree.map(split, expected)
    testing.assert_close(actual, expected, tolerance)


def in_float64(op, args, data, cotangents):
    """The result of `Program(op, ..)` in float64."""
    with jax.enable_x64(True):
        wide = functools.partial(jax.tree.map, lambda x: jnp.asarray(np.asarray(x), jnp.float64))
        args, cotangents = wide(args), wide(cotangents)
        return Program(op, args, data, cotangents)(args, data, cotangents)
