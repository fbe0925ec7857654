"""An unfinished training on disk: saved now and then and when the process is told to stop.

A save holds the learners, the position of each in the data, the points of the curves so far and
the outcomes of the seeds that are finished. A run goes on from it with the bits that it would have
had. Saves are those of `mpembed_jax.checkpoint`: a full one, then only the rows touched since,
until that is more than half as large. It needs the extra `[checkpoint]`.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments import provenance
from experiments.command_line import Refused
from experiments.running import Stop, Stopped
from mpembed_jax import checkpoint

if TYPE_CHECKING:
    from experiments.dlrm.training import Job, Learner, Run

KEPT = 2  # saves; a damaged one leaves the one before


@contextlib.contextmanager
def restoring(folder: Path) -> Iterator[None]:
    """Turns what `checkpoint.restore` raises into Refused."""
    try:
        yield
    except (checkpoint.CheckpointError, OSError, ValueError) as error:
        raise Refused(f"the unfinished run in {folder} cannot be read: {error}") from error


def read(folder: Path) -> dict[str, Any] | None:
    """Returns what the newest good save says of itself, None if there is none.

    Raises:
      Refused: if there are saves and none of them is good.
    """
    if checkpoint.latest_step(folder) is None:
        return None
    with restoring(folder):
        held = checkpoint.restore(folder, {"about": ""}, partial=True)
    return json.loads(held["about"])


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Lists the fields of two dictionaries that differ, with both values."""
    names = dict.fromkeys((*saved, *wanted))

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return " ".join(map(str, value))
        return "its default" if value is None else str(value)

    return [
        f"{name} {shown(saved.get(name))} there, {shown(wanted.get(name))} here"
        for name in names
        if saved.get(name) != wanted.get(name)
    ]


def warn(error: Exception) -> None:
    """Says that a save failed and training goes on."""
    print(f"warning: not saved, training goes on: {error}", file=sys.stderr, flush=True)


def last_words(folder: Path, place: str, command: str, error: Exception | None) -> str:
    """Returns what a run says that was told to stop.

    Args:
      folder: of the saves.
      place: where the run is, such as "at step 7".
      command: the line that goes on with the run.
      error: of the last save, None if the place is saved.
    """
    if error is None:
        return f"stopped {place}; go on with:\n  {command}"
    text = f"stopped {place}, which could not be saved: {error}"
    if checkpoint.latest_step(folder) is not None:
        text += f"\ngo on from an earlier place with:\n  {command}"
    return text


