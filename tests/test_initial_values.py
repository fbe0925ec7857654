"""Initial values of a user's initializer are those for the shape of the whole table.

They are made in blocks where that is right.
"""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import named
from flax import nnx

import mpembed_jax as mpembed
from mpembed_jax import nn

SIZE, DIM = 20_000, 4  # two full blocks and a part of one
KEY = jax.random.key(0)
TX = optax.sgd(0.1)
FANS = {
    "xavier_uniform": jax.nn.initializers.xavier_uniform(),
    "glorot_normal": jax.nn.initializers.glorot_normal(),
    "lecun_normal": jax.nn.initializers.lecun_normal(),
    "he_uniform": jax.nn.initializers.he_uniform(),
    "fan_avg of other axes": jax.nn.initializers.variance_scaling(
        2.0, "fan_avg", "truncated_normal", in_axis=1, out_axis=0
    ),
    "a rule of its own": lambda key, shape, dtype: (
        jax.random.uniform(key, shape, dtype, -1, 1) * np.sqrt(3.0 / sum(shape))
    ),
}
PRETRAINED = np.random.default_rng(0).normal(size=(SIZE, DIM)).astype(np.float32)
WHOLE = {  # rows that know their place, one another or an array
    "a part of an array": lambda key, shape, dtype: PRETRAINED[: shape[0]],
    "an array": lambda key, shape, dtype: PRETRAINED,
    "an array of jax": lambda key, shape, dtype: jnp.asarray(PRETRAINED)[: shape[0]] * 2,
    "positions": lambda key, shape, dtype: jnp.sin(
        jnp.arange(shape[0], dtype=dtype)[:, None] * jnp.ones(shape, dtype)
    ),
    "orthogonal": jax.nn.initializers.orthogonal(),
    "one draw for all rows": lambda key, shape, dtype: jnp.broadcast_to(
        jax.random.normal(key, shape[1:], dtype), shape
    ),
    "one draw of a scale": lambda key, shape, dtype: (
        jax.random.normal(key, shape, dtype) * jax.random.uniform(key, (), dtype)
    ),
    "keys for rows": lambda key, shape, dtype: jax.vmap(
        lambda key: jax.random.normal(key, shape[1:], dtype)
    )(jax.random.split(key, shape[0])),
    "centered": lambda key, shape, dtype: (lambda x: x - x.mean(axis=0))(
        jax.random.normal(key, shape, dtype)
    ),
    "another exponent for large tables": lambda key, shape, dtype: (
        jax.random.uniform(key, shape, dtype) ** (2 if shape[0] == SIZE else 3)
    ),
    "another rule for large tables": lambda key, shape, dtype: (
        jax.random.normal(key, shape, dtype) if shape[0] < 10_000 else jnp.full(shape, 7, dtype)
    ),
}
APART = {  # nothing depends on the number of rows
    "normal": jax.nn.initializers.normal(0.1),
    "truncated": jax.nn.initializers.truncated_normal(),
    "uniform": jax.nn.initializers.uniform(),
    "nnx.Embed's": nn.embed.DEFAULT_INIT,
    "shifted": lambda key, shape, dtype: jax.random.normal(key, shape, dtype) + shape[1],
}


def table_of(initializer, size=SIZE, dim=DIM, **options):
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("first", 3), mpembed.TableSpec("t", size, initializer)],
        dim,
        "float32",
        None,
    )
    return mpembed.to_dense(mpembed.init(KEY, spec, TX, **options))["t"]


def keys():
    return jax.random.fold_in(jax.random.wrap_key_data(jax.random.key_data(KEY)), 1)


@pytest.mark.parametrize(
    "name",
    named(list(FANS), fast={"a rule of its own", "xavier_uniform"}, core={"fan_avg of other axes"}),
)
def test_fans_are_those_of_the_whole_table(name):
    """A block's numbers are drawn from its own key and scaled as for the whole table."""
    values, call = table_of(FANS[name]), jax.jit(FANS[name], static_argnums=(1, 2))
    first = call(jax.random.fold_in(keys(), 0), (8192, DIM), jnp.float32)
    whole = np.asarray(call(keys(), (SIZE, DIM), jnp.float32))
    scale = values[0, 0] / first[0, 0]
    assert scale < 0.7
    np.testing.assert_allclose(values[:8192], first * scale, rtol=1e-5)
    # n values of a bounded or normal distribution: the relative spread of their deviation is below
    # 1 / sqrt(n).
    for block in (values[:8192], values[8192:16384], values[16384:], values):
        assert abs(block.std() / whole.std() - 1) < 5 / np.sqrt(block.size) + 5 / np.sqrt(
            whole.size
        )
    assert np.unique(values).size > 0.99 * values.size


