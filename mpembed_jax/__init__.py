"""Embedding tables that are too big: trained in low precision with an FP32 cache, in JAX."""

from mpembed_jax import memory, optim
from mpembed_jax.cache import CachePlan, CacheSpec, CacheState
from mpembed_jax.dense import from_dense, to_dense
from mpembed_jax.embedding import lookup, prefetch
from mpembed_jax.evaluation import flush, freeze, read
from mpembed_jax.formats import RowFormat
from mpembed_jax.gradients import apply_gradients, apply_pooled_gradients
from mpembed_jax.packing import decode, encode
from mpembed_jax.placement import Placement
from mpembed_jax.pooling import pool, segments_from_offsets
from mpembed_jax.spec import EmbeddingSpec
from mpembed_jax.state import EmbeddingState, init, partition_specs
from mpembed_jax.stats import CacheStats, stats
from mpembed_jax.table import NO_ID, QuantizedTable, TableSpec

__all__ = [
    "NO_ID",
    "CachePlan",
    "CacheSpec",
    "CacheState",
    "CacheStats",
    "EmbeddingSpec",
    "EmbeddingState",
    "Placement",
    "QuantizedTable",
    "RowFormat",
    "TableSpec",
    "apply_gradients",
    "apply_pooled_gradients",
    "decode",
    "encode",
    "flush",
    "freeze",
    "from_dense",
    "init",
    "lookup",
    "memory",
    "optim",
    "partition_specs",
    "pool",
    "prefetch",
    "read",
    "segments_from_offsets",
    "stats",
    "to_dense",
]
