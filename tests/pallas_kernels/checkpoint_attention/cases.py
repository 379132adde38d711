"""Arguments and checks that every implementation of `checkpoint_attention` is tested with."""

import copy

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import checkpoint_attention
from pallas_kernels.checkpoint_attention import tile
from pallas_kernels.checkpoint_attention.api import OP
from pallas_kernels.checkpoint_attention.slots import Config
from pallas_kernels.common import segments
from pallas_kernels.common.backend import call_op
from pallas_kernels.tools import testing

FLOATS = ("q", "k", "v", "past_k", "past_v")


class Case:
    """Random arguments and cotangents; `past` checkpoints of earlier calls."""

    def __init__(
        self,
        *,
        length,
        interval=4,
        dtype="float32",
        batch=2,
        groups=1,
        heads=2,
        key_size=5,
        value_size=3,
        packed=False,
        past=0,
        past_length=None,
        own=True,
        seed=0,
    ):
        rng = np.random.default_rng(seed)

        def normal(*shape, dtype=dtype):
            return jnp.asarray(rng.standard_normal(shape).astype(dtype))

        rows = (batch, length)
        self.args = {"q": normal(*rows, heads, key_size), "k": None, "v": None}
        if own:
            self.args["k"] = normal(*rows, groups, key_size)
            self.args["v"] = normal(*rows, groups, value_size)
        self.options = {"interval": interval}
        if past:
            self.args["past_k"] = normal(batch, past, groups, key_size)
            self.args["past_v"] = normal(batch, past, groups, value_size)
            if past_length is not None:
                self.options["past_length"] = jnp.asarray(past_length, jnp.int32)
            if own:
                offset = rng.integers(0, interval, batch) + interval * past
                self.options["offset"] = jnp.asarray(offset, jnp.int32)
        if packed:
            ids = jnp.asarray(testing.random_ids(rng, batch, length))
            self.options["segment_ids"] = ids
        wide = "float32" if dtype == "bfloat16" else dtype
        self.cotangents = normal(*rows, heads, value_size), normal(*rows, heads, dtype=wide)

    def replaced(self, **args):
        """The same case with other arguments."""
        case = copy.copy(self)
        case.args = self.args | {n: x for n, x in args.items() if n in FLOATS}
        case.options = self.options | {n: x for n, x in args.items() if n not in FLOATS}
        return case

    def oracle(self):
        """The same numbers through the sequential reference in double precision."""
        with jax.enable_x64(True):
            args, cotangents = testing.doubled((self.args, self.cotangents))
            result = self._run(testing.oracle, "reference", args, cotangents)
            return jax.tree.map(np.asarray, result)

    def run(self, implementation, tiles=None):
        """`{"outputs": (o, lse), "gradients": {name: ...}}`; -inf in `lse` is 0."""
        return self._run(testing.program, implementation, self.args, self.cotangents, tiles)

    def _run(self, program, implementation, args, cotangents, tiles=None):
        data = {n: x for n, x in self.options.items() if hasattr(x, "shape")}
        static = {n: x for n, x in self.options.items() if n not in data}
        op = _attention
        if tiles is not None:
            op, static = _attention_in_tiles, static | {"tiles": tiles}
        return program(op, **static, implementation=implementation)(args, data, cotangents)


def _attention(**options):
    return _present(*checkpoint_attention(**options, return_lse=True))


def _attention_in_tiles(
    q, k, v, past_k=None, past_v=None, past_length=None, offset=None, segment_ids=None,
    *, interval, tiles, implementation,
):  # fmt: skip
    index = None if segment_ids is None else segments.index(segment_ids)
    arrays = q, k, v, past_k, past_v, past_length, offset, index
    config = Config(float(q.shape[3] ** -0.5), interval, tiles)
    length = q.shape[1]
    o, lse = call_op(OP, config, *arrays, length=length, implementation=implementation)
    return _present(o, tile.or_infinity(lse))


def _present(o, lse):
    return o, jnp.where(jnp.isneginf(lse), 0.0, lse)


def assert_isolated(run, case):
    """New finite values in the second document change no bit of the others.

    `run(case)` gives what `Case.run` gives.
    """
    batch, length = case.args["q"].shape[:2]
    ids = np.ones((batch, length), np.int32)
    ids[:, length // 3 :] = 2
    ids[:, 2 * length // 3 :] = 1
    inside = ids == 2

    def large(x):
        mask = inside.reshape(*inside.shape, *[1] * (x.ndim - 2))
        return jnp.where(mask, jnp.asarray(1e30, x.dtype), x)

    case = case.replaced(segment_ids=jnp.asarray(ids))
    changed = {name: large(case.args[name]) for name in ("q", "k", "v")}
    before, after = run(case), run(case.replaced(**changed))

    def elsewhere(result):
        by_token = [*result["outputs"], *(result["gradients"][name] for name in ("q", "k", "v"))]
        rest = [x for n, x in result["gradients"].items() if n.startswith("past")]
        return [np.asarray(x)[~inside] for x in by_token] + rest

    for x, y in zip(elsewhere(before), elsewhere(after), strict=True):
        np.testing.assert_array_equal(x, y)
        assert np.isfinite(np.asarray(x, np.float32)).all()
