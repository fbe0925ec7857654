"""The checks of kernels and host tables in bench_gpu.

Small trainings on dyadic numbers are compared bit for bit.
"""

import concurrent.futures
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpembed_jax as mpembed
from experiments.gpu.steps import Bench, failure
from experiments.speed.step import embedding_step

# Triton's division and root are approximate: a few units in the last of 24 bits.
ADAGRAD_BOUND = 1e-6  # of the largest number of each array


def differences(one: Any, other: Any) -> dict[str, int]:
    """Returns the number of unequal elements for each leaf of two trees that has any.

    Two NaNs are equal.
    """
    found = {}
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        is_unequal = (a != b) & ~((a != a) & (b != b))
        if is_unequal.any():
            found[jax.tree_util.keystr(path)] = int(is_unequal.sum())
    return found


def largest_difference(one: Any, other: Any) -> float:
    """Returns the largest distance of two trees' floats, relative to each array's largest number.

    It is infinite if other numbers, or numbers that are not finite, are unequal.
    """

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        is_same = (a == b) | ((a != a) & (b != b))
        if is_same.all():
            return 0.0
        is_number = np.isfinite(a) & np.isfinite(b)
        if not np.issubdtype(a.dtype, np.floating) or not (is_number | is_same).all():
            return math.inf
        a, b = a.astype(np.float64), b.astype(np.float64)
        return float(
            np.max(np.abs(a - b), where=is_number, initial=0)
            / max(1e-30, np.max(np.abs(a), where=is_number, initial=0))
        )

    leaves = (map(np.asarray, jax.tree.leaves(tree)) for tree in (one, other))
    return max(itertools.starmap(apart, zip(*leaves, strict=True)))


class Small(NamedTuple):
    """Twelve training steps of a small stack, with bags, evictions, bypasses and padding."""

    storage: str
    dim: int
    implementation: str
    tx: Any
    memory_kind: str | None = None
    is_pooled: bool = False  # ends in apply_pooled_gradients

    @property
    def rule(self) -> str:
        """What `tx` does: by a kernel, but for momentum, whose rows a kernel only stores."""
        rule = mpembed.optim.rule_of(self.tx)
        return "momentum" if rule is None else "adagrad" if rule.has_sums else "sgd"

    def train(self) -> Any:
        """Compiles, trains on dyadic gradients, and returns all results.

        The sums of dyadic gradients are exact in any order.
        """
        rng = np.random.default_rng(0)
        weights = 1.0 / np.arange(1, 3001)
        batches = rng.choice(3000, p=weights / weights.sum(), size=(12, 60, 6)).astype(np.int32)
        batches = np.where(rng.random(batches.shape) < 0.1, mpembed.NO_ID, batches)
        grads = (rng.integers(-16, 17, (12, 60, self.dim)) / 64).astype(np.float32)
        cache = mpembed.CacheSpec(num_rows=128, ways=8)
        spec = mpembed.EmbeddingSpec(
            [mpembed.TableSpec("t", 3000)],
            self.dim,
            self.storage,
            cache,
            memory_kind=self.memory_kind,
        )
        state = mpembed.init(jax.random.key(1), spec, self.tx, implementation=self.implementation)
        state, seen = self.run(state, batches, grads)
        read = jax.jit(mpembed.read)(state, jnp.arange(-1, 3001, dtype=jnp.int32))
        flushed = jax.jit(mpembed.flush)(state)
        return jax.tree.map(
            self._in_floats,
            jax.device_get({"state": state, "read": read, "steps": seen, "flushed": flushed}),
            is_leaf=lambda x: isinstance(x, mpembed.QuantizedTable),
        )

    def _in_floats(self, leaf: Any) -> Any:
        """Returns an array as it is, and a table's words as float32 if its rows are float32."""
        if not isinstance(leaf, mpembed.QuantizedTable):
            return leaf
        return leaf.rows.view(np.float32) if self.storage == "float32" else leaf.rows

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def run(self, state: Any, batches: jax.Array, grads: jax.Array) -> Any:
        """All steps; the state is donated."""

        def step(state: Any, batch: tuple) -> tuple:
            # Powers of two: products with them are exact.
            weights = jnp.asarray([0.25, 0.5, 1, 2], jnp.float32)[batch[0] & 3]
            state, plan, rows, bags = embedding_step(
                state, *batch, tx=self.tx, is_pooled=self.is_pooled, weights=weights, combiner="sum"
            )
            # Kernels order the distinct ids of a batch otherwise than the reference.
            of_rows = plan.plan if self.is_pooled else plan
            rows = rows[jnp.argsort(of_rows.unique_ids)]
            return state, {"rows": rows, "bags": bags, "counts": plan.counts}

        return jax.lax.scan(step, state, (batches, grads))


