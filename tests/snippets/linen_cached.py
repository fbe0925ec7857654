"""A recommender in plain linen: which items a user liked, from the four items seen last."""

import flax.linen as nn
import jax
import numpy as np
import optax

from mpembed_jax.nn.linen import CachedEmbed, TrainState

NUM_ITEMS = 50_000


class Model(nn.Module):
    @nn.compact
    def __call__(self, ids):
        vectors = CachedEmbed(NUM_ITEMS, 16, fused=True, name="items")(ids).reshape(len(ids), -1)
        return nn.Dense(1)(nn.relu(nn.Dense(32)(vectors)))[:, 0]


@jax.jit(donate_argnums=0)
def train_step(state, ids, labels):
    state = state.prefetch(ids)

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, ids)
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


rng = np.random.default_rng(0)
appeal = rng.normal(size=NUM_ITEMS).astype(np.float32)
model = Model()
variables = model.init(jax.random.key(0), np.zeros((1, 4), np.int32))
state = TrainState.create(apply_fn=model.apply, variables=variables, tx=optax.adam(3e-3))
losses = []
for _ in range(60):
    ids = np.minimum(rng.zipf(1.3, (256, 4)), NUM_ITEMS).astype(np.int32) - 1
    labels = (appeal[ids].sum(1) > 0).astype(np.float32)
    state, loss = train_step(state, ids, labels)
    losses.append(float(loss))

accuracy = np.mean((np.asarray(state.apply_fn({"params": state.params}, ids)) > 0) == labels)
