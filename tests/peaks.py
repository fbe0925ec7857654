"""The bytes of a whole training step: a small model behind the vectors of one or more stacks."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed


def of_training(specs, tx, shape, implementation=None, mesh=None, placements=None):
    """Returns the most bytes that one jitted training step holds on a device, as XLA plans them.

    The model is a hidden layer of four units and a logistic loss. Its own arrays are small.

    Args:
      specs: the stacks; each gets ids of every shape position.
      tx: optax transformation for the rows.
      shape: (B, T), or (B, T, L) for bags of L ids.
      implementation: as in init.
      mesh: of one axis, which divides the batch; None for one device.
      placements: of each stack; None for the default one.
    """
    combiner = "sum" if len(shape) == 3 else None
    key = jax.random.key(0)
    states = [
        mpembed.init(key, spec, tx, implementation=implementation, mesh=mesh, placement=placement)
        for spec, placement in zip(specs, placements or [None] * len(specs), strict=True)
    ]
    widths = [shape[1] * spec.embedding_dim for spec in specs]

    def train_step(states, weights, ids, labels):
        states, plans, found = zip(
            *(
                mpembed.embed(state, part, combiner=combiner, tx=tx)
                for state, part in zip(states, ids, strict=True)
            ),
            strict=True,
        )

        def loss_fn(weights, found):
            flat = [vectors.reshape(vectors.shape[0], -1) for vectors in found]
            hidden = sum(v @ w for v, w in zip(flat, weights, strict=True))
            logits = jnp.sum(jnp.tanh(hidden), axis=1)
            loss = jnp.mean(jnp.logaddexp(0.0, -labels * logits))
            return loss if mesh is None else jax.lax.pmean(loss, mesh.axis_names)

        grads, vector_grads = jax.grad(loss_fn, argnums=(0, 1))(weights, found)
        states = [
            mpembed.apply_pooled_gradients(state, plan, g, tx=tx)
            for state, plan, g in zip(states, plans, vector_grads, strict=True)
        ]
        return states, [w - 0.1 * g for w, g in zip(weights, grads, strict=True)]

    weights = [jnp.ones((width, 4)) for width in widths]
    ids = [
        jnp.zeros(shape, jnp.int32)
        if spec.vocabulary is None
        else jnp.zeros((*shape, 2), jnp.uint32)
        for spec in specs
    ]
    labels = jnp.ones(shape[0])
    if mesh is not None:
        held = [mpembed.partition_specs(state) for state in states]
        train_step = jax.shard_map(
            train_step,
            mesh=mesh,
            in_specs=(held, P(), P(mesh.axis_names), P(mesh.axis_names)),
            out_specs=(held, P()),
        )
    compiled = (
        jax.jit(train_step, donate_argnums=(0, 1)).lower(states, weights, ids, labels).compile()
    )
    sizes = compiled.memory_analysis()
    return (
        sizes.argument_size_in_bytes
        + sizes.temp_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
    )
