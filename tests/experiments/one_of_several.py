"""`experiments.lm.train` or `experiments.lra.train` as one of several processes of a test.

    python -m tests.experiments.one_of_several lm 5 --data ...
    python -m tests.experiments.one_of_several agree 0 --distributed.coordinator ...

The process kills itself after the step that is named second; 0 is none. With "agree" it does not
train, but prints what it hears of the others.
"""

import functools
import importlib
import json
import os
import signal
import sys

import numpy as np
import tyro

from seqmodels.parallel import make_mesh, put_batch, rows_of_process
from seqmodels.training import processes


def dying(fit, at):
    """``fit`` in a process that dies after a step."""

    @functools.wraps(fit)
    def run(*arguments, on_event, **options):
        def event(what, step):
            on_event(what, step)
            if (what, step) == ("step", at):
                os.kill(os.getpid(), signal.SIGKILL)

        return fit(*arguments, on_event=event, **options)

    return run


def refused(function, *arguments):
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)


def refuse(what):
    with processes.together():
        if what:
            raise ValueError(what)


def agree(distributed):
    """What two processes say to each other, as JSON."""
    distributed.start()
    me = distributed.process
    mesh = make_mesh(1, seq=4)
    batch = {"inputs": np.arange(12, dtype=np.int32).reshape(2, 6)}
    batch["segment_ids"] = np.ones_like(batch["inputs"])
    placed = put_batch(batch, mesh)["inputs"]
    rows = rows_of_process(halves := make_mesh(2, seq=2), 4)
    by_rows = put_batch({"index": rows}, halves)["index"]
    votes = processes.Votes(mesh)
    return {
        "gathered": processes.gather("ab" * me),
        "differs": refused(processes.require_equal, {"a": {"b": me}}, "do so"),
        "refused": refused(refuse, "no room" * me),
        "shape": placed.shape,
        "parts": [np.asarray(part.data).tolist() for part in placed.addressable_shards],
        "rows": [np.asarray(part.data).tolist() for part in by_rows.addressable_shards],
        "votes": [votes.largest(number * me) for number in (0, 15, 0, 0)],
    }


if __name__ == "__main__":
    kind, at, *arguments = sys.argv[1:]
    if kind == "agree":
        flags = [part.replace("--distributed.", "--") for part in arguments]
        print(json.dumps(agree(tyro.cli(processes.Distributed, args=flags))))
        sys.exit()
    command = importlib.import_module(f"experiments.{kind}.train")
    command.fit = dying(command.fit, int(at))
    sys.exit(command.main(arguments))
