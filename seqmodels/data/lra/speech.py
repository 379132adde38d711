"""Raw audio: which word is said in a recording of about a second, sample by sample.

Two layouts are read, as a folder or an archive. Speech Commands v0.02 (Warden 2018) has a folder of
recordings for each of its 35 words, and two lists that say which are for validation and the test
(84,843, 9,981 and 11,005 at 16 kHz). The Free Spoken Digit Dataset has 3,000 recordings at 8 kHz,
`recordings/<digit>_<speaker>_<index>.wav`; indices 0 to 4 are its test set, and 5 to 9 are held
out for validation here. Samples are signed 16-bit, divided by 2**15.
"""

import io
import re
import wave
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqmodels.data.examples import Examples, Scaling, TaskData, offsets_of
from seqmodels.data.lra.sources import Layout
from seqmodels.ranges import Checked, Size

_COMMAND = r"[a-z]+/[0-9a-f]+_nohash_\d+\.wav"
_DIGIT = r"recordings/\d_[a-z]+_\d+\.wav"
_LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
SPEECH = Layout(
    files=rf"(?:{_COMMAND}|{_DIGIT}|{'|'.join(map(re.escape, _LISTS.values()))})",
    archives=("speech_commands*.tar*", "*spoken-digit*.tar*", "fsdd*.tar*"),
    most=4_000_000,
    where=(
        "get speech_commands_v0.02.tar.gz (2.4 GB) from "
        "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz, or the Free Spoken "
        "Digit Dataset (16 MB) from https://github.com/Jakobovski/free-spoken-digit-dataset, and "
        "pass the archive or its folder as data_dir"
    ),
)
PUBLISHED = {
    "Speech Commands": {"train": 84_843, "validation": 9_981, "test": 11_005},
    "Free Spoken Digit Dataset": {"train": 2_400, "validation": 300, "test": 300},
}
_PCM16 = Scaling((0.0,), (32768.0,))

Recording = tuple[str, np.ndarray]  # a word and samples
Splits = dict[str, list[Recording]]


@dataclass(frozen=True)
class SpeechConfig(Checked):
    """How to read recordings.

    Attributes:
      max_length: samples kept of each recording, from its start.
      allow_partial: accept other numbers of recordings than the published ones.

    Raises:
      ValueError: a value is out of range.
    """

    max_length: Size = 16_000
    allow_partial: bool = False

    @property
    def longest(self) -> int:
        """Steps that a row has at most."""
        return self.max_length


def read(config: SpeechConfig, data_dir: str | Path) -> TaskData:
    """Reads either layout.

    Raises:
      ValueError: a recording is damaged, empty, not mono 16-bit PCM or of another rate than the
        others, a list names one that is not there, the numbers are not the published ones, or both
        layouts are there.
    """
    lists: dict[str, set[str]] = {}
    sounds: dict[str, np.ndarray] = {}
    rates: dict[int, str] = {}
    for name, content in SPEECH.read(data_dir):
        short, where = "/".join(name.split("/")[-2:]), f"{data_dir}, {name}"
        if name.endswith(".txt"):
            lists[short.rsplit("/")[-1]] = set(content.decode("utf-8", errors="replace").split())
            continue
        if short in sounds:
            raise ValueError(f"{where}: {short} is there more than once")
        sounds[short], rate = _samples(content, config.max_length, where)
        rates.setdefault(rate, where)
    if len(rates) > 1:
        facts = "; ".join(f"{rate} Hz in {where}" for rate, where in rates.items())
        raise ValueError(f"recordings have different rates: {facts}")
    digits = [name for name in sounds if name.startswith("recordings/")]
    if digits and len(digits) < len(sounds):
        raise ValueError(f"{data_dir} holds two data sets: pass the folder of one as data_dir")
    if digits:
        source, splits = "Free Spoken Digit Dataset", _digit_splits(sounds)
    else:
        source, splits = "Speech Commands", _command_splits(sounds, lists, data_dir)
    counts = {split: len(recordings) for split, recordings in splits.items()}
    if counts != PUBLISHED[source] and not config.allow_partial:
        raise ValueError(
            f"{data_dir} holds {_counts(counts)} recordings, the {source} "
            f"{_counts(PUBLISHED[source])}: get it whole, or use what is there with --allow-partial"
        )
    words = sorted({word for recordings in splits.values() for word, _ in recordings})
    return TaskData(
        name="speech",
        **{split: _examples(recordings, words) for split, recordings in splits.items()},
        vocabulary_size=None,
        num_classes=len(words),
        description={"source": source, "classes": words, "rate": next(iter(rates))},
    )


def _samples(content: bytes, most: int, where: str) -> tuple[np.ndarray, int]:
    """The first samples, `(n,)` int16, and how many there are a second."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            kind = (file.getnchannels(), file.getsampwidth())
            frames, rate = file.getnframes(), file.getframerate()
            data = file.readframes(frames)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{where} is not a wav file of PCM: {error}; {SPEECH.where}") from error
    if kind != (1, 2):
        raise ValueError(f"{where}: {kind[0]} channels of {8 * kind[1]} bits, expected 1 of 16")
    if not frames:
        raise ValueError(f"{where} is empty; {SPEECH.where}")
    if len(data) != 2 * frames:
        raise ValueError(f"{where} is cut: {len(data) // 2} of {frames} samples; {SPEECH.where}")
    return np.frombuffer(data, "<i2")[:most].astype(np.int16), rate


def _digit_splits(sounds: dict[str, np.ndarray]) -> Splits:
    splits: Splits = {"train": [], "validation": [], "test": []}
    for name in sorted(sounds):
        digit, _, index = name.removeprefix("recordings/").removesuffix(".wav").split("_")
        number = int(index)
        split = "test" if number < 5 else "validation" if number < 10 else "train"
        splits[split].append((digit, sounds[name]))
    return splits


def _command_splits(
    sounds: dict[str, np.ndarray], lists: dict[str, set[str]], data_dir: str | Path
) -> Splits:
    missing = [name for name in _LISTS.values() if name not in lists]
    if missing:
        raise ValueError(f"{data_dir} does not hold {', '.join(missing)}; {SPEECH.where}")
    held_out = {split: lists[name] for split, name in _LISTS.items()}
    both = sorted(held_out["validation"] & held_out["test"])
    if both:
        raise ValueError(f"{data_dir}: {both[0]} is in both lists; {SPEECH.where}")
    for split, names in held_out.items():
        absent = sorted(names - sounds.keys())
        if absent:
            raise ValueError(f"{data_dir}: {_LISTS[split]} has {absent[0]}, which is not there")
    splits: Splits = {"train": [], "validation": [], "test": []}
    for name in sorted(sounds):
        split = next((split for split, names in held_out.items() if name in names), "train")
        splits[split].append((name.partition("/")[0], sounds[name]))
    return splits


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in counts.items())


def _examples(recordings: Iterable[Recording], words: list[str]) -> Examples:
    recordings = list(recordings)
    sounds = [sound for _, sound in recordings]
    flat = np.concatenate([np.zeros(0, np.int16), *sounds])[:, None]
    offsets = offsets_of(np.array([len(sound) for sound in sounds], np.int64))
    labels = np.array([words.index(word) for word, _ in recordings], np.int32)
    return Examples(flat, offsets, labels, scaling=_PCM16)
