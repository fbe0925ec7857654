"""The table "What works inside what" of RECIPES.md: a test behind every cell.

The rows start from a dense table and are trained by SGD on the sum of the squares of the vectors,
so that NumPy knows them after each step.
"""

import copy
import pickle
import re
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import named
from flax import nnx
from jax import export
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed
from mpembed_jax import CacheSpec, EmbeddingSpec, TableSpec, nn
from mpembed_jax.nn.linen import CachedEmbed, TrainState

RECIPES = (Path(__file__).parents[2] / "mpembed_jax/RECIPES.md").read_text()
ROWS, DIM, LR = 200, 4, 0.05
TX = optax.sgd(LR)
RULED = mpembed.optim.sgd(LR)  # native calls run it; its state is that of TX
DENSE = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
IDS = np.array([[3, 7], [7, 20], [3, 50], [199, 7]], np.int32)
OTHERS = IDS[::-1] // 2
OPTIONS = {"storage": "float32", "cache": CacheSpec(num_rows=64, ways=2)}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def mesh_of():
    return jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def initializer(key, shape, dtype):
    """The dense table; a function of a module, as pickle needs it."""
    return jnp.asarray(DENSE, dtype)


def after(subject, *batches, factor=1):
    """The dense table after a step with each batch, and `factor` times the loss of the last."""
    table = subject.rows_at_start().astype(np.float64)
    loss = None
    for ids in batches:
        vectors = table[ids].sum(1, keepdims=True) if subject.has_bags else table[ids]
        loss = factor * np.square(vectors).sum()
        grads = np.zeros_like(table)
        np.add.at(grads, ids, 2 * factor * vectors)
        table = table - LR * grads
    return table, loss


def assert_trained(subject, state, loss, *batches, factor=1):
    table, expected = after(subject, *batches, factor=factor)
    if loss is not None:
        np.testing.assert_allclose(loss, expected, **CLOSE)
    ids = subject.trained(*batches)
    rows = subject.rows_of(subject.state_of(state), ids)
    np.testing.assert_allclose(rows, table[ids], **CLOSE)


def of_loss(loss_of, argument, wrap=lambda f: f):
    """The loss, and its gradient; the loss is `scale` times a sum, whose gradient is that sum."""
    loss, (grad, of_scale) = jax.value_and_grad(wrap(loss_of), argnums=(0, 1))(
        argument, jnp.float32(1)
    )
    return loss + 0 * of_scale, grad


class Subject:
    """What all subjects have."""

    is_step = True
    has_bags = False
    is_functional = False  # whether it runs inside jax.shard_map and jax.pmap

    @staticmethod
    def rows_at_start():
        return DENSE

    @staticmethod
    def trained(*batches):
        """The ids whose rows are compared: all rows."""
        return np.arange(ROWS, dtype=np.int32)

    @staticmethod
    def rows_of(state, ids):
        return mpembed.read(state, ids)


class Verbs(Subject):
    """A step of the verbs."""

    is_functional = True

    @staticmethod
    def start(**where):
        spec = EmbeddingSpec([TableSpec("embedding", ROWS, initializer)], DIM, **OPTIONS)
        return mpembed.init(jax.random.key(0), spec, TX, **where)

    @staticmethod
    def run(state, ids, wrap=lambda f: f, axis_name=None):
        """One step: the state, and the loss."""
        state, plan = mpembed.prefetch(state, ids)
        rows = mpembed.lookup(state, plan)

        def loss_of(rows, scale):
            loss = scale * jnp.square(mpembed.pool(rows, plan.inverse)).sum()
            return loss if axis_name is None else jax.lax.psum(loss, axis_name)

        loss, grads = of_loss(loss_of, rows, wrap)
        return mpembed.apply_gradients(state, plan, rows, grads, tx=TX), loss

    @staticmethod
    def state_of(state):
        return state


class Bags(Verbs):
    """A step of bags, in two verbs."""

    has_bags = True

    @staticmethod
    def run(state, ids, wrap=lambda f: f, axis_name=None):
        state, plan, vectors = mpembed.embed(state, ids, None, "sum", tx=RULED)

        def loss_of(vectors, scale):
            loss = scale * jnp.square(vectors).sum()
            return loss if axis_name is None else jax.lax.psum(loss, axis_name)

        loss, grads = of_loss(loss_of, vectors, wrap)
        return mpembed.apply_pooled_gradients(state, plan, grads, tx=RULED), loss


