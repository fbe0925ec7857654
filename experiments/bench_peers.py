"""Our training step beside its peers', same ids, dims and optimizer, alternated in one run, each in a process of its own.

    python -m experiments.bench_peers --dims 16 64 128 --batch 2048
    python -m experiments.bench_peers --task dlrm --dims 16

Peers: FBGEMM's table-batched embedding on the CPU (FP32 and FP16, exact row-wise Adagrad), torch.nn.EmbeddingBag with
sparse=True and SGD, flax nnx.Embed with optax.adagrad (dense gradient, donated). They need
`pip install "mpembed_jax[peers]"`; one that cannot be imported is named and left out. A worker serves rounds over a pipe, so
that rounds of all workers alternate while only one of them computes. --task dlrm times the whole training: host batch to
device, dense part, embedding, optimizers.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from experiments import workload

PEERS = (
    "ours-int8-w32",
    "ours-int8-w8",
    "ours-int4",
    "ours-float32",
    "fbgemm-fp32",
    "fbgemm-fp16",
    "torch-sparse",
    "flax-dense",
)
LEARNING_RATE = 0.05
WARM_STEPS, STEPS_PER_ROUND = 40, 10
DENSE_FLAX_ROWS = 1_000_000  # the dense gradient of all 33.76 M rows needs hours; its cost is linear in rows


def _data(args):
    sizes = workload.sizes_for(args.rows)
    local = workload.batches(1, args.distinct, args.batch, sizes, args.skew)
    rng = np.random.default_rng(2)
    grads = rng.normal(size=(args.batch, len(sizes), args.dim)).astype(np.float32)
    dense = rng.normal(size=(args.batch, 13)).astype(np.float32)
    label = (rng.random(args.batch) < 0.25).astype(np.float32)
    return sizes, local, grads, dense, label


# --- workers: make(args) returns step(i), which trains on batch i and waits for the result


def make_ours(args, sizes, local, grads, dense, label):
    """Our verbs; the worker's name says storage and ways."""
    import jax
    import jax.numpy as jnp
    import optax

    import mpembed_jax as mpembed

    name = args.worker.removeprefix("ours-")
    storage = name.split("-")[0]
    ways = 8 if name.endswith("w8") else 32
    cache = None if storage == "float32" else mpembed.CacheSpec(0.01 if storage == "int4" else 0.05, ways=ways)
    tables = [mpembed.TableSpec(f"C{i + 1}", v) for i, v in enumerate(sizes)]
    spec = mpembed.EmbeddingSpec(tables, args.dim, storage, cache, max_unique_ids=int(0.4 * args.batch * len(sizes)))
    tx = mpembed.optim.rowwise_adagrad(LEARNING_RATE)
    before = workload.resident_bytes()
    start = time.perf_counter()
    state = jax.block_until_ready(mpembed.init(jax.random.key(0), spec, tx))
    facts = {"state_bytes": sum(a.nbytes for a in jax.tree.leaves(state)), "before_init": before}
    facts["init_s"] = time.perf_counter() - start
    ids = [workload.to_global(b, sizes) for b in local]

    if args.task == "embedding":

        def train(state, ids, grads):
            state, plan = mpembed.prefetch(state, ids)
            rows = mpembed.lookup(state, plan)
            vectors, pull_back = jax.vjp(lambda rows: mpembed.pool(rows, plan.inverse), rows)
            (row_grads,) = pull_back(grads)
            return mpembed.apply_gradients(state, plan, rows, row_grads, tx=tx), vectors, plan.counts.dropped

        train = jax.jit(train, donate_argnums=0)
        on_device, grads = [jnp.asarray(b) for b in ids], jnp.asarray(grads)

        def step(i):
            nonlocal state
            state, vectors, dropped = train(state, on_device[i % len(ids)], grads)
            jax.block_until_ready((state, vectors))
            assert int(dropped) == 0

    else:
        from experiments import dlrm

        params = dlrm.init_dlrm(jax.random.key(1), 13, len(sizes), args.dim)
        dense_tx = optax.sgd(LEARNING_RATE)
        opt_state = dense_tx.init(params)

        def train(state, params, opt_state, batch):
            state, plan = mpembed.prefetch(state, batch["ids"])
            rows = mpembed.lookup(state, plan)

            def loss_fn(params, rows):
                vectors = mpembed.pool(rows, plan.inverse)
                logits = dlrm.dlrm(params, batch["dense"], vectors)
                return dlrm.bce(logits, batch["label"])

            loss, (g, row_grads) = jax.value_and_grad(loss_fn, argnums=(0, 1))(params, rows)
            state = mpembed.apply_gradients(state, plan, rows, row_grads, tx=tx)
            updates, opt_state = dense_tx.update(g, opt_state, params)
            return state, optax.apply_updates(params, updates), opt_state, loss

        train = jax.jit(train, donate_argnums=(0, 1, 2))

        def step(i):
            nonlocal state, params, opt_state
            batch = {"ids": workload.to_global(local[i % len(ids)], sizes), "dense": dense, "label": label}
            state, params, opt_state, loss = train(state, params, opt_state, batch)
            jax.block_until_ready((state, loss))

    start = time.perf_counter()
    step(0)
    facts["first_step_s"] = time.perf_counter() - start
    return step, facts


