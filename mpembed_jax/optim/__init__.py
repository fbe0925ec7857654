"""Optimizers for rows, and stochastically rounded updates for low-precision parameters."""

from mpembed_jax.optim.rounding import StochasticRoundState, stochastic_round_updates
from mpembed_jax.optim.rowwise import (
    RowRule,
    ScaleByRowwiseAdagradState,
    ScaleByRowwiseAdamState,
    clip_by_row_norm,
    rowwise_adagrad,
    rowwise_adam,
    rule_of,
    scale_by_rowwise_adagrad,
    scale_by_rowwise_adam,
    sgd,
    transformation_of,
)

__all__ = [
    "RowRule",
    "ScaleByRowwiseAdagradState",
    "ScaleByRowwiseAdamState",
    "StochasticRoundState",
    "clip_by_row_norm",
    "rowwise_adagrad",
    "rowwise_adam",
    "rule_of",
    "scale_by_rowwise_adagrad",
    "scale_by_rowwise_adam",
    "sgd",
    "stochastic_round_updates",
    "transformation_of",
]