class RawIds(Verbs):
    """A step of the verbs with raw ids, each of which gets the one row of its set."""

    spec = EmbeddingSpec(
        TableSpec("embedding"),
        DIM,
        storage="float32",
        cache=CacheSpec(num_rows=64, ways=2),
        vocabulary=mpembed.VocabularySpec(4096, admit_after=1, ways=1),
    )

    @classmethod
    def pairs(cls, ids):
        return cls.spec.raw_ids({"embedding": ids})["embedding"]

    @classmethod
    def start(cls, **where):
        return mpembed.init(jax.random.key(0), cls.spec, TX, **where)

    @classmethod
    def run(cls, state, ids, wrap=lambda f: f, axis_name=None):
        return super().run(state, cls.pairs(ids), wrap, axis_name)

    @classmethod
    @cache
    def rows_at_start(cls):
        ids = np.unique([IDS, OTHERS])
        state, _ = jax.jit(mpembed.prefetch)(cls.start(), cls.pairs(ids))
        rows = np.zeros((ROWS, DIM), np.float32)
        rows[ids] = cls.rows_of(state, ids)
        return rows

    @staticmethod
    def trained(*batches):
        return np.unique(batches)

    @classmethod
    def rows_of(cls, state, ids):
        return mpembed.read(state, cls.pairs(ids))


class Read(Subject):
    """`read`: the state, and the sum of the squares of the rows."""

    is_step = False
    is_functional = True
    start = Verbs.start
    state_of = Verbs.state_of

    @staticmethod
    def run(state, ids, wrap=lambda f: f, axis_name=None):
        def sum_of(weights, scale):
            return scale * (weights * jnp.square(mpembed.read(state, ids))).sum()

        loss, _ = of_loss(sum_of, jnp.ones((), jnp.float32), wrap)
        return state, loss if axis_name is None else jax.lax.psum(loss, axis_name)


class NnxStep(Subject):
    """A step of an nnx module, as a function of its state."""

    is_deterministic = False

    @classmethod
    def model(cls, **where):
        tx = {"tx": TX, "embedding_init": initializer, "rngs": nnx.Rngs(0)}
        embed = nn.CachedEmbed(ROWS, DIM, **tx, **OPTIONS, **where)
        return nnx.view(embed, deterministic=True) if cls.is_deterministic else embed

    @classmethod
    def start(cls, **where):
        return nnx.split(cls.model(**where))

    @staticmethod
    def step(embed, ids, wrap=lambda f: f):
        embed.prefetch(ids)

        def loss_of(embed):
            return jnp.square(embed(ids)).sum()

        loss, grads = nnx.value_and_grad(wrap(loss_of))(embed)
        nn.apply_gradients(embed, grads)
        return loss

    @classmethod
    def run(cls, held, ids, wrap=lambda f: f, axis_name=None):
        wrap = nnx.remat if wrap is jax.checkpoint else wrap
        embed = nnx.merge(*held)
        loss = cls.step(embed, ids, wrap)
        return nnx.split(embed), loss

    @staticmethod
    def state_of(held):
        return nnx.merge(*held).state


class NnxEvaluation(NnxStep):
    """An evaluation of an nnx module."""

    is_step = False
    is_deterministic = True

    @staticmethod
    def step(embed, ids, wrap=lambda f: f):
        loss, _ = nnx.value_and_grad(wrap(lambda embed: jnp.square(embed(ids)).sum()))(embed)
        return loss


class LinenStep(Subject):
    """A step of a linen module."""

    @staticmethod
    def start(**where):
        tx = {"tx": TX, "embedding_init": initializer}
        model = CachedEmbed(ROWS, DIM, **tx, **OPTIONS, **where)
        variables = model.init(jax.random.key(0), IDS)
        return TrainState.create(apply_fn=model.apply, variables=variables, tx=TX)

    @staticmethod
    def run(state, ids, wrap=lambda f: f, axis_name=None):
        state = state.prefetch(ids)

        def loss_of(params, scale):
            return scale * jnp.square(state.apply_fn({"params": params}, ids)).sum()

        loss, grads = of_loss(loss_of, state.params, wrap)
        return state.apply_gradients(grads=grads), loss

    @staticmethod
    def state_of(state):
        return state.embeddings["table"]


