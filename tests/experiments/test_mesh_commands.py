"""The commands with ``--mesh``: what eight devices compute is what one does."""

import json

import jax
import numpy as np
import pytest

from experiments.command_line import UsageError
from experiments.lm import eval as lm_eval
from experiments.lm import generate as lm_generate
from experiments.lm import train as lm_train
from experiments.lra import eval as lra_eval
from experiments.lra import train as lra_train
from experiments.run import mesh_of, mesh_sizes
from tests import tolerances
from tests.experiments.test_lm_commands import STORY
from tests.experiments.test_lra_train import command


def test_a_mesh_is_sizes_by_axis():
    assert mesh_sizes("data=2, seq=4") == {"data": 2, "seq": 4}
    assert dict(mesh_of("seq=4").shape) == {"data": 1, "model": 1, "seq": 4}
    assert mesh_of(None).size == 1
    for wrong in ("4", "rows=2", "seq=4,seq=2", "seq=two", "seq"):
        with pytest.raises(UsageError, match=r"must give each axis one size, e\.g\. data=2,seq=4"):
            mesh_sizes(wrong)
    with pytest.raises(ValueError, match="seq=16 does not divide the 8 devices; use seq=8"):
        mesh_of("seq=16")


def loss_of(folder, run):
    return json.loads((folder / run / "result.json").read_text())["validation_loss"]


@pytest.mark.full
def test_language_models(tmp_path, monkeypatch, capsys):
    (tmp_path / "story.txt").write_text(STORY)

    def train(run, *more):
        return lm_train.main(
            ["--data", str(tmp_path / "story.txt"), "--mixer", "mamba2", "--preset", "tiny",
             "--run-dir", str(tmp_path / run), "--results-dir", str(tmp_path / run / "results"),
             "--no-progress", "--carry-state", "--steps", "4", "--train.eval-every", "4", *more]
        )  # fmt: skip

    assert train("split", "--mesh", "data=2,model=2,seq=2", "--data.length", "61") == 0
    assert "rows of 61 tokens are padded to 62, a multiple of seq=2" in capsys.readouterr().out
    first = jax.devices()[:1]
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: first)
        assert train("whole", "--data.length", "61") == 0
        assert train("chunks", "--data.length", "61", "--memory.chunk", "16") == 0
    np.testing.assert_allclose(
        loss_of(tmp_path, "split"), loss_of(tmp_path, "whole"), **tolerances.EACH_FLOAT32_SUM
    )
    np.testing.assert_allclose(
        loss_of(tmp_path, "chunks"), loss_of(tmp_path, "whole"), **tolerances.EACH_FLOAT32_SUM
    )

    def said(module, *arguments, run="whole"):
        capsys.readouterr()
        assert module.main(["--checkpoint", str(tmp_path / run), *arguments]) == 0
        return capsys.readouterr().out

    asked = ("--data", str(tmp_path / "story.txt"), "--no-progress")
    whole, split = (said(lm_eval, *asked, *mesh) for mesh in ((), ("--mesh", "model=2,seq=4")))
    assert whole.split(",")[0] == split.split(",")[0]  # bits per byte
    # What eight devices have saved one can read.
    assert said(lm_eval, *asked, run="split").split(",")[0][:20] == whole[:20]
    asked = ("--prompt", "99 bottles of", "--length", "20", "--temperature", "0")
    whole, split = (said(lm_generate, *asked, *mesh) for mesh in ((), ("--mesh", "model=2,seq=4")))
    assert whole == split


@pytest.mark.full
def test_long_range_arena(tmp_path, monkeypatch, capsys):
    def losses(run, *more):
        folder = tmp_path / run
        assert lra_train.main(command(folder, *more)) == 0
        (path,) = (folder / "results").glob("*.json")
        return [record["loss"] for record in json.loads(path.read_text())["curve"]]

    split = losses("split", "--mesh", "data=2,model=2,seq=2")
    first = jax.devices()[:1]
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: first)
        whole = losses("whole")
    np.testing.assert_allclose(split, whole, **tolerances.EACH_FLOAT32_SUM)
    capsys.readouterr()
    run = str(tmp_path / "whole" / "run")
    assert lra_eval.main(["--checkpoint", run, "--no-progress", "--mesh", "seq=8"]) == 0
    assert "equal to the recorded accuracy" in capsys.readouterr().out
