"""The errors of checkpoints: what could not be saved or read, and whether that is for good."""


class CheckpointError(RuntimeError):
    """Raised if a checkpoint could not be written, or is incomplete or damaged.

    The message names the step and the problem.
    """


class DamagedError(CheckpointError):
    """Raised if bytes of a checkpoint were read and are wrong, or if its files are missing."""


class UnreadableError(CheckpointError):
    """Raised if the system could not read a checkpoint now. It may be good."""
