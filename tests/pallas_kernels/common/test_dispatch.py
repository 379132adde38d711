"""What is chosen by platform or size, and that `explain` names all of it."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import (
    bidirectional_mimo_scan,
    causal_conv1d,
    checkpoint_attention,
    delta_rule,
    diagonal_ssm,
    explain,
    linear_attention,
    linear_scan,
    long_conv,
    s4_kernel,
    selective_scan,
)
from pallas_kernels.checkpoint_attention import Cache
from pallas_kernels.common import dispatch, products
from seqmodels.layers.attention import attend
from seqmodels.mixers import S4Config, build

WAYS = {"plus": lambda x: x + 1, "minus": lambda x: x - 1}


def taken(op, *args, **options):
    """`{what: {platform: way}}`"""
    found = {}
    for choice in explain(op, *args, **options):
        found.setdefault(choice.op, {})[choice.platform] = choice.implementation
    return found


def everywhere(name, **others):
    return dict.fromkeys(dispatch.PLATFORMS, name) | others


def choose(x, unsupported=None):
    return dispatch.choose("op", WAYS, x, default="minus", cpu="plus", unsupported=unsupported)


def test_a_choice_runs_what_it_says():
    assert taken(choose, jnp.ones(2)) == {"op": everywhere("minus", cpu="plus")}
    np.testing.assert_array_equal(jax.jit(choose)(jnp.ones(2)), [2, 2])
    lowered = jax.jit(choose).trace(jnp.ones(2)).lower(lowering_platforms=("tpu",)).as_text()
    assert "subtract" in lowered


def test_a_way_that_does_not_serve_is_named_with_its_reason():
    why = {"plus": "it is too small"}
    np.testing.assert_array_equal(choose(jnp.ones(2), why), [0, 0])
    by_platform = {c.platform: c for c in explain(lambda x: choose(x, why), jnp.ones(2))}
    assert str(by_platform["cpu"]) == "op on cpu: minus; not plus: it is too small"
    assert by_platform["tpu"].skipped == {}


def test_a_function_that_has_been_compiled_is_explained_too():
    run, x = jax.jit(linear_scan), jnp.ones((1, 4, 3)) / 2
    run(x, x)
    found = taken(run, x, x)
    assert found == taken(run, x, x)
    assert found["linear_scan"] == everywhere("xla", tpu="tpu", cuda="gpu")
    assert run._cache_size() == 1


def test_a_preference_holds_inside_and_where_the_call_names_none():
    run, x = jax.jit(linear_scan), jnp.ones((1, 4, 3)) / 2
    usual = taken(run, x, x)
    with dispatch.preferring("reference"):
        assert taken(run, x, x)["linear_scan"] == everywhere("reference")
        named = taken(linear_scan, x, x, implementation="xla")
        assert named["linear_scan"] == everywhere("xla")
        assert taken(run, x[:, :1], x[:, :1])["linear_scan"] == everywhere("xla")
    assert taken(run, x, x) == usual
    with dispatch.preferring("tpu"):  # which has no kernel for it
        assert taken(long_conv, x, x[0].T)["long_conv"] == everywhere("xla")


def backends_in(fn, *args):
    """Backends whose Pallas kernels are in the traced program of `fn`, known by parameters."""
    program = str(jax.make_jaxpr(fn)(*args))
    marks = {"tpu": "dimension_semantics", "gpu": "num_warps"}
    return {backend for backend, mark in marks.items() if mark in program}


def test_for_one_platform_no_other_is_traced():
    run, x = jax.jit(linear_scan), jnp.ones((1, 4, 3)) / 2
    usual = taken(run, x, x)
    assert backends_in(run, x, x) == {"tpu", "gpu"}
    for platform, kernels in (("cpu", set()), ("tpu", {"tpu"}), ("gpu", {"gpu"})):
        with dispatch.only_for(platform):
            assert backends_in(run, x, x) == kernels
            assert taken(run, x, x) == usual  # all platforms are explained even so
            assert backends_in(jax.grad(lambda x: linear_scan(x, x)[0].sum()), x) == kernels
    assert backends_in(run, x, x) == {"tpu", "gpu"}
    with dispatch.only_for("gpu"):
        lowered = run.trace(x, x).lower(lowering_platforms=("rocm",)).as_text()
    assert "triton" not in lowered.lower()


def test_a_kernel_forced_where_it_does_not_run_is_taken_at_its_word():
    x = jnp.ones((1, 4, 3)) / 2
    with dispatch.only_for("cpu"):
        assert backends_in(lambda x: linear_scan(x, x, implementation="tpu"), x) == {"tpu"}


def test_the_platform_is_where_the_arrays_are():
    x = jnp.ones((1, 4, 3)) / 2

    def inside(arrays):
        with dispatch.where(arrays):
            return backends_in(linear_scan, x, x)

    assert inside({"on a device": x, "in numpy": np.ones(2)}) == inside([np.ones(2)]) == set()
    traced = []
    jax.eval_shape(lambda arrays: traced.append(inside(arrays)), {"traced": x, "not": np.ones(2)})
    assert traced == [{"tpu", "gpu"}]


def test_unknown_platforms_are_refused():
    with (
        pytest.raises(ValueError, match="platform='npu' is unknown; one of gpu, cpu, tpu"),
        dispatch.only_for("npu"),
    ):
        pass


def on_a_gpu(monkeypatch, capability):
    gpu = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])


@pytest.mark.parametrize(
    ("capability", "segment_index"), [("7.5", "xla"), ("8.0", "gpu"), ("10.0", "gpu")]
)
def test_an_old_gpu_takes_the_portable_path(monkeypatch, capability, segment_index):
    x = jnp.ones((1, 4, 3)) / 2
    on_a_gpu(monkeypatch, capability)
    choices = {c.platform: c for c in explain(linear_scan, x, x) if c.op == "linear_scan"}
    assert choices["cuda"].implementation == segment_index
    if segment_index == "xla":
        assert "of this machine has compute capability 7.5" in choices["cuda"].skipped["gpu"]


def test_an_old_gpu_refuses_the_kernels_with_the_reason(monkeypatch):
    x = jnp.ones((1, 4, 3)) / 2
    on_a_gpu(monkeypatch, "7.5")
    for requested in ("gpu", ["gpu"]):
        with pytest.raises(NotImplementedError, match=r"gpu: .* the kernels need 8\.0"):
            linear_scan(x, x, implementation=requested)


def struct(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def tokens(length, *shape):
    return struct(1, length, *shape)


SSM = {"log_a": struct(3, 2, dtype="complex64"), "c": struct(3, 2, dtype="complex64")}
MAMBA = {"A": struct(3, 2)}
PROJECTED = {
    "decay": struct(2**10, dtype="complex64"),
    "input_projection": struct(2, 2**11),
    "output_projection": struct(2**12, 2),
}
LEGS = {"dt": struct(3), **dict.fromkeys(("eigenvalues", "p", "b"), SSM["c"])}


def scan(length, batch=1):
    x = struct(batch, length, 3)
    return linear_scan, {"a": x, "b": x}


def mamba(length, batch=1):
    x, states = struct(batch, length, 3), struct(batch, length, 2)
    return selective_scan, {"x": x, "dt": x, "B": states, "C": states, **MAMBA}


def ssm(length, batch=1):
    return diagonal_ssm, {"u": struct(batch, length, 3), **SSM}


def heads(op, length, **others):
    x = tokens(length, 2, 8)
    return op, {"q": x, "k": x, "v": x, **others}


def s4(length):
    mixer = build(S4Config(state_size=4), 2)
    x = tokens(length, 2)
    variables = jax.eval_shape(mixer.init, jax.random.key(0), x)
    return mixer.apply, {"variables": variables, "x": x}


ONE, MANY = "one token", "whole"
# By what is chosen: the op and small operands, what these run, large ones, what these run, why.
SIZES = {
    "linear_scan rows": (scan(1), ONE, scan(9), MANY, "there are 9"),
    "selective_scan rows": (mamba(1), ONE, mamba(9), MANY, "there are 9"),
    "linear_attention rows": (
        heads(linear_attention, 1), ONE, heads(linear_attention, 9), MANY, "there are 9",
    ),
    "delta_rule rows": (
        heads(delta_rule, 1, beta=tokens(1, 2)), ONE,
        heads(delta_rule, 9, beta=tokens(9, 2)), MANY, "there are 9",
    ),
    "checkpoint_attention rows": (
        heads(checkpoint_attention, 1, interval=2), ONE,
        heads(checkpoint_attention, 9, interval=2), MANY, "there are 9",
    ),
    "bidirectional_mimo_scan rows": (
        (bidirectional_mimo_scan, {"u": tokens(1, 2), **PROJECTED}), ONE,
        (bidirectional_mimo_scan, {"u": tokens(9, 2), **PROJECTED}), MANY, "there are 9",
    ),
    "s4_kernel rows": (
        (s4_kernel, {**LEGS, "c": struct(1, 3, 2, dtype="complex64"), "length": 1}), ONE,
        (s4_kernel, {**LEGS, "c": struct(1, 3, 2, dtype="complex64"), "length": 9}), MANY,
        "there are 9",
    ),
    "bidirectional_mimo_scan method": (
        (bidirectional_mimo_scan, {"u": tokens(2**9, 2), **PROJECTED}), "scans",
        (bidirectional_mimo_scan, {"u": tokens(2**10, 2), **PROJECTED}), "blocks",
        "there are 524288 state values, they pay from 1048576 on",
    ),
    "diagonal_ssm method": (
        ssm(1), "scan", ssm(2), "chunked", "there are 2 tokens, chunks pay from 2 on",
    ),
    "causal_conv1d method": (
        (causal_conv1d, {"x": tokens(15, 3), "weight": struct(4, 3)}), "behind its window",
        (causal_conv1d, {"x": tokens(16, 3), "weight": struct(4, 3)}), "shifted",
        "15 tokens are fewer than 16",
    ),
    "checkpoint_attention slots": (
        heads(checkpoint_attention, 9, interval=2), "strided",
        heads(
            checkpoint_attention, 9, interval=2, segment_ids=struct(1, 9, dtype="int32")
        ), "gathered", "documents begin anywhere",
    ),
    "attend": (
        heads(attend, 127), "portable", heads(attend, 128), "splash",
        "127 queries do not fill a block",
    ),
    "attend portable": (
        heads(attend, 128, window=3), "all pairs", heads(attend, 129, window=3), "band",
        "128 queries are no more than two blocks of 64",
    ),
    "s4": (s4(1), "recurrence", s4(2), "convolution", "one token is one step"),
    "linear_scan chunks": (
        scan(256), "whole rows", scan(257), "chained", "it takes 2 chunks to fill a GPU",
    ),
    "diagonal_ssm chunks": (
        ssm(64), "whole rows", ssm(65), "chained", "it takes 2 chunks to fill a GPU",
    ),
    "selective_scan chunks": (
        mamba(128), "whole rows", mamba(256), "chained", "it takes 2 chunks to fill a GPU",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SIZES)
def test_explain_says_what_a_size_decides(what):
    (op, small), of_small, (_, large), of_large, why = SIZES[what]
    found = [[c for c in explain(op, **arguments) if c.op == what] for arguments in (small, large)]
    both = zip(*found, strict=True)
    decided = [pair for pair in both if pair[0].implementation != pair[1].implementation]
    assert decided
    for pair in decided:
        assert tuple(c.implementation for c in pair) == (of_small, of_large)
        assert why in (reason for c in pair for reason in c.skipped.values())


def test_a_row_of_one_token_takes_no_kernel_and_says_why():
    op, arguments = scan(1)
    choices = {c.platform: c for c in explain(op, **arguments) if c.op == "linear_scan"}
    for platform, kernel in (("tpu", "tpu"), ("cuda", "gpu")):
        assert choices[platform].implementation == "xla"
        assert choices[platform].skipped[kernel] == "a row of one token needs no kernel"


def test_explain_names_the_method_of_a_long_convolution():
    found = taken(long_conv, struct(1, 8, 3), struct(3, 8))
    assert found["long_conv method"] == everywhere("fft", tpu="blocked")
    assert set(taken(long_conv, struct(1, 8, 3), struct(3, 8), method="fft")) == {"long_conv"}


@pytest.mark.parametrize(
    ("length", "dtype", "on_cpu"),
    [(1, "bfloat16", "one a row"), (1, "float32", "scatter"), (2, "bfloat16", "scatter")],
)
def test_explain_names_how_a_cache_is_written(length, dtype, on_cpu):
    cache = Cache.empty(2, 8, 1, 4, 4, interval=2, dtype=dtype)
    x = jnp.ones((2, length, 1, 4), dtype)
    found = taken(lambda x: cache.extend(x, x, interval=2), x)
    assert found["Cache.extend"] == everywhere("scatter", cpu=on_cpu)


def test_explain_names_how_bfloat16_is_multiplied():
    x = struct(2, 2, dtype="bfloat16")
    found = taken(lambda x: products.einsum("ij,jk->ik", x, x), x)
    assert found == {"product": everywhere("bfloat16", cpu="float32 copies")}


def test_every_choice_by_platform_is_one_that_explain_names():
    root = pathlib.Path(pallas_kernels.__file__).parents[1]
    files = [*root.glob("pallas_kernels/**/*.py"), *root.glob("seqmodels/**/*.py")]
    by_hand = [f.name for f in files if "platform_dependent(" in f.read_text(encoding="utf-8")]
    assert by_hand == ["dispatch.py"]
