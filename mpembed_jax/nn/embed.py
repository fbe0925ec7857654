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

# All modules without tx share this one transformation. A transformation is a static argument of
# jit, so a new one for each model would retrace the model's step.
DEFAULT_TX = optim.rowwise_adagrad(0.05)
# This is the default of nnx.Embed and linen.Embed: normal values of variance 1 / features. The
# variance is the same for a block of rows as for the whole table.
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

    Rows in the cache are trained in float32, all others in the table's format. A training step runs
    under nnx.jit with the model donated. It calls `prefetch(ids)` before nnx.value_and_grad, and
    `grads = nn.apply_gradients(model, grads)` after it. After `model.eval()`, calls need no
    prefetch.

    Args:
      num_embeddings: V, the number of rows of the table.
      features: D, the width of a row.
      tx: optax transformation for the rows. None: optim.rowwise_adagrad(0.05), which suits the
        default initial values. The model's own optimizer never sees the table.
      storage: RowFormat, or its name, in which rows outside the cache are stored.
      cache: CacheSpec, or None to train every row in the table.
      dtype: dtype of the vectors; None for float32. Updates of rows are computed in float32,
        whatever this dtype is.
      embedding_init: `(key, shape, dtype) -> array`, as for nnx.Embed; see mpembed_jax.TableSpec.
        None for nnx.Embed's default.
      out_of_range: the rule for ids outside the table, see mpembed_jax.EmbeddingSpec.
      max_unique_ids: the budget of distinct ids per batch, see mpembed_jax.EmbeddingSpec.
      skip_nonfinite: whether rows whose gradient is not finite are skipped and counted.
      row_state_dtype: dtype of the optimizer state per row, "float32" or "bfloat16".
      memory_kind: None, or "pinned_host" for a table in host memory.
      mesh: jax.sharding.Mesh over which tables and batches are divided; None for one device. With
        a mesh, the model is still called on whole arrays; it divides their leading axis. In
        training, the length of this axis must be a multiple of the number of devices.
      axis_name: the mesh axis that divides rows, see mpembed_jax.init.
      placement: see mpembed_jax.Placement.
      implementation: see mpembed_jax.init; it also decides which code pools the vectors.
      fused: True: prefetch makes the vectors, and the loss is differentiated with respect to them.
        With numba on a CPU and an optimizer such as rowwise_adagrad, a step then makes no array of
        rows or of their gradients. Each call must get exactly the ids of its prefetch, in
        the same nesting and shapes. Leave it False where something reads or changes gradients of
        rows, such as clipping by the global norm, and for microbatches, vmap or scan. Over a mesh,
        fused=True changes nothing.
      rngs: its `params` stream determines the initial values and the embedding's own randomness.

    Raises:
      TypeError: if an argument has the wrong type.
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
          state: a state of the same tables. Later steps consume it if they donate the model.

        Raises:
          ValueError: if the state is of other tables, or if a step is in progress.
        """
        self.stack.set_embedding_state(state)

    def prefetch(self, ids: Any) -> None:
        """Plans a batch and holds its rows for one step.

        Call it once per step, outside the differentiated function, with the ids of all calls.

        Args:
          ids: integers [..] in [0, num_embeddings), or any nest of such arrays. NO_ID is padding.
            Ids outside the table are treated by the rule `out_of_range`. Host arrays of 64-bit ids
            are checked in 64 bits, because jax would truncate them in silence.

        Raises:
          TypeError: if ids are not integers.
          ValueError: in evaluation mode; if neither nn.apply_gradients nor nn.discard followed the
            last prefetch; if a mesh cannot divide the leading axis of ids evenly; or if
            out_of_range is "raise" and a concrete id is outside the table.
        """
        mapped = routing.table_ids(self.stack.spec, ids)
        self.stack.prefetch(mapped, ids, not self.deterministic)

    def __call__(self, ids: Any) -> Any:
        """Returns the vectors of ids.

        In training, they are differentiable in what prefetch holds: the rows, or the vectors with
        fused=True.

        Args:
          ids: in training, ids that were prefetched, in any shape, order and number (with
            fused=True, exactly those of the prefetch); after eval(), any ids.

        Returns:
          [.., features] in `dtype`, in the nesting of ids. Padding gives zeros. Ids outside the
          table are treated by the rule `out_of_range`. In training inside jit, ids that were not
          prefetched give NaN, or zeros if the batch exceeded max_unique_ids.

        Raises:
          TypeError: if ids are not integers.
          ValueError: in training, if prefetch was not called, or, outside jit, if an id of the
            call was not prefetched. With fused=True, also if nesting or shapes differ from those of
            the prefetch. Also if out_of_range is "raise" and a concrete id is outside the table.
        """
        mapped = routing.table_ids(self.stack.spec, ids)
        vectors = vectors_of(self.stack, mapped, ids, not self.deterministic)
        return jax.tree.map(lambda v: v.astype(self.dtype), vectors)

    def attend(self, query: jax.Array) -> jax.Array:
        """Returns the dot products of queries with every row (dense logits).

        The table is decoded in blocks. The result is differentiable only in the query, and only
        after eval(). In training mode, differentiation raises an error, because the table would get
        no gradient. To train the table, use sampled softmax over prefetched rows. Prefetch the
        positive and the sampled negative ids together with the inputs, as one nest, and take dot
        products with the vectors of the call.

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
