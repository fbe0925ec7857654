"""Our training step beside its peers', with the same ids, dims and optimizer.

The steps alternate in one run, each in its own process.

    python -m experiments.speed.bench_peers --dims 16 64 128 --batch 2048
    python -m experiments.speed.bench_peers --task dlrm --dims 16

Peers: FBGEMM's table-batched embedding on the CPU (FP32 and FP16, exact row-wise Adagrad),
torch.nn.EmbeddingBag with sparse=True and SGD, flax nnx.Embed with optax.adagrad (dense gradient,
donated). They need `pip install "mpembed_jax[peers]"`; one that cannot be imported is named and
left out. Rounds of all workers alternate while only one of them computes; a ratio is the median
over rounds of ours to the peer's. The steps before the timed ones (--warm) fill our cache, so that
the timed ones evict. Each result says how full it was, and how many rows a timed step evicted. Each
round is timed twice. The processor's caches are
"warm" if one step follows the other. They are "cold" if 256 MB of other memory are touched and a
product of matrices is computed between the steps, as a model's dense part would. --task dlrm times
the whole training: host batch to device, dense part, embedding, optimizers.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Literal

from experiments import command_line, provenance, running
from experiments.command_line import setting
from experiments.speed.peers import Case
from experiments.speed.step import check_memory

PEERS = (
    "ours-int8-w32",
    "ours-int8-w8",
    "ours-int8-small-pages",
    "ours-int8-verbs",
    "ours-int4",
    "ours-float32",
    "fbgemm-fp32",
    "fbgemm-fp32-huge",
    "fbgemm-fp16",
    "torch-sparse",
    "flax-dense",
)
DLRM_PEERS = ("ours-int8-w32", "torch-sparse", "flax-dense")
CACHES = ("warm", "cold")  # the processor's
STEPS_PER_ROUND = 10


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to compare."""

    dims: tuple[int, ...] = setting(
        (16, 64, 128), "Numbers in a row of the table.", "NUMBERS", at_least=1, at_most=4096
    )
    batch: int = setting(2048, "Rows of data in a step.", "ROWS", at_least=1, at_most=1 << 20)
    rows: int | None = setting(
        None,
        "Rows of all tables together.",
        "ROWS",
        at_least=100_000,
        at_most=1_000_000_000,
        shown="Kaggle's 33.76 M",
    )
    skew: float = setting(1.05, "Exponent of the ids' Zipf law.", "EXPONENT", above=0, at_most=4)
    rounds: int = setting(
        7, "Rounds in which the peers alternate.", "ROUNDS", at_least=1, at_most=10_000
    )
    distinct: int = setting(
        140, "Batches that the timed steps cycle through.", "BATCHES", at_least=1, at_most=10_000
    )
    warm: int = setting(
        1200,
        "Steps that fill our cache; peers without one take 40.",
        "STEPS",
        at_least=1,
        at_most=1_000_000,
    )
    threads: int = setting(
        os.cpu_count() or 1,
        "Threads of each peer.",
        "THREADS",
        at_least=1,
        at_most=4096,
        shown="all cores",
    )
    together: int = setting(
        2,
        "Processes alternated at once; their tables share the memory.",
        "PROCESSES",
        at_least=2,
        at_most=64,
    )
    peers: tuple[str, ...] = setting(
        (),
        "The first is compared with the others.",
        choices=PEERS,
        shown="all of them",
    )
    peers_python: Path = setting(
        Path(sys.executable),
        "Interpreter that has torch and fbgemm-gpu-cpu.",
        shown="this one",
    )
    task: Literal["embedding", "dlrm"] = setting("embedding", "What a step trains.")
    out: Path = setting(Path("experiments/results/bench_peers.json"), "File for the results.")


def check(settings: Settings) -> None:
    """Refuses peers that cannot do the task, a missing interpreter and an unwritable file.

    Raises:
      Refused: in one sentence.
    """
    chosen = settings.peers or PEERS
    if len(chosen) < 2:
        command_line.refuse("--peers", " ".join(chosen), "two of them at least")
    for name in settings.peers:
        if settings.task == "dlrm" and name not in DLRM_PEERS:
            command_line.refuse("--peers", name, f"some of {', '.join(DLRM_PEERS)} for --task dlrm")
    if shutil.which(settings.peers_python) is None:
        command_line.refuse("--peers-python", settings.peers_python, "a program that is there")
    command_line.check_out(settings.out)
    check_memory(settings.rows, max(settings.dims))


