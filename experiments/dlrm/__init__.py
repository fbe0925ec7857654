"""The recommender: models, tables as stacks, the training loop, and the report of a run."""
