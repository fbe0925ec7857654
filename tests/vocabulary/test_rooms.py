"""Raw ids in the other rooms: flax modules, checkpoints, stats, bytes; and what is refused."""

import dataclasses
import json
import pickle
from functools import partial
from unittest import mock

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from cases import Refused, named
from flax import nnx

import mpembed_jax as mpembed
from mpembed_jax import NO_ID, checkpoint, memory, nn, restacking, serving, vocabularies
from mpembed_jax.embedding import admission
from mpembed_jax.embedding.stats import VocabularyStats
from mpembed_jax.nn import routing
from mpembed_jax.nn.linen import CachedEmbedBags, TrainState
from mpembed_jax.optim import rowwise_adagrad
from mpembed_jax.serving import checkpoints
from mpembed_jax.vocabulary import hashes, pool

TX = rowwise_adagrad(0.5)
SPEC = mpembed.EmbeddingSpec(
    (mpembed.TableSpec("user"), mpembed.TableSpec("item")),
    8,
    storage="int8",
    cache=mpembed.CacheSpec(num_rows=8, ways=4),
    vocabulary=mpembed.VocabularySpec(48, admit_after=2, ways=8),
)


TABLES = {"user": np.zeros((9, 8)), "item": np.zeros((9, 8))}


def batches(seed, num):
    rng = np.random.default_rng(seed)
    for _ in range(num):
        names = np.minimum(rng.zipf(1.3, (16, 2)), 500)
        yield {
            "user": np.asarray([f"u{n}" for n in names[:, 0]]),
            "item": names[:, 1].astype(np.int64) + 2**40,
        }


def gradient(rows, plan):
    return jax.grad(lambda rows: loss(mpembed.pool(rows, plan.inverse)))(rows)


@jax.jit
def step(state, pairs):
    return training.step(state, pairs, TX, gradient).state


def loss(vectors):
    return sum(jnp.sum((v - 1) ** 2) for v in vectors.values())


def trained(state, seed, num):
    for ids in batches(seed, num):
        state = step(state, SPEC.raw_ids(ids))
    return state


@pytest.mark.slow
@pytest.mark.parametrize("is_fused", [False, True], ids=["rows", "fused"])
def test_modules_train_the_rows_of_the_functional_step(is_fused):
    module = nn.CachedEmbedBags(SPEC, TX, combiner=None, fused=is_fused, rngs=nnx.Rngs(0))
    state = module.stacks[0].embedding_state
    for ids in batches(0, 12):
        state = step(state, SPEC.raw_ids(ids))
        module.prefetch(ids)
        grads = nnx.grad(lambda m, ids=ids: loss(m(ids)))(module)
        nn.apply_gradients(module, grads)
    held = module.stacks[0].embedding_state
    training.assert_same(held.vocabulary, state.vocabulary)
    training.assert_same(held.table, state.table)
    ids = next(batches(9, 1))
    module.eval()
    want = mpembed.read(state, SPEC.raw_ids(ids))
    for feature, vectors in module(ids).items():
        np.testing.assert_array_equal(vectors, want[feature])


def as_columns(ids):
    """The pairs of both features in one array, uint32 [.., 2, 2]."""
    return np.stack([ids["user"], ids["item"]], axis=-2)


@pytest.mark.slow
@pytest.mark.parametrize("form", named({"mapping": lambda ids: ids, "array": as_columns}))
@pytest.mark.parametrize("is_fused", [False, True], ids=["rows", "fused"])
def test_jitted_modules_take_the_pairs_of_strings_and_wide_integers(is_fused, form):
    """A jitted function gets no strings, and 32 bits of an integer: it gets pairs instead."""
    module = nn.CachedEmbedBags(SPEC, TX, combiner=None, fused=is_fused, rngs=nnx.Rngs(0))
    state = module.stacks[0].embedding_state

    @nnx.jit
    def train_step(module, ids):
        module.prefetch(ids)
        grads = nnx.grad(lambda m: jnp.sum((jnp.stack(jax.tree.leaves(m(ids))) - 1) ** 2))(module)
        nn.apply_gradients(module, grads)

    for ids in batches(0, 8):
        pairs = SPEC.raw_ids(ids)
        state = step(state, pairs)
        train_step(module, form(pairs))
    held = module.stacks[0].embedding_state
    training.assert_same(held.vocabulary, state.vocabulary)
    training.assert_same(held.table, state.table)
    assert int(state.vocabulary.counters[2, 0]) > 0
    module.eval()
    ids = next(batches(9, 1))
    training.assert_same(module(ids), mpembed.read(state, SPEC.raw_ids(ids)))


