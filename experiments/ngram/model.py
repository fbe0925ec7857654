"""A small transformer with one n-gram memory between its blocks, as in Engram (arXiv 2601.07372).

The memory's vectors of a position give a key and a value. The gate is the sigmoid of the scaled
product of the normalised hidden state and the normalised key. Gate times value is added to the
residual stream.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mpembed_jax import nn


class Block(nnx.Module):
    """Causal attention and an MLP, each after a norm and added to the stream."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in range(2)])
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Takes and returns float32 [B, T, width]."""
        parts = self.qkv(self.norms[0](x)).reshape(*x.shape[:2], 3, self.heads, -1)
        query, key, value = (parts[:, :, at] for at in range(3))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class GatedMemory(nnx.Module):
    """Adds what an NGramMemory holds to the stream, through a gate."""

    def __init__(self, width: int, memory: nn.NGramMemory, rngs: nnx.Rngs):
        self.memory = memory
        held = len(memory.ngrams.tables) * memory.features
        self.key = nnx.Linear(held, width, use_bias=False, rngs=rngs)
        self.value = nnx.Linear(held, width, use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        """Takes float32 [B, T, width] and int32 [B, T]; returns float32 [B, T, width]."""
        vectors = self.memory(tokens)
        query, key = self.norms[0](x), self.norms[1](self.key(vectors))
        score = jnp.sum(query * key, axis=-1, keepdims=True) / x.shape[-1] ** 0.5
        return x + nnx.sigmoid(score) * self.value(vectors)


class LanguageModel(nnx.Module):
    """Predicts the next token.

    Args:
      vocabulary_size: number of tokens.
      length: T, the longest sequence.
      width: of the stream.
      num_blocks: blocks; the memory is after the first.
      heads: of attention.
      memory: makes the NGramMemory, or None for no memory.
      seed: of all weights. The weights beside the memory do not depend on it.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        length: int,
        width: int,
        num_blocks: int,
        heads: int,
        memory: Any,
        seed: int,
    ):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(vocabulary_size, width, rngs=rngs)
        self.position = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(num_blocks)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary_size, use_bias=False, rngs=rngs)
        self.gated = None
        if memory is not None:
            self.gated = nnx.data(GatedMemory(width, memory(nnx.Rngs(seed)), rngs))

    def prefetch(self, tokens: jax.Array) -> None:
        """Prefetches the memory's rows of a batch, if there is a memory."""
        if self.gated is not None:
            self.gated.memory.prefetch(tokens)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Takes int32 [B, T]; returns logits, float32 [B, T, vocabulary_size]."""
        return self.head(self.stream(tokens))

    def stream(self, tokens: jax.Array) -> jax.Array:
        """Takes int32 [B, T]; returns what the head reads, float32 [B, T, width]."""
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 0 and self.gated is not None:
                x = self.gated(x, tokens)
        return self.norm(x)