def compared(pairs: list[tuple[Small, Small]]) -> Iterator[dict]:
    """Trains both of each pair and says where they differ.

    It uses threads, because most of the time is XLA's compilation. A row has passed if all bits are
    equal. Row-wise Adagrad has also passed if only floats differ, by no more than its bound.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        runs = {small: pool.submit(small.train) for small in dict.fromkeys(itertools.chain(*pairs))}
        for one, small in pairs:
            row = {
                "format": small.storage,
                "dim": small.dim,
                "implementation": small.implementation,
            }
            row |= {
                "memory_kind": small.memory_kind,
                "is_pooled": small.is_pooled,
                "rule": small.rule,
            }
            try:
                seen = runs[one].result(), runs[small].result()
                row["unequal_elements"] = differences(*seen)
                row["largest_difference"] = largest_difference(*seen)
                row["bound"] = ADAGRAD_BOUND if small.rule == "adagrad" else 0
                row["passed"] = row["largest_difference"] <= row["bound"]
            except Exception as error:  # other formats may still do
                row |= failure(error)
            yield row


def kernels_against_xla(bench: Bench) -> Iterator[dict]:
    """Compares lookup, read, swap, both updates, bags and sums of duplicates.

    With SGD, the bits must be the same in every format. Row-wise Adagrad divides and takes roots,
    which Triton does not round correctly: its rows are float32 and its sums too, so that nothing
    amplifies that, and the largest difference is to be of the size of rounding errors.
    """
    cases = [
        ("int8", 16),
        ("int8", 64),
        ("int4", 128),
        ("float32", 100),
        ("int2", 7),
        ("bfloat16", 1),
    ]
    cases += [
        ("float16", 16),
        ("float8_e4m3fn", 7),
        ("float8_e5m2", 64),
        ("int8", 7),
        ("int4", 16),
        ("int8", 128),
    ]
    tx = mpembed.optim.sgd(0.25)
    chosen = [("int8", 7)] if bench.is_tiny else cases
    pairs = [(Small(*case, "xla", tx), Small(*case, bench.kernels, tx)) for case in chosen]
    for rule, storage, dim in (("adagrad", "float32", 64), ("momentum", "int8", 16)):
        other = (
            mpembed.optim.rowwise_adagrad(0.25)
            if rule == "adagrad"
            else optax.sgd(0.25, momentum=0.5)
        )
        size = 7 if bench.is_tiny else dim
        pairs.append(
            (Small(storage, size, "xla", other), Small(storage, size, bench.kernels, other))
        )
    pooled = [
        (one, other._replace(is_pooled=True)) for one, other in pairs if other.rule != "momentum"
    ]
    yield from compared(pairs + pooled)


def host_against_device(bench: Bench) -> Iterator[dict]:
    """Compares tables in pinned host memory with tables on the device, bit for bit.

    They run with plain XLA and with the kernels that remain.
    """
    momentum, sgd = optax.sgd(0.25, momentum=0.5), mpembed.optim.sgd(0.25)
    cases = [
        ("int8", 16, "xla", sgd),
        ("float32", 64, "xla", momentum),
        ("int4", 7, bench.kernels, sgd),
    ]
    chosen = cases[:1] if bench.is_tiny else cases
    yield from compared([(Small(*case), Small(*case, "pinned_host")) for case in chosen])