def test_weights_have_the_shape_of_the_ids_that_pairs_stand_for():
    module = nn.CachedEmbedBags(SPEC, TX, combiner="sum", rngs=nnx.Rngs(0))
    ids = next(batches(0, 1))
    pairs = as_columns(SPEC.raw_ids(ids))
    weights = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    module.eval()
    want = mpembed.read(module.stacks[0].embedding_state, SPEC.raw_ids(ids))
    want = np.stack([want["user"], want["item"]], axis=1) * weights[..., None]
    np.testing.assert_array_equal(module(pairs, weights), want)
    by_feature = {"user": weights[:, :1], "item": weights[:, 1:]}
    bags = {f: p[:, None] for f, p in SPEC.raw_ids(ids).items()}
    found = module(bags, by_feature)
    np.testing.assert_array_equal(np.stack([found["user"], found["item"]], axis=1), want)
    with pytest.raises(ValueError, match=r"of ids \[16, 2\], got \[16, 2, 2\]"):
        module(pairs, np.ones((16, 2, 2), np.float32))


MASK = [[False, True], [False, False], [True, False]]
MASKED = {
    "integers": np.ma.array([[1, 2], [3, 4], [5, 6]], mask=MASK),
    "strings": np.ma.array([["a", "b"], ["c", "d"], ["e", "f"]], mask=MASK),
    "objects": np.ma.array(np.asarray([["a", "b"], ["c", "d"], ["e", "f"]], object), mask=MASK),
    "None": [["a", None], ["c", "d"], [None, "f"]],
    "pairs": np.ma.array(
        SPEC.raw_ids([["a", "b"], ["c", "d"], ["e", "f"]]),
        mask=np.asarray(MASK)[..., None].repeat(2, axis=-1),
    ),
}


@pytest.mark.parametrize("ids", named(MASKED))
def test_modules_take_masked_ids_as_padding(ids):
    def is_padding(pairs):
        assert not isinstance(pairs, np.ma.MaskedArray)
        return (pairs == hashes.PADDING).all(axis=-1)

    (routed,) = routing.route((SPEC,), ids)
    np.testing.assert_array_equal(is_padding(routed), MASK)
    columns = ids if isinstance(ids, np.ndarray) else np.asarray(ids, object)
    (routed,) = routing.route((SPEC,), {"user": columns[:, 0], "item": columns[:, 1]})
    found = np.stack([is_padding(routed["user"]), is_padding(routed["item"])], axis=1)
    np.testing.assert_array_equal(found, MASK)


def test_a_masked_pair_is_padding_for_the_verbs():
    pairs = MASKED["pairs"]
    (found,), _ = admission.checked(pairs)
    np.testing.assert_array_equal((np.asarray(found) == hashes.PADDING).all(axis=-1), MASK)


def test_a_list_of_masked_raw_ids_is_refused():
    row = MASKED["strings"][0]
    for call in (SPEC.raw_ids, lambda ids: routing.route((SPEC,), ids)):
        for ids in ([row, row], {"user": [row, row]}):
            with pytest.raises(TypeError, match=r"list of masked arrays.*np\.ma\.stack"):
                call(ids)


SIMILAR = {
    "other masks": (
        {"user": np.ma.array(["a", "a"], mask=[1, 0]), "item": [1, 1]},
        {"user": np.ma.array(["a", "a"], mask=[0, 1]), "item": [1, 1]},
    ),
    "integers that are equal as floats": (
        {"user": ["a", "a"], "item": [2**63, 2**63 + 1, -1]},
        {"user": ["a", "a"], "item": [2**63 + 1, 2**63, -1]},
    ),
    "bytes that end with a zero": (
        {"user": [b"a", b"a\0"], "item": [1, 1]},
        {"user": [b"a\0", b"a"], "item": [1, 1]},
    ),
}


@pytest.mark.parametrize("case", named(SIMILAR, fast={"other masks"}))
def test_a_call_in_jit_tells_similar_host_ids_from_those_of_its_prefetch(case):
    """NumPy takes both for equal. They are permutations, so prefetch has all ids of the call."""
    planned, called = case
    rules = mpembed.VocabularySpec(48, admit_after=1, ways=8)
    spec = dataclasses.replace(SPEC, cache=None, vocabulary=rules)
    module = nn.CachedEmbedBags(spec, TX, combiner=None, rngs=nnx.Rngs(0))

    @nnx.jit
    def call(module):
        module.prefetch(planned)
        return module(planned), module(called)

    of_planned, of_called = call(module)
    for feature, vectors in of_planned.items():
        before, after = (spec.raw_ids(ids)[feature].tolist() for ids in (planned, called))
        order = np.asarray([before.index(pair) for pair in after])
        np.testing.assert_array_equal(of_called[feature], vectors[order])
    assert any((of_planned[f] != of_called[f]).any() for f in of_planned)