@pytest.mark.parametrize("name", WHOLE)
def test_rows_that_know_their_place_are_made_at_once(name):
    wanted = jax.jit(WHOLE[name], static_argnums=(1, 2))(
        jax.random.fold_in(keys(), 0), (SIZE, DIM), jnp.float32
    )
    np.testing.assert_allclose(table_of(WHOLE[name]), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", named(list(APART), fast={"shifted", "uniform"}, core=()))
def test_other_rows_are_made_by_blocks_and_no_float32_table_exists(name):
    """Each block from the key folded by its number. From shapes: no array of the table's shape."""
    call = jax.jit(APART[name], static_argnums=(1, 2))
    wanted = [
        call(jax.random.fold_in(keys(), block), (size, DIM), jnp.float32)
        for block, size in enumerate((8192, 8192, SIZE - 16384))
    ]
    np.testing.assert_array_equal(table_of(APART[name]), np.concatenate(wanted))
    for initializer in (APART[name], FANS["xavier_uniform"]):
        spec = mpembed.EmbeddingSpec(mpembed.TableSpec("t", SIZE, initializer), DIM, "int8", None)
        text = str(jax.make_jaxpr(lambda key: mpembed.init(key, spec, TX).table.rows)(KEY))  # noqa: B023
        assert f"f32[{SIZE}," not in text
        assert f"u32[{SIZE}," not in text


@pytest.mark.slow
@pytest.mark.parametrize("initializer", [FANS["xavier_uniform"], WHOLE["positions"]])
def test_shards_hold_the_rows_of_one_device(initializer):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    np.testing.assert_array_equal(table_of(initializer, mesh=mesh), table_of(initializer))


@pytest.mark.parametrize("bound", [0.0, 0.25])
def test_a_table_starts_within_a_bound(bound):
    tables = [mpembed.TableSpec("first", 3), mpembed.TableSpec("t", 5000, initial_bound=bound)]
    state = mpembed.init(KEY, mpembed.EmbeddingSpec(tables, DIM, "float32", None), TX)
    first, values = (np.abs(rows).max() for rows in mpembed.to_dense(state).values())
    assert 0.99 * bound <= values <= bound and 0.25 < first <= 3**-0.5


@pytest.mark.parametrize("bound", [-0.1, "0.1", np.inf, np.nan, True])
def test_a_bound_that_is_no_finite_number_is_refused(bound):
    with pytest.raises(ValueError, match="'t': initial_bound must be a finite number"):
        mpembed.TableSpec("t", 5, initial_bound=bound)


def test_an_initializer_and_a_bound_are_refused():
    with pytest.raises(ValueError, match="an initializer and an initial_bound; leave one out"):
        mpembed.TableSpec("t", 5, jax.nn.initializers.ones, initial_bound=0.1)


@pytest.mark.slow
def test_a_module_has_the_spread_of_nnx_embed():
    """100,000 rows of 16: deviations of n = 1.6 M values each agree within 5 sigma."""
    init = jax.nn.initializers.xavier_uniform()
    ours = nn.CachedEmbed(100_000, 16, storage="int8", embedding_init=init, rngs=nnx.Rngs(0))
    theirs = nnx.Embed(100_000, 16, embedding_init=init, rngs=nnx.Rngs(0)).embedding[...]
    table = mpembed.to_dense(ours.state)["embedding"]
    assert abs(table.std() / np.std(theirs) - 1) < 10 / np.sqrt(table.size)
    assert abs(table[-1000:].std() / np.std(theirs) - 1) < 10 / np.sqrt(16_000)


def test_an_initializer_of_another_shape_is_refused():
    with pytest.raises(
        ValueError, match=r"table 't' returned \(5, 4\) when asked for \(20000, 4\)"
    ):
        table_of(lambda key, shape, dtype: jnp.zeros((5, 4)))


@pytest.mark.parametrize(
    "initializer",
    named(
        {
            "nnx.with_partitioning": nnx.with_partitioning(FANS["xavier_uniform"], (None, "x")),
            "linen.with_partitioning": linen.with_partitioning(FANS["xavier_uniform"], (None, "x")),
            "nothing": lambda key, shape, dtype: None,
        }
    ),
)
def test_an_initializer_that_returns_no_array_is_refused(initializer):
    """Those of flax's with_partitioning return an array in a box."""
    with pytest.raises(
        TypeError, match=r"'t' returned (VariableMetadata|Partitioned|NoneType), no"
    ):
        table_of(initializer)
