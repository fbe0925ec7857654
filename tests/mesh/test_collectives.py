"""Over a mesh, devices never disagree about whether a collective runs: they would wait for ever.

Inside jax.shard_map, the type of a value says over which axes of the mesh it may differ. A
collective over an axis must not stand in a loop or branch whose condition may differ over it.
"""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from cases import named
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed

TX = mpembed.optim.rowwise_adagrad(0.5)
COLLECTIVES = (
    "psum", "pmax", "pmin", "all_to_all", "ragged_all_to_all", "all_gather", "ppermute",
    "psum_scatter", "reduce_scatter", "pbroadcast", "pgather",
)  # fmt: skip


class Collective(NamedTuple):
    """One collective of a program."""

    name: str
    axes: frozenset[str]
    is_conditional: bool  # whether it stands in a loop with a condition, or in a branch
    differs: frozenset[str]  # the axes over which one of these conditions may differ


def axes_of(variable):
    """The axes over which a value may differ."""
    kind = getattr(variable.aval, "manual_axis_type", None)
    return frozenset() if kind is None else frozenset(kind.varying)


def jaxprs(value):
    """The programs among the parameters of an equation."""
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield from jaxprs(value.jaxpr)
    elif isinstance(value, tuple | list):
        yield from itertools.chain.from_iterable(map(jaxprs, value))


def collectives(jaxpr, is_conditional=False, differs=frozenset()):
    """Yields every Collective of a traced program."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name.removesuffix("_invariant").removesuffix("_invarying") in COLLECTIVES:
            axes = equation.params.get("axes", equation.params.get("axis_name", ()))
            axes = {axes} if isinstance(axes, str) else set(axes)
            yield Collective(name, frozenset(axes), is_conditional, differs)
        inside, apart = is_conditional, differs
        if name == "cond":
            inside, apart = True, differs | axes_of(equation.invars[0])
        elif name == "while":
            condition = equation.params["cond_jaxpr"].jaxpr
            inside, apart = True, differs | axes_of(condition.outvars[0])
        for value in equation.params.values():
            for other in jaxprs(value):
                yield from collectives(other, inside, apart)


def found_in(function, *arguments):
    return list(collectives(jax.make_jaxpr(function)(*arguments).jaxpr))


class Case(NamedTuple):
    shape: tuple[int, ...]
    is_raw: bool = False
    budget: int | None = None
    placement: mpembed.Placement = mpembed.Placement("rows")
    is_pooled: bool = False
    implementation: str = "xla"


CASES = {
    "rows": Case((4,)),
    "rows, a budget": Case((4,), budget=100),
    "rows and replicas, a budget": Case((2, 4), budget=100),
    "rows of the same batch": Case((4,), placement=mpembed.Placement("rows", batch_axes=())),
    "vectors": Case((2, 4), is_pooled=True),
    "raw ids": Case((2, 4), is_raw=True),
    "replicated": Case((4,), placement=mpembed.Placement("replicated")),
    "kernels, a budget": Case((2, 4), budget=100, implementation="pallas_interpret"),
    "kernels, raw ids": Case((2, 4), is_raw=True, implementation="pallas_interpret"),
}


def step(state, ids, upstream, is_pooled):
    if is_pooled:
        state, plan, _ = mpembed.embed(state, ids, tx=TX)
        return mpembed.apply_pooled_gradients(state, plan, upstream, tx=TX)
    state, plan = mpembed.prefetch(state, ids)
    rows = mpembed.lookup(state, plan)
    _, pull_back = jax.vjp(lambda rows: mpembed.pool(rows, plan.inverse), rows)
    return mpembed.apply_gradients(state, plan, rows, *pull_back(upstream), tx=TX)


@pytest.mark.parametrize(
    "case", named(CASES, fast={*CASES} - {"rows, a budget", "rows of the same batch"}, core=())
)
def test_no_collective_waits_for_a_condition_that_devices_may_decide_differently(case):
    names = ("data", "rows")[-len(case.shape) :]
    mesh = jax.make_mesh(case.shape, names, axis_types=(AxisType.Auto,) * len(names))
    tables = [mpembed.TableSpec(name, None if case.is_raw else 3000) for name in "ab"]
    spec = mpembed.EmbeddingSpec(
        tables,
        8,
        "int8",
        mpembed.CacheSpec(num_rows=256, ways=2),
        max_unique_ids=case.budget,
        vocabulary=mpembed.VocabularySpec(560, ways=4) if case.is_raw else None,
    )
    init = partial(mpembed.init, spec=spec, tx=TX, mesh=mesh, axis_name="rows")
    init = partial(init, placement=case.placement, implementation=case.implementation)
    state = jax.eval_shape(init, jax.ShapeDtypeStruct((2,), jnp.uint32))
    specs = mpembed.partition_specs(state)
    batch = P(state.layout.batch_axes or None)
    run = jax.shard_map(
        partial(step, is_pooled=case.is_pooled),
        mesh=mesh,
        in_specs=(specs, batch, batch),
        out_specs=specs,
    )
    shape = (64, 2, 2) if case.is_raw else (64, 2)
    ids = jax.ShapeDtypeStruct(shape, jnp.uint32 if case.is_raw else jnp.int32)
    found = found_in(run, state, ids, jax.ShapeDtypeStruct((64, 2, 8), jnp.float32))
    assert [c for c in found if c.axes & c.differs] == []
    if case.placement.kind == "rows":
        assert {"all_to_all", "psum"} <= {c.name.removesuffix("_invariant") for c in found}
        # The exchange of a full width stands in branches.
        assert [c for c in found if c.is_conditional and c.name == "all_to_all"]


@pytest.mark.parametrize("kind", ["branch", "loop"])
def test_a_condition_that_differs_would_be_seen(kind):
    mesh = jax.make_mesh((2, 2), ("data", "rows"), axis_types=(AxisType.Auto,) * 2)

    def body(x):
        mine = lax.axis_index("rows").astype(jnp.int32)
        if kind == "branch":
            return lax.cond(mine > 0, lambda: lax.all_gather(x, "rows"), lambda: jnp.stack([x, x]))
        return lax.fori_loop(
            0, mine, lambda _, x: x + lax.all_to_all(x, "rows", 0, 0, tiled=True), x
        )

    spec = P(("data", "rows"))
    run = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)
    (found,) = found_in(run, jnp.zeros(8))
    assert found.is_conditional and found.differs == {"rows"} == found.axes