BAD_PAIRS = {
    "of another table": Refused(
        lambda pairs: {"user": pairs["item"]}, "the pair at .* is not of table 'user'"
    ),
    "no pairs": Refused(
        lambda pairs: {"user": np.arange(3, dtype=np.uint32)},
        r"'user': uint32 ids must be the pairs \[\.\., 2\].*got \[3\]; cast raw ids to int64",
        TypeError,
    ),
    "columns that are no pairs": Refused(
        lambda pairs: np.zeros((4, 2), np.uint32),
        r"uint32 array ids must be the pairs \[\.\., 2, 2\].*got \[4, 2\]",
        TypeError,
    ),
    "of another table, on a device": Refused(
        lambda pairs: {"user": jnp.asarray(pairs["item"])}, "the pair at .* is not of table 'user'"
    ),
    "columns in another order": Refused(
        lambda pairs: as_columns(pairs)[:, ::-1], "the pair at .* is not of table 'user'"
    ),
}


@pytest.mark.parametrize("case", named(BAD_PAIRS))
def test_pairs_that_a_module_cannot_take_are_refused(case):
    module = nn.CachedEmbedBags(SPEC, TX, combiner=None, rngs=nnx.Rngs(0))
    ids = case.call(SPEC.raw_ids(next(batches(0, 1))))
    with pytest.raises(case.error, match=case.message):
        module.prefetch(ids)
    assert not module.stacks[0].is_prefetched


@pytest.mark.parametrize("form", ["mapping", "array"])
def test_traced_pairs_of_another_table_are_padding(form):
    module = nn.CachedEmbedBags(SPEC, TX, combiner=None, rngs=nnx.Rngs(0))
    module.eval()
    pairs = SPEC.raw_ids(next(batches(0, 1)))
    given = {"user": pairs["item"], "item": pairs["item"]}
    run = nnx.jit(lambda module, pairs: module(pairs))
    item = module(pairs)["item"]
    if form == "array":
        found = run(module, as_columns(given))
        found = {"user": found[:, 0], "item": found[:, 1]}
    else:
        found = run(module, given)
    assert (np.asarray(found["user"]) == 0).all()
    np.testing.assert_array_equal(found["item"], item)


def test_a_pickle_without_place_bits_is_of_an_older_version():
    spec = mpembed.VocabularySpec(64, ways=4)
    assert pickle.loads(pickle.dumps(spec)) == spec
    older = object.__new__(mpembed.VocabularySpec)
    new_fields = ("place_bits", "window")
    older.__setstate__({k: v for k, v in vars(spec).items() if k not in new_fields})
    held = pool.init(spec, None)
    del vars(held)["place_bits"]
    assert held.place_bits == 22
    assert older == dataclasses.replace(spec, place_bits=22)


@pytest.mark.parametrize("implementation", named(["xla", "numba"], fast={"numba"}, core=()))
def test_embed_admits_and_trains_as_the_separate_verbs_do(implementation):
    @jax.jit
    def fused(state, pairs):
        state, plan, vectors = mpembed.embed(state, pairs, tx=TX)
        grads = jax.grad(loss)(vectors)
        return mpembed.apply_pooled_gradients(state, plan, grads, tx=TX), vectors

    state = mpembed.init(jax.random.key(1), SPEC, TX, implementation=implementation)
    other = state
    for ids in batches(2, 6):
        pairs = SPEC.raw_ids(ids)
        state, vectors = fused(state, pairs)
        other = step(other, pairs)
        training.assert_same(state.vocabulary, other.vocabulary)
        assert vectors["user"].shape == (16, 8)
    ids = SPEC.raw_ids(next(batches(9, 1)))
    training.assert_same(mpembed.read(state, ids), mpembed.read(other, ids))
    assert int(state.vocabulary.counters[2, 0]) > 0


def test_a_refused_call_of_embed_admits_nothing():
    state = mpembed.init(jax.random.key(1), SPEC, TX)
    ids = SPEC.raw_ids(next(batches(2, 1)))
    bags = jax.tree.map(lambda pairs: pairs[:, None], ids)
    weights = jax.tree.map(lambda pairs: jnp.ones(pairs.shape[:2]), bags)
    few = weights | {"item": weights["item"][:3]}
    with mock.patch.object(admission, "admit", side_effect=AssertionError("admitted")):
        for arguments in ((ids, None, "median"), (ids, few, None), (bags, few, "sum")):
            with pytest.raises(ValueError, match=r"combiner|weights"):
                mpembed.embed(state, *arguments, tx=TX)
    after, _, _ = mpembed.embed(state, bags, weights, "sum", tx=TX)
    training.assert_same(after.vocabulary, mpembed.prefetch(state, ids)[0].vocabulary)