class Worker:
    """A peer in its own process, see experiments/speed/peers.py."""

    def __init__(self, case, python, stack):
        command = [python, "-m", "experiments.speed.peers", json.dumps(dataclasses.asdict(case))]
        # The product between cold steps runs on one thread: threads of BLAS spin after it.
        environment = os.environ | {
            "OMP_NUM_THREADS": str(case.threads),
            "OPENBLAS_NUM_THREADS": "1",
        }
        if case.worker.endswith("-huge"):
            environment |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        if case.worker.endswith("-small-pages"):
            environment |= {"MPEMBED_JAX_HUGE_PAGES": "0"}
        self.name = case.worker
        pipe = subprocess.PIPE
        self.process = stack.enter_context(
            running.started(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True,
                env=environment,
            )
        )  # fmt: skip
        line = self.process.stdout.readline()
        again = f"the worker ended; see why with: {' '.join(command[:3])} '{command[3]}'"
        self.facts = json.loads(line) if line else {"missing": again}
        self.times = {caches: [] for caches in CACHES}

    def ask(self, line):
        """Returns the worker's answer to a line."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def round(self, steps, caches):
        """Runs `steps` steps and notes their median time in seconds."""
        self.times[caches].append(statistics.median(self.ask(f"{caches} {steps}")["times"]))

    def note_cache(self, before):
        """Notes how full our cache was before the rounds, and what it evicted in each step."""
        after = self.ask("cache")
        if after:
            steps = max(1, after["steps"] - before["steps"])
            self.facts["occupancy"] = before["occupancy"]
            for name in ("evictions", "write_backs"):
                self.facts[f"{name}_per_step"] = (after[name] - before[name]) / steps


def start(name, dim, args, stack):
    """Starts a worker, which ends with the stack, and waits until it is warm.

    If it cannot run, a line says why, and the result is None.
    """
    is_ours, is_dense = name.startswith("ours"), name == "flax-dense"
    warm = (
        args.warm if is_ours and name != "ours-float32" else min(args.warm, 5 if is_dense else 40)
    )
    case = Case(
        name, args.task, dim, args.batch, args.skew, args.rows, args.distinct, warm, args.threads
    )
    python = str(args.peers_python)
    python = python if name.startswith(("fbgemm", "torch")) else sys.executable
    worker = Worker(case, python, stack)
    if "missing" not in worker.facts:
        return worker
    print(f"{name}: left out, {worker.facts['missing']} (pip install 'mpembed_jax[peers]')")
    return None


def alternate(names, dim, args):
    """Runs one group of peers side by side, the first of them ours; returns their results."""
    with running.working(f"D={dim}: {', '.join(names)}"), contextlib.ExitStack() as stack:
        workers = [w for w in (start(name, dim, args, stack) for name in names) if w]
        before = [worker.ask("cache") for worker in workers]
        for _ in range(args.rounds):
            for caches in CACHES:
                for worker in workers:
                    worker.round(3 if worker.name == "flax-dense" else STEPS_PER_ROUND, caches)
        for worker, facts in zip(workers, before, strict=True):
            worker.note_cache(facts)
    results = []
    for worker, caches in itertools.product(workers, CACHES):
        ours, theirs = workers[0].times[caches], worker.times[caches]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        row = {
            "task": args.task, "dim": dim, "batch": args.batch, "skew": args.skew,
            "peer": worker.name, "caches": caches,
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
            f"D={dim:<4} {worker.name:<16} {caches} {row['ms']:8.2f} ms [{row['ms_min']:.2f}, "
            f"{row['ms_max']:.2f}]   "
            f"ours / peer {row['ours_over_peer']:.3f} [{row['ratio_min']:.3f}, "
            f"{row['ratio_max']:.3f}]   "
            f"resident {row['resident'] / 1e9:.2f} GB, first step {row['first_step_s']:.1f} s"
            + (f"   ({row['rows']:,} rows)" if "rows" in row else "")
            + (
                f"   {row['occupancy']:.1%} of the lines full, {row['evictions_per_step']:,.0f} "
                "evictions a step"
                if "occupancy" in row
                else ""
            ),
            flush=True,
        )
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
            ", ".join(
                f"{r['peer']} at D={r['dim']} {r['caches']} ({r['ours_over_peer']:.2f})"
                for r in losses
            )
            or "nobody"
        )
    )
    # No path of one machine.
    words = command_line.words_of(args, without=("peers_python",))
    command, out = command_line.command_of("experiments.speed.bench_peers", words), args.out
    provenance.write(out, provenance.environment() | {"command": command, "results": results})


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
