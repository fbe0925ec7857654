"""Inputs of the experiments: sources of click-through data with one shape.

A source has `name`, `tables` ({feature: vocabulary size}), `bags` (features whose ids are
averaged), `num_dense`, `num_train`, `num_test`, and two generators, `train(batch_size, seed, start,
num_epochs)` and `test(batch_size)`, of host batches `{"dense": f32 [B, num_dense], "ids": {feature:
i32 [B] or [B, L]} or i32 [B, T], "label": f32 [B]}` whose ids are local to their table and padded
with `NO_ID`. Training batches are shuffled by the seed, another way in each epoch, and all full; a
run that has taken `start` of them resumes with the next one. Test batches may be short. Only
`movielens` downloads anything, once.
"""
