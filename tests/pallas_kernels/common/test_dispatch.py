"""What is chosen by platform or size, and that `explain` names all of it."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import bidirectional_mimo_scan, explain, linear_scan, long_conv
from pallas_kernels.checkpoint_attention import Cache
from pallas_kernels.common import dispatch, products
from seqmodels.layers.attention import attend

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
    expected = everywhere("xla", tpu="tpu", cuda="gpu")
    assert taken(run, x, x) == taken(run, x, x) == {"linear_scan": expected}
    assert run._cache_size() == 1


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
    choices = {c.platform: c for c in explain(linear_scan, x, x)}
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


@pytest.mark.parametrize(("length", "on_cpu"), [(2**10, "blocks"), (2**9, "scans")])
def test_explain_names_how_two_projected_scans_run(length, on_cpu):
    shared = struct(2**10, dtype="complex64"), struct(2, 2**11), struct(2**12, 2)
    found = taken(bidirectional_mimo_scan, struct(1, length, 2), *shared)
    assert found["bidirectional_mimo_scan"] == everywhere("xla", tpu="tpu", cuda="gpu")
    assert found["bidirectional_mimo_scan method"] == everywhere("scans", cpu=on_cpu)


@pytest.mark.parametrize(("length", "on_tpu"), [(128, "splash"), (127, "portable")])
def test_explain_names_the_attention(length, on_tpu):
    q = struct(1, length, 2, 128)
    assert taken(attend, q, q, q)["attend"] == everywhere("portable", tpu=on_tpu)


def test_explain_names_how_bfloat16_is_multiplied():
    x = struct(2, 2, dtype="bfloat16")
    found = taken(lambda x: products.einsum("ij,jk->ik", x, x), x)
    assert found == {"product": everywhere("bfloat16", cpu="float32 copies")}


def test_every_choice_by_platform_is_one_that_explain_names():
    root = pathlib.Path(pallas_kernels.__file__).parents[1]
    files = [*root.glob("pallas_kernels/**/*.py"), *root.glob("seqmodels/**/*.py")]
    by_hand = [f.name for f in files if "platform_dependent(" in f.read_text(encoding="utf-8")]
    assert by_hand == ["dispatch.py"]
