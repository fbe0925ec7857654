"""Initial values of a table's rows from a user's initializer, without a float32 table.

An initializer `(key, shape, dtype) -> array` learns the size of the table from the shape. Most
initializers draw each row by itself. The number of rows then changes only some numbers in the
computation, such as fan_in. The trace of the call shows whether this is so. If it is, the
initializer is called on blocks, but with the numbers of the whole table. Any other initializer is
called once for the whole table, because a value may depend on the row's number, on another row, or
on an array that the initializer holds.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpembed_jax.optim import row_locality
from mpembed_jax.spec import TableSpec, size_of

BLOCK = 8192  # rows per call; the values depend on it, because each block has a key of its own

Block = Callable[
    [jax.Array | int, int], jax.Array
]  # (number of a block, its rows) -> f32 [rows, D]


def of_blocks(table: TableSpec, key: jax.Array, embedding_dim: int) -> Block:
    """Returns the function that gives the initial values of a table's blocks.

    Args:
      table: it has an initializer.
      key: a typed key; a block uses the key folded by its number.
      embedding_dim: D.

    Returns:
      A function of the number of a block (int32 scalar) and the static number of its rows. Blocks
      have BLOCK rows, except the last one. The function returns float32 [rows, D].

    Raises:
      TypeError: if the initializer returns something other than an array.
      ValueError: if the initializer returns another shape.
    """
    call: Any = table.initializer
    num_rows = size_of(table)

    def values(key: jax.Array, size: int) -> jax.Array:
        result = call(key, (size, embedding_dim), jnp.float32)
        if not isinstance(result, jax.Array | np.ndarray):
            raise TypeError(
                f"initializer of table {table.name!r} returned {type(result).__name__}, not an "
                "array; pass the plain initializer, without with_partitioning (init's mesh= and "
                "placement= divide the rows)"
            )
        if result.shape != (size, embedding_dim):
            raise ValueError(
                f"initializer of table {table.name!r} returned {result.shape} when asked for "
                f"{(size, embedding_dim)}"
            )
        return jnp.asarray(result).astype(jnp.float32)

    def trace(size: int) -> Any:
        return jax.make_jaxpr(lambda key: values(key, size))(key)

    if num_rows <= BLOCK:
        return lambda block, size: values(jax.random.fold_in(key, block), size)
    whole = trace(num_rows)
    if not _is_drawn_by_row(trace, whole, num_rows, embedding_dim):
        table_values = values(jax.random.fold_in(key, 0), num_rows)
        return lambda block, size: lax.dynamic_slice_in_dim(
            table_values, jnp.asarray(block, jnp.int32) * BLOCK, size
        )

    def block_values(block: jax.Array | int, size: int) -> jax.Array:
        block_key = jax.random.fold_in(key, block)
        part = trace(size)
        if _has_same_numbers(part.jaxpr, whole.jaxpr):
            return values(block_key, size)
        (result,) = _evaluate(part.jaxpr, whole.jaxpr, [block_key])
        return result

    return block_values


def _is_drawn_by_row(
    trace: Callable[[int], Any], whole: Any, num_rows: int, embedding_dim: int
) -> bool:
    """Returns whether an initializer draws each row by itself.

    It must do so in the same way for any number of rows. `whole` is the trace for all `num_rows`
    rows.
    """
    sizes = dict.fromkeys((row_locality.ROWS, BLOCK, num_rows % BLOCK or BLOCK))
    try:
        traced = [*map(trace, sizes), whole]
    except Exception:  # The initializer may accept only the shape of the whole table.
        return False
    is_apart = embedding_dim != row_locality.ROWS and row_locality.draws_rows_apart(traced[0])
    return is_apart and all(_forms(t.jaxpr) == _forms(traced[0].jaxpr) for t in traced)


def _forms(jaxpr: Any) -> list[Any]:
    """Returns a description of a trace without the values of its literals.

    A trace can be evaluated with the literals of another if both have the same description.
    """
    result: list[Any] = [[row_locality.is_literal(atom) for atom in jaxpr.outvars]]
    for eqn in jaxpr.eqns:
        inner = row_locality.inner_of(eqn)
        result.append(
            (
                eqn.primitive.name,
                [row_locality.is_literal(atom) for atom in eqn.invars],
                # Settings such as the exponent of integer_pow. Shapes are tuples, so they are left
                # out.
                {k: v for k, v in eqn.params.items() if isinstance(v, str | int | np.dtype)},
                None if inner is None else _forms(inner),
            )
        )
    return result


def _has_same_numbers(part: Any, whole: Any) -> bool:
    """Returns whether two traces have the same literals, up to rounding.

    The traces may be for different numbers of rows.
    """
    pairs = zip(_numbers(part), _numbers(whole), strict=True)
    return all(np.isclose(one, other, rtol=1e-6, atol=0, equal_nan=True) for one, other in pairs)


def _numbers(jaxpr: Any) -> list[Any]:
    """Returns the literal operands of all equations."""
    result = []
    for eqn in jaxpr.eqns:
        result += [atom.val for atom in eqn.invars if row_locality.is_literal(atom)]
        inner = row_locality.inner_of(eqn)
        result += _numbers(inner) if inner is not None else []
    return result


def _evaluate(part: Any, whole: Any, operands: list[jax.Array]) -> list[jax.Array]:
    """Evaluates the jaxpr of a block with the literal operands of the jaxpr of the whole table."""
    held = dict(zip(part.invars, operands, strict=True))

    def value(atom: Any, in_whole: Any) -> jax.Array:
        if row_locality.is_literal(atom):
            return jnp.asarray(in_whole.val, atom.aval.dtype)
        return held[atom]

    for eqn, in_whole in zip(part.eqns, whole.eqns, strict=True):
        given = [value(a, b) for a, b in zip(eqn.invars, in_whole.invars, strict=True)]
        inner, inner_whole = row_locality.inner_of(eqn), row_locality.inner_of(in_whole)
        if inner is not None and inner_whole is not None:
            results = _evaluate(inner, inner_whole, given)
        else:
            results = eqn.primitive.bind(*given, **eqn.params)
            results = results if eqn.primitive.multiple_results else [results]
        held.update(zip(eqn.outvars, results, strict=True))
    pairs = zip(part.outvars, whole.outvars, strict=True)
    return [value(a, b) for a, b in pairs]
