"""Our training step beside its peers', with the same ids, dims and optimizer.

The steps alternate in one run, each in its own process.

    python -m experiments.speed.bench_peers --dims 16 64 128 --batch 2048
    python -m experiments.speed.bench_peers --task dlrm --dims 16

Peers: FBGEMM's table-batched embedding on the CPU (FP32 and FP16, exact row-wise Adagrad),
torch.nn.EmbeddingBag with sparse=True and SGD, flax nnx.Embed with optax.adagrad (dense gradient,
donated). They need `pip install "mpembed_jax[peers]"`; one that cannot be imported is named and
left out. Rounds of all workers alternate while only one of them computes; a ratio is the median
over rounds of ours to the peer's. Our cache is warm: the steps before the timed ones have filled
its lines, so that the timed ones evict. --task dlrm times the whole training: host batch to device,
dense part, embedding, optimizers.
"""

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from experiments import provenance
from experiments.speed.peers import Case

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
DLRM_PEERS = ("ours-int8-w32", "torch-sparse", "flax-dense")
STEPS_PER_ROUND = 10


class Worker:
    """A peer in its own process, see experiments/speed/peers.py."""

    def __init__(self, case, python):
        command = [python, "-m", "experiments.speed.peers", json.dumps(dataclasses.asdict(case))]
        environment = os.environ | {"OMP_NUM_THREADS": str(case.threads)}
        self.name = case.worker
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        line = self.process.stdout.readline()
        again = f"the worker ended; see why with: {' '.join(command[:3])} '{command[3]}'"
        self.facts = json.loads(line) if line else {"missing": again}
        self.times = []

    def round(self, steps):
        """Runs `steps` steps and notes their median time in seconds."""
        self.process.stdin.write(f"round {steps}\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.times.append(statistics.median(answer.pop("times")))
        self.facts |= answer

    def stop(self):
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def start(name, dim, args):
    """Starts a worker and waits until it is warm.

    If it cannot run, a line says why, and the result is None.
    """
    is_ours, is_dense = name.startswith("ours"), name == "flax-dense"
    warm = (
        args.warm if is_ours and name != "ours-float32" else min(args.warm, 5 if is_dense else 40)
    )
    case = Case(
        name, args.task, dim, args.batch, args.skew, args.rows, args.distinct, warm, args.threads
    )
    worker = Worker(
        case, args.peers_python if name.startswith(("fbgemm", "torch")) else sys.executable
    )
    if "missing" not in worker.facts:
        return worker
    print(f"{name}: left out, {worker.facts['missing']} (pip install 'mpembed_jax[peers]')")
    return None


def alternate(names, dim, args):
    """Runs one group of peers side by side, the first of them ours; returns their results."""
    workers = [w for w in (start(name, dim, args) for name in names) if w]
    for _ in range(args.rounds):
        for worker in workers:
            worker.round(3 if worker.name == "flax-dense" else STEPS_PER_ROUND)
    results = []
    for worker in workers:
        ours, theirs = workers[0].times, worker.times
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        row = {
            "task": args.task, "dim": dim, "batch": args.batch, "skew": args.skew,
            "peer": worker.name,
            "against": workers[0].name, "ms": 1e3 * statistics.median(theirs),
            "ms_min": 1e3 * min(theirs), "ms_max": 1e3 * max(theirs),
            "ours_over_peer": statistics.median(ratios), "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "samples_per_s": args.batch / statistics.median(theirs), **worker.facts,
        }  # fmt: skip
        if (
            "state_bytes" in row
        ):  # P6: what the process took beyond its state, batch temporaries and compiler included
            row["peak_over_state"] = (row["peak"] - row["before_init"]) / row["state_bytes"]
        results.append(row)
        print(
            f"D={dim:<4} {worker.name:<14} {row['ms']:8.2f} ms [{row['ms_min']:.2f}, "
            f"{row['ms_max']:.2f}]   "
            f"ours / peer {row['ours_over_peer']:.3f} [{row['ratio_min']:.3f}, "
            f"{row['ratio_max']:.3f}]   "
            f"resident {row['resident'] / 1e9:.2f} GB, first step {row['first_step_s']:.1f} s"
            + (f"   ({row['rows']:,} rows)" if "rows" in row else ""),
            flush=True,
        )
        worker.stop()
    return results


def run(args):
    """Runs all peers at every dim and writes the JSON."""
    results = []
    peers = args.peers or (PEERS if args.task == "embedding" else DLRM_PEERS)
    for dim in args.dims:
        # Tables of several gigabytes do not fit side by side: groups that do are alternated, ours
        # in each of them.
        first, others = peers[0], peers[1:]
        size = max(1, args.together - 1)
        for group in [others[i : i + size] for i in range(0, len(others), size)]:
            results += alternate([first, *group], dim, args)
    losses = [r for r in results if r["ours_over_peer"] > 1 and not r["peer"].startswith("ours")]
    print(
        "we lose against: "
        + (
            ", ".join(f"{r['peer']} at D={r['dim']} ({r['ours_over_peer']:.2f})" for r in losses)
            or "nobody"
        )
    )
    words = [
        w for w in sys.argv[1:] if w not in ("--peers-python", args.peers_python)
    ]  # no path of one machine
    command = shlex.join(["python", "-m", "experiments.speed.bench_peers", *words])
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps(provenance.environment() | {"command": command, "results": results}, indent=1)
    )


def main():
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument(
        "--rows",
        type=int,
        default=None,
        help="rows of all tables together; default Kaggle's 33.76 M",
    )
    parser.add_argument("--skew", type=float, default=1.05)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--distinct", type=int, default=70, help="batches that the timed steps cycle through"
    )
    parser.add_argument(
        "--warm", type=int, default=700, help="steps that fill our cache; peers without one take 40"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--together",
        type=int,
        default=2,
        help="processes alternated at once (their tables share the memory)",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        help=f"some of {', '.join(PEERS)}; the first is compared with the others",
    )
    parser.add_argument(
        "--peers-python",
        default=sys.executable,
        help="interpreter that has torch and fbgemm-gpu-cpu",
    )
    parser.add_argument("--task", choices=("embedding", "dlrm"), default="embedding")
    parser.add_argument("--out", default="experiments/results/bench_peers.json")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
