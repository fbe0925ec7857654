"""The recommender: its models, its tables as stacks, the loop that trains it, and what a run reports."""
