"""Arguments and checks that every implementation of `linear_attention` is tested with."""

import copy

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import linear_attention
from pallas_kernels.tools import testing

NAMES = ("q", "k", "v", "log_decay", "initial_state")


class Case:
    """Random arguments and cotangents; log decays from -1e-3 to -3."""

    def __init__(
        self,
        *,
        length,
        decay="head",
        dtype="float32",
        batch=2,
        groups=1,
        heads=2,
        key_size=5,
        value_size=3,
        packed=False,
        seed=0,
    ):
        rng = np.random.default_rng(seed)

        def normal(*shape, dtype=dtype):
            return jnp.asarray(rng.standard_normal(shape).astype(dtype))

        wide = "float32" if dtype == "bfloat16" else dtype
        rows = (batch, length)
        shapes = {
            "constant": (heads,),
            "head": (*rows, heads),
            "key": (*rows, heads, key_size),
        }
        log_decay = None
        if decay is not None:
            log_decay = jnp.asarray(-(10 ** rng.uniform(-3, 0.5, shapes[decay])), wide)
        self.args = {
            "q": normal(*rows, groups, key_size),
            "k": normal(*rows, groups, key_size),
            "v": normal(*rows, heads, value_size),
            "log_decay": log_decay,
            "initial_state": normal(batch, heads, key_size, value_size, dtype=wide),
        }
        self.cotangents = (
            normal(*rows, heads, value_size),
            normal(batch, heads, key_size, value_size, dtype=wide),
        )
        self.ids = jnp.asarray(testing.random_ids(rng, batch, length)) if packed else None

    def replaced(self, **args):
        """The same case with other arguments."""
        case = copy.copy(self)
        case.args = self.args | args
        return case

    def oracle(self):
        """The same numbers through the sequential reference in double precision."""
        with jax.enable_x64(True):
            args, cotangents = testing.doubled((self.args, self.cotangents))
            run = testing.oracle(linear_attention, implementation="reference")
            return jax.tree.map(np.asarray, run(args, {"segment_ids": self.ids}, cotangents))

    def run(self, implementation, *, ids=None):
        """`{"outputs": (o, final_state), "gradients": {name: ...}}`."""
        ids = self.ids if ids is None else ids
        run = testing.program(linear_attention, implementation=implementation)
        return run(self.args, {"segment_ids": ids}, self.cotangents)


def assert_isolated(run, case):
    """New finite values in the second document change no bit of the others.

    `run(case, ids=...)` gives what `Case.run` gives.
    """
    batch, length = case.args["v"].shape[:2]
    ids = np.ones((batch, length), np.int32)
    ids[:, length // 3 :] = 2
    ids[:, 2 * length // 3 :] = 1
    inside = ids == 2

    def large(x, by):
        mask = inside.reshape(*inside.shape, *[1] * (x.ndim - 2))
        return jnp.where(mask, jnp.asarray(by, x.dtype), x)

    args = case.args
    changed = {name: large(args[name], 1e30) for name in ("q", "k", "v")}
    if args["log_decay"] is not None and args["log_decay"].ndim > 1:
        changed["log_decay"] = large(args["log_decay"], -1e30)
    before = run(case, ids=jnp.asarray(ids))
    after = run(case.replaced(**changed), ids=jnp.asarray(ids))

    def elsewhere(result):
        o, final = result["outputs"]
        gradients = result["gradients"]
        by_token = [o] + [gradients[name] for name in NAMES[:3]]
        if "log_decay" in changed:
            by_token.append(gradients["log_decay"])
        return [np.asarray(x)[~inside] for x in by_token] + [final, gradients["initial_state"]]

    for x, y in zip(elsewhere(before), elsewhere(after), strict=True):
        np.testing.assert_array_equal(x, y)
        assert np.isfinite(np.asarray(x, np.float32)).all()
