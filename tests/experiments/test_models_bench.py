"""The model benchmarks run, check that both sides compute the same, and record what they did."""

import json

import pytest
import rich.console
import transformers

from experiments.kernels.bench import run, table
from experiments.models import bench, block, decode
from seqmodels.mixers import MambaConfig
from seqmodels.models.published import mamba_language_model

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TINY = mamba_language_model(16, 1, MambaConfig(state_size=4), 40)


def test_block_row(tmp_path):
    config = bench.ModelBenchConfig(only="block", repetitions=1, output=tmp_path / "x.json")
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


def test_decode_rows():
    rates, far = decode.results(1, 0, tokens=3, config=TINY)
    for name in ("seqmodels", "transformers"):
        assert rates.figures[f"{name} tokens/s"] == 3e3 / rates.figures[f"{name} ms"]
    assert set(rates.ratios) == {"transformers"}
    assert set(far.figures) == {"token at 16 ms", "token at 100000 ms"}
    table([rates, far])


def test_files_and_refusals():
    assert bench.ModelBenchConfig().path.name == "mamba-cpu.json"
    assert bench.ModelBenchConfig(only="decode").path.name == "mamba-decode-cpu.json"
    with pytest.raises(ValueError, match="repetitions=0 must be at least 1"):
        bench.ModelBenchConfig(repetitions=0)
