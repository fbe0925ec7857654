"""The errors of checkpoints: what could not be saved or read, and whether that is for good."""


class CheckpointError(RuntimeError):
    """Raised if a checkpoint could not be written, or is incomplete or damaged.

    The message names the step and the problem.
    """


class DamagedError(CheckpointError):
    """Raised if bytes of a checkpoint were read and are wrong, or if its files are missing."""


class UnreadableError(CheckpointError):
    """Raised if the system could not read a checkpoint now. It may be good."""


def cause_of(error: BaseException) -> str:
    """Returns the first line of an error's message, without what libraries add for themselves."""
    text = str(error).strip()
    if not text:
        return type(error).__name__
    text = text.splitlines()[0]
    for addition in (" [tensorstore_spec=", " [source locations=", ". But input PyTree contains"):
        text = text.split(addition)[0]
    return text
