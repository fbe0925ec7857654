"""Inputs of the experiments: three sources of click-through data with one shape.

A source has `name`, `tables` ({feature: vocabulary size}), `bags` (features whose ids are averaged), `num_dense`,
`num_train`, `num_test`, and two generators, `train(batch_size, seed)` and `test(batch_size)`, of host batches
`{"dense": f32 [B, num_dense], "ids": {feature: i32 [B] or [B, L]} or i32 [B, T], "label": f32 [B]}` whose ids are local
to their table and padded with `NO_ID`. Training batches are shuffled by the seed and all full; test batches may be
short. Nothing here downloads anything.
"""
