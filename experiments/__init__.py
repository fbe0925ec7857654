"""Experiments: a folder per question.

Run them from the repository root as `python -m experiments.<folder>.<name>`. They use the public
names of `mpembed_jax` only and need the extra `[experiments]`.
"""

import signal
import sys
import types

from experiments import running

if sys.argv[:1] == ["-m"]:  # python -m is about to run one of the programs
    _before = sys.excepthook

    def _hook(
        kind: type[BaseException], error: BaseException, place: types.TracebackType | None
    ) -> None:
        """Says one line where Ctrl-C comes while jax is still being imported."""
        if kind is KeyboardInterrupt:
            print("stopped before it began", file=sys.stderr, flush=True)
        else:
            _before(kind, error, place)

    sys.excepthook = _hook
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job of a script
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = running.insisting(sys.unraisablehook, running.Stop())
