"""What can end a run early. Each message is one line for the user."""

import signal


class TrainingError(RuntimeError):
    """Training cannot go on; ``exit_code`` is for the process."""

    exit_code = 1


class CheckpointError(TrainingError):
    """A checkpoint could not be written, read, or belongs to another config."""


class RunDirectoryError(TrainingError):
    """The run directory does not fit the request (exists already, or is not a run)."""

    exit_code = 2


class NonFiniteError(TrainingError):
    """Loss or gradient was not finite; the batch is described in the run directory."""

    exit_code = 3


class Interrupted(TrainingError):
    """A signal asked training to stop; a checkpoint was written."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number