class Vectors(linen.Module):
    """The vectors of raw ids."""

    @linen.compact
    def __call__(self, ids):
        return CachedEmbedBags(SPEC, TX, combiner=None, name="embed")(ids)


@pytest.mark.parametrize("kind", ["integers", "pairs"])
def test_a_linen_module_trains_the_rows_of_the_functional_step(kind):
    def numbers(seed, num):
        for ids in batches(seed, num):
            item = ids["item"].astype(np.int32)
            yield SPEC.raw_ids(ids) if kind == "pairs" else {"user": item, "item": item + 7}

    @jax.jit
    def train_step(train_state, ids):
        train_state = train_state.prefetch(ids)
        grads = jax.grad(lambda params: loss(train_state.apply_fn({"params": params}, ids)))(
            train_state.params
        )
        return train_state.apply_gradients(grads=grads)

    model = Vectors()
    variables = model.init(jax.random.key(0), next(numbers(0, 1)))
    held = TrainState.create(apply_fn=model.apply, variables=variables, tx=optax.sgd(0.1))
    state = embedding_of(held)
    for ids in numbers(0, 6):
        held = train_step(held, ids)
        state = step(state, ids if kind == "pairs" else SPEC.raw_ids(ids))
    training.assert_same(embedding_of(held).vocabulary, state.vocabulary)
    training.assert_same(embedding_of(held).table, state.table)
    assert int(state.vocabulary.counters[2, 0]) > 0


def embedding_of(tree):
    """The one embedding state in a tree."""

    def is_state(node):
        return isinstance(node, mpembed.EmbeddingState)

    (found,) = filter(is_state, jax.tree.leaves(tree, is_leaf=is_state))
    return found


def test_the_norm_of_gradients_is_that_of_the_distinct_rows():
    state = trained(mpembed.init(jax.random.key(1), SPEC, TX), 0, 3)
    ids = SPEC.raw_ids({"user": ["a", "a", "b", None], "item": [1, 2, 1, 1]})
    state, plan = mpembed.prefetch(state, ids)
    rows = mpembed.lookup(state, plan)
    num_rows = len({int(r) for r in plan.unique_ids if r != mpembed.NO_ID})
    norm = mpembed.gradient_norm(state, plan, jnp.full_like(rows, 0.5))
    assert norm == pytest.approx(np.sqrt(num_rows * 8 * 0.25), rel=1e-6)


def test_training_goes_on_after_a_restore_as_if_it_had_not_stopped(tmp_path):
    state = trained(mpembed.init(jax.random.key(1), SPEC, TX), 0, 10)
    checkpoint.save(tmp_path, 1, state)
    empty = mpembed.init(jax.random.key(1), SPEC, TX)
    restored = checkpoint.restore(tmp_path, empty)
    training.assert_same(trained(restored, 5, 6), trained(state, 5, 6))


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [(None, 0.25), (0.25, None)], ids=str)
def test_new_owners_start_as_the_spec_of_a_restored_state_says(bounds, tmp_path):
    """Rows without an owner were made by the spec that was saved."""
    saved, spec = (
        dataclasses.replace(
            SPEC,
            tables=[mpembed.TableSpec(name, initial_bound=bound) for name in ("user", "item")],
            vocabulary=mpembed.VocabularySpec(400, admit_after=1, ways=8),
        )
        for bound in bounds
    )
    checkpoint.save(tmp_path, 1, mpembed.init(jax.random.key(1), saved, TX))
    state = checkpoint.restore(tmp_path, mpembed.init(jax.random.key(1), spec, TX))
    pairs = spec.raw_ids({"user": np.arange(60)})
    read = mpembed.read(jax.jit(mpembed.prefetch)(state, pairs)[0], pairs)
    most = bounds[1] or 1 / np.sqrt(spec.num_rows)
    assert 0.9 * most < np.abs(read["user"]).max() <= 1.02 * most


def test_lists_have_the_pairs_of_their_own_types():
    """NumPy would make strings of the integers beside strings, and floats beside 2**63."""
    rows = [[17, "x"], [2**63, b"y\0"]]
    wanted = SPEC.raw_ids({"user": np.asarray([17, 2**63], np.uint64), "item": ["x", b"y\0"]})
    got = SPEC.raw_ids(rows)
    for n, name in enumerate(("user", "item")):
        np.testing.assert_array_equal(got[:, n], wanted[name])
    np.testing.assert_array_equal(routing.route((SPEC,), rows)[0], got)


