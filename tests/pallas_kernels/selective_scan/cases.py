"""Arguments, cotangents and checks that every implementation of `selective_scan` is tested with."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import selective_scan
from pallas_kernels.common import segments
from pallas_kernels.common.backend import call_op
from pallas_kernels.selective_scan.api import OP
from pallas_kernels.selective_scan.tile import Config
from pallas_kernels.tools import testing

NAMES = ("x", "dt", "A", "B", "C", "D", "gate", "dt_bias", "initial_state")


class Case:
    """Random arguments and cotangents, as Mamba begins: A from -1 to -N, dt from 1e-3 to 0.1.

    `full` adds what is optional: D, the gate, the bias of dt and its softplus.
    """

    def __init__(
        self,
        *,
        length,
        dtype="float32",
        batch=2,
        width=5,
        states=4,
        full=True,
        packed=False,
        reverse=False,
        seed=0,
    ):
        rng = np.random.default_rng(seed)
        wide = "float64" if dtype == "float64" else "float32"

        def normal(*shape, dtype=dtype):
            return jnp.asarray(rng.standard_normal(shape).astype(dtype))

        dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), (batch, length, width)))
        bias = rng.uniform(-0.5, 0.5, width)
        if full:
            dt = np.log(np.expm1(dt)) - bias
        A = -np.arange(1, states + 1) * np.ones((width, 1))
        self.args = {
            "x": normal(batch, length, width),
            "dt": jnp.asarray(dt.astype(dtype)),
            "A": jnp.asarray(A.astype(wide)),
            "B": normal(batch, length, states),
            "C": normal(batch, length, states),
            "D": normal(width, dtype=wide) if full else None,
            "gate": normal(batch, length, width) if full else None,
            "dt_bias": jnp.asarray(bias.astype(wide)) if full else None,
            "initial_state": normal(batch, width, states, dtype=wide),
        }
        self.cotangents = (
            normal(batch, length, width),
            normal(batch, width, states, dtype=wide),
        )
        self.ids = jnp.asarray(testing.random_ids(rng, batch, length)) if packed else None
        self.options = {"dt_softplus": full, "reverse": reverse}

    def oracle(self):
        """The same numbers through the sequential reference in double precision."""
        with jax.enable_x64(True):
            args, cotangents = testing.doubled((_present(self.args), self.cotangents))
            run = testing.oracle(selective_scan, **self.options, implementation="reference")
            return jax.tree.map(np.asarray, run(args, {"segment_ids": self.ids}, cotangents))

    def run(self, implementation, *, tiles=None, args=None, ids=None):
        """`{"outputs": (y, final_state), "gradients": {name: gradient}}`."""
        ids = self.ids if ids is None else ids
        options = self.options | {"implementation": implementation}
        if tiles is None:
            run = testing.program(selective_scan, **options)
        else:
            run = testing.program(_scan_in_tiles, **options, tiles=tiles)
        return run(_present(args or self.args), {"segment_ids": ids}, self.cotangents)


def _scan_in_tiles(*, segment_ids, dt_softplus, reverse, tiles, implementation, **args):
    index = None if segment_ids is None else segments.index(segment_ids)
    arrays = *map(args.get, NAMES), index
    config, length = Config(dt_softplus, reverse, tiles), args["x"].shape[1]
    return call_op(OP, config, *arrays, length=length, implementation=implementation)


def _present(args):
    return {name: z for name, z in args.items() if z is not None}


def assert_isolated(run, case):
    """New finite values in the second document change no bit of the others."""
    batch, length = case.args["x"].shape[:2]
    ids = np.ones((batch, length), np.int32)
    ids[:, length // 3 :] = 2
    ids[:, 2 * length // 3 :] = 1
    inside = jnp.asarray(ids == 2)[..., None]
    # Large enough to overflow to infinity inside the document.
    tokens = [name for name in ("x", "dt", "B", "C", "gate") if case.args[name] is not None]
    huge = {name: jnp.where(inside, 1e30, case.args[name]) for name in tokens}
    before = run(ids=jnp.asarray(ids))
    after = run(args=case.args | huge, ids=jnp.asarray(ids))

    def elsewhere(result):
        y, final = result["outputs"]
        gradients = result["gradients"]
        by_token = [np.asarray(z)[ids != 2] for z in (y, *(gradients[name] for name in tokens))]
        return [*by_token, np.asarray(final), np.asarray(gradients["initial_state"])]

    for old, new in zip(elsewhere(before), elsewhere(after), strict=True):
        np.testing.assert_array_equal(old, new)
