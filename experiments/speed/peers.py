"""The workers of bench_peers: one training step of ours and of each peer.

Each runs in its own process and is served over a pipe. A maker builds tables for a `Case` and
returns `(prepare, step, facts)`. prepare(local ids int64 [B, T]) makes what the framework reads.
step(prepared) trains on it and waits for the result. Ours also returns cache(), which says how full
the cache of rows is. In the embedding task, ids are prepared before the clock starts, as a data
pipeline would have done. In the DLRM task, the whole way from host arrays is timed. A worker
answers each line `warm K` or `cold K` on its standard input with a JSON line of K step times, and
each line `cache` with what cache() says.
"""

import dataclasses
import itertools
import json
import os
import sys
import time

import numpy as np

from experiments import running
from experiments.speed import workload

LEARNING_RATE = 0.05
# The dense gradient of all 33.76 M rows takes tens of seconds. Its cost is linear in rows.
DENSE_FLAX_ROWS = 1_000_000


@dataclasses.dataclass(frozen=True)
class Case:
    """What one worker does."""

    worker: str
    task: str  # "embedding" or "dlrm"
    dim: int
    batch: int
    skew: float
    rows: (
        int | None
    )  # of all tables together; None: Kaggle's 33.76 M, for dense flax DENSE_FLAX_ROWS
    distinct: int  # batches that the timed steps cycle through
    warm: int  # batches trained before them, each drawn afresh: they fill a cache
    threads: int

    @property
    def sizes(self):
        """Vocabulary sizes."""
        rows = DENSE_FLAX_ROWS if self.rows is None and self.worker == "flax-dense" else self.rows
        return workload.sizes_for(rows)

    def upstream(self):
        """Returns the gradient of the pooled vectors, float32 [B, T, D]."""
        return (
            np.random.default_rng(2)
            .normal(size=(self.batch, len(self.sizes), self.dim))
            .astype(np.float32)
        )

    def dense_and_label(self):
        """Returns DLRM's dense features float32 [B, 13] and labels float32 [B]."""
        rng = np.random.default_rng(3)
        return rng.normal(size=(self.batch, 13)).astype(np.float32), (
            rng.random(self.batch) < 0.25
        ).astype(np.float32)


def _make_ours(case):
    """Our step; the worker's name says storage and ways.

    `verbs`: the separate ones, instead of embed and apply_pooled_gradients.
    """
    import jax
    import jax.numpy as jnp
    import optax

    import mpembed_jax as mpembed
    from experiments.speed.step import embedding_step

    storage = case.worker.split("-")[1]
    ways = 8 if case.worker.endswith("w8") else 32
    cache = (
        None
        if storage == "float32"
        else mpembed.CacheSpec(0.01 if storage == "int4" else 0.05, ways=ways)
    )
    tables = [mpembed.TableSpec(f"C{i + 1}", v) for i, v in enumerate(case.sizes)]
    is_pooled = not case.worker.endswith("verbs")
    budget = None if is_pooled else case.batch * len(tables) // 3  # as wide are the verbs' arrays
    spec = mpembed.EmbeddingSpec(tables, case.dim, storage, cache, max_unique_ids=budget)
    tx = mpembed.optim.rowwise_adagrad(LEARNING_RATE)
    facts = {"before_init": workload.resident_bytes()}
    start = time.perf_counter()
    state = jax.block_until_ready(mpembed.init(jax.random.key(0), spec, tx))
    facts |= {
        "state_bytes": sum(a.nbytes for a in jax.tree.leaves(state)),
        "init_s": time.perf_counter() - start,
    }

    def cache_facts():
        if state.cache is None:
            return {}
        totals = mpembed.stats(state)
        occupancy = float(np.mean(np.asarray(state.cache.tags) != mpembed.NO_ID))
        return {"occupancy": occupancy} | {
            name: getattr(totals, name) for name in ("steps", "evictions", "write_backs")
        }

    if case.task == "embedding":
        grads = jnp.asarray(case.upstream())

        def train_embedding(state, ids, grads):
            state, plan, _, vectors = embedding_step(state, ids, grads, tx=tx, is_pooled=is_pooled)
            return state, vectors, plan.counts.dropped

        train_embedding = jax.jit(train_embedding, donate_argnums=0)

        def prepare(local):
            return jnp.asarray(workload.to_global(local, case.sizes))

        def step(ids):
            nonlocal state
            state, vectors, dropped = train_embedding(state, ids, grads)
            jax.block_until_ready((state, vectors))
            assert int(dropped) == 0

        return prepare, step, facts, cache_facts

    from experiments.dlrm import models

    params = models.init_dlrm(jax.random.key(1), 13, len(tables), case.dim)
    dense_tx = optax.sgd(LEARNING_RATE)
    opt_state = dense_tx.init(params)
    dense, label = case.dense_and_label()

    def train(state, params, opt_state, batch):
        state, plan, vectors = mpembed.embed(state, batch["ids"], tx=tx)

        def loss_fn(params, vectors):
            return models.bce(models.dlrm(params, batch["dense"], vectors), batch["label"])

        loss, (g, grads) = jax.value_and_grad(loss_fn, argnums=(0, 1))(params, vectors)
        state = mpembed.apply_pooled_gradients(state, plan, grads, tx=tx)
        updates, opt_state = dense_tx.update(g, opt_state, params)
        return state, optax.apply_updates(params, updates), opt_state, loss

    train = jax.jit(train, donate_argnums=(0, 1, 2))

    def dlrm_step(local):
        nonlocal state, params, opt_state
        batch = {"ids": workload.to_global(local, case.sizes), "dense": dense, "label": label}
        state, params, opt_state, loss = train(state, params, opt_state, batch)
        jax.block_until_ready((state, loss))

    return lambda local: local, dlrm_step, facts, cache_facts


