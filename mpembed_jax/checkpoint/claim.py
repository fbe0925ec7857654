"""The claim of a process on a directory while it saves there: one writer at a time.

The claim is a lock of the operating system on the file `.writer`. The system drops it when the
process ends, however it ends. The file says who holds it, for the message to the second writer.
"""

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
import sys
from pathlib import Path

from mpembed_jax.checkpoint.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOG = logging.getLogger("mpembed_jax.checkpoint")
_NAME = ".writer"
_IS_LINUX = sys.platform == "linux"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Claim:
    """A claim on a directory. It is held until `release`, or until the process ends."""

    def __init__(self, directory: Path) -> None:
        """Takes the claim.

        Raises:
          CheckpointError: if another process holds it; the message says which.
          OSError: if the file cannot be opened or written.
        """
        # A lock by lockf belongs to the process. A forked child neither has it nor keeps it alive.
        self._file: int | None = os.open(
            directory / _NAME, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666
        )
        try:
            self._lock(directory)
            os.ftruncate(self._file, 0)
            since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            holder = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
            os.pwrite(self._file, json.dumps(holder).encode(), 0)
        except BaseException:
            self.release()
            raise

    def _lock(self, directory: Path) -> None:
        assert self._file is not None
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "this system has no fcntl")
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # If another process holds the lock, POSIX allows EAGAIN and EACCES. Linux reports
            # EAGAIN, and uses EACCES for other errors.
            if error.errno == errno.EAGAIN or (error.errno == errno.EACCES and not _IS_LINUX):
                raise CheckpointError(
                    f"{_holder(self._file)} saves in {directory}; wait until it is done, or save "
                    "in another directory"
                ) from None
            if error.errno not in _NO_LOCKS:
                raise
            _LOG.warning(
                "%s has no file locks (%s): make sure that no two processes save there at once",
                directory,
                error.strerror,
            )

    def release(self) -> None:
        """Gives the claim up."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                os.close(file)  # which also drops the lock


def _holder(file: int) -> str:
    """Returns the name of the process that holds a claim, for a message."""
    try:
        held = json.loads(os.pread(file, 4096, 0))
        return f"process {held['process']} on {held['host']} (since {held['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
