"""Serving: trained tables in one file, which is mapped into memory and read from its packed rows.

`save` writes the tables of embedding states to a file, and `load` maps the file. The command
`python -m mpembed_jax.serving` exports a checkpoint to a file, inspects a file, or verifies it.
"""

from mpembed_jax.serving.container import verify
from mpembed_jax.serving.errors import ServingError
from mpembed_jax.serving.interchange import export_program, write_npy
from mpembed_jax.serving.saving import save
from mpembed_jax.serving.sketch import SignSketch, sketch
from mpembed_jax.serving.sources import NGramState
from mpembed_jax.serving.table import ServingTable, load

__all__ = [
    "NGramState",
    "ServingError",
    "ServingTable",
    "SignSketch",
    "export_program",
    "load",
    "save",
    "sketch",
    "verify",
    "write_npy",
]