def recyclings(state):
    return np.asarray(state.vocabulary.counters)[pool.COUNTERS.index("recyclings"), 0]


@partial(jax.jit, static_argnames="verbs")
def tracked_step(state, tracker, pairs, *, verbs):
    if verbs == "prefetch":
        state, plan, _ = training.step(state, pairs, TX)
    else:
        state, plan, vectors = mpembed.embed(state, pairs, tx=TX)
        state = mpembed.apply_pooled_gradients(state, plan, vectors, tx=TX)
    return state, checkpoint.mark(tracker, plan)


def after_new_ids(spec, num, run):
    """A state after the ids 0, 1, .. below `num`, each once."""
    state = mpembed.init(jax.random.key(1), spec, TX)
    tracker = checkpoint.track(state)
    for first in range(0, num, 32):
        state, tracker = run(state, tracker, spec.raw_ids(first + np.arange(32).reshape(16, 2)))
    return state


@pytest.mark.parametrize("verbs", named(["prefetch", "embed"], fast={"embed"}))
def test_increments_hold_rows_that_change_their_owners(verbs, tmp_path):
    """Every link of a chain is restored bit for bit. Rows in lines start again in each link."""
    spec = dataclasses.replace(
        SPEC,
        cache=mpembed.CacheSpec(num_rows=480, ways=4),
        vocabulary=mpembed.VocabularySpec(960, admit_after=1, ways=8),
    )

    run = partial(tracked_step, verbs=verbs)
    state = after_new_ids(spec, 2000, run)  # more ids than rows, each once
    full = checkpoint.save(tmp_path, 1, state)
    for link in range(2, 5):
        tracker, before = checkpoint.track(state), recyclings(state)
        for number in range(2):  # new ids, each four times
            names = 10_000 * link + 8 * number + np.arange(32) % 8
            state, tracker = run(state, tracker, spec.raw_ids(names.reshape(16, 2)))
        state = jax.jit(mpembed.flush)(state) if link == 3 else state
        assert recyclings(state) > before
        saved = checkpoint.save(tmp_path, link, state, tracker=tracker)
        assert saved.nbytes < 0.8 * full.nbytes
        empty = mpembed.init(jax.random.key(2), spec, TX)
        training.assert_same(checkpoint.restore(tmp_path, empty), state)


@pytest.mark.slow
def test_an_increment_empties_the_line_of_a_row_that_started_again(tmp_path):
    """Forgotten ids leave empty lines, so that newcomers take other lines than old owners had."""
    spec = dataclasses.replace(
        SPEC,
        cache=mpembed.CacheSpec(num_rows=96, ways=4),
        # Of the two hashes, the older one has ids here whose lines stay empty.
        vocabulary=mpembed.VocabularySpec(96, admit_after=1, ways=4, place_bits=22),
    )

    run = partial(tracked_step, verbs="embed")
    state = after_new_ids(spec, 320, run)
    num_emptied = 0
    for number in range(8):
        known = np.arange(320).reshape(160, 2)
        start = vocabularies.forget(state, spec.raw_ids(known[8 * number : 8 * number + 8]))
        folder = tmp_path / str(number)
        checkpoint.save(folder, 1, start)
        names = 1000 + 2 * number + np.tile(np.arange(2), (16, 1))
        after, tracker = run(start, checkpoint.track(start), spec.raw_ids(names))
        was_held, is_held = (np.asarray(s.cache.tags) != NO_ID for s in (start, after))
        num_emptied += np.sum(was_held & ~is_held)
        checkpoint.save(folder, 2, after, tracker=tracker)
        empty = mpembed.init(jax.random.key(2), spec, TX)
        training.assert_same(checkpoint.restore(folder, empty), after)
    assert num_emptied > 0  # what this test is about


@pytest.mark.slow
def test_an_increment_after_a_change_of_the_vocabulary_is_refused_before_it_is_written(tmp_path):
    """No plan names the rows that start again. A call that changes no row is no matter."""
    state = trained(mpembed.init(jax.random.key(1), SPEC, TX), 0, 4)
    (first,) = batches(0, 1)
    checkpoint.save(tmp_path, 1, state)
    tracker = checkpoint.track(state)
    many = {"item": np.arange(200)}
    for changed in (
        vocabularies.forget(state, SPEC.raw_ids(first)),
        vocabularies.from_counts(state, SPEC.raw_ids(many), {"item": np.full(200, 100)}),
        vocabularies.shrink(vocabularies.grow(state, 96), 48),
    ):
        with pytest.raises(ValueError, match="outside of steps after the tracker was started"):
            checkpoint.save(tmp_path, 2, changed, tracker=tracker)
        assert checkpoint.steps(tmp_path) == [1]
        assert mpembed.stats(changed).refused_updates == 0
    same = vocabularies.forget(state, SPEC.raw_ids({"user": ["nobody"]}))
    same = vocabularies.from_counts(
        same, SPEC.raw_ids(first), dict.fromkeys(first, np.ones(16, int))
    )
    checkpoint.save(tmp_path, 2, same, tracker=tracker)
    training.assert_same(checkpoint.restore(tmp_path, state), same)


