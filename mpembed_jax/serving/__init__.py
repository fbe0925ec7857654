"""Serving: trained tables in one file that is mapped in milliseconds and read from packed rows.

`save` writes embedding states, `load` maps the file. `python -m mpembed_jax.serving` exports a
checkpoint, and shows or checks a file.
"""

from mpembed_jax.serving.container import verify
from mpembed_jax.serving.errors import ServingError
from mpembed_jax.serving.saving import save

__all__ = ["ServingError", "save", "verify"]
