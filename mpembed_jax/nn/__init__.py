"""Flax modules for cached embeddings, for nnx and linen.

To use them, five lines of a plain nnx training loop change.
"""

from mpembed_jax.nn import linen
from mpembed_jax.nn.bags import CachedEmbedBags
from mpembed_jax.nn.embed import CachedEmbed
from mpembed_jax.nn.ngram import NGramMemory, ngram_spec
from mpembed_jax.nn.stack import (
    CachedRows,
    CachedVectors,
    EmbeddingVariable,
    apply_gradients,
    discard,
)
from mpembed_jax.vocabulary.ngram_hash import NGramHash

__all__ = [
    "CachedEmbed",
    "CachedEmbedBags",
    "CachedRows",
    "CachedVectors",
    "EmbeddingVariable",
    "NGramHash",
    "NGramMemory",
    "apply_gradients",
    "discard",
    "linen",
    "ngram_spec",
]
