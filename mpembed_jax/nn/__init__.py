"""Flax modules over the verbs: cached embeddings that train inside an nnx loop by five changed lines, and for linen."""

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
