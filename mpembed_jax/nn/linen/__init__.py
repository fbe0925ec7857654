"""Cached embeddings for flax.linen: the modules, and the train state that trains them."""

from mpembed_jax.nn.linen.modules import CachedEmbed, CachedEmbedBags, NGramMemory
from mpembed_jax.nn.linen.train_state import TrainState

__all__ = ["CachedEmbed", "CachedEmbedBags", "NGramMemory", "TrainState"]
