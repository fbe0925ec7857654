"""A stream whose ids drift: what is a pool of rows worth that is too small for all of them?

Reddit's posts come in the order in which they were written. Each batch is scored before the model
trains on it, so every AUC is one of posts that the model has not seen. Contenders: FP32 with a row
for every id of the whole stream, which nobody could number beforehand; and for each size of a pool,
raw ids that recycle rows, raw ids that do not, and FP32 tables of equal bytes into which ids are
hashed. Pools hold INT4 rows with an FP32 cache. Seeds differ in their initial values. Differences
are taken within a seed.

    python -m experiments.accuracy.drift

Writes experiments/results/drift.json and .png. Reddit's posts are used; see
experiments/data/reddit.py for the file.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn import metrics

import mpembed_jax as mpembed
from experiments import command_line, provenance, running, train_dlrm
from experiments.accuracy import intervals
from experiments.command_line import setting
from experiments.data import reddit
from experiments.data.background import in_background
from experiments.dlrm import stacks, training

FP32 = training.FP32.name
KINDS = ("recycled", "not recycled", "hashed")  # of a pool, and of a table in its place


@dataclasses.dataclass(frozen=True)
class Settings:
    """The stream, and what is compared."""

    path: Path | None = setting(
        None, "File of posts, or its folder.", shown="the folder that MPEMBED_DATA names"
    )
    num_rows: int | None = setting(
        None, "Posts before and after the split.", "ROWS", at_least=100, at_most=10**9, shown="all"
    )
    pools: tuple[float, ...] = setting(
        (0.1, 0.2, 0.4), "Rows of a pool, as a share of all ids.", "SHARE", above=0, at_most=1
    )
    admit_after: int = setting(
        2, "The occurrence from which on an id has a row.", "TIMES", at_least=1, at_most=255
    )
    window: int = setting(
        30, "Ids per row of a pool after which counts are halved.", "IDS", at_least=1,
        at_most=1 << 20,
    )  # fmt: skip
    cache: float = setting(0.05, "Share of a pool in the cache.", "SHARE", above=0, at_most=1)
    embedding_dim: int = setting(16, "Numbers in a row.", "NUMBERS", at_least=1, at_most=4096)
    seeds: tuple[int, ...] = setting((0, 1, 2), "Seeds.", "SEED", at_least=0, at_most=2**31 - 1)
    month_posts: int = setting(
        10_000, "Fewest posts of a month that is shown.", "POSTS", at_least=2, at_most=10**9
    )
    out: Path = setting(Path("experiments/results/drift.json"), "File for the results.")


def posts_of(settings: Settings) -> reddit.RedditPosts:
    """Returns the posts as one stream: all of them train, in time order."""
    source = reddit.RedditPosts(settings.path, settings.num_rows, in_time_order=True, raw=True)
    source.num_train, source.num_test = len(source.label), 0
    return source


def contenders_of(
    source: Any, recipe: training.Recipe, settings: Settings
) -> dict[str, training.Contender]:
    """Returns the contenders by name, FP32 first."""
    num_ids = sum(source.tables.values())
    found = {FP32: training.FP32}
    for share in settings.pools:
        pool = training.Contender(
            "", "int4", settings.cache, pool_rows=max(1, round(share * num_ids)),
            admit_after=settings.admit_after, window=settings.window,
        )  # fmt: skip
        several = (
            pool,
            dataclasses.replace(pool, recycle=False),
            training.hashed_of_equal_bytes(source, pool, recipe),
        )
        for kind, contender in zip(KINDS, several, strict=True):
            name = name_of(share, kind)
            found[name] = dataclasses.replace(contender, name=name)
    return found


def name_of(share: float, kind: str) -> str:
    """Returns the name of a contender."""
    return f"{100 * share:.3g} %, {kind}"


def scores_of(
    source: Any, contender: training.Contender, recipe: training.Recipe, job: Any, seed: int
) -> tuple[np.ndarray, mpembed.EmbeddingState]:
    """Trains on the stream once.

    Returns:
      The score of each post of the full batches, before the model trained on it (float32 [n]).
      The state of the rows afterwards.
    """
    [learner] = training.begin(source, [contender], recipe, job, seed=seed).learners
    scores = []
    for batch in in_background(map(jax.device_put, source.train(recipe.batch_size))):
        learner, log = job.train_step(learner, batch)
        scores.append(log.scores)
    assert learner is not None
    [state] = learner.emb
    return np.concatenate(jax.device_get(scores)), state


def months_of(month: np.ndarray, fewest: int) -> dict[str, np.ndarray]:
    """Returns the posts (bool [n]) of each month that has at least `fewest`, by its name."""
    numbers, counts = np.unique(month, return_counts=True)
    return {
        f"{number // 12}-{number % 12 + 1:02}": month == number
        for number, count in zip(numbers, counts, strict=True)
        if count >= fewest
    }


def aucs_of(scores: np.ndarray, labels: np.ndarray, months: dict[str, np.ndarray]) -> Any:
    """Returns the AUC of each month, and of all of them together."""
    shown = {**months, "all": np.any(list(months.values()), axis=0)}
    return {
        name: float(metrics.roc_auc_score(labels[which], scores[which]))
        for name, which in shown.items()
    }


def counts_of(state: mpembed.EmbeddingState) -> dict[str, int] | None:
    """Returns what became of the ids of a pool; None of numbered ids."""
    found = mpembed.stats(state).vocabulary
    return None if found is None else found._asdict()


def measure(settings: Settings) -> list[dict[str, Any]]:
    """Runs every contender with every seed.

    Raises:
      Refused: if there are too few posts, or no month has enough.
    """
    with running.working("reading the posts"):
        source = posts_of(settings)
    task = train_dlrm.Settings(data="reddit", embedding_dim=settings.embedding_dim)
    recipe = train_dlrm.make_recipe(task)
    num = len(source.label) // recipe.batch_size * recipe.batch_size
    months = months_of(source.month[:num], settings.month_posts)
    if not months:
        raise command_line.Refused(
            f"no month has {settings.month_posts:,} of the {num:,} posts in full batches; lower "
            "--month-posts or give more posts"
        )
    contenders = contenders_of(source, recipe, settings)
    job = training.make_job(source, recipe)
    full = 4 * recipe.embedding_dim * sum(source.tables.values())
    results = []
    for name, contender in contenders.items():
        [spec] = stacks.make_specs(source, contender, recipe)
        size = mpembed.memory.report(spec, optax.identity()).total
        result: dict[str, Any] = {
            "name": name, "rows": spec.num_rows, "bytes": size, "ratio": full / size, "auc": {},
        }  # fmt: skip
        for seed in settings.seeds:
            with running.working(f"training {name}, seed {seed}"):
                scores, state = scores_of(source, contender, recipe, job, seed)
            result["auc"][seed] = aucs_of(scores, source.label[:num], months)
            result["vocabulary"] = counts_of(state)  # of the last seed
        print(
            f"{name:<22} {result['ratio']:6.2f}x  AUC "
            f"{np.mean([by['all'] for by in result['auc'].values()]):.4f}",
            flush=True,
        )
        results.append(result)
    base = results[0]["auc"]
    for result in results:
        result["minus_fp32"] = {
            month: str(
                intervals.paired(
                    {seed: result["auc"][seed][month] for seed in base},
                    {seed: base[seed][month] for seed in base},
                )
            )
            for month in (*months, "all")
        }
    return results


def picture(results: list[dict[str, Any]], pools: tuple[float, ...], path: Path) -> None:
    """Draws the AUC minus FP32's by month, a panel for each size of a pool."""
    by_name = {result["name"]: result for result in results}
    months = [month for month in by_name[FP32]["minus_fp32"] if month != "all"]
    figure = Figure(figsize=(4 * len(pools), 3.6), layout="constrained")
    panels = figure.subplots(1, len(pools), sharey=True, squeeze=False)[0]
    for panel, share in zip(panels, pools, strict=True):
        for kind in KINDS:
            result = by_name[name_of(share, kind)]
            values = [float(result["minus_fp32"][month].split()[0]) for month in months]
            panel.plot(months, values, "o-", markersize=3, label=kind)
        panel.axhline(0, color="#555555", linewidth=0.8)
        panel.set_title(f"pool of {100 * share:.3g} % of the ids")
        panel.set_xticks(range(0, len(months), max(1, len(months) // 5)))
        panel.tick_params(axis="x", rotation=45)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("AUC minus FP32's")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def check(settings: Settings) -> None:
    """Refuses a missing file of posts, and an unwritable file.

    Raises:
      Refused: in one sentence.
    """
    command_line.check_out(settings.out)
    names = [name_of(share, "") for share in settings.pools]
    if len(set(names)) < len(names):
        command_line.refuse("--pools", " ".join(map(str, settings.pools)), "shares of three digits")
    with command_line.reading("--path", settings.path, ValueError):
        reddit.check(settings.path)


def run(settings: Settings) -> None:
    """Measures, and writes the results and their picture."""
    results = measure(settings)
    anywhere = dataclasses.replace(settings, path=None)  # the path is of one machine
    provenance.write_results(anywhere, results)
    picture(results, settings.pools, settings.out.with_suffix(".png"))


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__ or "", arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