@pytest.mark.slow
def test_a_pool_in_host_memory_trains_and_changes_to_the_same_bits(tmp_path):
    """Rows start again, ids are forgotten, the pool grows, shrinks and is restored."""
    found = []
    for memory_kind in (None, "pinned_host"):
        spec = dataclasses.replace(
            SPEC,
            tables=[mpembed.TableSpec("user", initial_bound=0.25), mpembed.TableSpec("item")],
            vocabulary=mpembed.VocabularySpec(48, admit_after=1, ways=4),
            memory_kind=memory_kind,
        )
        state = mpembed.init(jax.random.key(1), spec, TX)
        for ids in batches(3, 6):
            state = step(state, spec.raw_ids(ids))
        assert recyclings(state) > 0
        states = [state]
        states.append(vocabularies.forget(state, spec.raw_ids({"item": [2**40 + 1, 2**40 + 2]})))
        states.append(vocabularies.grow(states[-1], 96))
        states.append(vocabularies.shrink(states[-1], 64))
        checkpoint.save(tmp_path / str(memory_kind), 1, states[-1])
        empty = mpembed.init(jax.random.key(2), states[-1].spec, TX)
        states.append(checkpoint.restore(tmp_path / str(memory_kind), empty))
        kinds = {each.table.rows.sharding.memory_kind for each in states}
        assert kinds == {memory_kind or "device"}
        found.append([jax.device_get(jax.tree.leaves(each)) for each in states])
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_checkpoint_of_another_pool_is_refused(tmp_path):
    state = trained(mpembed.init(jax.random.key(1), SPEC, TX), 0, 2)
    checkpoint.save(tmp_path, 1, state)
    for change in (
        {"vocabulary": dataclasses.replace(SPEC.vocabulary, num_rows=96)},
        {"row_state_dtype": "bfloat16"},
    ):
        other = mpembed.init(jax.random.key(1), dataclasses.replace(SPEC, **change), TX)
        with pytest.raises(ValueError, match="vocabulary"):
            checkpoint.restore(tmp_path, other)


def test_a_pool_of_an_older_version_is_read_with_its_own_places(tmp_path):
    """Fingerprint, sizes and rows are those of the version before place_bits."""

    def spec_of(**places):
        pool = mpembed.VocabularySpec(64, ways=4, **places)
        return mpembed.EmbeddingSpec(mpembed.TableSpec("user"), 4, vocabulary=pool)

    old, new = spec_of(place_bits=22), spec_of()
    assert old.fingerprint.tolist() == [2301555565, 3454668556]
    names = {"sets", "ways", "groups", "first_sets", "sketch_width", "counter_bits", "shared_rows"}
    assert old.vocabulary.arrays.keys() == names
    assert new.vocabulary.arrays == {**old.vocabulary.arrays, "place_bits": 30}
    pairs = old.raw_ids({"user": np.arange(20)})
    np.testing.assert_array_equal(pairs["user"], new.raw_ids({"user": np.arange(20)})["user"])
    state = mpembed.init(jax.random.key(0), old, TX)
    counts = {"user": np.full(20, 5)}
    state = vocabularies.from_counts(state, pairs, counts)
    rows = [29, 0, 4, 24, 36, 10, 31, 7, 11, 15, 12, 13, 14, 2, 3, 8, 5, 30, 9, 20]
    assert np.asarray(admission.rows_of(state, pairs)["user"]).tolist() == rows
    checkpoint.save(tmp_path, 1, state)
    checkpoint.save(tmp_path / "new", 1, mpembed.init(jax.random.key(0), new, TX))
    for version, folder in {1: tmp_path, 2: tmp_path / "new"}.items():
        manifest = json.loads((folder / "step_1" / "manifest.json").read_text())
        assert json.loads(manifest["body"])["version"] == version
    again = checkpoint.restore(tmp_path, mpembed.init(jax.random.key(1), old, TX))
    assert np.asarray(admission.rows_of(again, pairs)["user"]).tolist() == rows
    with pytest.raises(ValueError, match=r"VocabularySpec\(.., place_bits=22\)"):
        checkpoint.restore(tmp_path, mpembed.init(jax.random.key(1), new, TX))
    larger = vocabularies.grow(state, 128)
    assert larger.spec.vocabulary.place_bits == larger.vocabulary.place_bits == 22
    np.testing.assert_array_equal(
        mpembed.read(larger, pairs)["user"], mpembed.read(state, pairs)["user"]
    )
    serving.save(tmp_path / "state", state)
    checkpoints.export(tmp_path, tmp_path / "checkpoint")
    for path in (tmp_path / "state", tmp_path / "checkpoint"):
        assert serving.verify(path).version == 2
        assert serving.load(path).rows_of({"user": np.arange(20)})["user"].tolist() == rows


