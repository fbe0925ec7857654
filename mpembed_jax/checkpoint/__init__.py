"""Checkpoints of whole training states on orbax: exact, asynchronous, incremental, and refused when damaged.

Needs the `[checkpoint]` extra. `save` and `restore` take any tree that holds embedding states; each checkpoint carries a
checksum of every file, and one that was cut short or changed is never used. What orbax does (moving arrays between disk and
devices, from many processes) is left to it.
"""

from mpembed_jax.checkpoint.increments import RowTracker, mark, partition_specs, track
from mpembed_jax.checkpoint.manifest import CheckpointError, latest_step, steps
from mpembed_jax.checkpoint.restoring import restore
from mpembed_jax.checkpoint.saving import Saving, save

__all__ = [
    "CheckpointError",
    "RowTracker",
    "Saving",
    "latest_step",
    "mark",
    "partition_specs",
    "restore",
    "save",
    "steps",
    "track",
]
