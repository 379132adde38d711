"""Arguments, cotangents and checks that every implementation of `linear_scan` is tested with."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import linear_scan
from pallas_kernels.common import segments
from pallas_kernels.common.backend import call_op
from pallas_kernels.linear_scan.api import OP
from pallas_kernels.linear_scan.tile import Config
from pallas_kernels.tools import testing

COMPLEX, REAL = "complex64", "float32"


class Case:
    """Random arguments and cotangents; decays around the unit circle and below."""

    def __init__(
        self,
        *,
        length,
        dtype=REAL,
        batch=2,
        width=5,
        constant=False,
        packed=False,
        reverse=False,
        seed=0,
    ):
        rng = np.random.default_rng(seed)

        def normal(*shape, dtype=dtype):
            x = rng.standard_normal(shape)
            if np.dtype(dtype).kind == "c":
                x = (x + 1j * rng.standard_normal(shape)) / 2
            return jnp.asarray(x.astype(dtype))

        state = "float32" if dtype == "bfloat16" else dtype
        self.args = (
            normal(width) * 0.6 if constant else normal(batch, length, width) * 0.6,
            normal(batch, length, width),
            normal(batch, width, dtype=state),
        )
        self.cotangents = (normal(batch, length, width), normal(batch, width, dtype=state))
        self.ids = jnp.asarray(testing.random_ids(rng, batch, length)) if packed else None
        self.reverse = reverse

    def oracle(self):
        """The same numbers through the sequential reference in double precision."""
        with jax.enable_x64(True):
            args, cotangents = testing.doubled((self.args, self.cotangents))
            run = testing.oracle(_scan, reverse=self.reverse, implementation="reference")
            return jax.tree.map(np.asarray, run(args, {"segment_ids": self.ids}, cotangents))

    def run(self, implementation, *, tiles=None, args=None, ids=None):
        ids = self.ids if ids is None else ids
        options = {"reverse": self.reverse, "implementation": implementation}
        if tiles is None:
            run = testing.program(_scan, **options)
        else:
            run = testing.program(_scan_in_tiles, **options, tiles=tiles)
        return run(args or self.args, {"segment_ids": ids}, self.cotangents)


def _scan(a, b, initial_state, **options):
    return linear_scan(a, b, initial_state=initial_state, **options)


def _scan_in_tiles(a, b, initial_state, *, segment_ids, reverse, tiles, implementation):
    index = None if segment_ids is None else segments.index(segment_ids)
    arrays = a, b, initial_state, index
    config = Config(reverse, tiles)
    return call_op(OP, config, *arrays, length=b.shape[1], implementation=implementation)


def assert_isolated(run, case):
    """New finite values in the second document change no bit of the others."""
    a, b, initial = case.args
    length = b.shape[1]
    ids = np.ones(b.shape[:2], np.int32)
    ids[:, length // 3 :] = 2
    ids[:, 2 * length // 3 :] = 1
    inside = jnp.asarray(ids == 2)[..., None]
    # Large enough to overflow to infinity inside the document.
    changed = (jnp.where(inside, a * 0 + 1e30, a), jnp.where(inside, b * 0 + 1e30, b), initial)
    before = run(ids=jnp.asarray(ids))
    after = run(args=changed, ids=jnp.asarray(ids))

    def elsewhere(result):
        h, final = result["outputs"]
        da, db, dinitial = result["gradients"]
        outside = ids != 2
        return [np.asarray(x)[outside] for x in (h, da, db)] + [np.asarray(final), dinitial]

    for x, y in zip(elsewhere(before), elsewhere(after), strict=True):
        np.testing.assert_array_equal(x, y)
