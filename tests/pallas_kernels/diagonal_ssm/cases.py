"""Arguments, cotangents and checks that every implementation of `diagonal_ssm` is tested with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import diagonal_ssm
from pallas_kernels.common import segments
from pallas_kernels.common.backend import call_op
from pallas_kernels.diagonal_ssm.api import OP
from pallas_kernels.diagonal_ssm.tile import Config
from pallas_kernels.tools import testing


class Case:
    """Random arguments and cotangents. Models remember 2 to 50 steps, phases are all there are."""

    def __init__(
        self,
        *,
        length,
        dtype="float32",
        batch=2,
        width=3,
        states=4,
        packed=False,
        reverse=False,
        method=None,
        decay=(0.02, 0.5),
        seed=0,
    ):
        rng = np.random.default_rng(seed)
        wide = "complex128" if dtype == "float64" else "complex64"

        def normal(*shape, dtype=dtype):
            x = rng.standard_normal(shape)
            if np.dtype(dtype).kind == "c":
                x = (x + 1j * rng.standard_normal(shape)) / 2
            return jnp.asarray(x.astype(dtype))

        shape = (width, states)
        log_a = -rng.uniform(*decay, shape) + 1j * rng.uniform(-np.pi, np.pi, shape)
        self.args = (
            normal(batch, length, width),
            jnp.asarray(log_a.astype(wide)),
            normal(*shape, dtype=wide),
            normal(batch, *shape, dtype=wide),
        )
        self.cotangents = (normal(batch, length, width), normal(batch, *shape, dtype=wide))
        self.ids = jnp.asarray(testing.random_ids(rng, batch, length)) if packed else None
        self.reverse = reverse
        self.method = method

    def oracle(self):
        """The same numbers through the sequential reference in double precision."""
        with jax.enable_x64(True):
            args, cotangents = testing.doubled((self.args, self.cotangents))
            run = testing.oracle(_ssm, reverse=self.reverse, implementation="reference")
            return jax.tree.map(np.asarray, run(args, {"segment_ids": self.ids}, cotangents))

    def run(self, implementation, *, tiles=None, args=None, ids=None):
        ids = self.ids if ids is None else ids
        options = {"reverse": self.reverse, "method": self.method, "implementation": implementation}
        if self.method == "fft" and ids is not None:  # wants to know the ids when it is traced
            op = functools.partial(_ssm, segment_ids=ids, **options)
            return testing.value_and_gradients(op, *(args or self.args), cotangents=self.cotangents)
        if tiles is None:
            run = testing.program(_ssm, **options)
        else:
            run = testing.program(_ssm_in_tiles, **options, tiles=tiles)
        return run(args or self.args, {"segment_ids": ids}, self.cotangents)


def _ssm(u, log_a, c, initial_state, **options):
    return diagonal_ssm(u, log_a, c, initial_state=initial_state, **options)


def _ssm_in_tiles(
    u, log_a, c, initial_state, *, segment_ids, reverse, method, tiles, implementation
):
    index = None if segment_ids is None else segments.index(segment_ids)
    arrays = u, log_a, c, initial_state, index
    config = Config(reverse, method, tiles)
    return call_op(OP, config, *arrays, length=u.shape[1], implementation=implementation)


def assert_isolated(run, case):
    """New finite values in the second document change no bit of the others."""
    u, *others = case.args
    length = u.shape[1]
    ids = np.ones(u.shape[:2], np.int32)
    ids[:, length // 3 :] = 2
    ids[:, 2 * length // 3 :] = 1
    inside = jnp.asarray(ids == 2)[..., None]
    # Large enough to overflow to infinity inside the document.
    changed = (jnp.where(inside, u * 0 + 3e38, u), *others)
    before = run(ids=jnp.asarray(ids))
    after = run(args=changed, ids=jnp.asarray(ids))

    def elsewhere(result):
        y, final = result["outputs"]
        du, _, _, dinitial = result["gradients"]
        outside = ids != 2
        return [np.asarray(x)[outside] for x in (y, du)] + [np.asarray(final), dinitial]

    for x, y in zip(elsewhere(before), elsewhere(after), strict=True):
        np.testing.assert_array_equal(x, y)
