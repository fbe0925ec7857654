"""Checkpoints of whole training states: exact, asynchronous and incremental, written by orbax.

This module needs the `[checkpoint]` extra. `save` and `restore` take any tree that holds embedding
states. Each checkpoint has a checksum of every file. A checkpoint that was cut short or changed is
never used. Orbax moves arrays between disk and devices, also from many processes.
"""

from mpembed_jax.checkpoint.errors import CheckpointError
from mpembed_jax.checkpoint.increments import RowTracker, mark, partition_specs, track
from mpembed_jax.checkpoint.manifest import latest_step, steps
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
