"""A thread that makes the next batches while the device computes."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any


def in_background(items: Iterable[Any], depth: int = 32) -> Iterator[Any]:
    """Yields the items of an iterable that a thread runs up to `depth` items ahead.

    An exception of the iterable is raised where the items are consumed. A consumer that stops early
    stops the thread.
    """
    ready: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(item: tuple[str, Any]) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(("item", item))
                if stop.is_set():
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, item = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
