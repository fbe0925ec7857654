"""Experiments: a folder per question.

Run them from the repository root as `python -m experiments.<folder>.<name>`. They use the public
names of `mpembed_jax` only and need the extra `[experiments]`.
"""
