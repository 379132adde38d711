"""Arguments, cotangents and checks that every implementation of `delta_rule` is tested with."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import delta_rule
from pallas_kernels.tools import testing

DECAYS = (None, "head", "key")


def normalised(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Case:
    """Random arguments and cotangents: keys of norm 1, beta in (0, 1), memories of 2 to 50 tokens.

    `heads` are H, `groups` G; K and V are `size`.
    """

    def __init__(
        self,
        *,
        length,
        decay="head",
        dtype="float32",
        batch=3,
        groups=2,
        heads=4,
        size=(8, 6),
        packed=False,
        scale=None,
        seed=0,
    ):
        rng = np.random.default_rng(seed)
        wide = "float64" if dtype == "float64" else "float32"
        keys, values = size

        def normal(*shape, dtype=dtype):
            return jnp.asarray(rng.standard_normal(shape).astype(dtype))

        tokens = (batch, length)
        self.args = {
            "q": normal(*tokens, groups, keys),
            "k": jnp.asarray(
                normalised(rng.standard_normal((*tokens, groups, keys))).astype(dtype)
            ),
            "v": normal(*tokens, heads, values),
            "beta": jnp.asarray(rng.uniform(0, 1, (*tokens, heads)).astype(dtype)),
        }
        if decay is not None:
            shape = (*tokens, heads, keys) if decay == "key" else (*tokens, heads)
            decays = -np.exp(rng.uniform(np.log(0.02), np.log(0.5), shape))
            self.args["log_decay"] = jnp.asarray(decays, wide)
        self.args["initial_state"] = normal(batch, heads, keys, values, dtype=wide)
        self.cotangents = (
            normal(*tokens, heads, values),
            normal(batch, heads, keys, values, dtype=wide),
        )
        self.ids = jnp.asarray(testing.random_ids(rng, batch, length)) if packed else None
        self.scale = scale

    @property
    def tokens(self):
        """Names of the arguments that have a length."""
        return [name for name in self.args if name != "initial_state"]

    def oracle(self):
        """The same numbers through the sequential reference in double precision."""
        with jax.enable_x64(True):
            args, cotangents = testing.doubled((self.args, self.cotangents))
            run = testing.oracle(delta_rule, scale=self.scale, implementation="reference")
            return jax.tree.map(np.asarray, run(args, {"segment_ids": self.ids}, cotangents))

    def run(self, implementation, *, args=None, ids=None):
        """`{"outputs": (o, final_state), "gradients": {name: gradient}}`."""
        ids = self.ids if ids is None else ids
        run = testing.program(delta_rule, scale=self.scale, implementation=implementation)
        return run(self.args if args is None else args, {"segment_ids": ids}, self.cotangents)


def assert_isolated(run, case):
    """New finite values in the second document change no bit of the others."""
    batch, length = case.args["v"].shape[:2]
    ids = np.ones((batch, length), np.int32)
    ids[:, length // 3 :] = 2
    ids[:, 2 * length // 3 :] = 1
    before = run(ids=jnp.asarray(ids))

    def elsewhere(result):
        o, final = result["outputs"]
        gradients = result["gradients"]
        by_token = [np.asarray(x)[ids != 2] for x in (o, *(gradients[n] for n in case.tokens))]
        return [*by_token, np.asarray(final), np.asarray(gradients["initial_state"])]

    def replaced(name, value):
        x = case.args[name]
        inside = jnp.asarray(ids == 2).reshape(*ids.shape, *[1] * (x.ndim - 2))
        return jnp.where(inside, jnp.asarray(value, x.dtype), x)

    # Overflows inside the document, at once or by and by; and one that decays to nothing.
    huge = dict.fromkeys(case.tokens, 1e30) | {"log_decay": -1e30}
    for values in (huge, {"k": 20.0}, {"log_decay": -1e4, "beta": 0.0}):
        new = {n: replaced(n, x) for n, x in values.items() if n in case.args}
        after = run(args=case.args | new, ids=jnp.asarray(ids))
        for old, new in zip(elsewhere(before), elsewhere(after), strict=True):
            np.testing.assert_array_equal(old, new)
