"""GPU kernels of the row update by Pallas' Triton back end: from gradients to stored rows.

One kernel applies the optimizer's rule (SGD or row-wise Adagrad) to each unique row of a batch. It
stores the row in its line as float32, or in the table, rounded by the rule of its format. `update`
takes the gradient of each row. `update_summed` takes the gradients of positions and sums those of
each row itself, so no array of row gradients exists. The references are in `xla.update`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mpembed_jax.numerics import random_bits, rounding
from mpembed_jax.ops.gpu import kernel, sums
from mpembed_jax.ops.gpu.kernel import RowWords
from mpembed_jax.ops.records import Draw, Moves, Positions, Store
from mpembed_jax.optim import RowRule
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import QuantizedTable

_BFLOAT16 = rounding.FLOAT_FORMATS["bfloat16"]


class _Stored(NamedTuple):
    """The arrays that an update changes in place, or a kernel's references to them.

    A field is None if its array does not exist.
    """

    packed: Any
    lines: Any
    accumulator: Any

    @property
    def held(self) -> list:
        """The fields that are not None."""
        return [array for array in self if array is not None]

    def holding(self, others: Any) -> "_Stored":
        """Returns a copy whose fields that are not None are replaced by `others`, in order."""
        remaining = iter(others)
        return _Stored(*(None if array is None else next(remaining) for array in self))


class _Gradients(NamedTuple):
    """The source of the gradients of a kernel's rows."""

    operands: list[jax.Array]
    block: int  # R, rows of a program
    rows_of: Callable[
        [Any], tuple
    ]  # number of ids -> (the rows of a program, int32 [R]; whether each exists, bool [R])
    places: Callable[
        [list, jax.Array, jax.Array], list
    ]  # (references, row, mask) -> float32 [R, W] by place


def _stepped(
    rule: RowRule, rows: list, grads: list, total: jax.Array | None, number: jax.Array
) -> list[jax.Array]:
    """Returns the rows after one step of the rule.

    `rows`, `grads` and the result are lists by place. `total` (float32 [R]) is G of row-wise
    Adagrad, or None for SGD. `number` is for rounding.apart.
    """
    rate = jnp.float32(-rule.learning_rate)
    if total is not None:
        root = jnp.sqrt(total) + jnp.float32(rule.eps)
        inverse = (jnp.float32(1) / jnp.where(root > 0, root, jnp.float32(1)))[:, None]
        grads = [g * inverse for g in grads]
    return [w + rounding.apart(rate * g, number) for w, g in zip(rows, grads, strict=True)]


