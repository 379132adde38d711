"""The model benchmarks run, check that both sides compute the same, and record what they did."""

import dataclasses
import json

import pytest
import rich.console

from experiments.kernels.bench import run, table
from experiments.lm.presets import ModelSize, parameters
from experiments.models import bench, block, decode, hybrids, memory, mixers, s5, token_time
from seqmodels.interop.huggingface import described
from seqmodels.mixers import AttentionConfig, GatedConvConfig, MambaConfig
from seqmodels.models.published import hybrid_language_model, mamba_language_model

TINY = mamba_language_model(16, 1, MambaConfig(state_size=4), 40)


@pytest.mark.full
def test_block_row(tmp_path):
    pytest.importorskip("mambapy", reason="not run: mambapy is not installed")
    config = bench.ModelBenchConfig(only="mamba-block", repetitions=1, output=tmp_path / "x.json")
    console = rich.console.Console(quiet=True)
    [row] = run(config, block.results(1, 0, 1, 5, TINY), console)
    ms = {name.removesuffix(" ms"): value for name, value in row.figures.items()}
    assert set(ms) == {"seqmodels", "transformers, mambapy"}
    name = "transformers, mambapy"
    assert row.ratios[name] == ms[name] / ms["seqmodels"]
    assert set(row.targets) == {name}
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["config"]["seed"] == 0
    assert {"commit", "versions", "device", "wall_s"} <= set(record)
    assert record["cases"] == [row.to_json()]


@pytest.mark.full
def test_decode_rows():
    pytest.importorskip("transformers", reason="not run: transformers is not installed")
    rates, far = decode.results(1, 0, tokens=3, config=TINY)
    for name in ("seqmodels", "transformers"):
        assert rates.figures[f"{name} tokens/s"] == 3e3 / rates.figures[f"{name} ms"]
    assert set(rates.ratios) == {"transformers"}
    assert set(far.figures) == {"token at 16 ms", "token at 100000 ms"}
    table([rates, far])


@pytest.mark.full
def test_hybrid_rows():
    pytest.importorskip("transformers", reason="not run: transformers is not installed")
    mixers = (GatedConvConfig(), AttentionConfig(heads=2, qk_norm=True, norm_epsilon=1e-5))
    tiny = hybrid_language_model(
        ("gated_conv", "attention"), mixers, 16, 8, 40, norm_epsilon=1e-5, tie_embeddings=True
    )
    rows = list(hybrids.results(1, 0, models={"tiny": tiny}, prompt=12, new=3))
    assert [row.case for row in rows] == ["tiny: a prompt of 12", "tiny: 3 tokens one by one"]
    for row in rows:
        figures = row.figures
        assert row.ratios["transformers"] == figures["transformers ms"] / figures["seqmodels ms"]
    assert rows[1].figures["state bytes"] > 2048 * 2 * 16 * 4
    table(rows)


@pytest.mark.full
def test_hybrids_have_a_hundred_million_parameters():
    for config in hybrids.MODELS.values():
        count = parameters(config)
        assert 0.8e8 < count < 1.25e8, (config.backbone.layout[:2], count)
        described(config)  # so that transformers can open it


@pytest.mark.full
def test_s5_rows():
    [row] = s5.results(1, 0, batch=1, length=6, width=4, states=(3,))
    assert row.ratios["associative_scan"] == (
        row.figures["associative_scan ms"] / row.figures["seqmodels ms"]
    )


@pytest.mark.full
def test_token_time_rows():
    size = ModelSize(layers=1, width=8, mlp=8, head=4)
    assert {"mamba", "attention", "s4", "scout"} < set(token_time.mixers(size))
    assert "hydra" not in token_time.mixers(size)
    fixed, growing = token_time.results(1, 0, tokens=2, size=size, names=("lru", "attention"))
    assert set(fixed.targets) == {"the time at 16"} == set(fixed.ratios)
    assert len({fixed.figures[f"state bytes at {c}"] for c in token_time.CONTEXTS}) == 1
    assert growing.targets == {}
    sizes = [growing.figures[f"state bytes at {c}"] for c in token_time.CACHED]
    assert sizes == sorted(set(sizes))
    table([fixed, growing])


@pytest.mark.full
def test_mixer_rows():
    size = ModelSize(layers=2, width=8, mlp=8, head=4, length=16)
    options = {"names": ("attention", "mom", "orchid"), "size": size, "shape": (2, 16)}
    rows = list(mixers.results(1, 0, **options))
    assert [row.case for row in rows] == ["attention", "mom", "orchid"]
    for row in rows:
        assert row.figures["bytes of a step"] > row.figures["parameters of a layer"] > 0
        assert set(row.ratios) == {"attention, forward", "attention, forward+backward"}
    assert rows[2].figures["state bytes"] == 0
    table(rows)


@pytest.mark.full
def test_memory_rows():
    stack = dataclasses.replace(memory.MODEL.backbone, layout=("gla",) * 2, width=16, mlp=16)
    model = dataclasses.replace(memory.MODEL, vocabulary_size=512, backbone=stack)
    options = {"model": model, "budget": 2**25, "lengths": (2048, 4096)}
    plain, chunks = memory.results(1, 0, names=("nothing", "loss_tile, chunk"), **options)
    assert plain.ratios == {"nothing": 1.0}
    assert chunks.ratios["nothing"] > 2
    for row in (plain, chunks):
        assert row.figures["bytes of the longest"] <= 2**25
    table([plain, chunks])


def test_files_and_refusals():
    assert bench.ModelBenchConfig().path.name == "all-cpu.json"
    assert bench.ModelBenchConfig(only="mamba-decode").path.name == "mamba-decode-cpu.json"
    with pytest.raises(ValueError, match="repetitions=0 must be positive"):
        bench.ModelBenchConfig(repetitions=0)
