"""Small flax models with cached embeddings, and their training step.

The snippets show the five changed lines.
"""

import difflib
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import mpembed_jax as mpembed
from mpembed_jax import CacheSpec, EmbeddingSpec, TableSpec, nn

SNIPPETS = pathlib.Path(__file__).parent / "snippets"
ROWS, DIM = 300, 4
CACHE = CacheSpec(num_rows=32, ways=4)
# One object each: optimizers are static, and tests that share them share compiled steps.
ROW_TX, HEAD_TX = optax.sgd(0.5), optax.sgd(0.25)
SMALL = {"storage": "int4", "cache": None}  # compiles in a quarter of the time


def code_changes(before: str, after: str) -> list[str]:
    """Returns the lines of code that were changed or added."""
    lines = difflib.ndiff(
        (SNIPPETS / before).read_text().splitlines(), (SNIPPETS / after).read_text().splitlines()
    )
    changed = list(lines)
    num_removed = sum(line.startswith("- ") for line in changed)
    added = [line[2:] for line in changed if line.startswith("+ ") and line[2:].strip()]
    assert num_removed <= len(added), "lines were deleted"
    return added


def run_snippet(name: str, look) -> tuple[dict, int, object, object]:
    """Runs a snippet.

    Returns its names, how often its step was traced, and what `look` saw before and after training.
    """
    setup, loop = (SNIPPETS / name).read_text().split("\nfor _ in", 1)
    names: dict = {"__name__": name}
    exec(compile(setup, name, "exec"), names)
    forward, num_calls = names["Model"].__call__, []

    def counted(*args, **kwargs):
        num_calls.append(1)
        return forward(*args, **kwargs)

    names["Model"].__call__ = counted
    before = look(names)
    training, evaluation = ("for _ in" + loop).split("\n\n", 1)
    exec(compile(training, name, "exec"), names)
    num_traces = len(num_calls)
    after = look(names)
    exec(compile(evaluation, name, "exec"), names)
    return names, num_traces, before, after


def address(state) -> int:
    return state.table.rows.unsafe_buffer_pointer()


def batches(num: int, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(num):
        ids = np.minimum(rng.zipf(1.2, (16, 3)), ROWS).astype(np.int32) - 1
        yield ids, rng.normal(size=16).astype(np.float32)


((IDS, LABELS),) = batches(1)
OTHER_IDS = np.setdiff1d(np.arange(ROWS, dtype=np.int32), IDS)


class Model(nnx.Module):
    """One embedding and a linear head."""

    def __init__(self, rngs, embed):
        self.embed = embed
        self.head = nnx.Linear(DIM, 1, rngs=rngs)

    def __call__(self, ids):
        return self.head(self.embed(ids).mean(axis=1))[:, 0]


@functools.cache
def build_model(options: tuple) -> Model:
    rngs = nnx.Rngs(0)
    return Model(
        rngs,
        nn.CachedEmbed(ROWS, DIM, rngs=rngs, **{"cache": CACHE, "tx": ROW_TX, **dict(options)}),
    )


def cached_model(**options) -> tuple[Model, nnx.Optimizer]:
    """Returns a model with a CachedEmbed of these options, and its optimizer."""
    graphdef, state = nnx.split(build_model(tuple(options.items())))
    model = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))  # steps donate
    return model, nnx.Optimizer(model, HEAD_TX, wrt=nnx.Param)


def prefetch_embed(model, ids):
    model.embed.prefetch(ids)


def squared_error(model, ids, labels):
    return jnp.mean(jnp.square(model(ids) - labels))


@functools.cache
def jitted_step(prefetch=prefetch_embed, clip=None):
    """Returns a training step, and the list that grows with each of its traces."""
    traces = []

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, ids, labels):
        traces.append(1)
        prefetch(model, ids)
        loss, grads = nnx.value_and_grad(squared_error)(model, ids, labels)
        if clip is not None:
            grads, _ = optax.clip_by_global_norm(clip).update(grads, optax.EmptyState())
        grads = nn.apply_gradients(model, grads)
        optimizer.update(model, grads)
        return loss

    return step, traces


def assert_same_bits(one, other) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def bag_specs(**options) -> list[EmbeddingSpec]:
    """Two widths.

    Features `seen` and `bought` share a table. Without a cache unless asked: it compiles faster.
    """
    options = {"cache": None, **options}
    features = {"seen": "items", "bought": "items", "user": "users"}
    items = EmbeddingSpec(
        (TableSpec("items", 50), TableSpec("users", 20)), 4, features=features, **options
    )
    return [items, EmbeddingSpec((TableSpec("shop", 7),), 3, **options)]


BAG_IDS = {
    "shop": np.array([[0], [6], [7]]),  # 7 is no shop
    "seen": np.array([[1, 2, mpembed.NO_ID], [2, 2, 49], [mpembed.NO_ID] * 3]),
    "user": np.array([[3], [19], [3]]),
    "bought": np.array(
        [[2, 1], [50, 0], [4, mpembed.NO_ID]]
    ),  # 50 is no item, and not the first user either
}
