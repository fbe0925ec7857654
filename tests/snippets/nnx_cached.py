"""A recommender in plain nnx: which items a user liked, from the four items seen last."""

import numpy as np
import optax
from flax import nnx

from mpembed_jax import nn

NUM_ITEMS = 50_000


class Model(nnx.Module):
    def __init__(self, rngs):
        self.items = nn.CachedEmbed(NUM_ITEMS, 16, fused=True, rngs=rngs)
        self.hidden = nnx.Linear(4 * 16, 32, rngs=rngs)
        self.out = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, ids):
        vectors = self.items(ids).reshape(len(ids), -1)
        return self.out(nnx.relu(self.hidden(vectors)))[:, 0]


@nnx.jit(donate_argnums=(0, 1))
def train_step(model, optimizer, ids, labels):
    model.items.prefetch(ids)

    def loss_fn(model):
        return optax.sigmoid_binary_cross_entropy(model(ids), labels).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    grads = nn.apply_gradients(model, grads)
    optimizer.update(model, grads)
    return loss


rng = np.random.default_rng(0)
appeal = rng.normal(size=NUM_ITEMS).astype(np.float32)
model = Model(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
losses = []
for _ in range(60):
    ids = np.minimum(rng.zipf(1.3, (256, 4)), NUM_ITEMS).astype(np.int32) - 1
    labels = (appeal[ids].sum(1) > 0).astype(np.float32)
    losses.append(float(train_step(model, optimizer, ids, labels)))

model.eval()
accuracy = np.mean((np.asarray(model(ids)) > 0) == labels)
