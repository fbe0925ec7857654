"""Over a mesh, devices never disagree about whether a collective runs: they would wait for ever.

Inside jax.shard_map, the type of a value says over which axes of the mesh it may differ. A
collective over an axis must not stand in a loop or branch whose condition may differ over it.
"""

import itertools
import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from cases import named
from jax import lax
from jax.extend.core import Var
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


def widths_decided(jaxpr, sources=None):
    """Yields, for each branch that exchanges, the value that decides it.

    A value that enters a program, or only changes its dtype, is the one that it was outside.

    Args:
      jaxpr: a traced program.
      sources: {variable: value}, of the variables that enter it.
    """
    sources = {} if sources is None else sources

    def source(variable):
        return sources.get(variable, variable) if isinstance(variable, Var) else variable

    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "convert_element_type":
            sources[equation.outvars[0]] = source(equation.invars[0])
        inside = [other for value in equation.params.values() for other in jaxprs(value)]
        if name == "cond":
            if any(c.name == "all_to_all" for branch in inside for c in collectives(branch)):
                yield source(equation.invars[0])
            continue
        for other in inside:
            if len(other.invars) == len(equation.invars):
                own = dict(zip(other.invars, map(source, equation.invars), strict=True))
                yield from widths_decided(other, own)
                if len(other.outvars) == len(equation.outvars) and name != "scan":
                    for outer, inner in zip(equation.outvars, other.outvars, strict=True):
                        sources[outer] = own.get(inner, inner) if isinstance(inner, Var) else inner


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
    upstream = jax.ShapeDtypeStruct((64, 2, 8), jnp.float32)
    program = jax.make_jaxpr(run)(state, ids, upstream).jaxpr
    found = list(collectives(program))
    assert [c for c in found if c.axes & c.differs] == []
    if case.placement.kind == "rows":
        assert {"all_to_all", "psum"} <= {c.name.removesuffix("_invariant") for c in found}
        # The exchange of a full width stands in branches: of ids, rows, and gradients. One value
        # decides all of them, before the ids leave. Another one decides about raw ids, which leave
        # first, and about their rows.
        assert [c for c in found if c.is_conditional and c.name == "all_to_all"]
        decided = list(widths_decided(program))
        num_budgets = case.budget is not None  # its branch sends the kept ids back
        num_exchanges = 3 + 2 * case.is_raw
        assert len(decided) == num_exchanges + num_budgets
        assert len(set(decided)) == 1 + case.is_raw + num_budgets


@pytest.mark.slow
def test_one_value_of_the_compiled_step_decides_about_a_full_width():
    """The host reads it before the ids leave, and again before rows and gradients do."""
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("t", 3000)], 8, "int8", mpembed.CacheSpec(num_rows=256, ways=2)
    )
    init = partial(mpembed.init, spec=spec, tx=TX, mesh=mesh, axis_name="rows")
    state = jax.eval_shape(
        partial(init, implementation="xla"), jax.ShapeDtypeStruct((2,), jnp.uint32)
    )

    def vectors_and_step(state, ids, upstream):
        state, plan, vectors = mpembed.embed(state, ids, tx=TX)
        return mpembed.apply_pooled_gradients(state, plan, upstream, tx=TX), vectors

    specs, batch = mpembed.partition_specs(state), P("rows")
    run = jax.shard_map(
        vectors_and_step, mesh=mesh, in_specs=(specs, batch, batch), out_specs=(specs, batch)
    )
    ids, upstream = (
        jax.ShapeDtypeStruct((64, *shape), dtype)
        for shape, dtype in (((), jnp.int32), ((8,), jnp.float32))
    )
    text = jax.jit(run, donate_argnums=0).lower(state, ids, upstream).compile().as_text()
    decided = re.findall(r" conditional\((%[\w.-]+)", text)
    assert len(decided) == 3 and len(set(decided)) == 1


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
