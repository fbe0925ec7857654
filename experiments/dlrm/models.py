"""The dense halves of two recommenders, DLRM and a small MLP.

They are pure functions over lists of arrays. Both take what the embedding side hands over,
`vectors` f32 [B, T, D], so neither knows how rows are stored. DLRM follows Naumov et al. 2019
(arXiv 1906.00091) in its Criteo-Kaggle setting: bottom MLP 13-512-256-64-D, dot products of all
pairs of the T + 1 vectors, top MLP 512-256-1. Dropout, batch norm and other interactions are not
here.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Params = list[dict[str, jax.Array]]
Model = Callable[[dict[str, Params], jax.Array, jax.Array], jax.Array]


def init_mlp(key: jax.Array, widths: Sequence[int]) -> Params:
    """Draws weights and biases as DLRM does: N(0, 2 / (in + out)) and N(0, 1 / out).

    Args:
      key: a PRNG key.
      widths: input width, hidden widths, output width.

    Returns:
      One {"kernel": f32 [in, out], "bias": f32 [out]} per layer.
    """
    layers = []
    for wide_in, wide_out in itertools.pairwise(widths):
        key, kernel_key, bias_key = jax.random.split(key, 3)
        kernel = jax.random.normal(kernel_key, (wide_in, wide_out)) * np.sqrt(
            2 / (wide_in + wide_out)
        )
        layers.append(
            {
                "kernel": kernel,
                "bias": jax.random.normal(bias_key, (wide_out,)) * np.sqrt(1 / wide_out),
            }
        )
    return layers


def mlp(layers: Params, x: jax.Array, *, relu_last: bool) -> jax.Array:
    """Applies the layers to x f32 [B, in], with ReLU between them.

    With `relu_last`, ReLU also follows the last layer.
    """
    for number, layer in enumerate(layers):
        x = x @ layer["kernel"] + layer["bias"]
        if relu_last or number < len(layers) - 1:
            x = jax.nn.relu(x)
    return x


@functools.cache
def _triangle(num_vectors: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions of the strict lower triangle in a flat [T, T] square.

    Also returns, for each cell of the square, the number of its pair.
    """
    row, column = np.tril_indices(num_vectors, -1)
    pair = np.full(
        (num_vectors, num_vectors), len(row), np.int32
    )  # the diagonal points past the last pair
    pair[row, column] = pair[column, row] = np.arange(len(row))
    return row * num_vectors + column, pair.reshape(-1)


@jax.custom_vjp
def interact(vectors: jax.Array) -> jax.Array:
    """Dot products of all pairs of different vectors: f32 [B, T, D] -> [B, T (T - 1) / 2].

    One batched matmul, then a static gather of the lower triangle. The gradient is a gather and one
    more matmul: the transposed gather would be a scatter-add, and the square's gradient is
    symmetric, so one product serves both sides.
    """
    square = jnp.einsum("btd,bsd->bts", vectors, vectors)
    return square.reshape(len(vectors), -1)[:, _triangle(vectors.shape[1])[0]]


def _interact_forward(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    return interact(vectors), vectors


def _interact_backward(vectors: jax.Array, grads: jax.Array) -> tuple[jax.Array]:
    num_vectors = vectors.shape[1]
    padded = jnp.concatenate([grads, jnp.zeros((len(grads), 1), grads.dtype)], axis=1)
    square = padded[:, _triangle(num_vectors)[1]].reshape(-1, num_vectors, num_vectors)
    return (jnp.einsum("bts,bsd->btd", square, vectors),)


interact.defvjp(_interact_forward, _interact_backward)


def init_dlrm(
    key: jax.Array,
    num_dense: int,
    num_vectors: int,
    embedding_dim: int,
    *,
    bottom: Sequence[int] = (512, 256, 64),
    top: Sequence[int] = (512, 256),
) -> dict[str, Params]:
    """Draws DLRM's dense parameters: {"bottom": layers, "top": layers}.

    `num_vectors` is T, one per feature.
    """
    bottom_key, top_key = jax.random.split(key)
    num_pairs = num_vectors * (num_vectors + 1) // 2
    return {
        "bottom": init_mlp(bottom_key, (num_dense, *bottom, embedding_dim)),
        "top": init_mlp(top_key, (embedding_dim + num_pairs, *top, 1)),
    }


def dlrm(params: dict[str, Params], dense: jax.Array, vectors: jax.Array) -> jax.Array:
    """DLRM's logits f32 [B] from dense f32 [B, num_dense] and vectors f32 [B, T, D]."""
    bottom = mlp(params["bottom"], dense, relu_last=True)
    pairs = interact(jnp.concatenate([bottom[:, None], vectors], axis=1))
    return mlp(params["top"], jnp.concatenate([bottom, pairs], axis=1), relu_last=False)[:, 0]


def init_small(
    key: jax.Array, num_vectors: int, embedding_dim: int, *, hidden: int = 64
) -> dict[str, Params]:
    """Draws the small model's parameters: {"top": layers}."""
    return {"top": init_mlp(key, (num_vectors * embedding_dim, hidden, 1))}


def small(params: dict[str, Params], dense: jax.Array, vectors: jax.Array) -> jax.Array:
    """Returns the logits f32 [B] of one hidden layer over the vectors f32 [B, T, D], concatenated.

    `dense` is not used.
    """
    del dense
    return mlp(params["top"], vectors.reshape(len(vectors), -1), relu_last=False)[:, 0]


def bce(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Mean binary cross-entropy f32 [] of logits f32 [B] and labels f32 [B] in {0, 1}."""
    return jnp.mean(jnp.maximum(logits, 0) - logits * label + jnp.log1p(jnp.exp(-jnp.abs(logits))))
