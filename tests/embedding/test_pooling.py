"""Pooling equals a loop over bags in float64.

Its gradients equal central differences. Bags never become [.., L, D].
"""

import math
from collections import OrderedDict, defaultdict
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import Refused, named

import mpembed_jax as mpembed
from mpembed_jax import NO_ID

NUM_ROWS, DIM = 7, 3  # unique rows, the last one padding
PAD = NUM_ROWS - 1
# Bags of up to four: full with duplicates, ragged, of one, padding in the middle, empty, ragged.
BAGS = np.array(
    [
        [[0, 1, 1, 3], [2, 5, PAD, PAD]],
        [[4, PAD, PAD, PAD], [0, PAD, 0, 2]],
        [[PAD] * 4, [3, 5, 4, PAD]],
    ]
)
BAGS = BAGS.astype(np.int32)
# The same bags and one more empty one, out of order, with positions of no bag.
FLAT = np.array([3, 0, PAD, 2, 1, 5, 1, 4, 2, 0, 5], np.int32)
SEGMENT = np.array([4, 0, 0, 1, 0, 1, 0, 2, -1, 9, 4], np.int32)
NUM_SEGMENTS = 5


def unique_rows(seed=0, num=NUM_ROWS, dim=DIM):
    rows = np.random.default_rng(seed).normal(size=(num, dim)).astype(np.float32)
    rows[-1] = 0
    return rows