SUBJECTS = {
    "a step of the verbs": Verbs,
    "a step of bags": Bags,
    "a step of raw ids": RawIds,
    "`read`": Read,
    "a step in nnx": NnxStep,
    "evaluation in nnx": NnxEvaluation,
    "a step in linen": LinenStep,
}


def check(subject, state, loss, *batches):
    """The state and the loss are those of a dense table."""
    if subject.is_step:
        assert_trained(subject, state, loss, *batches)
    else:
        np.testing.assert_allclose(loss, after(subject, batches[-1])[1], **CLOSE)


def stacked(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstacked(tree, k):
    return jax.tree.map(lambda leaf: leaf[k], tree)


def in_jit(subject):
    check(subject, *jax.jit(subject.run)(subject.start(), IDS), IDS)


def in_scan(subject):
    batches = np.stack([IDS, OTHERS])
    state, losses = jax.jit(partial(jax.lax.scan, subject.run))(subject.start(), batches)
    expected = after(subject, *([IDS, OTHERS] if subject.is_step else [OTHERS]))[1]
    np.testing.assert_allclose(losses[1], expected, **CLOSE)
    check(subject, state, None if subject.is_step else losses[1], IDS, OTHERS)


def in_vmap(subject, mapped=jax.vmap):
    run, first = mapped(subject.run), subject.start()
    states, losses = run(stacked(first, first), np.stack([IDS, OTHERS]))
    for k, ids in enumerate((IDS, OTHERS)):
        check(subject, unstacked(states, k), losses[k], ids)


def in_grad(subject):
    """The loss is differentiated inside of `run`; the gradient of its factor is the loss."""
    state, loss = jax.jit(partial(subject.run, wrap=lambda f: lambda *a: 2 * f(*a)))(
        subject.start(), IDS
    )
    if subject.is_step:
        assert_trained(subject, state, None, IDS, factor=2)
    else:
        np.testing.assert_allclose(loss, 2 * after(subject, IDS)[1], **CLOSE)


def in_remat(subject):
    check(subject, *jax.jit(partial(subject.run, wrap=jax.checkpoint))(subject.start(), IDS), IDS)


def in_shard_map(subject):
    mesh = mesh_of()
    state, run = subject.start(mesh=mesh), subject.run
    if subject.is_functional:
        specs = mpembed.partition_specs(state)
        run = partial(run, axis_name="x")
        places = {"in_specs": (specs, P("x")), "out_specs": (specs, P())}
        run = jax.shard_map(run, mesh=mesh, **places)
    check(subject, *jax.jit(run)(state, IDS), IDS)


def in_pmap(subject):
    devices = jax.devices()
    if not subject.is_functional:
        return in_vmap(subject, partial(jax.pmap, devices=devices[:2]))

    def run(ids):
        state, loss = subject.run(subject.start(axis_name="x"), ids)
        return jax.lax.psum(loss, "x"), subject.rows_of(state, subject.trained(IDS))

    run = jax.pmap(run, axis_name="x", devices=devices[:4])
    losses, rows = run(IDS.reshape(4, 1, 2))
    table, loss = after(subject, IDS)
    np.testing.assert_allclose(losses, np.full(4, loss), **CLOSE)
    table = (table if subject.is_step else DENSE)[subject.trained(IDS)]
    np.testing.assert_allclose(rows[1], table, **CLOSE)


def in_disable_jit(subject):
    with jax.disable_jit():
        check(subject, *subject.run(subject.start(), IDS), IDS)


def in_x64(subject):
    with jax.enable_x64(True):
        state, loss = jax.jit(subject.run)(subject.start(), IDS)
        assert loss.dtype == np.float32
        check(subject, state, loss, IDS)


def in_strict_promotion(subject):
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    in_jit(subject)


def in_export(subject):
    """Exported, serialized, read again and called."""
    state = subject.start(implementation="xla") if subject.is_step else subject.start()
    leaves, treedef = jax.tree.flatten(state)

    def run(leaves, ids):
        state, loss = subject.run(treedef.unflatten(leaves), ids)
        return jax.tree.leaves(state), loss

    blob = export.export(jax.jit(run))(leaves, IDS).serialize()
    leaves, loss = export.deserialize(blob).call(leaves, IDS)
    check(subject, treedef.unflatten(leaves), loss, IDS)


def in_pickle(subject):
    if subject.is_functional:
        copied = partial(_copied, lambda state: pickle.loads(pickle.dumps(state)))
        return copied(subject)
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError), match="pickle"):
        pickle.dumps(subject.start())


