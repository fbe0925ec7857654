"""The training under test in `faults`: README's step, with checkpoints of its whole state."""

import hashlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpembed_jax as mpembed
from experiments.speed import workload
from mpembed_jax import checkpoint

SIZES, DIM, WIDTH, SAVE_EVERY = (60_000, 500), 16, 512, 10
SPEC = mpembed.EmbeddingSpec(
    [mpembed.TableSpec("large", SIZES[0]), mpembed.TableSpec("small", SIZES[1])],
    DIM,
    "int8",
    mpembed.CacheSpec(num_rows=2048, ways=16),
)
ROW_TX, TX = mpembed.optim.rowwise_adagrad(0.05), optax.adam(1e-3)


def ids_at(step: int, num_rows: int = sum(SIZES), width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Returns the ids of one step: skewed, drifting, the same for the same step."""
    rng = np.random.default_rng([seed, step])
    ids = workload.zipf_ids(rng, num_rows, (width,), 1.05)
    return ((ids + step // 50 * 977) % num_rows).astype(np.int32)


def marked_step(state: Any, tracker: Any, ids: Any, *, tx: Any) -> tuple[Any, Any]:
    """Trains rows by themselves, so that every touched row changes, and marks them."""
    state, plan = mpembed.prefetch(state, ids)
    rows = mpembed.lookup(state, plan)
    state = mpembed.apply_gradients(state, plan, rows, rows + 1, tx=tx)
    return state, checkpoint.mark(tracker, plan)


@partial(jax.jit, donate_argnums=0)
def train_step(tree: dict[str, Any], ids: jax.Array) -> dict[str, Any]:
    """README's step with a row tracker."""
    emb, plan = mpembed.prefetch(tree["emb"], ids)
    tracker = checkpoint.mark(tree["tracker"], plan)
    rows = mpembed.lookup(emb, plan)

    def loss_fn(params, rows):
        vectors = mpembed.pool(rows, plan.inverse)
        return jnp.mean(jnp.sin(vectors @ params["w"] * 30) + params["b"] ** 2)

    grads, row_grads = jax.grad(loss_fn, argnums=(0, 1))(tree["params"], rows)
    emb = mpembed.apply_gradients(emb, plan, rows, row_grads * WIDTH, tx=ROW_TX)
    updates, opt_state = TX.update(grads, tree["opt_state"], tree["params"])
    return dict(
        emb=emb,
        tracker=tracker,
        params=optax.apply_updates(tree["params"], updates),
        opt_state=opt_state,
    )


def first_tree() -> dict[str, Any]:
    """Returns the state before the first step."""
    params = {"w": jnp.ones((DIM, 8)), "b": jnp.ones(8)}
    emb = mpembed.init(jax.random.key(0), SPEC, ROW_TX)
    return dict(emb=emb, tracker=checkpoint.track(emb), params=params, opt_state=TX.init(params))


def saved_part(tree: dict[str, Any], position: int) -> dict[str, Any]:
    """Returns what a checkpoint holds: everything but the tracker, and the position in the data."""
    return {**{k: v for k, v in tree.items() if k != "tracker"}, "position": position}


def bits_of(tree: Any) -> str:
    """Returns a hash of every bit of a tree of arrays."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.array(leaf).tobytes())
    return total.hexdigest()


def work(directory: Path, steps: int) -> str:
    """Trains to `steps` and saves in the background every SAVE_EVERY steps.

    It resumes from a checkpoint that is there. Says on stdout what it does, so that a parent can
    aim, and ends when stdin does: a parent that is late still finds it. Returns the hash of the
    last state.
    """
    tree, begin = first_tree(), 0
    if checkpoint.latest_step(directory) is not None:
        restored = checkpoint.restore(directory, saved_part(tree, 0))
        begin = restored.pop("position")
        tree = dict(restored, tracker=checkpoint.track(restored["emb"]))
    print(f"resume {begin}", flush=True)
    for step in range(begin, steps):
        tree = train_step(tree, ids_at(step))
        print(f"step {step + 1}", flush=True)
        if (step + 1) % SAVE_EVERY == 0:
            print(f"save {step + 1}", flush=True)
            is_full = (step + 1) % (5 * SAVE_EVERY) == 0 or checkpoint.latest_step(
                directory
            ) is None
            part, tracker = saved_part(tree, step + 1), None if is_full else tree["tracker"]
            checkpoint.save(directory, step + 1, part, tracker=tracker, wait=False, keep=3)
            tree["tracker"] = checkpoint.track(tree["emb"])
    print(f"end {steps}", flush=True)
    sys.stdin.read()
    return bits_of(saved_part(tree, steps))
