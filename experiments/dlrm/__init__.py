"""The recommender that experiments train: dense models, the step and the loop, what a run gave."""