def in_deepcopy(subject):
    _copied(copy.deepcopy, subject)


def _copied(copy_of, subject):
    first = subject.start()
    twin = copy_of(first)
    check(subject, *jax.jit(subject.run)(twin, IDS), IDS)
    check(subject, *jax.jit(subject.run)(first, OTHERS), OTHERS)


CONTEXTS = {
    name.removeprefix("in_").replace("strict_p", "strict p"): function
    for name, function in list(globals().items())
    if name.startswith("in_")
}


def table():
    """{(context, subject): text} of the document."""
    section = RECIPES.split("## What works inside what")[1]
    lines = [line.strip("| ").split(" | ") for line in re.findall(r"^\|.*$", section, re.M)]
    (_, *subjects), _, *rows = lines
    return {(row[0], s): text for row in rows for s, text in zip(subjects, row[1:], strict=True)}


def test_the_table_has_a_cell_for_each_context_and_subject():
    assert set(table()) == {(c, s) for c in CONTEXTS for s in SUBJECTS}


QUICK = {("vmap", "`read`"), ("export", "`read`"), ("deepcopy", "a step of the verbs")}
# Of each context the subjects of the whole command. Over devices and without jit, steps of the
# verbs and of raw ids are also in tests/mesh, in test_over_mesh.py of tests/vocabulary and in
# test_errors.py of tests/embedding.
SUBJECTS_OF = {
    "jit": {"a step of raw ids", "a step in nnx", "a step in linen"},
    "scan": {"a step of raw ids", "a step in linen"},
    "vmap": {"a step of the verbs", "a step of raw ids", "evaluation in nnx"},
    "grad": {"a step of the verbs", "a step in nnx"},
    "remat": {"a step of bags", "a step of raw ids", "a step in linen"},
    "shard_map": {"`read`", "evaluation in nnx"},  # steps: tests/mesh
    "pmap": {"`read`", "evaluation in nnx"},
    "disable_jit": {"a step of bags", "`read`", "a step in linen"},
    "x64": {"a step of bags", "`read`", "a step in nnx"},
    "export": {"a step of the verbs", "a step in linen"},
}


@pytest.mark.parametrize(
    "cell",
    named(
        {" of ".join(cell): cell for cell in table()},
        fast={" of ".join(cell) for cell in QUICK},
        core={
            " of ".join(cell) for cell in table() if cell[1] in SUBJECTS_OF.get(cell[0], SUBJECTS)
        },
    ),
)
def test_a_cell_is_true(cell):
    context, subject = cell
    CONTEXTS[context](SUBJECTS[subject])


def test_a_state_with_native_calls_cannot_be_exported():
    state = Verbs.start(implementation="numba")
    with pytest.raises(ValueError, match=r"(?s)custom calls whose targets.*@mpembed_"):
        export.export(jax.jit(lambda ids: Verbs.run(state, ids)[1]))(IDS)


@pytest.mark.parametrize("subject", named({"Verbs": Verbs, "Bags": Bags}, core={"Verbs"}))
def test_checkify_finds_no_float_fault_in_a_sound_step(subject):
    checked = checkify.checkify(subject.run, checkify.float_checks | checkify.user_checks)
    error, (state, loss) = jax.jit(checked)(subject.start(), IDS)
    error.throw()
    check(subject, state, loss, IDS)


@pytest.mark.slow
def test_nnx_transforms_train_models_side_by_side_and_one_after_another():
    """nnx.vmap and nnx.scan, as users of nnx write them."""

    @nnx.vmap(in_axes=(0, 0), out_axes=0)
    def side_by_side(embed, ids):
        return NnxStep.step(embed, ids)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def in_turn(embed, ids):
        return embed, NnxStep.step(embed, ids)

    graph, held = nnx.split(NnxStep.model())
    models = nnx.merge(graph, stacked(held, held))
    nnx.jit(side_by_side)(models, np.stack([IDS, OTHERS]))
    _, states = nnx.split(models)
    for k, ids in enumerate((IDS, OTHERS)):
        assert_trained(NnxStep, (graph, unstacked(states, k)), None, ids)
    embed = NnxStep.model()
    nnx.jit(in_turn)(embed, np.stack([IDS, OTHERS]))
    assert_trained(NnxStep, nnx.split(embed), None, IDS, OTHERS)
