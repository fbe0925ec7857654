"""Flax modules for cached embeddings, for nnx and linen.

Changing five lines of a plain nnx training loop is enough to use them.
"""

from mpembed_jax.nn import linen
from mpembed_jax.nn.bags import CachedEmbedBags
from mpembed_jax.nn.embed import CachedEmbed
from mpembed_jax.nn.stack import CachedRows, EmbeddingVariable, apply_gradients, discard

__all__ = [
    "CachedEmbed",
    "CachedEmbedBags",
    "CachedRows",
    "EmbeddingVariable",
    "apply_gradients",
    "discard",
    "linen",
]
