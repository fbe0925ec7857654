"""Inputs of the experiments: sources of click-through data with one shape.

A source has `name`, `tables` ({feature: vocabulary size}), `bags` (features whose ids are
averaged), `num_dense`, `num_train`, `num_test`, and two generators, `train(batch_size, seed, start,
num_epochs)` and `test(batch_size)`, of host batches `{"dense": f32 [B, num_dense], "ids": {feature:
i32 [B] or [B, L]} or i32 [B, T], "label": f32 [B]}` whose ids are local to their table and padded
with `NO_ID`. Training batches are shuffled by the seed, another way in each epoch, and all full; a
run that has taken `start` of them resumes with the next one. Test batches may be short. Only
`movielens` downloads anything, once.

Criteo's words as they are, not counted, are ids u32 [B, T] of tables of 2^32 ids, without padding.
Posts and ratings that are opened with `raw` add "pairs" to each batch: {feature: u32 [B, 2] or
[B, L, 2]}, their names and integers as `spec.raw_ids` hashes them.
"""
