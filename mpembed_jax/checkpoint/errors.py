"""The errors of checkpoints. Their types tell damage from a file that cannot be read now."""


class CheckpointError(RuntimeError):
    """Raised if a checkpoint cannot be saved or restored.

    The message names the problem and its place: a step, a folder, a file or an embedding state.
    """


class DamagedError(CheckpointError):
    """Raised if files of a checkpoint are missing, or were read and have wrong contents."""


class UnreadableError(CheckpointError):
    """Raised if the system cannot read a checkpoint now. The checkpoint may be good."""


def cause_of(error: BaseException) -> str:
    """Returns the first line of an error's message, or the error's type if it has no message.

    The details that tensorstore and orbax append to a message are cut off.
    """
    text = str(error).strip()
    if not text:
        return type(error).__name__
    text = text.splitlines()[0]
    for addition in (" [tensorstore_spec=", " [source locations=", ". But input PyTree contains"):
        text = text.split(addition)[0]
    return text
