"""Large embedding tables, trained in low precision with a float32 cache, in JAX."""

from mpembed_jax import memory, optim
from mpembed_jax.cache.plan import CachePlan
from mpembed_jax.cache.residency import CacheState
from mpembed_jax.cache.spec import CacheSpec
from mpembed_jax.embedding.dense import from_dense, to_dense
from mpembed_jax.embedding.evaluation import flush, freeze, read
from mpembed_jax.embedding.pooling import pool, segments_from_offsets
from mpembed_jax.embedding.state import EmbeddingState, init, partition_specs
from mpembed_jax.embedding.stats import CacheStats, stats
from mpembed_jax.embedding.step import apply_gradients, gradient_norm, lookup, prefetch
from mpembed_jax.embedding.vectors import VectorPlan, apply_pooled_gradients, embed
from mpembed_jax.embedding.writing import write_rows
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.numerics.packing import decode, encode
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import EmbeddingSpec, TableSpec
from mpembed_jax.table import QuantizedTable
from mpembed_jax.vocabulary.spec import VocabularySpec

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
    "VectorPlan",
    "VocabularySpec",
    "apply_gradients",
    "apply_pooled_gradients",
    "decode",
    "embed",
    "encode",
    "flush",
    "freeze",
    "from_dense",
    "gradient_norm",
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
    "write_rows",
]
