"""Serving: trained tables in one file that is mapped in milliseconds and read from packed rows.

`save` writes embedding states, `load` maps the file. `python -m mpembed_jax.serving` exports a
checkpoint, and shows or checks a file.
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