def _mean_of_squares(grads: list[jax.Array], dim: int, number: jax.Array) -> jax.Array:
    """Returns the mean square of each row (float32 [R]) of a list by place (float32 [R, W]).

    The order of the sum is that of `optim.rowwise.mean_of_squares`: by halves. With k elements
    in a word, element d is at place d mod k of word d div k, so the words are halved first. Padding
    is zero. `number` is for rounding.apart.
    """
    squares = [rounding.apart(g * g, number) for g in grads]
    while squares[0].shape[1] > 1:
        rows, words = squares[0].shape
        # Each of these sums has two terms, so XLA cannot choose another order.
        squares = [jnp.sum(s.reshape(rows, 2, words // 2), axis=1) for s in squares]
    while len(squares) > 1:
        half = len(squares) // 2
        squares = [a + b for a, b in zip(squares[:half], squares[half:], strict=True)]
    total = squares[0].reshape(squares[0].shape[0])
    return rounding.apart(total * jnp.float32(1 / dim), number)


def update(
    store: Store,
    accumulator: jax.Array | None,
    moves: Moves,
    old_rows: jax.Array,
    row_grads: jax.Array,
    *,
    rule: RowRule,
    draw: Draw,
    is_interpreted: bool,
) -> tuple[Store, jax.Array | None, jax.Array]:
    """See `xla.update.update`, in one pass."""
    return _update(
        store,
        accumulator,
        moves,
        old_rows,
        row_grads,
        rule=rule,
        draw=draw,
        is_interpreted=is_interpreted,
    )


def write(
    store: Store,
    moves: Moves,
    old_rows: jax.Array,
    new_rows: jax.Array,
    draw: Draw,
    *,
    is_interpreted: bool,
) -> tuple[Store, jax.Array]:
    """Stores the updated rows that moved; see `xla.rows.write`.

    This is the update's kernel without a rule. The new rows take the place of gradients.
    """
    given = (store, None, moves, old_rows, new_rows)
    store, _, is_stored = _update(*given, rule=None, draw=draw, is_interpreted=is_interpreted)
    return store, is_stored


def _update(
    store: Store,
    accumulator: jax.Array | None,
    moves: Moves,
    rows: jax.Array,
    row_grads: jax.Array,
    *,
    rule: RowRule | None,
    draw: Draw,
    is_interpreted: bool,
) -> tuple[Store, jax.Array | None, jax.Array]:
    row_words = RowWords(store.table.format, rows.shape[1], is_interpreted)
    block = kernel.block_rows(rows.shape[1])

    def in_order(num_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        row = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
        return row, row < num_ids

    def places(refs: list, row: jax.Array, mask: jax.Array) -> list:
        columns = kernel.place_columns(row_words)
        return [kernel.load_row(refs[0], row, mask, c, row_words.dim) for c in columns]

    gradients = _Gradients([row_grads], block, in_order, places)
    stored, is_stored, _ = _launch(
        "mpembed_update",
        _Stored(store.table.rows, store.lines, accumulator),
        row_words,
        moves,
        rows,
        gradients,
        rule=rule,
        draw=draw,
        skip_nonfinite=False,
    )
    return _restored(store, stored), stored.accumulator, moves.is_row & (is_stored != 0)


def update_summed(
    store: Store,
    accumulator: jax.Array | None,
    moves: Moves,
    old_rows: jax.Array,
    positions: Positions,
    *,
    rule: RowRule,
    draw: Draw,
    skip_nonfinite: bool,
    is_interpreted: bool,
) -> tuple[Store, jax.Array | None, jax.Array, jax.Array]:
    """Sums the gradients of each row and updates it; see `xla.update.update_summed`.

    Unless deduplication has sorted the positions, XLA sorts them. One kernel then does the sums of
    `gpu.sums` and the update.
    """
    width, dim = old_rows.shape
    row_words = RowWords(store.table.format, dim, is_interpreted)
    num_columns = row_words.padded_words * row_words.per_word
    block = sums.block_rows(num_columns)
    segments = positions.segments
    if segments is None:
        segments = sums.sort_positions(positions.row, width)
    terms = sums.terms_of(segments, positions.grads.shape[0], positions.source, positions.factors)

    def places(refs: list, row: jax.Array, mask: jax.Array) -> list:
        *term_refs, grads_ref = refs
        columns = jnp.arange(num_columns, dtype=jnp.int32)
        total = sums.sum_rows(term_refs, grads_ref, row, mask, columns, row_words.dim)
        if row_words.per_word == 1:
            return [total]
        words = total.reshape(block, -1, row_words.per_word)
        place = jnp.arange(row_words.per_word, dtype=jnp.int32)
        # A sum with zeros picks the elements of a place, because Triton cannot index registers.
        return [
            jnp.sum(jnp.where(place[None, None, :] == p, words, jnp.float32(0)), axis=2)
            for p in range(row_words.per_word)
        ]

    gradients = _Gradients(
        [*terms.operands, positions.grads],
        block,
        lambda num_ids: sums.spread_positions(block, num_ids),
        places,
    )
    stored, is_stored, is_finite = _launch(
        "mpembed_update_summed",
        _Stored(store.table.rows, store.lines, accumulator),
        row_words,
        moves,
        old_rows,
        gradients,
        rule=rule,
        draw=draw,
        skip_nonfinite=skip_nonfinite,
    )
    is_updated = moves.is_row if is_finite is None else moves.is_row & (is_finite != 0)
    return _restored(store, stored), stored.accumulator, is_updated, is_updated & (is_stored != 0)


def _restored(store: Store, stored: _Stored) -> Store:
    """Returns the store with the arrays that a kernel changed."""
    table = QuantizedTable(stored.packed, store.table.format, store.table.embedding_dim)
    return store._replace(table=table, lines=stored.lines)


def _launch(
    name: str,
    stored: _Stored,
    row_words: RowWords,
    moves: Moves,
    rows: jax.Array,
    gradients: _Gradients,
    *,
    rule: RowRule | None,
    draw: Draw,
    skip_nonfinite: bool,
) -> tuple[_Stored, jax.Array, jax.Array | None]:
    """Runs the kernel.

    Returns:
      The stored arrays, and whether each row was stored (int32 [U]). If skip_nonfinite is true,
      also whether each row's gradient is finite (int32 [U]); otherwise None. The values of entries
      that are no rows are arbitrary.
    """
    bounds = jnp.stack([moves.num_cached, moves.num_ids])
    width, dim = rows.shape
    held = stored.held

    def body(*refs: Any) -> None:
        inputs, outputs = list(refs[: len(operands)]), list(refs[len(operands) :])
        bounds_ref, ids_ref, line_ref, rows_ref, *others = inputs[: len(operands) - len(held)]
        seed_refs, grad_refs = others[: len(seeds)], others[len(seeds) :]
        into = stored.holding(outputs)
        num_cached, num_ids = bounds_ref[0], bounds_ref[1]
        position, is_row = gradients.rows_of(num_ids)
        columns = kernel.place_columns(row_words)

        @pl.when(jnp.max(is_row.astype(jnp.int32)) > 0)
        def update_block() -> None:
            here = kernel.load(ids_ref, (position,), is_row, NO_ID)
            is_updated = is_row & (here != NO_ID)
            old = [kernel.load_row(rows_ref, position, is_updated, c, dim) for c in columns]
            places = grads = gradients.places(grad_refs, position, is_updated)
            if rule is not None:
                if skip_nonfinite:
                    wrong = [jnp.max(jnp.where(jnp.abs(g) < jnp.inf, 0, 1), axis=1) for g in grads]
                    is_finite = functools.reduce(jnp.maximum, wrong) == 0
                    kernel.store(outputs[-1], (position,), is_finite.astype(jnp.int32), is_row)
                    is_updated = is_updated & is_finite
                total = None
                if into.accumulator is not None:
                    own = None
                    if is_narrow:
                        own = kernel.load_seeds(seed_refs[2:], position, is_updated)
                    total = _add_squares(
                        into.accumulator, grads, here, is_updated, own, num_ids, row_words
                    )
                places = _stepped(rule, old, grads, total, num_ids)
            moved = [
                jnp.max(jnp.where((new != before) & (c < dim)[None, :], 1, 0), axis=1)
                for new, before, c in zip(places, old, columns, strict=True)
            ]
            is_stored = is_updated & (functools.reduce(jnp.maximum, moved) > 0)
            kernel.store(outputs[len(held)], (position,), is_stored.astype(jnp.int32), is_row)
            is_cached = is_stored & (position < num_cached)
            if into.lines is not None:
                place = kernel.load(line_ref, (position,), is_cached)
                for values, c in zip(places, columns, strict=True):
                    kernel.store_row(into.lines, place, is_cached, c, dim, values)
            is_rounded = is_stored & ~is_cached
            own = kernel.load_seeds(seed_refs[:2], position, is_rounded)
            kernel.write_packed(into.packed, here, is_rounded, places, row_words, own)

    is_narrow = stored.accumulator is not None and stored.accumulator.dtype == jnp.uint16
    seeds = [*draw.row_seeds(random_bits.BYPASS, moves.ids)]
    if is_narrow:
        # G is leaf 0 of the state tree of row-wise Adagrad, so its stream is ROW_STATE + 0.
        seeds += draw.row_seeds(random_bits.ROW_STATE, moves.ids)
    operands = [bounds, moves.ids, moves.line, rows, *seeds, *gradients.operands, *held]
    shapes = [kernel.shape_of(array) for array in held]
    results = kernel.launch(
        body, pl.cdiv(width, gradients.block), operands,
        shapes + [jax.ShapeDtypeStruct((width,), jnp.int32)] * (1 + skip_nonfinite),
        name=name, is_interpreted=row_words.is_interpreted,
        aliases={len(operands) - len(held) + i: i for i in range(len(held))},
    )  # fmt: skip
    is_stored = results[len(held)]
    return stored.holding(results), is_stored, results[-1] if skip_nonfinite else None


def _add_squares(
    accumulator: Any,
    grads: list,
    ids: jax.Array,
    mask: jax.Array,
    seeds: random_bits.RowSeeds | None,
    number: jax.Array,
    row_words: RowWords,
) -> jax.Array:
    """Adds the mean square of each row's gradient to its stored G, and returns the sum.

    G is stored as float32, or as bit patterns of bfloat16; these are rounded by random bits of the
    sequences `seeds` (None for float32). The returned sum (float32 [R]) is not rounded. `number` is
    for rounding.apart.
    """
    before = kernel.load(accumulator, (ids,), mask)
    if seeds is not None:
        before = rounding.decode_float(before.astype(jnp.uint32), _BFLOAT16)
    total = stored = before + _mean_of_squares(grads, row_words.dim, number)
    if seeds is not None:
        bits = random_bits.bits_of(seeds, jnp.zeros(ids.shape, jnp.uint32))
        stored = rounding.encode_float(total, _BFLOAT16, bits).astype(jnp.uint16)
    # All threads with a copy of the old sum must have read it before one of them stores the new
    # sum.
    kernel.barrier(row_words.is_interpreted)
    kernel.store(accumulator, (ids,), stored, mask)
    return total
