"""What a run reached: AUC and loss on the test rows, bytes, hits. It trains nothing."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from sklearn import metrics

import mpembed_jax as mpembed
from experiments.data.background import in_background
from experiments.dlrm.curves import Point

if TYPE_CHECKING:
    from experiments.dlrm.training import Contender, Fitted, Job, Learner


@dataclasses.dataclass
class Outcome:
    """What one contender reached."""

    contender: "Contender"
    seed: int
    auc: float
    log_loss: float
    normalized_entropy: float  # log loss over the entropy of the test set's base rate
    embedding_bytes: int  # every array of the embedding state but the optimizer's
    row_state_bytes: int  # the optimizer's
    bytes_per_row: float  # embedding_bytes over the rows of the FP32 run
    ratio: float  # float32 rows, as many as the FP32 run has, over embedding_bytes
    ratio_with_row_state: float  # the same with the optimizer's state on both sides
    # hit_rate and the next three are those of the first stack.
    hit_rate: float  # share of requests found in the cache while training
    unique_hit_rate: float
    evictions_per_step: float
    bypasses_per_step: float
    bypass_share: float  # of a batch's distinct ids, those that found no cache line
    step_ms: float  # median over chunks, without the first, which compiles
    first_chunk_s: float
    num_steps: int
    losses: list[tuple[int, float]]  # (step, mean training loss of the chunk that ends there)
    curve: list[Point]  # a point per chunk
    advice: list[str]  # what mpembed_jax.stats warned of


def evaluate(
    job: "Job",
    learner: "Learner",
    source: Any,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Returns auc, log_loss and normalized_entropy of the source's test rows.

    `on_batch` is called before each batch; what it raises ends the evaluation.
    """
    labels, scores = [], []

    def padded() -> Iterator[dict]:
        for batch in source.test(batch_size):
            labels.append(batch["label"])
            # One shape for all: a short batch repeats its last row, and the scores of the repeats
            # are cut off.
            rows = np.minimum(np.arange(batch_size), len(batch["label"]) - 1)
            yield jax.tree.map(lambda a, rows=rows: a[rows], batch)

    for batch in in_background(map(jax.device_put, padded())):
        on_batch()
        scores.append(job.predict(learner, batch))
    label = np.concatenate(labels)
    score = np.concatenate(
        [np.asarray(s)[: len(y)] for s, y in zip(scores, labels, strict=True)]
    ).astype(np.float64)
    if label.min() == label.max():
        raise ValueError(
            f"all {len(label)} test labels are {label[0]:g}: AUC is not defined; use more rows"
        )
    if not np.isfinite(score).all():
        return dict.fromkeys(
            ("auc", "log_loss", "normalized_entropy"), float("nan")
        )  # a run that diverged
    log_loss, rate = float(metrics.log_loss(label, score)), float(label.mean())
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    auc = float(metrics.roc_auc_score(label, score))
    return {"auc": auc, "log_loss": log_loss, "normalized_entropy": log_loss / float(entropy)}


def measure(
    job: "Job",
    fitted: "Fitted",
    source: Any,
    plain: mpembed.EmbeddingSpec,
    batch_size: int,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> Outcome:
    """Evaluates a fitted contender and counts its bytes.

    Args:
      job: what trained it.
      fitted: from training.fit.
      source: gives the test rows.
      plain: the spec of float32 rows without a cache, to which ratios relate.
      batch_size: rows per prediction.
      on_batch: see evaluate.

    Returns:
      An Outcome.

    Raises:
      ValueError: if ids of the source were outside their tables.
    """
    with warnings.catch_warnings(record=True) as advice:
        warnings.simplefilter("always")
        # The table has this share, and says what it means.
        warnings.filterwarnings("ignore", ".* found no place in the cache")
        counts, *others = map(mpembed.stats, fitted.learner.emb)
    if outside := sum(c.out_of_range for c in (counts, *others)):
        raise ValueError(f"{source.name} made {outside} ids outside their tables")
    full, *sizes = (mpembed.memory.report(spec, job.row_tx) for spec in (plain, *fitted.specs))
    total = sum(size.total for size in sizes)
    row_state_bytes = sum(size.components["row state"] for size in sizes)
    return Outcome(
        contender=fitted.contender, seed=fitted.seed,
        **evaluate(job, fitted.learner, source, batch_size, on_batch),
        embedding_bytes=total - row_state_bytes, row_state_bytes=row_state_bytes,
        bytes_per_row=(total - row_state_bytes) / full.num_rows,
        ratio=full.float32_bytes / (total - row_state_bytes),
        ratio_with_row_state=(full.float32_bytes + full.float32_row_state_bytes) / total,
        hit_rate=counts.hit_rate, unique_hit_rate=counts.unique_hit_rate,
        evictions_per_step=counts.evictions / fitted.num_steps,
        bypasses_per_step=counts.bypasses / fitted.num_steps,
        bypass_share=counts.bypasses / max(1, counts.unique),
        step_ms=1e3 * float(np.median(fitted.step_s[1:] or fitted.step_s)),
        first_chunk_s=fitted.first_chunk_s,
        num_steps=fitted.num_steps, losses=[(p.step, p.loss) for p in fitted.curve],
        curve=fitted.curve, advice=[str(w.message) for w in advice],
    )  # fmt: skip