def make_fbgemm(args, sizes, local, grads, dense, label):
    """FBGEMM's table-batched embedding, exact row-wise Adagrad fused into the backward pass."""
    import torch

    torch.set_num_threads(args.threads)
    import fbgemm_gpu  # noqa: F401  registers the operators
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    before = workload.resident_bytes()
    embedding = SplitTableBatchedEmbeddingBagsCodegen(
        [(v, args.dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for v in sizes],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LEARNING_RATE,
        eps=1e-8,
        weights_precision=SparseType.FP32 if args.worker.endswith("fp32") else SparseType.FP16,
    )
    embedding.init_embedding_weights_uniform(-0.01, 0.01)
    offsets = torch.arange(args.batch * len(sizes) + 1)
    batches = [torch.from_numpy(np.ascontiguousarray(b.T).reshape(-1)) for b in local]
    upstream = torch.from_numpy(grads.reshape(args.batch, -1))

    def step(i):
        embedding(batches[i % len(batches)], offsets).backward(upstream)

    return step, {"before_init": before}


def make_torch(args, sizes, local, grads, dense, label):
    """torch EmbeddingBags with sparse gradients: SGD for the embedding task, Adagrad in the whole DLRM."""
    import torch

    torch.set_num_threads(args.threads)
    before = workload.resident_bytes()
    bags = torch.nn.ModuleList([torch.nn.EmbeddingBag(v, args.dim, mode="sum", sparse=True) for v in sizes])
    batches = [torch.from_numpy(np.ascontiguousarray(b.T)) for b in local]
    offsets = torch.arange(args.batch)
    facts = {"before_init": before}
    if args.task == "embedding":
        optimizer = torch.optim.SGD(bags.parameters(), lr=LEARNING_RATE)
        upstream = torch.from_numpy(grads)

        def step(i):
            optimizer.zero_grad()
            ids = batches[i % len(batches)]
            out = torch.stack([bag(ids[t], offsets) for t, bag in enumerate(bags)], dim=1)
            out.backward(upstream)
            optimizer.step()

        return step, facts

    def mlp(*widths):
        layers = []
        for a, b in itertools.pairwise(widths):
            layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
        return torch.nn.Sequential(*layers)

    vectors_per_row = len(sizes) + 1
    bottom = mlp(13, 512, 256, 64, args.dim)
    top = mlp(args.dim + vectors_per_row * (vectors_per_row - 1) // 2, 512, 256, 1)[:-1]
    rows, columns = torch.tril_indices(vectors_per_row, vectors_per_row, -1)
    sparse_tx = torch.optim.Adagrad(bags.parameters(), lr=LEARNING_RATE)
    dense_tx = torch.optim.SGD([*bottom.parameters(), *top.parameters()], lr=LEARNING_RATE)
    loss_fn = torch.nn.BCEWithLogitsLoss()

    def step(i):
        ids = torch.from_numpy(np.ascontiguousarray(local[i % len(local)].T))
        x = bottom(torch.from_numpy(dense))
        stacked = torch.stack([x] + [bag(ids[t], offsets) for t, bag in enumerate(bags)], dim=1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))[:, rows, columns]
        loss = loss_fn(top(torch.cat([x, products], dim=1))[:, 0], torch.from_numpy(label))
        sparse_tx.zero_grad()
        dense_tx.zero_grad()
        loss.backward()
        sparse_tx.step()
        dense_tx.step()

    return step, facts


def make_flax(args, sizes, local, grads, dense, label):
    """One flax nnx.Embed over all rows with a dense gradient and optax.adagrad."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    args.rows = DENSE_FLAX_ROWS if args.rows is None else args.rows
    sizes = workload.sizes_for(args.rows)
    ids = [workload.to_global(b, sizes) for b in workload.batches(1, args.distinct, args.batch, sizes, args.skew)]
    before = workload.resident_bytes()
    model = nnx.Embed(sum(sizes), args.dim, rngs=nnx.Rngs(0))
    tx = optax.adagrad(LEARNING_RATE)
    if args.task == "embedding":
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit(donate_argnums=(0, 1))
        def train(model, optimizer, ids, grads):
            g = nnx.grad(lambda m: jnp.sum(m(ids) * grads))(model)
            optimizer.update(model, g)

        grads = jnp.asarray(grads)

        def step(i):
            train(model, optimizer, jnp.asarray(ids[i % len(ids)]), grads)
            jax.block_until_ready(nnx.state(model))

    else:
        from experiments import dlrm

        params = {"table": model.embedding[...], "dense": dlrm.init_dlrm(jax.random.key(1), 13, len(sizes), args.dim)}
        label_of = {"table": "table", "dense": "dense"}
        both = optax.multi_transform({"table": tx, "dense": optax.sgd(LEARNING_RATE)}, label_of)
        opt_state = both.init(params)

        def train(params, opt_state, batch):
            def loss_fn(params):
                logits = dlrm.dlrm(params["dense"], batch["dense"], params["table"][batch["ids"]])
                return dlrm.bce(logits, batch["label"])

            loss, g = jax.value_and_grad(loss_fn)(params)
            updates, opt_state = both.update(g, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        train = jax.jit(train, donate_argnums=(0, 1))

        def step(i):
            nonlocal params, opt_state
            batch = {"ids": ids[i % len(ids)], "dense": dense, "label": label}
            params, opt_state, loss = train(params, opt_state, batch)
            jax.block_until_ready(loss)

    return step, {"before_init": before, "rows": sum(sizes)}


def serve(args):
    """Runs one worker: a line `round K` on stdin answers a JSON line with K step times."""
    makers = {"ours": make_ours, "fbgemm": make_fbgemm, "torch": make_torch, "flax": make_flax}
    if args.worker.startswith(("ours", "flax")):
        workload.keep_freed_memory()  # jax only: FBGEMM and torch ran up to 300 times slower with it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout; the pipe is ours alone
    try:
        step, facts = makers[args.worker.split("-")[0]](args, *_data(args))
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=answers, flush=True)
        return
    facts["after_init"] = workload.resident_bytes()
    print(json.dumps(facts), file=answers, flush=True)
    done = 1
    for line in sys.stdin:
        times = []
        for _ in range(int(line.split()[1])):
            start = time.perf_counter()
            step(done)
            times.append(time.perf_counter() - start)
            done += 1
        print(
            json.dumps({"times": times, "peak": workload.peak_bytes(), "resident": workload.resident_bytes()}),
            file=answers,
            flush=True,
        )


# --- the run


class Worker:
    """A peer in its own process."""

    def __init__(self, name, args, dim):
        command = [
            args.peers_python if name.startswith(("fbgemm", "torch")) else sys.executable,
            "-m",
            "experiments.bench_peers",
        ]
        command += ["--worker", name, "--dim", str(dim), "--batch", str(args.batch), "--skew", str(args.skew)]
        command += ["--distinct", str(args.distinct), "--task", args.task, "--threads", str(args.threads)]
        command += ["--rows", str(args.rows)] if args.rows else []
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        line = self.process.stdout.readline()
        self.facts = json.loads(line) if line else {"missing": "the worker ended; run it alone with --worker to see why"}
        self.times = []

    def round(self, steps):
        """Runs `steps` steps and returns their times in seconds."""
        self.process.stdin.write(f"round {steps}\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.facts |= {"peak": answer["peak"], "resident": answer["resident"]}
        return answer["times"]

    def stop(self):
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def run(args):
    """Runs all peers at every dim and writes the JSON."""
    results = []
    for dim in args.dims:
        # Tables of several gigabytes do not fit side by side: groups that do are alternated, ours in each of them.
        names = [p for p in args.peers if args.task == "embedding" or p in ("ours-int8-w32", "torch-sparse", "flax-dense")]
        first, others = names[0], names[1:]
        size = max(1, args.together - 1)
        for group in [others[i : i + size] for i in range(0, len(others), size)]:
            workers = []
            for name in [first, *group]:
                worker = Worker(name, args, dim)
                if "missing" in worker.facts:
                    print(f"{name}: left out, {worker.facts['missing']} (pip install 'mpembed_jax[peers]')")
                    continue
                warm = 5 if name == "flax-dense" else WARM_STEPS
                worker.round(warm)
                workers.append(worker)
            for _ in range(args.rounds):
                for worker in workers:
                    worker.times.append(
                        statistics.median(worker.round(3 if worker.name == "flax-dense" else STEPS_PER_ROUND))
                    )
            ours = workers[0]
            for worker in workers:
                ratios = [a / b for a, b in zip(ours.times, worker.times, strict=True)]
                row = {
                    "task": args.task, "dim": dim, "batch": args.batch, "skew": args.skew, "peer": worker.name,
                    "against": ours.name, "ms": 1e3 * statistics.median(worker.times),
                    "ms_min": 1e3 * min(worker.times), "ms_max": 1e3 * max(worker.times),
                    "ours_over_peer": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
                    "samples_per_s": args.batch / statistics.median(worker.times), **worker.facts,
                }  # fmt: skip
                results.append(row)
                print(
                    f"D={dim:<4} {worker.name:<14} {row['ms']:8.2f} ms [{row['ms_min']:.2f}, {row['ms_max']:.2f}]   "
                    f"ours / peer {row['ours_over_peer']:.3f} [{row['ratio_min']:.3f}, {row['ratio_max']:.3f}]   "
                    f"resident {row['resident'] / 1e9:.2f} GB" + (f"   ({row['rows']:,} rows)" if "rows" in row else "")
                )
                worker.stop()
    losses = [r for r in results if r["ours_over_peer"] > 1 and not r["peer"].startswith("ours")]
    print(
        "we lose against: "
        + (", ".join(f"{r['peer']} at D={r['dim']} ({r['ours_over_peer']:.2f})" for r in losses) or "nobody")
    )
    out = Path(args.out)
    words = [w for w in sys.argv[1:] if w not in ("--peers-python", args.peers_python)]  # no path of one machine
    command = " ".join(["python -m experiments.bench_peers", *words])
    out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpu_count": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    out.write_text(json.dumps({"command": command, "machine": machine, "results": results}, indent=1))


def main():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--dim", type=int)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=None, help="rows of all tables together; default Kaggle's 33.76 M")
    parser.add_argument("--skew", type=float, default=1.05)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--distinct", type=int, default=130, help="batches drawn in advance")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--together", type=int, default=2, help="processes alternated at once (their tables share the memory)"
    )
    parser.add_argument("--peers", nargs="+", default=list(PEERS))
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has torch and fbgemm-gpu-cpu")
    parser.add_argument("--task", choices=("embedding", "dlrm"), default="embedding")
    parser.add_argument("--out", default="experiments/results/bench_peers.json")
    parser.add_argument("--worker")
    args = parser.parse_args()
    serve(args) if args.worker else run(args)


if __name__ == "__main__":
    main()