def factors(seed, shape):
    """Weights of both signs, none near zero in sum."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(0.5, 2.0, shape) * np.where(rng.random(shape) < 0.2, -0.25, 1.0)).astype(
        np.float32
    )


def pool_bag(rows, members, combiner):
    """One bag of (row number, weight), in float64."""
    members = [(i, w) for i, w in members if i != len(rows) - 1]
    total = sum((w * rows[i] for i, w in members), np.zeros(rows.shape[1]))
    match combiner:
        case "sum":
            denominator = 1.0
        case "mean":
            denominator = math.fsum(w for _, w in members)
        case "sqrtn":
            denominator = math.sqrt(math.fsum(w * w for _, w in members))
    return total / denominator if denominator else np.zeros_like(total)


def pool_bags(rows, index, weights, combiner):
    rows, weights = rows.astype(np.float64), weights.astype(np.float64)
    out = np.zeros((*index.shape[:-1], rows.shape[1]))
    for bag in np.ndindex(index.shape[:-1]):
        out[bag] = pool_bag(rows, list(zip(index[bag], weights[bag], strict=True)), combiner)
    return out


def pool_segments(rows, index, weights, combiner, segment_ids, num_segments):
    rows, weights = rows.astype(np.float64), weights.astype(np.float64)
    return np.stack(
        [
            pool_bag(
                rows,
                [(i, w) for i, w, s in zip(index, weights, segment_ids, strict=True) if s == bag],
                combiner,
            )
            for bag in range(num_segments)
        ]
    )


def slopes(function, x, step=1e-5):
    """Central differences of a scalar function in float64."""
    x = x.astype(np.float64)
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        for sign in (1, -1):
            moved = x.copy()
            moved[place] += sign * step
            out[place] += sign * function(moved) / (2 * step)
    return out


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("layout", ["bags", "segments"])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients_equal_a_loop(combiner, layout, weighted):
    """Gradients with respect to rows and weights, denominators included, are central differences of
    the loop.
    """
    rows = unique_rows()
    if layout == "bags":
        index, extra, oracle = BAGS, {}, pool_bags
        is_counted = index != PAD
    else:
        index, extra = FLAT, {"segment_ids": SEGMENT, "num_segments": NUM_SEGMENTS}
        is_counted = (index != PAD) & (SEGMENT >= 0) & (SEGMENT < NUM_SEGMENTS)

        def oracle(rows, index, weights, combiner):
            return pool_segments(rows, index, weights, combiner, SEGMENT, NUM_SEGMENTS)

    weights = factors(1, index.shape) if weighted else np.ones(index.shape, np.float32)
    expected = oracle(rows, index, weights, combiner)
    cotangent = np.random.default_rng(2).normal(size=expected.shape).astype(np.float32)

    @jax.jit
    def value_and_slopes(rows, weights):
        def loss(rows, weights):
            out = mpembed.pool(rows, index, weights if weighted else None, combiner, **extra)
            return jnp.sum(out * cotangent), out

        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(rows, weights)
        return out, grads

    out, (row_grads, weight_grads) = value_and_slopes(rows, weights)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        np.asarray(out)[(expected == 0).all(-1)], 0.0
    )  # empty bags: exactly zero

    numeric = slopes(lambda r: np.sum(oracle(r, index, weights, combiner) * cotangent), rows)
    np.testing.assert_allclose(row_grads[:PAD], numeric[:PAD], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(row_grads[PAD], 0.0)
    if weighted:
        numeric = slopes(lambda w: np.sum(oracle(rows, index, w, combiner) * cotangent), weights)
        np.testing.assert_allclose(weight_grads, numeric, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(weight_grads)[~is_counted], 0.0)


@pytest.mark.parametrize("combiner", ["mean", "sqrtn"])
def test_a_zero_denominator_gives_zeros_and_zero_gradients(combiner):
    """Weights that are all zero, weights that cancel, and non-finite weights at padding."""
    index = np.array([[0, 1, PAD], [2, 3, PAD], [PAD, PAD, PAD]], np.int32)
    weights = np.array([[0, 0, np.nan], [1, -1, np.inf], [np.nan, np.inf, 1]], np.float32)
    if combiner == "sqrtn":
        weights[1, :2] = 0  # squares do not cancel

    def loss(rows, weights):
        out = mpembed.pool(rows, index, weights, combiner)
        return jnp.sum(out), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        unique_rows(), weights
    )
    for array in (out, *grads):
        np.testing.assert_array_equal(array, 0.0)


def test_padding_and_offsets_describe_the_same_bags():
    """The same ragged bags, padded by NO_ID and flat with offsets, through prefetch.

    They are equal, and equal to the plain rows.
    """
    ragged = [[3, 9, 3], [], [5], [9, 1], []]
    padded = np.full((5, 4), NO_ID, np.int32)
    for bag, ids in enumerate(ragged):
        padded[bag, : len(ids)] = ids
    flat = np.concatenate([np.array(ids, np.int32) for ids in ragged])
    offsets = np.cumsum([0] + [len(ids) for ids in ragged[:-1]]).astype(np.int32)
    spec = mpembed.EmbeddingSpec((mpembed.TableSpec("t", 12),), DIM, storage="float32", cache=None)

    @jax.jit
    def pooled(key):
        state = mpembed.init(key, spec, optax.sgd(0.1))
        state, plan = mpembed.prefetch(state, {"padded": padded, "flat": flat})
        rows = mpembed.lookup(state, plan)
        segments = mpembed.segments_from_offsets(jnp.asarray(offsets), len(flat))
        by_padding = mpembed.pool(rows, plan.inverse["padded"], None, "mean")
        by_offsets = mpembed.pool(
            rows, plan.inverse["flat"], None, "mean", segment_ids=segments, num_segments=5
        )
        return by_padding, by_offsets, mpembed.read(state, np.arange(12, dtype=np.int32))

    by_padding, by_offsets, table = pooled(jax.random.key(0))
    expected = [np.mean(np.asarray(table)[ids], axis=0) if ids else np.zeros(DIM) for ids in ragged]
    np.testing.assert_allclose(by_padding, expected, rtol=1e-6)
    np.testing.assert_allclose(by_offsets, expected, rtol=1e-6)


@pytest.mark.parametrize("offsets", [[0, 2, 5], [0, 0, 3], [0, 3, 3, 6], [0, 6], [0], [0, 0, 0]])
def test_segments_from_offsets_equals_a_loop(offsets):
    """Equal neighbours are empty bags, the last bag runs to the end.

    torch.nn.EmbeddingBag's convention.
    """
    ends = [*offsets[1:], 6]
    expected = [
        bag
        for bag, (begin, end) in enumerate(zip(offsets, ends, strict=True))
        for _ in range(begin, end)
    ]
    segments = mpembed.segments_from_offsets(jnp.asarray(offsets, jnp.int32), 6)
    assert segments.dtype == jnp.int32
    np.testing.assert_array_equal(segments, expected)


def test_without_a_combiner_every_id_has_its_vector():
    """[..] -> [.., D].

    A row's gradient is the sum over the positions that hold it, the padding row's is zero.
    """
    rows = unique_rows()
    cotangent = np.random.default_rng(3).normal(size=(*BAGS.shape, DIM)).astype(np.float32)
    out, vjp = jax.vjp(jax.jit(lambda rows: mpembed.pool(rows, BAGS)), rows)
    np.testing.assert_array_equal(out, rows[BAGS])
    expected = np.zeros_like(rows, dtype=np.float64)
    np.add.at(expected, BAGS, cotangent)
    expected[PAD] = 0
    np.testing.assert_allclose(vjp(cotangent)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("combiner", [None, "sqrtn"])
def test_a_nest_of_features_is_pooled_feature_by_feature(combiner):
    """Same nesting out; row gradients add up over features."""
    rows = unique_rows()
    inverse = {"user": FLAT[:6].reshape(2, 3), "items": (BAGS[0], BAGS[1:])}
    cotangent = jax.tree.map(
        lambda i: factors(i.size, (*i.shape[: None if combiner is None else -1], DIM)), inverse
    )

    @jax.jit
    def together(rows):
        out, vjp = jax.vjp(lambda rows: mpembed.pool(rows, inverse, None, combiner), rows)
        return out, vjp(cotangent)[0]

    @jax.jit
    def apart(rows):
        out = jax.tree.map(lambda i: mpembed.pool(rows, i, None, combiner), inverse)
        grads = [
            jax.vjp(lambda rows, i=i: mpembed.pool(rows, i, None, combiner), rows)[1](g)[0]
            for i, g in zip(jax.tree.leaves(inverse), jax.tree.leaves(cotangent), strict=True)
        ]
        return out, sum(grads)

    out, grads = together(rows)
    expected_out, expected_grads = apart(rows)
    assert jax.tree.structure(out) == jax.tree.structure(inverse)
    jax.tree.map(np.testing.assert_array_equal, out, expected_out)
    np.testing.assert_allclose(grads, expected_grads, rtol=1e-5, atol=1e-6)


def test_weights_are_a_nest_like_the_ids():
    inverse, weights = (
        {"a": BAGS[0], "b": BAGS[1]},
        {"a": factors(4, BAGS[0].shape), "b": factors(5, BAGS[1].shape)},
    )
    out = jax.jit(lambda rows: mpembed.pool(rows, inverse, weights, "sum"))(unique_rows())
    for name in inverse:
        expected = pool_bags(unique_rows(), inverse[name], weights[name], "sum")
        np.testing.assert_allclose(out[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [partial(defaultdict, list), OrderedDict, MappingProxyType])
def test_weights_may_be_another_mapping_than_the_ids(kind):
    """Their keys count, in any order; None stands for ones, and numbers of any type for floats."""
    weights = {"b": factors(5, BAGS[0].shape), "a": None, "c": np.arange(8).reshape(2, 4)}
    ids = {name: BAGS[0] for name in ("b", "c", "a")}
    spec = mpembed.EmbeddingSpec([mpembed.TableSpec("t", NUM_ROWS - 1)], DIM, storage="float32")
    ids = jax.tree.map(lambda i: np.where(i == PAD, NO_ID, i), ids)
    tx = mpembed.optim.sgd(1.0)
    state = mpembed.init(jax.random.key(0), spec, tx)
    for of_ids, of_weights in ((dict, kind), (OrderedDict, dict)):
        inverse = of_ids(dict.fromkeys(ids, BAGS[0]))
        out = mpembed.pool(unique_rows(), inverse, of_weights(weights), "mean")
        for name, weight in weights.items():
            of_ones = np.ones(BAGS[0].shape)
            expected = pool_bags(
                unique_rows(), BAGS[0], of_ones if weight is None else weight, "mean"
            )
            np.testing.assert_allclose(out[name], expected, rtol=1e-5, atol=1e-6)
        _, _, vectors = mpembed.embed(state, of_ids(ids), of_weights(weights), "sum", tx=tx)
        rows = np.concatenate([mpembed.read(state, np.arange(PAD)), np.zeros((1, DIM))])
        expected = pool_bags(rows, BAGS[0], weights["c"], "sum")
        np.testing.assert_allclose(vectors["c"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32])
def test_segments_of_any_integers_are_those_of_int32(dtype):
    """Also if their type cannot hold the number of bags."""
    spec = mpembed.EmbeddingSpec([mpembed.TableSpec("t", NUM_ROWS - 1)], DIM, storage="float32")
    tx = mpembed.optim.sgd(1.0)
    ids, segment = np.where(FLAT == PAD, NO_ID, FLAT), np.abs(SEGMENT)
    num = 300 if dtype == np.uint8 else 70_000

    @jax.jit
    def step(state, segment):
        bags = {"segment_ids": segment, "num_segments": num}
        state, plan, vectors = mpembed.embed(state, ids, None, "mean", **bags, tx=tx)
        return mpembed.apply_pooled_gradients(state, plan, vectors, tx=tx), vectors

    state = mpembed.init(jax.random.key(0), spec, tx)
    one, other = step(state, segment.astype(dtype)), step(state, segment)
    np.testing.assert_array_equal(one[1], other[1])
    np.testing.assert_array_equal(one[0].table.rows, other[0].table.rows)


def sizes_in(jaxpr):
    """Number of elements of everything a jaxpr computes, sub-jaxprs included."""
    for equation in jaxpr.eqns:
        yield from (
            math.prod(v.aval.shape)
            for v in equation.outvars
            if jnp.issubdtype(v.aval.dtype, jnp.floating)
        )
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes_in(inner)


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_bags_of_ten_make_no_array_of_all_positions(combiner):
    """Neither the program nor the compiled buffers of value and gradients hold [B, L, D], forward
    or saved for backward.
    """
    num_bags, length, dim, num_rows = 256, 10, 32, 64
    index = np.random.default_rng(0).integers(0, num_rows, (num_bags, length)).astype(np.int32)

    def loss(rows, weights):
        return jnp.sum(jnp.square(mpembed.pool(rows, index, weights, combiner)))

    function = jax.value_and_grad(loss, argnums=(0, 1))
    arguments = unique_rows(0, num_rows, dim), factors(1, index.shape)
    sizes = list(sizes_in(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert len(sizes) > 20  # the walk does see inside
    assert max(sizes) == num_bags * dim
    if combiner == "mean":
        temporary = (
            jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        )
        assert temporary < 4 * num_bags * length * dim


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_empty_batches_and_empty_bags_just_work(shape):
    index, rows = jnp.zeros(shape, jnp.int32), jnp.asarray(unique_rows())
    assert mpembed.pool(rows, index).shape == (*shape, DIM)
    assert mpembed.pool(rows, {}) == {}
    assert mpembed.pool(rows, index, None, "mean").shape == (*shape[:-1], DIM)
    value, grads = jax.value_and_grad(
        lambda rows: jnp.sum(mpembed.pool(rows, index, None, "mean"))
    )(rows)
    assert value == 0
    np.testing.assert_array_equal(grads, 0.0)


def pooled(*arguments):
    return partial(mpembed.pool, unique_rows(), *arguments)


REFUSED = (
    Refused(pooled(BAGS, None, "average"), 'combiner must be None, "sum", "mean" or "sqrtn"'),
    Refused(pooled(BAGS, np.ones(BAGS.shape, np.float32)), "need a combiner"),
    Refused(
        pooled(BAGS, np.ones(BAGS.shape[:-1], np.float32), "sum"),
        "weights must have the shape of inverse",
    ),
    Refused(pooled(np.int32(3), None, "sum"), "reduces the last axis"),
    Refused(
        pooled({"a": BAGS, "b": BAGS}, {"a": BAGS}, "sum"),
        r"nesting of inverse, .*weights\['b'\].*, got \[\"weights\['a'\]\"\]",
    ),
    Refused(pooled(BAGS, 0.5, "sum"), "weights must be arrays of float32, got float", TypeError),
    Refused(
        pooled(BAGS, BAGS + 0.5j, "sum"),
        "weights must be arrays of float32, got complex128",
        TypeError,
    ),
)


@pytest.mark.parametrize("refused", named(REFUSED))
def test_wrong_arguments_say_what_to_do(refused):
    with pytest.raises(refused.error, match=refused.message):
        refused.call()


class Segmented(NamedTuple):
    """Arguments of a call with segment ids."""

    index: Any
    num_segments: int | None


NOT_FLAT = {
    "bags": Segmented(BAGS, 3),
    "no number": Segmented(FLAT, None),
    "two arrays": Segmented({"a": FLAT, "b": FLAT}, 3),
}


@pytest.mark.parametrize("of", named(NOT_FLAT))
def test_segments_need_one_flat_inverse_and_their_number(of):
    with pytest.raises(ValueError, match="one flat inverse"):
        mpembed.pool(
            unique_rows(), of.index, None, "sum", segment_ids=SEGMENT, num_segments=of.num_segments
        )
    for segment_ids, num in (
        (SEGMENT.astype(np.float32), 5),
        (SEGMENT.tolist(), 5),
        (SEGMENT, 5.0),
    ):
        with pytest.raises(TypeError, match=r"(segment_ids|num_segments) must be"):
            mpembed.pool(
                unique_rows(), FLAT, None, "sum", segment_ids=segment_ids, num_segments=num
            )
