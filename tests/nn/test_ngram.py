"""NGramMemory trains the rows of n-grams: alone, twice in a model, in loops, over a mesh, in linen.

Tables are small, so that rows are shared.
"""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from cases import Refused, named
from flax import nnx
from nn_models import assert_same_bits

import mpembed_jax as mpembed
from mpembed_jax import NO_ID, CacheSpec, nn
from mpembed_jax.nn.linen import TrainState

VOCABULARY, DIM = 40, 4
TX = optax.sgd(0.5)
# Of the tables: 2 orders x 2 heads.
OPTIONS = {"rows": (30, 50), "boundary": 0, "padding": 1, "tx": TX}
SMALL = {"storage": "int4", "cache": None}
CACHE = {"storage": "int4", "cache": CacheSpec(num_rows=64, ways=4)}
CANONICAL = np.arange(VOCABULARY) // 2 * 2
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (4, 9)).astype(np.int32)


def batches(number):
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCABULARY, (4, 9)).astype(np.int32) for _ in range(number)]


def mesh_of_four():
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((4,), ("x",), auto, devices=jax.devices()[:4])


def memory_of(seed=0, **options):
    return nn.NGramMemory(
        VOCABULARY, DIM, rngs=nnx.Rngs(seed), seed=seed, **{**OPTIONS, **SMALL, **options}
    )


def loss_of(model, tokens):
    return jnp.sum(jnp.sin(model(tokens)))


@nnx.jit(donate_argnums=0)
def train_step(memory, tokens):
    memory.prefetch(tokens)
    loss, grads = nnx.value_and_grad(loss_of)(memory, tokens)
    assert not jax.tree.leaves(nn.apply_gradients(memory, grads))
    return loss


def dense_rows(state):
    """All tables of a stack, one after another (f32 [V, D])."""
    return np.concatenate(list(mpembed.to_dense(state).values()))


def global_ids(memory, tokens):
    canonical = None if memory.canonical is None else np.asarray(memory.canonical.get_value())
    ids = memory.ngrams.ids(tokens, canonical)
    starts = np.concatenate([[0], np.cumsum(memory.ngrams.table_sizes)[:-1]])
    return np.where(ids == NO_ID, -1, ids + starts)


@pytest.mark.parametrize("canonical", named({"as they are": None, "mapped": CANONICAL}))
def test_a_step_trains_the_rows_of_the_n_grams_as_dense_sgd_does(canonical):
    memory = memory_of(storage="float32", canonical=canonical)
    before, ids = dense_rows(memory.state), global_ids(memory, TOKENS)
    wanted = np.where(ids[..., None] < 0, 0, before[ids])
    loss = train_step(memory, TOKENS)
    assert loss == pytest.approx(np.sin(wanted).sum(), rel=1e-5)
    after = before.copy()
    np.add.at(after, ids[ids >= 0], -0.5 * np.cos(wanted[ids >= 0]))
    np.testing.assert_allclose(dense_rows(memory.state), after, atol=1e-5)
    memory.eval()
    vectors = memory(TOKENS)
    assert vectors.shape == (4, 9, 4 * DIM)
    ids = ids.reshape(4, 9, 4, 1)
    np.testing.assert_allclose(
        vectors.reshape(4, 9, 4, DIM), np.where(ids < 0, 0, after[ids[..., 0]]), atol=1e-5
    )
    stats = memory.stats()
    assert stats.requests == (ids >= 0).sum() and stats.out_of_range == 0


@pytest.mark.slow
def test_decoding_token_by_token_gives_the_vectors_of_the_whole_sequence():
    memory = memory_of(canonical=CANONICAL, orders=(2, 4))
    memory.eval()
    whole = memory(TOKENS)

    @nnx.jit
    def decode(memory, token, context):
        return memory(token, context), memory.context_after(token, context)

    context = np.full((4, 3), NO_ID, np.int32)
    for at in range(TOKENS.shape[1]):
        vectors, context = decode(memory, TOKENS[:, at : at + 1], context)
        np.testing.assert_array_equal(vectors, whole[:, at : at + 1])