@pytest.mark.parametrize("change", [{"storage": "float32"}, {"cache": None}], ids=str)
def test_a_restore_into_another_format_or_cache_keeps_the_owners(change, tmp_path):
    state = trained(mpembed.init(jax.random.key(1), SPEC, TX), 0, 10)
    checkpoint.save(tmp_path, 1, state)
    spec = dataclasses.replace(SPEC, **change)
    restored = checkpoint.restore(tmp_path, mpembed.init(jax.random.key(2), spec, TX))
    training.assert_same(restored.vocabulary, state.vocabulary)
    pairs = SPEC.raw_ids(next(batches(0, 1)))
    for feature, want in mpembed.read(state, pairs).items():
        np.testing.assert_allclose(mpembed.read(restored, pairs)[feature], want, atol=0.01)


@pytest.mark.slow
def test_stats_count_raw_ids_and_warn_of_a_pool_that_thrashes():
    spec = dataclasses.replace(
        SPEC, vocabulary=mpembed.VocabularySpec(16, admit_after=1, ways=8), cache=None
    )
    state = mpembed.init(jax.random.key(1), spec, TX)
    quiet = mpembed.stats(state).vocabulary
    assert quiet == (0, 0, 0, 0, 0, 0, 16)
    donated = jax.jit(step, donate_argnums=0)
    for number in range(200):
        ids = np.arange(16) // 2 + 8 * number
        state = donated(state, spec.raw_ids({"user": np.repeat(ids, 1 + number % 3)}))
    with pytest.warns(UserWarning, match=r"VocabularySpec\(num_rows=..\)"):
        counts = mpembed.stats(state).vocabulary
    assert counts.occupancy == 1 and quiet.occupancy == 0
    assert counts.num_owned == 16 and counts.admissions == counts.recyclings + 16


def test_a_full_pool_with_few_recyclings_thrashes_never_however_long_it_runs():
    """In the drift of posts (experiments/accuracy), a pool of 20 % of the ids recycles as often."""
    counts = {"shared_requests": 37_000, "num_owned": 9, "num_rows": 9}
    full = VocabularyStats(1_000_000, admissions=4400, recyclings=4391, refusals=200, **counts)
    small = full._replace(recyclings=8000, refusals=5000)
    fixed = full._replace(admissions=9, recyclings=0, refusals=60_000)
    assert [each.is_thrashing for each in (full, small, fixed)] == [False, True, True]


def test_ids_that_found_no_row_before_training_do_not_make_a_pool_thrash():
    spec = dataclasses.replace(SPEC, vocabulary=mpembed.VocabularySpec(64, 1, ways=8), cache=None)
    state = mpembed.init(jax.random.key(1), spec, TX)
    pairs = spec.raw_ids({"user": np.arange(900)})
    state = vocabularies.from_counts(state, pairs, {"user": np.full(900, 9)})
    counts = mpembed.stats(state).vocabulary
    assert counts.num_owned == 64 and counts.admissions >= 64
    assert (counts.requests, counts.recyclings, counts.refusals) == (0, 0, 0)


def test_the_report_counts_the_bytes_of_the_state():
    report = memory.report(SPEC, TX)
    state = mpembed.init(jax.random.key(1), SPEC, TX)
    assert report.total == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert report.components["vocabulary"] == state.vocabulary.nbytes


