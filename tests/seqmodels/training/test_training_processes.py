"""How processes find each other, agree, and share the rows of a batch; real ones are tested in
`tests/experiments/test_several_processes.py`."""

import re
import types

import numpy as np
import pytest

from seqmodels.data import batches, text
from seqmodels.data.examples import Examples
from seqmodels.parallel import rows_of_process
from seqmodels.training import processes
from seqmodels.training.processes import Distributed


def mesh(data, seq, processes):
    """A mesh of devices of several processes, as far as ``rows_of_process`` looks at it."""
    owner = np.arange(data * seq) * processes // (data * seq)
    devices = np.array([types.SimpleNamespace(process_index=i) for i in owner])
    return types.SimpleNamespace(
        shape={"data": data, "model": 1, "seq": seq}, devices=devices.reshape(data, 1, seq)
    )


def rows(data, seq, number, batch_size):
    of = mesh(data, seq, number)
    return [rows_of_process(of, batch_size, i).tolist() for i in range(number)]


def test_each_process_reads_what_its_devices_hold():
    assert rows(2, 2, 2, 6) == [[0, 1, 2], [3, 4, 5]]
    assert rows(1, 4, 2, 3) == [[0, 1, 2]] * 2  # the same rows, another part of their length
    assert rows(3, 2, 2, 3) == [[0, 1], [1, 2]]  # the devices of row 1 belong to both
    assert rows(4, 1, 1, 8) == [list(range(8))]


def test_a_batch_that_does_not_divide_is_refused():
    said = "batch_size=6 does not divide over the mesh's data axis of 4; choose 4 or 8, or a"
    with pytest.raises(ValueError, match=re.escape(said)):
        rows_of_process(mesh(4, 1, 2), 6, 0)
    with pytest.raises(ValueError, match="choose 4, or a smaller"):
        rows_of_process(mesh(4, 1, 2), 3, 0)


def examples():
    lengths = np.random.default_rng(0).integers(1, 9, 40)
    return Examples.from_sequences([np.full(n, n) for n in lengths], [i % 3 for i in range(40)])


TEXT = text.encode([bytes(range(200)), b"two", bytes(range(99))])
STREAMS = {"length": 7, "batch_size": 6, "streams": True}
PIPELINES = {
    "windows": lambda own: text.train_batches(TEXT, length=7, batch_size=6, seed=3, own=own),
    "streams": lambda own: text.train_batches(TEXT, **STREAMS, own=own),
    "evaluated windows": lambda own: text.eval_batches(TEXT, length=7, batch_size=6, own=own),
    "evaluated streams": lambda own: text.eval_batches(TEXT, **STREAMS, own=own),
    "examples": lambda own: batches.train_batches(
        examples(), batch_size=6, seed=3, lengths=(3, 5, 8), window=2, own=own
    ),
    "evaluated examples": lambda own: batches.eval_batches(
        examples(), batch_size=6, lengths=(3, 5, 8), own=own
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_rows_of_all_processes_are_the_batches_of_one(name):
    """In order, over more than an epoch, and from the same positions."""
    whole, first, second = (
        iter(PIPELINES[name](own)) for own in (None, np.arange(4), np.arange(4, 6))
    )
    number = 0
    for number, parts in enumerate(zip(whole, first, second, strict=False)):
        expected = parts[0]
        for key, value in expected.items():
            joined = np.concatenate([part[key] for part in parts[1:]])
            np.testing.assert_array_equal(joined, value, err_msg=f"batch {number}, {key}")
            assert joined.dtype == value.dtype
        if not name.startswith("evaluated"):
            assert first.get_state() == second.get_state() == whole.get_state()
        if number == 20:
            break
    assert number >= 6


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"coordinator": "here:1"}, "--distributed.processes, --distributed.process missing"),
        ({"processes": 2, "process": 0}, "--distributed.coordinator missing: processes started by"),
        (
            {"coordinator": "here:1", "processes": 2, "process": 2},
            "--distributed.process 2 does not fit --distributed.processes 2: they are numbered "
            "from 0 to 1",
        ),
        ({"coordinator": "here", "processes": 2, "process": 0}, "'here' must be HOST:PORT"),
        ({"coordinator": "here:99999", "processes": 2, "process": 0}, "must be HOST:PORT"),
        ({"detect": True, "processes": 2}, "by itself: leave --distributed.processes out"),
        ({"coordinator": "here:1", "processes": 0, "process": 0}, "processes=0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Distributed(**flags)


def test_a_coordinator_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"localhost:9: nothing listens there after 1 s .*; start"):
        Distributed("localhost:9", 2, 1, timeout=1).start()


def test_processes_with_other_numbers_of_devices_are_refused():
    processes.check_devices({0: 4, 1: 4})
    with pytest.raises(ValueError, match="process 0 has 4, process 1 has 2; give each 2"):
        processes.check_devices({0: 4, 1: 2})


def test_processes_agree(monkeypatch):
    """What each says is what the others hear; here two of them are played by one."""
    said = []

    def gather(text):
        return [*said, text]

    monkeypatch.setattr(processes, "gather", gather)
    said[:] = ['{"train": {"steps": 3, "seed": 0}}']
    processes.require_equal({"train": {"steps": 3, "seed": 0}}, "do so")
    with pytest.raises(ValueError, match=r"differs .*: train\.seed=1 \(process 0: 0\); do so$"):
        processes.require_equal({"train": {"steps": 3, "seed": 1}}, "do so")
    said[:] = ["no room"]
    with pytest.raises(ValueError, match=r"^process 0: no room$"), processes.together():
        pass
    with pytest.raises(OSError, match=r"^mine$"), processes.together():
        raise OSError("mine")