@pytest.mark.parametrize("shape", named({"no sequence": (0, 9), "no token": (4, 0)}))
def test_empty_batches_have_vectors_and_change_nothing(shape):
    memory, tokens = memory_of(), np.zeros(shape, np.int32)
    before = dense_rows(memory.state)
    assert train_step(memory, tokens) == 0
    np.testing.assert_array_equal(dense_rows(memory.state), before)
    memory.eval()
    assert memory(tokens).shape == (*shape, 4 * DIM)


def raw_memory_of(**options):
    """A memory of 2- and 3-grams, which get rows of their own at their second occurrence."""
    rows = mpembed.VocabularySpec(64, admit_after=2, ways=4)
    return memory_of(**{"rows": rows, "heads": 1, "storage": "float32", **options})


@pytest.mark.parametrize("canonical", named({"as they are": None, "mapped": CANONICAL}))
def test_n_grams_that_are_raw_ids_are_trained_as_by_the_verbs(canonical):
    memory = raw_memory_of(canonical=canonical)
    state, spec = jax.tree.map(jnp.copy, memory.state), memory.stack.spec

    def gradient(rows, plan):
        vectors = lambda rows: jax.tree.leaves(mpembed.pool(rows, plan.inverse))  # noqa: E731
        return jax.grad(lambda rows: sum(jnp.sum(jnp.sin(v)) for v in vectors(rows)))(rows)

    step = jax.jit(lambda state, pairs: training.step(state, pairs, TX, gradient).state)

    def pairs_of(tokens):
        """Pairs of the keys of NumPy tokens, as a user hashes raw ids."""
        words, is_ngram = memory.ngrams.keys(tokens, canonical)
        keys = words[..., 0].astype(np.uint64) << np.uint64(32) | words[..., 1]
        columns = {"2-gram": 0, "3-gram": 1}
        return spec.raw_ids(
            {name: keys[..., n] for name, n in columns.items()},
            {name: is_ngram[..., n] for name, n in columns.items()},
        )

    for tokens in (*batches(2), *batches(2)):
        state = step(state, pairs_of(tokens))
        train_step(memory, tokens)
    np.testing.assert_array_equal(memory.state.vocabulary.owners, state.vocabulary.owners)
    memory.eval()
    wanted = mpembed.read(state, pairs_of(TOKENS))
    wanted = np.concatenate([wanted["2-gram"], wanted["3-gram"]], axis=-1)
    np.testing.assert_allclose(memory(TOKENS), wanted, atol=1e-6)
    counted = memory.stats().vocabulary
    assert counted.num_owned > 0 and 0 < counted.shared_requests < counted.requests


def test_raw_n_grams_are_decoded_token_by_token_without_getting_rows():
    memory = raw_memory_of()
    for tokens in batches(3):
        train_step(memory, tokens)
    before = memory.stats().vocabulary
    memory.eval()
    whole = memory(TOKENS)
    assert whole.shape == (4, 9, 2 * DIM)
    context = np.full((4, 2), NO_ID, np.int32)
    for at in range(TOKENS.shape[1]):
        token = TOKENS[:, at : at + 1]
        np.testing.assert_array_equal(memory(token, context), whole[:, at : at + 1])
        context = memory.context_after(token, context)
    assert memory.stats().vocabulary == before


@pytest.mark.parametrize("lines", named({"no cache": None, "cache": 128}, core={"cache"}))
def test_raw_n_grams_over_a_mesh_have_the_rows_of_one_device(lines):
    """Sums of a row's gradients in another order may round a number of INT4 to its other side.

    Steps are small: the many n-grams of a shared row would else amplify a last bit.
    """
    mesh = mesh_of_four()
    rows = mpembed.VocabularySpec(1024, admit_after=2, ways=4)
    cache = None if lines is None else CacheSpec(num_rows=lines, ways=4)
    options = {"rows": rows, "storage": "int4", "cache": cache, "tx": optax.sgd(0.01)}
    one, four = (raw_memory_of(**options, mesh=m) for m in (None, mesh))
    for tokens in batches(4):
        assert train_step(one, tokens) == pytest.approx(float(train_step(four, tokens)), rel=1e-3)
    assert one.stats().vocabulary == four.stats().vocabulary
    here = mpembed.sharding.relayout(four.state).vocabulary
    np.testing.assert_array_equal(here.owners, one.state.vocabulary.owners)