def test_what_is_not_supported_is_refused():
    state = mpembed.init(jax.random.key(1), SPEC, TX)
    dense = mpembed.EmbeddingSpec((mpembed.TableSpec("user", 9),), 8)
    narrow = mpembed.init(jax.random.key(1), dataclasses.replace(SPEC, max_unique_ids=9), TX)
    refused = [
        (ValueError, "raw_ids", lambda: SPEC.global_ids({"user": [1]})),
        (ValueError, "no vocabulary", lambda: dense.raw_ids({"user": [1]})),
        (TypeError, "raw_ids", lambda: mpembed.prefetch(state, np.zeros(3, np.int32))),
        (TypeError, "raw_ids", lambda: mpembed.read(state, np.zeros(3, np.int32))),
        (ValueError, "vocabulary", lambda: mpembed.freeze(state)),
        (ValueError, "raw ids", lambda: mpembed.to_dense(state)),
        (ValueError, "max_unique_ids", lambda: checkpoint.track(narrow)),
        (ValueError, "row numbers", lambda: mpembed.write_rows(state, [1], np.zeros((1, 8)))),
        (ValueError, "stacks without a vocabulary", lambda: restacking.restack(state, SPEC, TX)),
        (ValueError, "raw ids", lambda: mpembed.from_dense(jax.random.key(0), SPEC, TX, TABLES)),
        (ValueError, "vocabulary_size", lambda: mpembed.EmbeddingSpec(SPEC.tables, 8)),
        (ValueError, "vocabulary_size", lambda: dataclasses.replace(SPEC, tables=dense.tables)),
        (ValueError, "out_of_range", lambda: dataclasses.replace(SPEC, out_of_range="clip")),
        (KeyError, "unknown", lambda: SPEC.raw_ids({"stranger": [1]})),
        (ValueError, "one column", lambda: SPEC.raw_ids(np.zeros((3, 5), np.int64))),
        (ValueError, "where", lambda: SPEC.raw_ids({"user": [1]}, {"user": [True, True]})),
        (TypeError, "where must be nested", lambda: SPEC.raw_ids({"user": [1]}, [True])),
        (TypeError, "where must be nested", lambda: SPEC.raw_ids([[1, 2]], {"user": [True]})),
        (ValueError, "admit_after", lambda: mpembed.VocabularySpec(9, admit_after=256)),
    ]
    for kind, match, call in refused:
        with pytest.raises(kind, match=match):
            call()


@pytest.mark.slow
def test_host_and_device_ids_train_the_same_rows():
    state = mpembed.init(jax.random.key(1), SPEC, TX)
    on_device = jax.jit(lambda state, ids: step(state, SPEC.raw_ids(ids)))
    other = state
    for ids in batches(3, 5):
        users = ids["item"].astype(np.int32)
        state = step(state, SPEC.raw_ids({"item": users}))
        other = on_device(other, {"item": users})
    training.assert_same(state, other)


@pytest.mark.parametrize(
    "tx", named({"sgd": optax.sgd(0.5), "adam": optax.adam(0.1)}, fast={"adam"})
)
@pytest.mark.standard_promotion("optax.adam raises a float to an int32 power")
def test_a_new_owner_has_fresh_state_of_any_optimizer(tx):
    spec = dataclasses.replace(
        SPEC, vocabulary=mpembed.VocabularySpec(1, admit_after=1), row_state_dtype="bfloat16"
    )
    state = mpembed.init(jax.random.key(1), spec, tx)
    fresh = jax.tree.map(np.asarray, state.row_state)
    train = jax.jit(lambda state, pairs: training.step(state, pairs, tx).state)
    for name in ("a", "a", "a"):
        state = train(state, spec.raw_ids({"user": [name]}))
    state, plan = jax.jit(mpembed.prefetch)(state, spec.raw_ids({"user": ["b"] * 9}))
    assert plan.unique_ids[0] == 0
    for leaf, first in zip(jax.tree.leaves(state.row_state), jax.tree.leaves(fresh), strict=True):
        if first.ndim:
            np.testing.assert_array_equal(leaf, first)


@pytest.mark.parametrize("implementation", named(["xla", "xla_chunked", "numba"], fast={"numba"}))
def test_a_step_copies_no_array_of_the_state(implementation):
    """The temporaries of a step are a small part of the smallest large array, the sketch."""
    tables = [mpembed.TableSpec("user", initial_bound=0.25), mpembed.TableSpec("item")]
    spec = dataclasses.replace(
        SPEC, tables=tables, vocabulary=mpembed.VocabularySpec(100_000), cache=None
    )
    abstract = jax.eval_shape(
        lambda key: mpembed.init(key, spec, TX, implementation=implementation),
        jax.ShapeDtypeStruct((2,), jnp.uint32),
    )
    pairs = {"user": jax.ShapeDtypeStruct((64, 2), jnp.uint32)}
    lowered = jax.jit(step, donate_argnums=0).lower(abstract, pairs)
    sizes = lowered.compile().memory_analysis()
    assert sizes.temp_size_in_bytes < 100_000 < abstract.vocabulary.sketch.size
    assert sizes.alias_size_in_bytes > abstract.table.nbytes + abstract.vocabulary.nbytes
