"""`experiments.lm.train` or `experiments.lra.train` as one of several processes of a test.

    python -m tests.experiments.one_of_several lm 5 --data ...

The process kills itself after the step that is named second; 0 is none.
"""

import functools
import importlib
import os
import signal
import sys


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


if __name__ == "__main__":
    kind, at, *arguments = sys.argv[1:]
    command = importlib.import_module(f"experiments.{kind}.train")
    command.fit = dying(command.fit, int(at))
    sys.exit(command.main(arguments))