@pytest.mark.slow
def test_parts_of_a_text_are_trained_with_the_tokens_before_them():
    """A step that gets a sequence in two parts, the second with its context, is the same step."""
    whole, parts = memory_of(), memory_of()

    @nnx.jit
    def in_parts(memory, tokens):
        first, second = tokens[:, :5], tokens[:, 5:]
        given = [first, second], [jnp.full((4, 2), NO_ID, jnp.int32), memory.context_after(first)]
        memory.prefetch(*given)
        loss, grads = nnx.value_and_grad(
            lambda memory: sum(jnp.sum(jnp.sin(v)) for v in memory(*given))
        )(memory)
        nn.apply_gradients(memory, grads)
        return loss

    assert in_parts(parts, TOKENS) == pytest.approx(float(train_step(whole, TOKENS)), rel=1e-5)
    np.testing.assert_allclose(dense_rows(parts.state), dense_rows(whole.state), atol=0.1)
    assert np.mean(dense_rows(parts.state) != dense_rows(whole.state)) < 0.05


class Layers(nnx.Module):
    """Two memories, each after a linear layer that is recomputed in the backward pass."""

    def __init__(self, mesh=None, **options):
        cache = CacheSpec(num_rows=128, ways=4)  # sets for four devices
        options = {"storage": "int4", "cache": cache, "mesh": mesh, **options}
        self.memories = nnx.List([memory_of(seed, **options) for seed in (0, 1)])
        rngs = nnx.Rngs(5)
        self.linears = nnx.List([nnx.Linear(4 * DIM, 4 * DIM, rngs=rngs) for _ in range(2)])

    def __call__(self, tokens, is_recomputed=False):
        def layer(memory, linear, x, tokens):
            return jnp.tanh(linear(x + memory(tokens)))

        run = nnx.remat(layer) if is_recomputed else layer
        x = jnp.zeros((*tokens.shape, 4 * DIM))
        for memory, linear in zip(self.memories, self.linears, strict=True):
            x = run(memory, linear, x, tokens)
        return x


def layers_step(model, tokens, is_recomputed=False):
    for memory in model.memories:
        memory.prefetch(tokens)
    loss, grads = nnx.value_and_grad(lambda model: jnp.sum(model(tokens, is_recomputed)))(model)
    grads = nn.apply_gradients(model, grads)
    weights = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.01 * g, weights, grads))
    return loss


def assert_close_tables(one, other):
    """A last bit of a gradient, compiled differently, may move a row by one code of int4.

    It may also move a row in a line by a last bit.
    """
    for first, second in zip(one.memories, other.memories, strict=True):
        rows, wanted = dense_rows(first.state), dense_rows(second.state)
        np.testing.assert_allclose(rows, wanted, atol=2 / 7 * np.abs(wanted).max())
        assert np.mean(~np.isclose(rows, wanted, rtol=1e-4, atol=1e-5)) < 0.05


@pytest.fixture(scope="module")
def stepped():
    """Two memories after three steps under nnx.jit, and their losses."""
    model, step = Layers(), nnx.jit(layers_step)
    return model, [float(step(model, tokens)) for tokens in batches(3)]


@pytest.mark.slow
def test_memories_of_one_model_are_trained_each_by_itself(stepped):
    model, losses = stepped
    first, second = (memory.ngrams for memory in model.memories)
    assert (first.ids(TOKENS) != second.ids(TOKENS)).mean() > 0.5
    assert [memory.stats().steps for memory in model.memories] == [3, 3]
    untrained = Layers()
    for memory, before in zip(model.memories, untrained.memories, strict=True):
        assert (dense_rows(memory.state) != dense_rows(before.state)).any()
    assert not np.isnan(losses).any()


@pytest.mark.exhaustive
def test_recomputed_layers_take_the_same_steps(stepped):
    """The whole command recomputes layers inside a scan, below."""
    wanted, losses = stepped
    model, step = Layers(), nnx.jit(layers_step, static_argnames="is_recomputed")
    got = [float(step(model, tokens, is_recomputed=True)) for tokens in batches(3)]
    np.testing.assert_allclose(got, losses, rtol=1e-5)
    assert_close_tables(model, wanted)