def _make_fbgemm(case):
    """FBGEMM's table-batched embedding, exact row-wise Adagrad fused into the backward pass."""
    import torch

    torch.set_num_threads(case.threads)
    import fbgemm_gpu  # noqa: F401  registers the operators
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    facts = {"before_init": workload.resident_bytes()}
    embedding = SplitTableBatchedEmbeddingBagsCodegen(
        [(v, case.dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for v in case.sizes],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LEARNING_RATE,
        eps=1e-8,
        weights_precision=SparseType.FP32 if "fp32" in case.worker else SparseType.FP16,
    )
    embedding.init_embedding_weights_uniform(-0.01, 0.01)
    offsets = torch.arange(case.batch * len(case.sizes) + 1)
    upstream = torch.from_numpy(case.upstream().reshape(case.batch, -1))

    def prepare(local):
        return torch.from_numpy(np.ascontiguousarray(local.T).reshape(-1))

    def step(ids):
        embedding(ids, offsets).backward(upstream)

    return prepare, step, facts


def _make_torch(case):
    """torch EmbeddingBags with sparse gradients.

    The embedding task uses SGD, and the whole DLRM uses Adagrad.
    """
    import torch

    torch.set_num_threads(case.threads)
    facts = {"before_init": workload.resident_bytes()}
    bags = torch.nn.ModuleList(
        [torch.nn.EmbeddingBag(v, case.dim, mode="sum", sparse=True) for v in case.sizes]
    )
    offsets = torch.arange(case.batch)

    def prepare(local):
        return torch.from_numpy(np.ascontiguousarray(local.T))

    if case.task == "embedding":
        optimizer = torch.optim.SGD(bags.parameters(), lr=LEARNING_RATE)
        upstream = torch.from_numpy(case.upstream())

        def step(ids):
            optimizer.zero_grad()
            out = torch.stack([bag(ids[t], offsets) for t, bag in enumerate(bags)], dim=1)
            out.backward(upstream)
            optimizer.step()

        return prepare, step, facts

    def mlp(*widths):
        layers = []
        for a, b in itertools.pairwise(widths):
            layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
        return torch.nn.Sequential(*layers)

    num_vectors = len(case.sizes) + 1
    bottom = mlp(13, 512, 256, 64, case.dim)
    top = mlp(case.dim + num_vectors * (num_vectors - 1) // 2, 512, 256, 1)[:-1]
    rows, columns = torch.tril_indices(num_vectors, num_vectors, -1)
    sparse_tx = torch.optim.Adagrad(bags.parameters(), lr=LEARNING_RATE)
    dense_tx = torch.optim.SGD([*bottom.parameters(), *top.parameters()], lr=LEARNING_RATE)
    loss_fn = torch.nn.BCEWithLogitsLoss()
    dense, label = case.dense_and_label()

    def dlrm_step(local):
        ids = prepare(local)
        x = bottom(torch.from_numpy(dense))
        stacked = torch.stack([x] + [bag(ids[t], offsets) for t, bag in enumerate(bags)], dim=1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))[:, rows, columns]
        loss = loss_fn(top(torch.cat([x, products], dim=1))[:, 0], torch.from_numpy(label))
        sparse_tx.zero_grad()
        dense_tx.zero_grad()
        loss.backward()
        sparse_tx.step()
        dense_tx.step()

    return lambda local: local, dlrm_step, facts


def _make_flax(case):
    """One flax nnx.Embed over all rows with a dense gradient and optax.adagrad."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    facts = {"before_init": workload.resident_bytes(), "rows": sum(case.sizes)}
    model = nnx.Embed(sum(case.sizes), case.dim, rngs=nnx.Rngs(0))
    tx = optax.adagrad(LEARNING_RATE)

    if case.task == "embedding":
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        grads = jnp.asarray(case.upstream())

        @nnx.jit(donate_argnums=(0, 1))
        def train_embedding(model, optimizer, ids, grads):
            g = nnx.grad(lambda m: jnp.sum(m(ids) * grads))(model)
            optimizer.update(model, g)

        def step(ids):
            train_embedding(model, optimizer, ids, grads)
            jax.block_until_ready(nnx.state(model))

        return lambda local: jnp.asarray(workload.to_global(local, case.sizes)), step, facts

    from experiments.dlrm import models

    params = {
        "table": model.embedding[...],
        "dense": models.init_dlrm(jax.random.key(1), 13, len(case.sizes), case.dim),
    }
    label_of = {"table": "table", "dense": "dense"}
    both = optax.multi_transform({"table": tx, "dense": optax.sgd(LEARNING_RATE)}, label_of)
    opt_state = both.init(params)
    dense, label = case.dense_and_label()

    def train(params, opt_state, batch):
        def loss_fn(params):
            logits = models.dlrm(params["dense"], batch["dense"], params["table"][batch["ids"]])
            return models.bce(logits, batch["label"])

        loss, g = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = both.update(g, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    train = jax.jit(train, donate_argnums=(0, 1))

    def dlrm_step(local):
        nonlocal params, opt_state
        batch = {"ids": workload.to_global(local, case.sizes), "dense": dense, "label": label}
        params, opt_state, loss = train(params, opt_state, batch)
        jax.block_until_ready((params, loss))

    return lambda local: local, dlrm_step, facts


_MAKERS = {"ours": _make_ours, "fbgemm": _make_fbgemm, "torch": _make_torch, "flax": _make_flax}


def serve(case):
    """Runs one worker until its standard input ends."""
    if hasattr(os, "sched_setaffinity"):  # Linux; jax has as many threads as it may use cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: case.threads])
    if case.worker.startswith(("ours", "flax")):
        # Only for jax: with it, FBGEMM and torch ran up to 300 times slower.
        workload.keep_freed_memory()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout; the pipe is ours alone

    def answer(facts):
        print(json.dumps(facts), file=answers, flush=True)

    timed = workload.batches(1, case.distinct, case.batch, case.sizes, case.skew)
    try:
        prepare, step, facts, *cache = _MAKERS[case.worker.split("-")[0]](case)
    except ImportError as error:
        answer({"missing": str(error)})
        return
    for number in range(case.warm):
        (local,) = workload.batches(1000 + number, 1, case.batch, case.sizes, case.skew)
        start = time.perf_counter()
        step(prepare(local))
        if number == 0:
            facts["first_step_s"] = time.perf_counter() - start
    prepared = itertools.cycle([prepare(local) for local in timed])
    answer(facts | {"peak": workload.peak_bytes(), "resident": workload.resident_bytes()})
    other = np.ones(1 << 25, np.float32), np.ones(1 << 25, np.float32)
    matrix = np.ones((1024, 1024), np.float32)
    for line in sys.stdin:
        if line.strip() == "cache":
            answer(cache[0]() if cache else {})
            continue
        caches, steps = line.split()
        times = []
        for _ in range(int(steps)):
            batch = next(prepared)
            if caches == "cold":
                other[1][:] = other[0]
                matrix @ matrix
            start = time.perf_counter()
            step(batch)
            times.append(time.perf_counter() - start)
        answer({"times": times})


if __name__ == "__main__":
    serve(*running.words_from("speed.bench_peers", lambda text: Case(**json.loads(text))))
