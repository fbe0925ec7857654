"""The baselines that cached tables are compared with at equal bytes.

Each is a source, a view of rows, or a change after training. Pruning keeps an FP32 row for each of
the most frequent training ids; all other ids of a table share one row. Post-training quantization
trains in FP32 and stores the result. Quantization-aware training follows DQRM (arXiv 2410.20046):
the model sees an FP32 master through INT4 with one scale per table, absmax / 7, refreshed every 200
steps; gradients pass straight through to the master's touched rows. Both need FP32 tables while
they train: their bytes are those served afterwards. Hashing and a smaller dim need nothing here:
see training.make_spec and the recipe.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpembed_jax as mpembed
from experiments.dlrm.training import Learner, View

INT4_LEVELS = 7  # codes -7 .. 7
REFRESH_PERIOD = 200  # steps


def count_ids(source: Any, batch_size: int) -> dict[str, np.ndarray]:
    """Counts the ids of each table in one pass over training: {table: i64 [vocabulary_size]}."""
    counts = {
        name: np.zeros(size + 1, np.int64) for name, size in source.tables.items()
    }  # the last one: padding
    for batch in source.train(batch_size, 0):
        for name, ids in _by_table(batch["ids"], source.tables):
            np.add.at(counts[name], np.minimum(ids, source.tables[name]).reshape(-1), 1)
    return {name: count[:-1] for name, count in counts.items()}


def _by_table(ids: Any, tables: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    return iter(ids.items()) if isinstance(ids, dict) else zip(tables, ids.T, strict=True)


def index_bytes(num_rows: int) -> int:
    """Returns the bytes of the index of kept rows: a bit per row, a 4-byte rank per 512 rows."""
    return -(-num_rows // 8) + 4 * -(-num_rows // 512)


def rows_to_keep(num_rows: int, num_tables: int, embedding_dim: int, share: float) -> int:
    """Returns how many rows can be kept in a share of the FP32 bytes.

    The shared row of each table and the index of kept rows are paid first.
    """
    room = share * 4 * num_rows * embedding_dim - index_bytes(num_rows)
    return max(0, int(room // (4 * embedding_dim)) - num_tables)


class Pruned:
    """A source whose tables hold only the most frequent ids.

    All other ids become the last row of their table.

    Args:
      source: see experiments/data.
      counts: from count_ids; ties keep the id of the smaller number.
      num_kept: rows kept in all tables together.
    """

    def __init__(self, source: Any, counts: dict[str, np.ndarray], num_kept: int):
        self.source = source
        self.name, self.num_dense, self.bags = source.name, source.num_dense, source.bags
        self.num_train, self.num_test = source.num_train, source.num_test
        flat = np.concatenate([counts[name] for name in source.tables])
        is_kept = np.zeros(len(flat), bool)
        is_kept[np.argsort(-flat, kind="stable")[:num_kept]] = True
        self.tables, self.new_ids, start = {}, {}, 0
        for name, size in source.tables.items():
            kept = is_kept[start : start + size]
            start += size
            self.tables[name] = int(kept.sum()) + 1
            self.new_ids[name] = np.where(kept, np.cumsum(kept) - 1, self.tables[name] - 1).astype(
                np.int32
            )

    def _map(self, batches: Iterable[dict]) -> Iterator[dict]:
        for batch in batches:
            new = {}
            for name, ids in _by_table(batch["ids"], self.tables):
                is_id = ids != mpembed.NO_ID
                new[name] = np.where(
                    is_id, self.new_ids[name][np.where(is_id, ids, 0)], mpembed.NO_ID
                )
            yield batch | {
                "ids": new
                if isinstance(batch["ids"], dict)
                else np.stack(list(new.values()), axis=1)
            }

    def train(
        self, batch_size: int, seed: int = 0, start: int = 0, num_epochs: int = 1
    ) -> Iterator[dict]:
        """Yields the source's training batches in the new numbers."""
        return self._map(self.source.train(batch_size, seed, start, num_epochs))

    def test(self, batch_size: int) -> Iterator[dict]:
        """Yields the source's test batches in the new numbers."""
        return self._map(self.source.test(batch_size))


def fake_quantize(rows: jax.Array, scale: jax.Array) -> jax.Array:
    """Rounds to the nearest of scale * (-7 .. 7), clipped.

    The gradient passes through unchanged.

    Args:
      rows: f32 [.., D].
      scale: f32 [..], positive.

    Returns:
      f32 [.., D].
    """
    step = scale[..., None]
    quantized = jnp.clip(jnp.round(rows / step), -INT4_LEVELS, INT4_LEVELS) * step
    return rows + jax.lax.stop_gradient(quantized - rows)


@partial(jax.jit, static_argnames="sizes")
def table_scales(state: mpembed.EmbeddingState, sizes: tuple[int, ...]) -> jax.Array:
    """Returns absmax / 7 of each table, f32 [T]; of a table of zeros the least normal float."""
    row_absmax = jnp.max(
        jnp.abs(mpembed.read(state, jnp.arange(sum(sizes), dtype=jnp.int32))), axis=1
    )
    splits = np.cumsum(sizes)[:-1]
    absmax = jnp.stack([jnp.max(part) for part in jnp.split(row_absmax, splits)])
    return jnp.maximum(absmax / INT4_LEVELS, jnp.finfo(jnp.float32).tiny)


def quantization_aware(tables: dict[str, int], period: int = REFRESH_PERIOD) -> View:
    """Returns DQRM's view of rows: INT4 with one scale per table.

    `Learner.extra` holds the scales (f32 [T]).
    """
    sizes = tuple(tables.values())
    ends = np.cumsum(sizes).astype(np.int32)

    def see(learner: Learner, rows: jax.Array, ids: jax.Array) -> jax.Array:
        # Padding has a zero row, which stays zero whatever the scale.
        table = jnp.minimum(jnp.searchsorted(ends, ids, side="right"), len(sizes) - 1)
        return fake_quantize(rows, learner.extra[table])

    def refresh(learner: Learner) -> Learner:
        return learner._replace(extra=table_scales(learner.emb[0], sizes))

    return View(see, refresh, period)


def int4_served_bytes(tables: dict[str, int], embedding_dim: int) -> int:
    """Bytes of INT4 rows with one float32 scale per table."""
    return sum(tables.values()) * -(-embedding_dim // 2) + 4 * len(tables)


def quantize_after(
    state: mpembed.EmbeddingState, storage: str, tx: optax.GradientTransformation
) -> mpembed.EmbeddingState:
    """Stores a trained state's rows in another format, rounded to nearest, without a cache.

    Args:
      state: trained; not consumed.
      storage: name of the format.
      tx: of the state's rows.

    Returns:
      A state to read from.
    """
    rows = mpembed.RowFormat(storage, rounding="nearest")
    spec = dataclasses.replace(state.spec, storage=rows, cache=None)
    return mpembed.from_dense(jax.random.key(0), spec, tx, mpembed.to_dense(state))