@pytest.mark.slow
def test_a_scan_over_batches_with_recomputed_layers_takes_the_same_steps(stepped):
    wanted, losses = stepped
    model = Layers()

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def scanned(model, tokens):
        return model, layers_step(model, tokens, is_recomputed=True)

    _, got = scanned(model, np.stack(batches(3)))
    np.testing.assert_allclose(got, losses, rtol=1e-5)
    assert_close_tables(model, wanted)


@nnx.vmap
def memories_of(rngs):
    return nn.NGramMemory(VOCABULARY, DIM, rngs=rngs, **OPTIONS, **CACHE)


def state_of(memories, number):
    """The state of one of the memories that vmap made."""
    return jax.tree.map(lambda leaf: leaf[number], memories.stack.state.get_value())


@pytest.mark.slow
def test_memories_made_by_vmap_are_trained_in_a_scan_over_layers():
    memories = memories_of(nnx.Rngs(3).split(2))
    singles = [memory_of(**CACHE) for _ in range(2)]
    for number, single in enumerate(singles):
        single.stack.state.set_value(state_of(memories, number))
    assert (dense_rows(singles[0].state) != dense_rows(singles[1].state)).any()

    @nnx.jit
    def scanned_step(memories, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def layer(x, memory):
            return jnp.tanh(x + memory(tokens))

        nnx.vmap(lambda memory: memory.prefetch(tokens))(memories)
        loss, grads = nnx.value_and_grad(
            lambda memories: jnp.sum(layer(jnp.zeros((*tokens.shape, 4 * DIM)), memories))
        )(memories)
        nnx.vmap(nn.apply_gradients)(memories, grads)
        return loss

    @nnx.jit
    def single_steps(memories, tokens):
        def loss_of(memories):
            x = jnp.zeros((*tokens.shape, 4 * DIM))
            for memory in memories:
                x = jnp.tanh(x + memory(tokens))
            return jnp.sum(x)

        for memory in memories:
            memory.prefetch(tokens)
        loss, grads = nnx.value_and_grad(loss_of)(memories)
        nn.apply_gradients(memories, grads)
        return loss

    for tokens in batches(3):
        loss = float(scanned_step(memories, tokens))
        assert loss == pytest.approx(float(single_steps(nnx.List(singles), tokens)), rel=1e-4)
    for number, single in enumerate(singles):
        assert_same_bits(state_of(memories, number), single.state)


@pytest.mark.slow
def test_a_mesh_of_four_devices_takes_the_same_steps(stepped):
    wanted, losses = stepped
    mesh = mesh_of_four()
    model, step = Layers(mesh), nnx.jit(layers_step)
    got = [float(step(model, tokens)) for tokens in batches(3)]
    np.testing.assert_allclose(got, losses, rtol=1e-5)
    assert_close_tables(model, wanted)
    assert len(model.memories[0].state.table.rows.sharding.device_set) == 4
    model.eval()
    wanted.eval()
    np.testing.assert_allclose(model(TOKENS), wanted(TOKENS), atol=0.2)
    wanted.train()


@pytest.mark.slow
@pytest.mark.parametrize("is_raw", named({"hashed": False, "raw ids": True}))
def test_traced_tokens_outside_the_vocabulary_train_no_row(is_raw):
    """Those of hashed n-grams are counted. As raw ids, such n-grams are padding."""
    memory = raw_memory_of() if is_raw else memory_of()
    train_step(memory, np.full((1, 9), 5, np.int32))
    before = np.asarray(memory.state.table.rows)
    assert memory.stats().out_of_range == 0
    loss = train_step(memory, np.full((1, 9), VOCABULARY + 3, np.int32))
    assert loss == 0
    assert (memory.stats().out_of_range == 0) == is_raw
    np.testing.assert_array_equal(memory.state.table.rows, before)


@pytest.mark.slow
def test_a_cache_and_host_tables_give_the_same_rows_in_every_bit():
    device, host = (memory_of(**CACHE, memory_kind=kind) for kind in (None, "pinned_host"))
    for tokens in batches(4):
        assert train_step(device, tokens) == train_step(host, tokens)
    np.testing.assert_array_equal(dense_rows(device.state), dense_rows(host.state))
    assert device.stats().hits > 0


@pytest.mark.slow
def test_a_copy_of_the_state_with_its_canonical_map_trains_alike():
    memory = memory_of(canonical=CANONICAL, **CACHE)
    train_step(memory, TOKENS)
    graphdef, state = nnx.split(memory)
    held = jax.tree.map(np.asarray, state)
    assert any(np.array_equal(leaf, CANONICAL) for leaf in jax.tree.leaves(held))
    twin = nnx.merge(graphdef, jax.tree.map(jnp.asarray, held))
    train_step(twin, TOKENS)
    train_step(memory, TOKENS)
    assert_same_bits(twin.state, memory.state)


def test_initial_rows_are_those_of_the_initializer_for_each_table():
    memory = memory_of(storage="float32", embedding_init=jax.nn.initializers.constant(3.0))
    assert (dense_rows(memory.state) == 3).all()
    sizes = memory.ngrams.table_sizes
    assert [t.vocabulary_size for t in memory.stack.spec.tables] == list(sizes)
    report = mpembed.memory.report(nn.ngram_spec(memory.ngrams, DIM, cache=None), TX)
    assert report.num_rows == sum(sizes) == memory.stack.spec.num_rows


SETTINGS = {"max_unique_ids": 9, "skip_nonfinite": True, "row_state_dtype": "bfloat16"}


@pytest.mark.parametrize("kind", ["hashed", "raw"])
def test_rows_start_within_the_initial_bound_in_both_kinds_of_modules(kind):
    raw = {"rows": mpembed.VocabularySpec(64, ways=4, shared_rows=8), "heads": 1}
    options = {**OPTIONS, **SMALL, "storage": "float32", **(raw if kind == "raw" else {})}
    twin = nn.linen.NGramMemory(VOCABULARY, DIM, **options, initial_bound=0.01)
    (table,) = jax.tree.leaves(
        twin.init(jax.random.key(0), TOKENS)["embedding"], is_leaf=lambda x: hasattr(x, "state")
    )
    for state in (memory_of(**options, initial_bound=0.01).state, table.state):
        assert all(t.initial_bound == 0.01 for t in state.spec.tables)
        # Of a pool, only rows that have owners start within the bound, and the shared rows.
        ids = np.arange(64 if kind == "raw" else 0, state.spec.num_rows, dtype=np.int32)
        rows = np.asarray(jax.jit(mpembed.decode, static_argnums=(1, 2))(
            state.table.rows[ids], state.spec.storage, DIM
        ))  # fmt: skip
        assert 0.005 < np.abs(rows).max() <= 0.01
    with pytest.raises(ValueError, match=r"uniform\(\+-initial_bound\); leave embedding_init out"):
        memory_of(embedding_init=jax.nn.initializers.ones, initial_bound=0.01)


@pytest.mark.slow
def test_options_of_the_spec_reach_it_in_both_kinds_of_modules():
    memory = memory_of(**SETTINGS)
    twin = nn.linen.NGramMemory(VOCABULARY, DIM, **OPTIONS, **SMALL, **SETTINGS)
    (table,) = jax.tree.leaves(
        twin.init(jax.random.key(0), TOKENS)["embedding"], is_leaf=lambda x: hasattr(x, "state")
    )
    assert memory.state.spec == table.state.spec
    assert {name: getattr(memory.state.spec, name) for name in SETTINGS} == SETTINGS
    raw = raw_memory_of().state.spec
    options = {**OPTIONS, **SMALL, "storage": "float32", "heads": 1, "rows": raw.vocabulary}
    twin = nn.linen.NGramMemory(VOCABULARY, DIM, **options)
    variables = twin.init(jax.random.key(0), TOKENS)
    (table,) = jax.tree.leaves(variables["embedding"], is_leaf=lambda x: hasattr(x, "state"))
    assert raw == table.state.spec
    assert twin.apply(variables, TOKENS).shape == (4, 9, 2 * DIM)


def other_memory(**options):
    """A memory with other initial values, and with another hash if options say so."""
    options = {**OPTIONS, **SMALL, **options}
    return nn.NGramMemory(VOCABULARY, DIM, rngs=nnx.Rngs(1), **options)


@pytest.mark.slow
def test_a_state_from_outside_is_trained_and_one_of_other_tables_refused():
    memory, other = memory_of(), other_memory()
    memory.set_state(other.state)
    np.testing.assert_array_equal(dense_rows(memory.state), dense_rows(other.state))
    train_step(memory, TOKENS)
    with pytest.raises(ValueError, match="this module was made for tables"):
        memory.set_state(memory_of(rows=(70, 90)).state)


@pytest.mark.parametrize(
    "options", named({"seed": {"seed": 1}, "boundary": {"boundary": 2}, "padding": {"padding": 2}})
)
def test_a_state_of_another_hash_is_refused_in_every_way_that_it_may_come(options):
    """Also inside jit, while the step is traced."""
    memory, other = memory_of(), other_memory(**options)
    message = r"made for the NGramHash \{'boundary': 0, 'padding': 1, 'seed': 0\}, but holds the st"
    with pytest.raises(ValueError, match=message):
        memory.set_state(other.state)
    nnx.update(memory, nnx.state(other))
    for use in (
        lambda: memory.prefetch(TOKENS),
        lambda: train_step(memory, TOKENS),
        lambda: nnx.jit(lambda memory: memory(TOKENS))(nnx.view(memory, deterministic=True)),
        lambda: memory.state,
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_the_arrays_of_another_hash_are_recognized_without_its_spec():
    """As another library restores them: into the structure of the target."""
    memory, other = memory_of(), other_memory(seed=1)
    arrays = jax.tree.leaves(nnx.state(other))
    nnx.update(memory, jax.tree.unflatten(jax.tree.structure(nnx.state(memory)), arrays))
    with pytest.raises(ValueError, match="made for another spec"):
        memory.stats()
    assert np.isnan(train_step(memory, TOKENS))


def test_a_vocabulary_may_grow():
    """The rows of n-grams do not depend on its size."""
    memory = memory_of()
    larger = nn.NGramMemory(VOCABULARY + 9, DIM, rngs=nnx.Rngs(1), **OPTIONS, **SMALL)
    nnx.update(larger, nnx.state(memory))
    memory.eval()
    larger.eval()
    np.testing.assert_array_equal(larger(TOKENS), memory(TOKENS))


# --- linen


class LinenModel(linen.Module):
    """A memory and a linear head."""

    @linen.compact
    def __call__(self, tokens, context=None):
        memory = nn.linen.NGramMemory(
            VOCABULARY, DIM, canonical=tuple(CANONICAL.tolist()), name="memory", **OPTIONS, **SMALL
        )
        return linen.Dense(1, name="head")(memory(tokens, context))


@jax.jit
def linen_step(state, tokens):
    state = state.prefetch(tokens)
    loss, grads = jax.value_and_grad(
        lambda params: jnp.sum(jnp.sin(state.apply_fn({"params": params}, tokens)))
    )(state.params)
    return state.apply_gradients(grads=grads), loss, grads["memory"]["table"]


@pytest.mark.slow
def test_the_linen_memory_trains_and_decodes_like_the_nnx_one():
    model = LinenModel()
    state = TrainState.create(
        apply_fn=model.apply, variables=model.init(jax.random.key(0), TOKENS), tx=optax.sgd(0.0)
    )
    kernel, bias = (state.params["head"][name] for name in ("kernel", "bias"))
    held = state.collections["embedding"]["memory"]["table"]
    memory = memory_of(canonical=CANONICAL)
    memory.stack.state.set_value(jax.tree.map(jnp.copy, held.state))

    @nnx.jit
    def step(memory, tokens):
        memory.prefetch(tokens)
        loss, grads = nnx.value_and_grad(
            lambda memory: jnp.sum(jnp.sin(memory(tokens) @ kernel + bias))
        )(memory)
        nn.apply_gradients(memory, grads)
        return loss

    for tokens in batches(2):
        state, loss, row_grads = linen_step(state, tokens)
        assert loss == pytest.approx(float(step(memory, tokens)), rel=1e-5)
        assert (row_grads != 0).any()
    held = state.collections["embedding"]["memory"]["table"]
    np.testing.assert_allclose(dense_rows(held.state), dense_rows(memory.state), atol=0.2)
    assert np.mean(dense_rows(held.state) != dense_rows(memory.state)) < 0.05
    whole = model.apply(state.variables, TOKENS)
    context = memory.context_after(TOKENS[:, :4])
    np.testing.assert_allclose(
        model.apply(state.variables, TOKENS[:, 4:5], context), whole[:, 4:5], atol=1e-5
    )


class LinenMeshModel(linen.Module):
    """A memory with a cache, on one device or over a mesh, and a linear head."""

    mesh: jax.sharding.Mesh | None = None

    @linen.compact
    def __call__(self, tokens):
        cache = CacheSpec(num_rows=128, ways=4)  # sets for four devices
        options = {**OPTIONS, **CACHE, "cache": cache, "rows": (300, 500), "tx": optax.sgd(0.01)}
        memory = nn.linen.NGramMemory(VOCABULARY, DIM, mesh=self.mesh, name="memory", **options)
        return linen.Dense(1, name="head")(memory(tokens))


@pytest.mark.slow
def test_a_linen_memory_over_a_mesh_in_a_scan_takes_the_steps_of_one_device():
    mesh = mesh_of_four()
    whole = np.stack(batches(3))
    tx = optax.sgd(0.01, momentum=0.9)

    def step(state, tokens):
        state, loss, _ = linen_step(state, tokens)
        return state, loss

    trained = {}
    for name, where in {"one device": None, "mesh": mesh}.items():
        model = LinenMeshModel(where)
        variables = model.init(jax.random.key(0), TOKENS)
        state = TrainState.create(apply_fn=model.apply, variables=variables, tx=tx)
        for _ in range(2):
            state, losses = jax.jit(lambda state: jax.lax.scan(step, state, whole))(state)
        rows = dense_rows(state.collections["embedding"]["memory"]["table"].state)
        trained[name] = rows, np.asarray(losses), state
    (wanted, losses, one), (rows, got, over_mesh) = trained.values()
    np.testing.assert_allclose(got, losses, rtol=1e-3)
    np.testing.assert_allclose(rows, wanted, atol=2 / 7 * np.abs(wanted).max())
    assert np.mean(~np.isclose(rows, wanted, rtol=1e-3, atol=1e-5)) < 0.05
    steps = [next(iter(state.stats().values())).steps for state in (one, over_mesh)]
    assert steps == [6, 6]
    held = over_mesh.collections["embedding"]["memory"]["table"].state
    assert len(held.table.rows.sharding.device_set) == 4


@pytest.mark.slow
def test_a_step_in_linen_takes_the_context_of_a_part_of_a_text():
    """Its loss is that of the positions of the whole text."""
    model = LinenModel()
    state = TrainState.create(
        apply_fn=model.apply, variables=model.init(jax.random.key(0), TOKENS), tx=optax.sgd(0.0)
    )

    @jax.jit
    def loss_of(state, tokens, context):
        state = state.prefetch(tokens, context)
        return state.apply_fn({"params": state.params}, tokens, context)

    parts = memory_of(canonical=CANONICAL)
    context = parts.context_after(TOKENS[:, :4])
    whole = model.apply(state.variables, TOKENS)
    np.testing.assert_allclose(loss_of(state, TOKENS[:, 4:], context), whole[:, 4:], atol=1e-5)
    with pytest.raises(ValueError, match="context must be the 2 tokens"):
        state.prefetch(TOKENS, context[:1])


class LinenModels(linen.Module):
    """A memory beside an embedding."""

    @linen.compact
    def __call__(self, tokens, context=None):
        memory = nn.linen.NGramMemory(VOCABULARY, DIM, name="memory", **OPTIONS, **SMALL)
        embed = nn.linen.CachedEmbed(VOCABULARY, DIM, tx=TX, cache=None, name="embed")
        return memory(tokens, context), embed(tokens)


def test_each_memory_of_a_linen_model_has_its_own_context():
    model = LinenModels()
    variables = model.init(jax.random.key(0), TOKENS)
    state = TrainState.create(apply_fn=model.apply, variables=variables, tx=TX)
    context = memory_of().context_after(TOKENS[:, :4])
    part = TOKENS[:, 4:]
    ids = {"memory": part, "embed": part}
    trained = state.prefetch(ids, {"memory": context})
    wanted, _ = model.apply(state.variables, TOKENS)
    vectors, _ = trained.apply_fn({"params": trained.params}, part, context)
    np.testing.assert_allclose(vectors, wanted[:, 4:], atol=1e-5)
    with pytest.raises(KeyError, match=r"prefetch takes \{path: context\} for"):
        state.prefetch(ids, context)
    with pytest.raises(ValueError, match="'embed' is no NGramMemory and takes no context"):
        state.prefetch(ids, {"embed": context})


# --- what misuse raises


def made(**options):
    return lambda memory: memory_of(**options)


@pytest.mark.parametrize(
    "case",
    named(
        [
            Refused(lambda m: m.prefetch(np.full((1, 3), 40)), r"in \[0, 40\), the vocabulary"),
            Refused(lambda m: m.prefetch(TOKENS * 1.0), "tokens must be integers", TypeError),
            Refused(lambda m: m(TOKENS), "without prefetch"),
            Refused(
                lambda m: (m.prefetch(TOKENS), m(TOKENS[::-1] * 0 + 39)), "were not prefetched"
            ),
            Refused(
                lambda m: (m.prefetch(TOKENS), m.prefetch(TOKENS)), "prefetch was called twice"
            ),
            Refused(lambda m: (m.eval(), m.prefetch(TOKENS)), "in evaluation mode"),
            Refused(lambda m: m.context_after(TOKENS, TOKENS), "context must be the 2 tokens"),
            Refused(made(orders=(1, 2)), r"each of orders must be in \[2, 64\], got 1"),
            Refused(made(rows=0), "rows must be in .*got 0"),
            Refused(made(canonical=np.arange(39)), r"canonical .*\[40\], got \[39\]"),
            Refused(
                lambda _: nnx.eval_shape(lambda: memory_of(canonical=jnp.arange(40) // 2)),
                "canonical must not be traced",
                TypeError,
            ),
            Refused(made(rows=mpembed.VocabularySpec(9)), "heads must be 1, got 2"),
            Refused(
                made(
                    rows=mpembed.VocabularySpec(9),
                    heads=1,
                    embedding_init=jax.nn.initializers.ones,
                ),
                "leave embedding_init out",
            ),
            Refused(made(initial_bound=-1.0), "initial_bound must be a finite number of at least"),
            Refused(made(storage="int9"), "unknown row format 'int9'"),
            Refused(made(cache=0.05), "cache must be a CacheSpec or None", TypeError),
            Refused(made(tx=0.1), "tx must be an optax", TypeError),
        ]
    ),
)
def test_misuse_raises_and_says_what_to_do(case):
    memory = memory_of()
    with pytest.raises(case.error, match=case.message):
        case.call(memory)


@pytest.mark.slow
def test_a_linen_memory_refuses_the_collection_of_other_tables():
    tokens = np.arange(6, dtype=np.int32).reshape(1, 6)
    modules = [nn.linen.NGramMemory(100, 4, rows=rows, heads=1) for rows in (50, 70)]
    variables = [module.init(jax.random.key(0), tokens) for module in modules]
    modules[0].apply(variables[0], tokens)
    with pytest.raises(ValueError, match="holds the state of"):
        modules[0].apply(variables[1], tokens)


MAPPED = {"canonical": CANONICAL}


@pytest.mark.parametrize(
    "case",
    named(
        {
            "seed": ({}, {"seed": 1}, "made for the NGramHash .*'seed': 1"),
            "boundary": ({}, {"boundary": 2}, "made for the NGramHash .*'boundary': 2"),
            "padding": ({}, {"padding": 2}, "made for the NGramHash .*'padding': 2"),
            "a larger vocabulary": ({}, {"vocabulary_size": 41}, "has a vocabulary of 41 and no"),
            "a map": ({}, MAPPED, "has a vocabulary of 40 and a map of tokens, collection"),
            "no map": (MAPPED, {}, "has a vocabulary of 40 and no map of tokens, collection"),
            "another map": (MAPPED, {"canonical": CANONICAL[::-1]}, "or with another map"),
        }
    ),
)
def test_a_linen_memory_refuses_the_collection_of_another_hash(case):
    options, others, message = case
    made, other = (
        nn.linen.NGramMemory(
            **{"vocabulary_size": VOCABULARY, **OPTIONS, **SMALL, **own}, features=4
        )
        for own in (options, others)
    )
    variables = made.init(jax.random.key(0), TOKENS)
    made.apply(variables, TOKENS)
    with pytest.raises(ValueError, match=message):
        other.apply(variables, TOKENS)
