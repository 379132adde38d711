"""Arguments, cotangents and checks that every implementation of `causal_conv1d` is tested with."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import causal_conv1d
from pallas_kernels.causal_conv1d import reference
from pallas_kernels.causal_conv1d.api import OP
from pallas_kernels.causal_conv1d.tile import Config, final_window
from pallas_kernels.common import segments
from pallas_kernels.common.backend import call_op
from pallas_kernels.tools import testing


class Case:
    """Random arguments and cotangents; short and long documents where `packed`."""

    def __init__(
        self,
        *,
        length,
        conv_size=4,
        dtype="float32",
        batch=2,
        width=5,
        activation="silu",
        packed=False,
        seed=0,
    ):
        rng = np.random.default_rng(seed)

        def normal(*shape, dtype=dtype):
            return jnp.asarray(rng.standard_normal(shape).astype(dtype))

        weights = "float32" if dtype == "bfloat16" else dtype
        window = (batch, conv_size - 1, width)
        self.args = (
            normal(batch, length, width),
            normal(conv_size, width, dtype=weights),
            normal(width, dtype=weights),
            normal(*window),
        )
        self.cotangents = (normal(batch, length, width), normal(*window))
        self.ids = jnp.asarray(testing.random_ids(rng, batch, length)) if packed else None
        self.activation = activation

    def oracle(self):
        """The same numbers through the sequential reference in double precision."""
        with jax.enable_x64(True):
            args, cotangents = testing.doubled((self.args, self.cotangents))
            run = testing.oracle(_reference, activation=self.activation)
            result = run(args, {"segment_ids": self.ids}, cotangents)
            return _present(jax.tree.map(np.asarray, result))

    def run(self, implementation, *, tiles=None, args=None, ids=None):
        ids = self.ids if ids is None else ids
        options = {"activation": self.activation, "implementation": implementation}
        if tiles is None:
            run = testing.program(_conv, **options)
        else:
            run = testing.program(_conv_in_tiles, **options, tiles=tiles)
        return _present(run(args or self.args, {"segment_ids": ids}, self.cotangents))


def _conv(x, weight, bias, initial_state, **options):
    return causal_conv1d(x, weight, bias, initial_state=initial_state, **options)


def _conv_in_tiles(
    x, weight, bias, initial_state, *, segment_ids, activation, tiles, implementation
):
    index = None if segment_ids is None else segments.index(segment_ids)
    arrays = x, weight, bias, initial_state, index
    config = Config(activation, tiles)
    (y,) = call_op(OP, config, *arrays, length=x.shape[1], implementation=implementation)
    return y, final_window(x, initial_state, index)


def _reference(*args, segment_ids, activation):
    segment_index = None if segment_ids is None else segments.index(segment_ids)
    return reference.with_state(Config(activation), *args, segment_index)


def _present(result):
    """Without empty arrays: one tap has a window of no tokens."""
    return jax.tree.map(lambda x: x if x.size else None, result)


def assert_isolated(run, case):
    """New values in the second document, infinite ones or ones that overflow, change no bit of the
    others."""
    x, weight, bias, initial = case.args
    length = x.shape[1]
    ids = np.ones(x.shape[:2], np.int32)
    ids[:, length // 3 :] = 2
    ids[:, 2 * length // 3 :] = 1
    inside = jnp.asarray(ids == 2)[..., None]
    value = jnp.array([1e30, jnp.inf], x.dtype)[:, None, None]
    changed = (jnp.where(inside, value, x), weight, bias, initial)
    before = run(ids=jnp.asarray(ids))
    after = run(args=changed, ids=jnp.asarray(ids))

    def elsewhere(result):
        y, final = result["outputs"]
        dx, _, _, dinitial = result["gradients"]
        return [np.asarray(a)[ids != 2] for a in (y, dx)] + [np.asarray(final), dinitial]

    for a, b in zip(elsewhere(before), elsewhere(after), strict=True):
        np.testing.assert_array_equal(a, b)