class Keeper:
    """Saves a run in a folder.

    Args:
      folder: of the saves.
      every_s: seconds between two saves; 0: only when told to stop.
      stop: says whether the process was told to stop.
      about: what the run depends on and what is finished, JSON; read again at each save.
      command: the line that goes on with the run.
    """

    def __init__(
        self,
        folder: Path,
        every_s: float,
        stop: Stop,
        about: dict[str, Any],
        command: str,
    ):
        self.folder, self.every_s, self.stop = folder, every_s, stop
        self.about, self.command = about, command
        self.last = time.monotonic()
        self._saving: checkpoint.Saving | None = None
        self._full_bytes = 0  # of the save from which the trackers started; 0: none
        self.about["environment"] = {
            "commit": provenance.commit(),
            "device": provenance.device(),
            "versions": provenance.versions(("jax", "jaxlib")),
        }

    # --- while it trains

    def begin(self, run: "Run") -> None:
        """Starts to mark the rows that steps touch, from the first step on: one program for all.

        Raises:
          Stopped: if the process was told to stop; it need not wait for a compilation.
        """
        self._full_bytes = 0
        self._track(run)
        self.after_step(run)

    def after_step(self, run: "Run") -> None:
        """Saves and leaves, if the process was told to stop.

        Raises:
          Stopped: with the command that goes on.
        """
        if not self.stop:
            return
        failed: Exception | None = None
        try:
            self._finish()
            self._save(run, wait=True)
        except (checkpoint.CheckpointError, OSError) as error:
            failed = error
        text = last_words(self.folder, f"at {run.place}", self.command, failed)
        raise Stopped(self.stop.number, text)

    def after_chunk(self, run: "Run") -> None:
        """Saves in the background, if it is time to; says so if the last save failed."""
        if not self.every_s or time.monotonic() - self.last < self.every_s:
            return
        self.last = time.monotonic()
        try:
            self._finish()
            self._save(run, wait=False)
        except (checkpoint.CheckpointError, OSError) as error:
            self._full_bytes = 0
            warn(error)

    def finish(self) -> None:
        """Waits for a save in the background; its error no longer matters."""
        with contextlib.suppress(checkpoint.CheckpointError):
            self._finish()

    def tell_changes(self, saved: dict[str, Any]) -> None:
        """Says which changes since a save may change the bits that follow."""
        if found := differences(saved["environment"], self.about["environment"]):
            text = f"warning: another environment than the save's: {'; '.join(found)}"
            print(text, file=sys.stderr, flush=True)

    def _finish(self) -> None:
        """Waits for the save in the background."""
        saving, self._saving = self._saving, None
        if saving is not None:
            try:
                saving.wait()
            except checkpoint.CheckpointError:
                self._full_bytes = 0
                raise

    def _track(self, run: "Run") -> None:
        held = [emb for learner in run.learners if learner is not None for emb in learner.emb]
        if any(emb.vocabulary is not None for emb in held):
            self._full_bytes = 0  # rows of raw ids cannot be tracked, so every save is full
            return
        for i, learner in enumerate(run.learners):
            if learner is not None:
                trackers = tuple(map(checkpoint.track, learner.emb))
                run.learners[i] = learner._replace(trackers=trackers)

    def _save(self, run: "Run", *, wait: bool) -> None:
        number = (checkpoint.latest_step(self.folder) or 0) + 1
        about = self.about | {"run": run.about(), "number": number}
        tree = _tree(run, json.dumps(about))
        trackers = None
        if self._full_bytes:
            trackers = {
                f"learners.{i}.emb.{j}": tracker
                for i, learner in enumerate(run.learners)
                if learner is not None
                for j, tracker in enumerate(learner.trackers)
            }
        saving = checkpoint.save(self.folder, number, tree, tracker=trackers, wait=wait, keep=KEPT)
        self._saving = None if wait else saving
        if trackers is None:
            self._full_bytes = saving.nbytes
            self._track(run)
        elif 2 * saving.nbytes > self._full_bytes:
            self._full_bytes = 0  # the next one is full again


# --- going on


def _tree(run: "Run", about: str) -> dict[str, Any]:
    """Returns what a save holds; learners that were evaluated are not there any more."""
    left = {str(i): x for i, x in enumerate(run.learners) if x is not None}
    return {
        "about": about,
        "learners": {name: learner._replace(trackers=None) for name, learner in left.items()},
        "counts": {str(i): run.counts_of(i) for i in range(len(run.learners))},
        "scores": {str(i): run.scores_of(i) for i in range(len(run.learners))},
    }


def restore(folder: Path, about: dict[str, Any], run: "Run", job: "Job") -> None:
    """Brings a run that has not begun to where a save left it.

    Args:
      folder: of the saves.
      about: from `read`.
      run: from training.begin, of the same settings; its learners are replaced.
      job: of its model.

    Raises:
      Refused: if the save is of another run, or cannot be read.
    """
    run.take(about["run"])
    for i, learner in enumerate(run.learners):
        if i < len(run.outcomes):
            run.learners[i] = None
        elif learner is not None:
            if job.view is not None and run.steps[i]:
                learner = job.view.refresh(learner)
            # Only the shapes: the values that were drawn need no memory while others are read.
            run.learners[i] = _shapes(learner)
    with restoring(folder):
        tree = checkpoint.restore(folder, _tree(run, ""), step=about["number"])
    for i in range(len(run.learners)):
        if run.learners[i] is not None:
            run.learners[i] = tree["learners"][str(i)]
        run.set_logs(i, np.asarray(tree["counts"][str(i)]), np.asarray(tree["scores"][str(i)]))


def _shapes(learner: "Learner") -> "Learner":
    return jax.eval_shape(lambda: learner)


def record(settings: Any, *, without: tuple[str, ...]) -> dict[str, Any]:
    """Returns settings as JSON has them, paths absolute."""
    values = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.name not in without
    }
    values = {k: str(v.absolute()) if isinstance(v, Path) else v for k, v in values.items()}
    return json.loads(json.dumps(values))
