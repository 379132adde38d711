"""Recordings in the layouts of Speech Commands and of the Free Spoken Digit Dataset."""

import dataclasses
import re

import numpy as np
import pytest

from seqmodels.data.lra.speech import SpeechConfig, read
from tests.seqmodels.data.lra import original_files as original

CONFIG = SpeechConfig(max_length=50, allow_partial=True)
DIGITS, COMMANDS = original.digits(), original.commands()
FIRST = "fsdd/recordings/0_ann_0.wav"


def test_digits_are_split_by_index(tmp_path):
    data = read(CONFIG, original.write(tmp_path, DIGITS))
    assert [len(e) for e in data.splits.values()] == [20, 20, 20]
    assert data.description["classes"] == list("0123456789")
    assert data.description["rate"] == 8000
    assert data.test.labels.tolist() == [i // 2 for i in range(20)]
    sound = original.noise(20)  # the first recording
    np.testing.assert_array_equal(data.test[0]["inputs"][:, 0], (sound / 32768).astype(np.float32))
    assert data.train.lengths.max() == 50  # longer ones are cut


def test_commands_are_split_by_lists(tmp_path):
    data = read(CONFIG, original.tar(tmp_path / "speech_commands_v0.02.tar.gz", COMMANDS))
    assert [len(e) for e in data.splits.values()] == [6, 3, 3]
    assert data.description["classes"] == ["no", "up", "yes"]
    assert data.description["rate"] == 16000
    assert data.validation.labels.tolist() == [0, 1, 2]


def test_other_counts_need_an_option(tmp_path):
    with pytest.raises(ValueError, match=r"holds 20 train.*Digit Dataset 2,400 train.*--allow-par"):
        read(dataclasses.replace(CONFIG, allow_partial=False), original.write(tmp_path, DIGITS))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({FIRST: b""}, "is not a wav file of PCM"),
        ({FIRST: b"RIFF"}, "is not a wav file of PCM"),
        ({FIRST: DIGITS[FIRST][:-5]}, "is cut: 17 of 20 samples|is not a wav file"),
        ({FIRST: original.wav(np.zeros(0, "<i2"))}, r"0_ann_0\.wav is empty"),
        (
            {FIRST: original.wav(np.zeros(8, "<i2"), channels=2)},
            "2 channels of 16 bits, expected 1",
        ),
        ({FIRST: original.wav(np.zeros(8, "u1"), width=1)}, "1 channels of 8 bits"),
        ({FIRST: original.wav(np.ones(8, "<i2"), 16000)}, "different rates: 16000 Hz in"),
        ({"b/recordings/0_ann_0.wav": DIGITS[FIRST]}, "more than once"),
        ({"yes/00_nohash_0.wav": DIGITS[FIRST]}, "holds two data sets"),
    ],
)
def test_bad_recordings(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        read(CONFIG, original.write(tmp_path, DIGITS | files))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"testing_list.txt": b"yes/ff_nohash_0.wav"},
            "has yes/ff_nohash_0.wav, which is not ther",
        ),
        ({"testing_list.txt": COMMANDS["validation_list.txt"]}, "is in both lists"),
        ({"testing_list.txt": None}, "does not hold testing_list.txt"),
    ],
)
def test_bad_lists(tmp_path, files, message):
    changed = {n: b for n, b in (COMMANDS | files).items() if b is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        read(CONFIG, original.write(tmp_path, changed))
