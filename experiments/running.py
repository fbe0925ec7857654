"""While a program runs: it says how far it is, stops in order, and starts parts of itself."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PERIOD_S = 10.0  # between two lines of progress
STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def progress(say: Callable[[], str | None], period_s: float = PERIOD_S) -> Iterator[None]:
    """Prints what `say` returns, unless it is None, every `period_s` seconds, from a thread."""
    is_over = threading.Event()

    def work() -> None:
        while not is_over.wait(period_s):
            if (line := say()) is not None:
                print(line, flush=True)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Says every ten seconds what the program is at, and for how long, until it is done."""
    start = time.perf_counter()
    with progress(lambda: f".. {what}, {time.perf_counter() - start:.0f} s"):
        yield


class Stopped(Exception):
    """The user, or the system, told the program to stop, and it did so in order."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.status = 128 + number  # what a shell reports of a program that a signal ended


class Stop:
    """Whether the process was told to stop; see stoppable."""

    number = 0  # of the signal

    def __bool__(self) -> bool:
        return self.number != 0


@contextlib.contextmanager
def _handled(handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Handles the signals that tell a program to stop."""
    before = {number: signal.signal(number, handle) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Yields a Stop, which SIGINT and SIGTERM set; a second one ends the process at once.

    Outside the main thread, which alone receives signals, nothing sets it.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # Python runs a handler between two of its own instructions, which can be after a compilation
    # of half a minute. The number of a signal is written into the pipe at once.
    out, into = os.pipe()
    os.set_blocking(into, False)

    def listen() -> None:
        while (numbers := os.read(out, 16)) and numbers != b"\0":
            for number in numbers:
                if number not in STOPS:
                    continue
                if stop:
                    os._exit(128 + number)
                stop.number = number
                print(
                    "\nstopping after this step; once more stops at once, and loses what is not "
                    "saved",
                    file=sys.stderr,
                    flush=True,
                )

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    # Before the handlers, which do nothing, and until after them: no signal is lost.
    wakeup = signal.set_wakeup_fd(into, warn_on_full_buffer=False)
    try:
        with _handled(lambda *_: None):
            yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        os.write(into, b"\0")
        thread.join()
        os.close(into)
        os.close(out)


@contextlib.contextmanager
def terminable() -> Iterator[Stop]:
    """Lets SIGINT and SIGTERM raise KeyboardInterrupt; the Stop says which of them it was.

    What a library writes is then cleared away. SIGINT does so also where the process was started to
    ignore it, as the background jobs of a script are. Outside the main thread, nothing changes.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _: Any) -> None:
        stop.number = number
        raise KeyboardInterrupt

    before = sys.unraisablehook
    sys.unraisablehook = insisting(before, stop)
    try:
        with _handled(handle):
            yield stop
    finally:
        sys.unraisablehook = before


def insisting(before: Callable[[Any], None], stop: Stop) -> Callable[[Any], None]:
    """Returns a sys.unraisablehook that sends a signal again whose KeyboardInterrupt was dropped.

    Python drops what a callback of the garbage collector raises, and jax has such callbacks.

    Args:
      before: the hook for everything else.
      stop: says which signal it was.
    """

    def show(found: Any) -> None:
        if not issubclass(found.exc_type, KeyboardInterrupt):
            before(found)
            return
        main = threading.main_thread().ident
        # A little later, after the callback.
        again = threading.Timer(0.05, signal.pthread_kill, (main, stop.number or signal.SIGINT))
        again.daemon = True
        again.start()

    return show


def leave(status: int, failed: BaseException | None = None) -> None:
    """Lets a program end with a status, in order or where the next signal comes.

    Python and jax take a second to end, in which Ctrl-C would print a traceback. After a
    KeyboardInterrupt, jax may be compiling still, and crash when it is taken down: the process ends
    here, once generators have cleared away what they made.
    """
    if threading.current_thread() is threading.main_thread():
        for number in STOPS:
            signal.signal(number, lambda *_: os._exit(status))
    if not isinstance(failed, KeyboardInterrupt):
        return
    error: BaseException | None = failed
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """Says of a KeyboardInterrupt that it came before training."""
    try:
        yield
    except KeyboardInterrupt as error:
        text = "stopped before training began; nothing is lost, start the same command again"
        raise KeyboardInterrupt(text) from error


@contextlib.contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """Starts a process and waits for its end; kills it if the block raises, as Ctrl-C does.

    Args:
      command: its words.
      options: of subprocess.Popen.
    """
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def free_memory() -> int:
    """Returns the bytes that this process can still take: the system's, or less in a container."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


def words_from(program: str, *kinds: Callable[[str], Any]) -> list[Any]:
    """Returns the words that `program` gave to a process that it started, each of its kind.

    A call by hand ends with one sentence and status 2.
    """
    try:
        return [kind(word) for kind, word in zip(kinds, sys.argv[1:], strict=True)]
    except (ValueError, TypeError):
        name = f"{Path(sys.argv[0]).resolve().parent.name}.{Path(sys.argv[0]).stem}"
        text = f"experiments.{name}: is started by python -m experiments.{program}, not by hand"
        print(text, file=sys.stderr)
        sys.exit(2)
