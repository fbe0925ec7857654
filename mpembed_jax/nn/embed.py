"""CachedEmbed: an nnx module like nnx.Embed, whose table is quantized and cached."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mpembed_jax import optim
from mpembed_jax.cache.spec import CacheSpec
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.embedding.stats import CacheStats, stats
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.nn import routing, verbs
from mpembed_jax.nn.stack import Stack, vectors_of
from mpembed_jax.numerics.formats import RowFormat, as_format
from mpembed_jax.spec import EmbeddingSpec, TableSpec

# All modules share one object. An optimizer is a static argument, so a new one for each model would
# retrace its step.
DEFAULT_TX = optim.rowwise_adagrad(0.05)
# The default of nnx.Embed and linen.Embed: normal with variance 1 / features, for any block of
# rows.
DEFAULT_INIT = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


def embed_spec(
    num_embeddings: int,
    features: int,
    storage: RowFormat | str,
    cache: CacheSpec | None,
    embedding_init: Any,
    **options: Any,
) -> EmbeddingSpec:
    """Returns the spec of the one-table stack of a CachedEmbed with these arguments.

    `options` are fields of EmbeddingSpec.
    """
    table = TableSpec(
        "embedding", num_embeddings, DEFAULT_INIT if embedding_init is None else embedding_init
    )
    return EmbeddingSpec((table,), features, as_format(storage), cache, **options)


class CachedEmbed(nnx.Module):
    """Turns ids into vectors like nnx.Embed, with a quantized table and a float32 cache.

    The rows in use are cached and trained in float32. A training step runs under nnx.jit with the
    model donated. It calls `prefetch(ids)` before nnx.value_and_grad, and
    `grads = nn.apply_gradients(model, grads)` after it. After `model.eval()`, calls need no
    prefetch.

    Args:
      num_embeddings: V, the number of rows of the table.
      features: D, the width of a row.
      tx: optax transformation for the rows. None: optim.rowwise_adagrad(0.05), which suits the
        default initial values. The model's own optimizer never sees the table.
      storage: RowFormat, or its name, in which rows outside the cache are stored.
      cache: CacheSpec, or None to train every row in the table.
      dtype: dtype of the vectors; None for float32. Rows are always trained in float32.
      embedding_init: `(key, shape, dtype) -> array`, as for nnx.Embed; see mpembed_jax.TableSpec.
        None for nnx.Embed's default.
      out_of_range: the rule for ids outside the table, see mpembed_jax.EmbeddingSpec.
      max_unique_ids: the budget of distinct ids per batch, see mpembed_jax.EmbeddingSpec.
      skip_nonfinite: whether rows whose gradient is not finite are skipped and counted.
      row_state_dtype: dtype of the optimizer state per row, "float32" or "bfloat16".
      memory_kind: None, or "pinned_host" for a table in host memory.
      mesh: jax.sharding.Mesh over which tables and batches are divided; None for one device. With
        a mesh, the model is still called on whole arrays; it divides their leading axis.
      axis_name: the mesh axis that divides rows, see mpembed_jax.init.
      placement: see mpembed_jax.Placement.
      implementation: see mpembed_jax.init; it also selects the pooling.
      fused: True: prefetch makes the vectors, and a step needs no array of rows or of their
        gradients. Each call must then get exactly the ids of its prefetch, in the same nesting and
        shapes. Gradients are those of the vectors. So leave it False where something reads or
        changes gradients of rows, such as clipping by the global norm, and for microbatches, vmap
        or scan. Over a mesh, it changes nothing.
      rngs: its `params` stream determines the initial values and the embedding's own randomness.

    Raises:
      TypeError: if an argument has another type.
      ValueError: if a size is out of range, or tx cannot work on gathered rows.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        tx: optax.GradientTransformation | None = None,
        storage: RowFormat | str = "int8",
        cache: CacheSpec | None = CacheSpec(),  # noqa: B008
        dtype: Any = None,
        embedding_init: Any = None,
        out_of_range: str = "drop",
        max_unique_ids: int | None = None,
        skip_nonfinite: bool = False,
        row_state_dtype: str = "float32",
        memory_kind: str | None = None,
        mesh: Any = None,
        axis_name: Any = None,
        placement: Placement | None = None,
        implementation: str | None = None,
        fused: bool = False,
        rngs: nnx.Rngs,
    ):
        spec = embed_spec(
            num_embeddings,
            features,
            storage,
            cache,
            embedding_init,
            out_of_range=out_of_range,
            max_unique_ids=max_unique_ids,
            skip_nonfinite=skip_nonfinite,
            row_state_dtype=row_state_dtype,
            memory_kind=memory_kind,
        )
        self.num_embeddings = num_embeddings
        self.features = features
        self.dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
        self.deterministic = False
        where = {
            "mesh": mesh,
            "axis_name": axis_name,
            "placement": placement,
            "implementation": implementation,
            "fused": fused,
        }
        self.stack = Stack(spec, DEFAULT_TX if tx is None else tx, rngs=rngs, **where)

    @property
    def state(self) -> EmbeddingState:
        """The EmbeddingState, for mpembed_jax.to_dense, freeze, read and the other verbs."""
        return self.stack.embedding_state

    def set_state(self, state: EmbeddingState) -> None:
        """Replaces the EmbeddingState between steps, for example by one from write_rows.

        Args:
          state: of the same tables; consumed, if later steps donate the model.

        Raises:
          ValueError: if the state is of other tables, or if a step is in progress.
        """
        self.stack.set_embedding_state(state)

    def prefetch(self, ids: Any) -> None:
        """Plans a batch and holds its rows for one step.

        Call it once per step, outside the differentiated function, with the ids of all calls.

        Args:
          ids: integers [..] in [0, num_embeddings), or any nest of such arrays. NO_ID is padding.
            Ids outside the table are treated by the rule `out_of_range`. 64-bit host arrays are
            checked before jax would truncate them.

        Raises:
          TypeError: if ids are not integers.
          ValueError: in evaluation mode, or if nn.apply_gradients was not called after the last
            prefetch.
        """
        mapped = routing.table_ids(self.stack.spec, ids)
        self.stack.prefetch(mapped, ids, not self.deterministic)

    def __call__(self, ids: Any) -> Any:
        """Returns the vectors of ids, differentiable in the prefetched rows.

        Args:
          ids: in training, ids that were prefetched, in any shape, order and number; after
            eval(), any ids.

        Returns:
          [.., features] in `dtype`, in the nesting of ids. Padding and ids outside the table give
          zeros. In training inside jit, ids that were not prefetched give NaN.

        Raises:
          TypeError: if ids are not integers.
          ValueError: in training, if prefetch was not called, or outside jit if it was not given
            an id.
        """
        mapped = routing.table_ids(self.stack.spec, ids)
        vectors = vectors_of(self.stack, mapped, ids, not self.deterministic)
        return jax.tree.map(lambda v: v.astype(self.dtype), vectors)

    def attend(self, query: jax.Array) -> jax.Array:
        """Returns the dot products of queries with every row (dense logits).

        The table is decoded in blocks. The result is differentiable only in the query, and only
        after eval(): in training, the table would silently not be trained. To train it, use sampled
        softmax over prefetched rows. Prefetch the positive and the sampled negative ids together
        with the inputs, as one nest, and take dot products with the vectors of the call.

        Args:
          query: float [.., features].

        Returns:
          [.., num_embeddings] in `dtype`.

        Raises:
          TypeError: if query is not floating.
          ValueError: if its last axis is not features, or if attend is differentiated in training
            mode.
        """
        return verbs.attend(self.stack.embedding_state, query, self.dtype, not self.deterministic)

    def stats(self) -> CacheStats:
        """Returns the counts since init (hit_rate and others) as host numbers.

        See mpembed_jax.stats.
        """
        return stats(self.state)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode of a view, for nnx.view; `deterministic=True` means evaluation."""
        if deterministic is not None:
            self.deterministic = deterministic
