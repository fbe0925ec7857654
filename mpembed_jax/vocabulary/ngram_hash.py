"""Rows of hashed n-grams: which row of which table an n-gram of tokens has.

The n-gram of order n at a position is the token there and the n - 1 tokens before it. Each order
has one head or several. Each head has a hash and a table of its own, as in Engram (arXiv
2601.07372). Two n-grams that share a row of one head rarely share a row of another.

A trained table depends on this hash. The hash therefore never changes. All arithmetic is on uint32,
modulo 2^32. For head h of order n, with s = seed * 2654435761 + 1024 n + h:

  m_k = fmix32(fmix32(s) + k) | 1                  for k = 0 .. n - 1
  x = fmix32(s);  x = fmix32(x xor (token_k * m_k))  for k = 0 .. n - 1
  row = x mod p

token_0 is the token at the position, and token_k is the k-th token before it. If there is a map of
tokens, these are the numbers that the map gives. A token that is missing counts as 2^31 - 1. fmix32
is Murmur3's finalizer. p is the number of rows of the table. It is the smallest prime that is at
least the number asked for and that no earlier table has.

An n-gram that is a raw id has a key of 64 bits instead of a row. Its high word is x of head 0, its
low word x of head 1.

Tokens and context in NumPy give NumPy ids. jax arrays give the same ids on the device.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax import row_ids
from mpembed_jax.numerics import random_bits
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.vocabulary import hashes

MAX_ORDER, MAX_HEADS = 64, 1024
_SPREAD = 2_654_435_761  # the factor of a seed
_BLOCK = 1 << 14  # positions that the host hashes for all heads together
_OUTSIDE = -1  # the id of an n-gram with a token outside the vocabulary


def _is_prime(number: int) -> bool:
    """Returns whether a number below 3,215,031,751 is a prime, by the test of Miller and Rabin."""
    if number < 2 or number % 2 == 0:
        return number == 2
    odd = number - 1
    twos = (odd & -odd).bit_length() - 1
    odd >>= twos
    # Below that limit, no composite number passes for all of these witnesses.
    for witness in (2, 3, 5, 7):
        if witness % number == 0:
            continue
        power = pow(witness, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def prime_sizes(rows: Sequence[int]) -> tuple[int, ...]:
    """Returns a prime for each number of rows: the smallest that is at least the number.

    No prime is used twice: a prime that an earlier number got is skipped. Each number is at least
    1. All primes must be below 3,215,031,751.
    """
    sizes: list[int] = []
    refused: set[int] = set()  # numbers that were tried: primes in use, and composites
    first_untried: dict[int, int] = {}
    for wanted in rows:
        size = first_untried.get(wanted, wanted)
        while size in refused or not _is_prime(size):
            refused.add(size)
            size += 1
        sizes.append(size)
        refused.add(size)
        first_untried[wanted] = size + 1
    return tuple(sizes)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    return int(value)


def _integers(name: str, value: Any, low: int, high: int) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        raise TypeError(f"{name} must be a sequence of integers, got {value!r}")
    return tuple(_integer(f"each of {name}", v, low, high) for v in value)


@dataclasses.dataclass(frozen=True)
class NGramHash:
    """The settings that determine the rows of n-grams; frozen and hashable.

    Attributes:
      vocabulary_size: tokens are in [0, vocabulary_size); at most 2^31 - 1.
      orders: distinct orders n of the n-grams, at least one, each in [2, 64].
      heads: tables of each order, 1 to 1,024.
      rows: how many rows to ask for in a table: one number for all tables, or one for each order,
        1 to 2^31 - 2. A table gets the smallest prime that is at least this number and that no
        earlier table has. None: n-grams are raw ids, to which a vocabulary gives rows (see
        `pairs`). Then heads must be 1.
      boundary: a token that begins or separates texts, or None. No n-gram crosses it: it may be
        the first token of an n-gram, but no later one. Tokens are compared with it before they
        go through the map of tokens.
      padding: a token that stands for no token, or None. NO_ID always does. Its position has no
        rows, and no n-gram reaches across it.
      seed: 0 to 2^31 - 1. Another seed gives another hash, as for a second memory in one model.

    Raises:
      TypeError: if a value is not an integer, or orders is not a sequence.
      ValueError: if a value is out of range, if values do not fit together, or if the tables have
        2^31 - 1 rows or more in all. The message says which.
    """

    vocabulary_size: int
    orders: Sequence[int]
    heads: int
    rows: int | Sequence[int] | None
    _: dataclasses.KW_ONLY
    boundary: int | None = None
    padding: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        size = _integer("vocabulary_size", self.vocabulary_size, 1, NO_ID)
        orders = _integers("orders", self.orders, 2, MAX_ORDER)
        if not orders or len(set(orders)) < len(orders):
            raise ValueError(f"orders must be distinct and at least one, got {list(orders)}")
        heads = _integer("heads", self.heads, 1, MAX_HEADS)
        rows: int | tuple[int, ...] | None = None
        if self.rows is None:
            if heads != 1:
                raise ValueError(
                    "n-grams that are raw ids have one row each, so heads must be 1, got "
                    f"{heads}; take more features instead"
                )
        elif isinstance(self.rows, Sequence | np.ndarray) and not isinstance(self.rows, str):
            rows = _integers("rows", self.rows, 1, NO_ID - 1)
            if len(rows) != len(orders):
                raise ValueError(
                    f"rows must be one number, or one for each of orders {list(orders)}, got "
                    f"{list(rows)}"
                )
        else:
            rows = _integer("rows", self.rows, 1, NO_ID - 1)
        for name in ("boundary", "padding"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _integer(name, value, 0, size - 1))
        if self.boundary is not None and self.boundary == self.padding:
            raise ValueError(f"boundary and padding must be different tokens, got {self.padding}")
        object.__setattr__(self, "seed", _integer("seed", self.seed, 0, 2**31 - 1))
        object.__setattr__(self, "vocabulary_size", size)
        object.__setattr__(self, "orders", orders)
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "rows", rows)
        if rows is None:
            return
        total = sum(self._rows_by_order) * heads
        if total < NO_ID:  # checked first: prime_sizes needs numbers below its limit
            total = sum(self.table_sizes)
        if total >= NO_ID:
            raise ValueError(
                f"the {len(orders) * heads} tables must have fewer than 2**31 - 1 rows in all, got "
                f"{total:,}; take fewer rows, or several memories with other seeds"
            )

    @property
    def _rows_by_order(self) -> tuple[int, ...]:
        rows: Any = self.rows
        return rows if isinstance(rows, tuple) else (rows,) * len(self.orders)

    @property
    def tables(self) -> tuple[tuple[int, int], ...]:
        """The pair (order, head) of each table, in the order of the last axis of `ids`."""
        return tuple((order, head) for order in self.orders for head in range(self.heads))

    @property
    def table_names(self) -> tuple[str, ...]:
        """The name of each table; with raw ids, one for each order."""
        if self.rows is None:
            return tuple(f"{order}-gram" for order in self.orders)
        return tuple(f"{order}-gram_{head}" for order, head in self.tables)

    @functools.cached_property
    def table_sizes(self) -> tuple[int, ...]:
        """The rows of each table: distinct primes. Empty if n-grams are raw ids."""
        if self.rows is None:
            return ()
        return prime_sizes([n for n in self._rows_by_order for _ in range(self.heads)])

    @property
    def settings(self) -> dict[str, int | None]:
        """The fields in which hashes of the same tables can differ: boundary, padding and seed.

        The row of an n-gram depends on them. It does not depend on vocabulary_size.
        """
        return {"boundary": self.boundary, "padding": self.padding, "seed": self.seed}

    @property
    def context_size(self) -> int:
        """The number of earlier tokens that the n-grams of a position can contain."""
        return max(self.orders) - 1

    def ids(self, tokens: Any, canonical: Any = None, context: Any = None) -> Any:
        """Returns the row of each n-gram in its table.

        A sequence may be given as a whole, in parts, or one token at a time. With the context of
        each part, the ids are the same.

        Args:
          tokens: integers [.., T] in [0, vocabulary_size). NO_ID and `padding` are padding.
          canonical: None, or the map of tokens: integers [vocabulary_size] in [0, 2^31 - 1). Tokens
            with the same number are the same token in an n-gram.
          context: None for the beginning of a text, or integers [.., context_size], the tokens
            before the first; see context_after.

        Returns:
          int32 [.., T, number of tables], in the order of `tables`. It is NumPy if neither tokens
          nor context are jax arrays and no argument is traced. Positions of padding have NO_ID.
          N-grams with a traced token outside the vocabulary have -1.

        Raises:
          TypeError: if tokens, context or canonical are not integers.
          ValueError: if a concrete token is outside the vocabulary, if a number that canonical
            gives is out of range, if a shape does not fit, or if n-grams are raw ids.
        """
        if self.rows is None:
            raise ValueError("n-grams that are raw ids have keys and no row numbers; see keys")
        words, outside, newest = self._words(tokens, canonical, context)
        xp: Any = np if isinstance(newest, np.ndarray) else jnp
        sizes = np.reshape(
            np.asarray(self.table_sizes, np.uint32), (-1, self.heads, *[1] * newest.ndim)
        )
        of_orders = []
        for order, of_heads in zip(self.orders, sizes, strict=True):
            rows = (_hashed(words, self.seed, order, self.heads) % of_heads).astype(np.int32)
            of_orders.append(xp.where(outside[order - 1], np.int32(_OUTSIDE), rows))
        rows = xp.where(newest == NO_ID, np.int32(NO_ID), xp.concatenate(of_orders))
        return xp.moveaxis(rows, 0, -1).copy()

    def keys(self, tokens: Any, canonical: Any = None, context: Any = None) -> tuple[Any, Any]:
        """Returns the key of each n-gram: a raw id of 64 bits, as two words.

        Args:
          tokens: see `ids`.
          canonical: see `ids`.
          context: see `ids`.

        Returns:
          The high and the low word of each key, uint32 [.., T, number of orders, 2].
          Whether there is an n-gram, bool [.., T, number of orders]. There is none at padding, nor
          with a traced token outside the vocabulary.
          Both are NumPy where `ids` would be.

        Raises:
          TypeError: see `ids`.
          ValueError: as `ids` does for tokens, context and canonical.
        """
        words, outside, newest = self._words(tokens, canonical, context)
        xp: Any = np if isinstance(newest, np.ndarray) else jnp
        keys, is_ngram = [], []
        for order in self.orders:
            keys.append(xp.moveaxis(_hashed(words, self.seed, order, 2), 0, -1))
            is_ngram.append((newest != NO_ID) & ~outside[order - 1])
        return xp.stack(keys, axis=-2), xp.stack(is_ngram, axis=-1)

    def pairs(self, tokens: Any, canonical: Any = None, context: Any = None) -> Any:
        """Returns the key of each n-gram as the pair of a raw id; see `vocabulary.hashes`.

        Args:
          tokens: see `ids`.
          canonical: see `ids`.
          context: see `ids`.

        Returns:
          uint32 [.., T, number of orders, 2], in NumPy where `ids` would be. Where there is no
          n-gram, the pair is that of padding.

        Raises:
          TypeError: see `ids`.
          ValueError: see `keys`. Also if n-grams have row numbers, because `rows` is not None.
        """
        if self.rows is not None:
            raise ValueError("n-grams that are hashed have row numbers and no pairs; see ids")
        keys, is_ngram = self.keys(tokens, canonical, context)
        names = enumerate(self.table_names)
        xp: Any = np if isinstance(keys, np.ndarray) else jnp
        if xp is np:
            whole = keys[..., 0].astype(np.uint64) << np.uint64(32) | keys[..., 1]
            columns: list[Any] = [hashes.of_column(whole[..., n], name, n) for n, name in names]
        else:
            columns = [
                hashes.of_words(keys[..., n, 0], keys[..., n, 1], name, n) for n, name in names
            ]
        pairs = xp.stack(columns, axis=-2)
        return xp.where(is_ngram[..., None], pairs, np.uint32(hashes.PADDING))

    def _words(self, tokens: Any, canonical: Any, context: Any) -> tuple[list[Any], list[Any], Any]:
        """Returns the tokens of which the n-grams of each position consist.

        Returns:
          For each k, token_k of each position as a word (uint32 [.., T]).
          For each k, whether one of the tokens token_0 to token_k is outside the vocabulary
          (bool [.., T]).
          The tokens at the positions (int32 [.., T]): NO_ID for padding, -1 outside the vocabulary.
        """
        joined = _with_context(self, tokens, context)
        if isinstance(canonical, jax.core.Tracer):
            joined = jnp.asarray(joined)
        xp: Any = np if isinstance(joined, np.ndarray) else jnp
        mapped = joined if canonical is None else _mapped(self, joined, canonical)
        mapped = mapped.astype(np.uint32)
        size, length = self.context_size, joined.shape[-1] - self.context_size

        def back(array: Any, k: int) -> Any:
            """Returns, for each of the T positions, the entry k places before it in `array`."""
            return array[..., size - k : size - k + length]

        newest = back(joined, 0)
        words, outside = [back(mapped, 0)], [newest == _OUTSIDE]
        is_open = newest != NO_ID
        for k in range(1, max(self.orders)):
            token, newer = back(joined, k), back(joined, k - 1)
            is_open = is_open & (token != NO_ID)
            if self.boundary is not None:
                is_open = is_open & (newer != self.boundary)
            words.append(xp.where(is_open, back(mapped, k), np.uint32(NO_ID)))
            outside.append(outside[-1] | (is_open & (token == _OUTSIDE)))
        return words, outside, newest

    def context_after(self, tokens: Any, context: Any = None) -> Any:
        """Returns the context of the token that follows `tokens`.

        The context has the last tokens of each sequence, padding included. So put the padding of
        shorter sequences in front. If it is at the end, it counts as the tokens just before the
        next one, and no n-gram reaches across it.

        Args:
          tokens: integers [.., T], the tokens so far, or those since `context`.
          context: integers [.., context_size], the tokens before them. None: there are none.
            A concrete context with -1 is refused.

        Returns:
          int32 [.., context_size]; NO_ID stands for no token, and -1 for a traced token outside the
          vocabulary.

        Raises:
          TypeError: if tokens or context are not integers.
          ValueError: if a concrete token is outside the vocabulary, or if a shape does not fit.
        """
        joined = _with_context(self, tokens, context)
        return joined[..., joined.shape[-1] - self.context_size :]


def check_canonical(spec: NGramHash, canonical: Any) -> np.ndarray:
    """Returns a map of tokens as int32 [vocabulary_size].

    Args:
      spec: the hash.
      canonical: integers [vocabulary_size] in [0, 2^31 - 1): tokens with the same number are the
        same token in an n-gram.

    Raises:
      TypeError: if it does not consist of integers, has a mask, or is traced.
      ValueError: if it has another shape, or a value is out of range.
    """
    array = _checked_map(spec, canonical)
    if isinstance(array, jax.core.Tracer):
        raise TypeError("canonical must not be traced; make the map of tokens with NumPy")
    _check_numbers(array)
    return array.astype(np.int32)


def _checked_map(spec: NGramHash, canonical: Any) -> Any:
    """Checks dtype and shape of a map of tokens. Returns it in NumPy, unless it is traced."""
    row_ids.check_no_mask("canonical", canonical)
    is_traced = isinstance(canonical, jax.core.Tracer)
    array = canonical if is_traced else np.asarray(canonical)
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"canonical must be integers [{spec.vocabulary_size}], got {array.dtype} "
            f"{list(array.shape)}"
        )
    if array.shape != (spec.vocabulary_size,):
        raise ValueError(
            f"canonical must have one number for each token, [{spec.vocabulary_size}], got "
            f"{list(array.shape)}"
        )
    return array


def _check_numbers(numbers: np.ndarray) -> None:
    if numbers.size and (numbers.min() < 0 or numbers.max() >= NO_ID):
        raise ValueError(
            f"canonical must be in [0, 2**31 - 2], got values from {numbers.min()} to "
            f"{numbers.max()}"
        )


def _mapped(spec: NGramHash, tokens: Any, canonical: Any) -> Any:
    """Returns the number that the map of tokens gives to each token; NO_ID and -1 stay.

    Tokens and numbers are int32 [..]. On the host, only the numbers of these tokens are checked,
    and not the whole map: a model that decodes has one new token at a time.
    """
    is_token = (tokens != NO_ID) & (tokens != _OUTSIDE)
    if isinstance(tokens, np.ndarray):
        numbers = _checked_map(spec, canonical)[np.where(is_token, tokens, 0)]
        _check_numbers(numbers)
        return np.where(is_token, numbers.astype(np.int32), tokens)
    if isinstance(canonical, jax.core.Tracer):
        canonical = _checked_map(spec, canonical).astype(jnp.int32)
    else:
        canonical = jnp.asarray(check_canonical(spec, canonical))
    return jnp.where(is_token, canonical[jnp.where(is_token, tokens, 0)], tokens)


def check_tokens(spec: NGramHash, tokens: Any, name: str = "tokens") -> Any:
    """Returns tokens as int32 [.., T], in which padding is NO_ID.

    The result is a jax array if the tokens are one, else a NumPy array. Concrete tokens are
    checked. A traced token outside the vocabulary becomes -1.

    Args:
      spec: the hash.
      tokens: integers [.., T] in [0, vocabulary_size), or NO_ID. The token spec.padding is padding,
        too.
      name: the name of the tokens in error messages.

    Raises:
      TypeError: if they are not integers.
      ValueError: if they have no axis, or a concrete token is outside the vocabulary.
    """
    if not isinstance(tokens, jax.core.Tracer):
        is_host = not isinstance(tokens, jax.Array)
        array = _checked_host(spec, row_ids.on_host(tokens), name)
        return array if is_host else jnp.asarray(array)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be integers [.., T], got {tokens.dtype} {list(tokens.shape)}; cast them"
        )
    if tokens.ndim < 1:
        raise ValueError(f"{name} must be [.., T], got a scalar; pass tokens[None]")
    if tokens.dtype.itemsize < 4:
        tokens = tokens.astype(jnp.int32)
    # The comparison is in the dtype of the tokens, because a cast could wrap around.
    is_padding = tokens == NO_ID
    if spec.padding is not None and spec.padding <= jnp.iinfo(tokens.dtype).max:
        is_padding = is_padding | (tokens == spec.padding)
    is_inside = (tokens >= 0) & (tokens < spec.vocabulary_size)
    inside = jnp.where(is_inside, tokens, 0).astype(jnp.int32)
    return jnp.where(is_padding, jnp.int32(NO_ID), jnp.where(is_inside, inside, _OUTSIDE)).astype(
        jnp.int32
    )


def _checked_host(spec: NGramHash, tokens: np.ndarray, name: str) -> np.ndarray:
    if tokens.dtype.kind not in "iu" and tokens.size:
        raise TypeError(
            f"{name} must be integers [.., T], got {tokens.dtype} {list(tokens.shape)}; cast them"
        )
    if tokens.ndim < 1:
        raise ValueError(f"{name} must be [.., T], got a scalar; pass tokens[None]")
    wide = np.minimum(tokens, 2**62).astype(np.int64) if tokens.dtype == np.uint64 else tokens
    wide = wide.astype(np.int64)
    is_padding = wide == NO_ID
    bad = ~is_padding & ((wide < 0) | (wide >= spec.vocabulary_size))
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} must be in [0, {spec.vocabulary_size}), the vocabulary, got "
            f"{int(tokens[where])} at {list(where)} ({int(bad.sum())} such tokens)"
        )
    if spec.padding is not None:
        is_padding = is_padding | (wide == spec.padding)
    return np.where(is_padding, NO_ID, wide).astype(np.int32)


def _with_context(spec: NGramHash, tokens: Any, context: Any) -> Any:
    """Returns context and tokens in one array (int32 [.., context_size + T]), checked."""
    size = spec.context_size
    tokens = check_tokens(spec, tokens)
    if context is None:
        context = np.full((*tokens.shape[:-1], size), NO_ID, np.int32)
    else:
        context = check_tokens(spec, context, "context")
        if context.shape != (*tokens.shape[:-1], size):
            raise ValueError(
                f"context must be the {size} tokens before each sequence, "
                f"{[*tokens.shape[:-1], size]}, got {list(context.shape)}; NO_ID stands for none"
            )
    is_host = isinstance(tokens, np.ndarray) and isinstance(context, np.ndarray)
    return (np if is_host else jnp).concatenate([context, tokens], axis=-1)


def _hashed(words: list[Any], seed: int, order: int, heads: int) -> Any:
    """Returns x (uint32 [heads, .., T]) of the heads of an order.

    `words` has token_k (uint32 [.., T]) for each k up to n - 1 at least.
    """
    first, multipliers = _start(seed, order, heads)
    if isinstance(words[0], np.ndarray) and words[0].size > _BLOCK:
        # One head at a time, so that its numbers stay in the cache of the processor's core.
        parts = zip(np.split(first, heads), np.split(multipliers, heads, axis=1), strict=True)
        return np.concatenate([_of_heads(words, *part) for part in parts])
    return _of_heads(words, first, multipliers)


def _of_heads(words: list[Any], first: np.ndarray, multipliers: np.ndarray) -> Any:
    by_head = (-1, *[1] * words[0].ndim)
    mixed = first.reshape(by_head)
    for token, multiplier in zip(words, multipliers, strict=False):
        mixed = random_bits.fmix32(mixed ^ (token * multiplier.reshape(by_head)))
    return mixed


@functools.lru_cache(1 << 10)
def _start(seed: int, order: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first words (uint32 [heads]) and the multipliers (uint32 [order, heads])."""
    seeds = [(seed * _SPREAD + 1024 * order + head) % 2**32 for head in range(heads)]
    first = random_bits.fmix32(np.asarray(seeds, np.uint32))
    of_tokens = random_bits.fmix32(first + np.arange(order, dtype=np.uint32)[:, None])
    return first, of_tokens | np.uint32(1)
