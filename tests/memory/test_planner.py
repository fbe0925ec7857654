"""A plan fits its budget, its bytes are those of the live states, and it says why."""

import functools
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import peaks
import pytest
from cases import Refused, named

import mpembed_jax as mpembed
from mpembed_jax import memory, vocabularies
from mpembed_jax.memory import __main__, planner
from mpembed_jax.row_ids import NO_ID

TX = mpembed.optim.rowwise_adagrad(0.1)
ROOT = Path(__file__).parents[2]
TABLES = {"user": (20_000, 64), "item": (30_000, 64), "tag": (900, 16), "shop": (40_000, 16)}
FLOAT32 = sum(4 * rows * (dim + 1) for rows, dim in TABLES.values())


@pytest.fixture(scope="module", autouse=True)
def one_count():
    """Plans for the same tables share their counts of bytes, each of which traces init."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "report", functools.cache(planner.report))
        yield


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


class Budget(NamedTuple):
    """A budget, and the formats that it allows."""

    share: float  # of the float32 state
    formats: dict[str, str]

    @property
    def name(self):
        return str(self.share)


BUDGETS = (
    Budget(1.1, {"dim64": "float32", "dim16": "float32", "small16": "float32"}),
    Budget(0.5, {"dim64": "int8", "dim16": "float32"}),
    Budget(0.25, {"dim64": "int4", "dim16": "int8"}),
    Budget(0.19, {"dim64": "int4", "dim16": "int4"}),
)


@pytest.mark.parametrize("budget", named(BUDGETS))
def test_the_live_states_have_the_bytes_of_the_plan_and_fit(budget):
    limit = int(budget.share * FLOAT32)
    plan = memory.plan(TABLES, limit, tx=TX)
    states = {name: mpembed.init(jax.random.key(0), spec, TX) for name, spec in plan.specs.items()}
    assert plan.device_bytes == sum(map(nbytes, states.values())) <= limit
    for choice in plan.choices:
        assert choice.device_bytes == nbytes(states[choice.name])
    formats = {name: spec.storage.name for name, spec in plan.specs.items()}
    assert formats.items() >= budget.formats.items()
    if budget.share == 0.19:  # a smaller cache, before fewer bits
        assert plan.specs["dim64"].cache.fraction == 0.01
    planned = [(t.name, s.embedding_dim) for s in plan.specs.values() for t in s.tables]
    assert sorted(planned) == sorted((name, dim) for name, (_, dim) in TABLES.items())


def test_the_bytes_of_a_mesh_are_those_of_each_device():
    plan = memory.plan(TABLES, 8_000_000, tx=TX, devices=4)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    kinds = set()
    for choice in plan.choices:
        state = mpembed.init(
            jax.random.key(0), choice.spec, TX, mesh=mesh, placement=choice.placement
        )
        kinds.add(choice.placement.kind)
        for device in mesh.devices:
            held = sum(
                shard.data.nbytes
                for leaf in jax.tree.leaves(state)
                for shard in leaf.addressable_shards
                if shard.device == device
            )
            assert held == choice.device_bytes
    assert kinds == {"rows", "replicated"}


@pytest.mark.slow
@pytest.mark.parametrize("shape", named([(4096,), (512, 20)], fast={"512-20"}, core=()))
def test_temporaries_are_those_of_a_compiled_step(shape):
    plan = memory.plan({"a": (50_000, 16)}, "10MB", tx=TX, batch_shape=shape)
    (choice,) = plan.choices
    first, *rest = shape
    peak = peaks.of_training([choice.spec], TX, (first, 1, *rest))
    assert choice.temporary_bytes == pytest.approx(peak - choice.device_bytes, rel=0.1)
    assert plan.device_bytes == choice.device_bytes + choice.temporary_bytes


@pytest.mark.parametrize("shape", named([(4096,), (512, 20)], core={"512-20"}))
def test_temporaries_of_two_stacks_are_those_of_one_program(shape):
    """With bags, XLA uses memory of one stack again for another: their sum is half too much."""
    tables = {"a": (5_000, 16), "b": (5_000, 24)}
    plan = memory.plan(tables, "20MB", tx=TX, batch_shape=shape)
    first, *rest = shape
    peak = peaks.of_training(plan.specs.values(), TX, (first, 1, *rest))
    states = sum(choice.device_bytes for choice in plan.choices)
    assert plan.temporary_bytes == pytest.approx(peak - states, rel=0.1)
    assert plan.device_bytes == states + plan.temporary_bytes
    assert f"temporaries of one step: {plan.temporary_bytes:,} bytes" in str(plan)


def test_a_plan_of_bags_is_accepted_with_the_bytes_that_it_states():
    """Nothing is compared with the sum of the temporaries where one program needs less."""
    tables = {"a": (5_000, 16), "b": (5_000, 24)}
    best = memory.plan(tables, "20MB", tx=TX, batch_shape=(512, 20))
    assert best.temporary_bytes < 0.9 * sum(choice.temporary_bytes for choice in best.choices)
    plan = memory.plan(tables, best.device_bytes, tx=TX, batch_shape=(512, 20))
    assert plan.specs == best.specs and plan.device_bytes == best.device_bytes


@pytest.mark.slow
def test_the_smallest_budget_for_bags_is_one_that_is_accepted():
    tables = {"a": (5_000, 16), "b": (5_000, 24)}
    least = smallest_budget(tables, 1000, batch_shape=(512, 20))
    assert memory.plan(tables, least, tx=TX, batch_shape=(512, 20)).device_bytes <= least


@pytest.mark.slow
def test_temporaries_over_a_mesh_are_those_of_each_device():
    """One stack is divided by rows, the other has a copy on each device."""
    tables = {"a": (200_000, 16), "b": (5_000, 24)}
    plan = memory.plan(tables, "8MB", tx=TX, devices=4, batch_shape=(512, 5))
    placements = [choice.placement for choice in plan.choices]
    assert {placement.kind for placement in placements} == {"rows", "replicated"}
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = plan.specs.values()
    peak = peaks.of_training(specs, TX, (512, 1, 5), mesh=mesh, placements=placements)
    states = sum(choice.device_bytes for choice in plan.choices)
    assert plan.temporary_bytes == pytest.approx(peak - states, rel=0.1)
    assert f"temporaries of one step: {plan.temporary_bytes:,} bytes" in str(plan)


def test_host_memory_takes_the_packed_rows_of_what_does_not_fit():
    plan = memory.plan(TABLES, 1_500_000, tx=TX, host_budget="5MB")
    hosted = [c for c in plan.choices if c.host_bytes]
    assert hosted and plan.device_bytes <= 1_500_000 and plan.host_bytes <= 5_000_000
    for choice in hosted:
        assert choice.spec.memory_kind == "pinned_host"
        assert "packed rows are in host memory" in choice.reason
        report = memory.report(choice.spec, TX)
        assert choice.host_bytes == report.host_bytes == report.components["table"]


def test_rows_on_the_host_are_packed_and_cached_however_large_the_host_is():
    plan = memory.plan(TABLES, 1_500_000, tx=TX, host_budget="1GB")
    hosted = [c for c in plan.choices if c.host_bytes]
    assert hosted
    for choice in hosted:
        assert choice.spec.storage.name != "float32" and choice.spec.cache is not None


def smallest_budget(tables, budget, **options):
    """The budget that a refused plan names."""
    with pytest.raises(ValueError, match="smallest budget that works is") as refused:
        memory.plan(tables, budget, tx=TX, **options)
    return int(re.search(r"works is ([\d,]+)", str(refused.value))[1].replace(",", ""))


@pytest.mark.parametrize("host_budget", [None, "5MB", "1GB"])
def test_the_smallest_budget_is_one_that_is_accepted(host_budget):
    least = smallest_budget(TABLES, 1000, host_budget=host_budget)
    assert memory.plan(TABLES, least, tx=TX, host_budget=host_budget).device_bytes <= least
    assert smallest_budget(TABLES, least - 1, host_budget=host_budget) == least


SMALL = {"big": (1_000_000, 64), "small": (1_000, 64)}


@pytest.mark.parametrize("devices", [1, 4])
def test_the_smallest_budget_is_accepted_where_small_tables_would_fit_it_but_for_float32(devices):
    """At this budget, they take little of it: a stack of their own would need more than it."""
    least = smallest_budget(SMALL, "1MB", devices=devices)
    plan = memory.plan(SMALL, least, tx=TX, devices=devices)
    assert list(plan.specs) == ["dim64"] and plan.device_bytes == least
    assert smallest_budget(SMALL, least - 1, devices=devices) == least
    more = memory.plan(SMALL, int(1.1 * least), tx=TX, devices=devices)
    assert list(more.specs) == ["dim64", "small64"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_budget_above_the_smallest_is_never_refused(seed):
    rng = np.random.default_rng(seed)
    rows = np.exp(rng.uniform(0, np.log(3_000_000), 5)).astype(int)
    tables = {f"t{i}": (int(n), int(rng.choice([8, 64]))) for i, n in enumerate(rows)}
    options = {"devices": int(rng.choice([1, 2]))}
    if options["devices"] == 1 and seed % 2:
        options["host_budget"] = "1MB"
    least = smallest_budget(tables, 1, **options)
    for factor in (1, 1.001, 1.01, 1.1, 2, 10, 60, 200):
        limit = int(factor * least)
        assert memory.plan(tables, limit, tx=TX, **options).device_bytes <= limit
    for limit in (least - 1, int(0.99 * least), least // 2, least // 60):
        assert smallest_budget(tables, max(1, limit), **options) == least


@pytest.mark.parametrize("devices", [1, 4])
def test_tables_beyond_the_rows_of_a_stack_begin_another(devices):
    """A step of a larger stack takes pairs of ids, and no serving file holds it."""
    tables = {name: (900_000_000, 16) for name in "abcd"} | {"e": (5_000_000, 16)}
    plan = memory.plan(tables, "1TB", tx=TX, devices=devices)
    names = {name: [table.name for table in spec.tables] for name, spec in plan.specs.items()}
    assert names == {"dim16": ["a", "b"], "dim16_2": ["c", "d", "e"]}
    full = {"a": (NO_ID - 20_001, 8), "b": (20_000, 8), "c": (20_000, 8)}
    specs = memory.plan(full, "1TB", tx=TX, devices=devices).specs
    assert [spec.num_rows for spec in specs.values()] == [NO_ID - 1, 20_000]


def test_stacks_of_different_dims_may_need_different_formats_to_fit():
    """At D = 16, INT4 + 1 % is smaller than INT2 + 5 %; at D = 64, it is larger."""
    tables = {"a": (100_000, 16), "b": (100_000, 64)}
    specs = memory.plan(tables, smallest_budget(tables, 1000), tx=TX).specs
    found = {name: (spec.storage.name, spec.cache.fraction) for name, spec in specs.items()}
    assert found == {"dim16": ("int4", 0.01), "dim64": ("int2", 0.05)}


def test_a_sample_of_ids_shows_what_the_cache_takes_and_saves_a_cache_that_buys_nothing():
    rows = {"a": (100_000, 16)}
    limit = 100_000 * 20
    rng = np.random.default_rng(0)
    even = {"a": rng.integers(0, 100_000, 400_000)}
    skewed = {"a": np.minimum(rng.zipf(2.0, 400_000), 100_000) - 1}
    assert memory.plan(rows, limit, tx=TX, ids=even).specs["dim16"].cache.fraction == 0.05
    plan = memory.plan(rows, limit, tx=TX, ids=skewed)
    assert plan.specs["dim16"].cache.fraction == 0.01
    used = np.sort(np.bincount(skewed["a"]))[::-1]
    share = used[:1000].sum() / used.sum()
    assert f"the rows that fit the cache get {share:.0%} of the ids" in str(plan)


def test_accuracy_is_that_of_the_measured_table():
    page = (ROOT / planner.SOURCE.split(",")[0]).read_text()
    header, *lines = (
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in page.splitlines()
        if line.startswith("| ")
    )
    measured = {line[0]: dict(zip(header, line, strict=False)) for line in lines}
    for level in planner.LEVELS[1:]:
        row = measured[f"{level.storage.upper()} + {100 * level.fraction:.0f} %"]
        for dim, accuracy in level.accuracy.items():
            assert row[f"Reddit, D = {dim}"] == accuracy


def test_accuracy_of_raw_ids_is_that_of_the_measured_table():
    page = (ROOT / planner.RAW_SOURCE.split(",")[0]).read_text()
    page = page[page.index("| rows | D = 16 | × | D = 64 | × |") : page.index("On the twin, INT8")]
    for level in planner.RAW_LEVELS:
        cache = "" if level.fraction is None else f" + {100 * level.fraction:.0f} %"
        name = level.storage.upper().replace("FLOAT", "FP") + cache
        (line,) = re.findall(rf"\| {re.escape(name)}, k = {level.admit_after} \|.*", page)
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert (cells[1], cells[3]) == (level.accuracy[16], level.accuracy[64])


RNG = np.random.default_rng(0)
SAMPLES = {
    "user": (RNG.random(60_000) ** 3 * 20_000).astype(np.int64) * 2**33 + 5,  # no int32
    "city": [*RNG.choice(["Ulm", "Bern", "Oslo"], 200).tolist(), None, "Rome"],
}
RAW = {"user": (None, 16), "city": (None, 16), "shop": (12_000, 16)}


def own_ids(times):
    """How many ids of the samples occur at least so many times, counted by Python."""
    counts = [Counter(v for v in np.array(s, object).tolist() if v) for s in SAMPLES.values()]
    return sum(n >= times for count in counts for n in count.values())


def plan_of_raw_ids(share):
    """A plan within a share of the bytes that are used if there is room for all."""
    best = memory.plan(RAW, "1GB", tx=TX, ids=SAMPLES)
    budget = int(share * best.device_bytes)
    return memory.plan(RAW, budget, tx=TX, ids=SAMPLES)


class Pool(NamedTuple):
    """A budget, and what the stack of raw ids gets with it."""

    share: float  # of the largest plan
    storage: str
    admit_after: int

    @property
    def name(self):
        return str(self.share)


POOLS = (
    Pool(1.0, "float32", 2),
    Pool(0.5, "int8", 2),
    Pool(0.35, "int4", 2),
    Pool(0.25, "int4", 3),
)


@pytest.mark.parametrize("pool", named(POOLS))
def test_a_pool_has_rows_for_the_ids_that_occur_often_and_the_bytes_of_the_plan(pool):
    plan = plan_of_raw_ids(pool.share)
    (choice,) = [c for c in plan.choices if c.spec.vocabulary is not None]
    spec = choice.spec
    assert [(t.name, t.vocabulary_size) for t in spec.tables] == [("user", None), ("city", None)]
    assert (spec.storage.name, spec.vocabulary.admit_after) == (pool.storage, pool.admit_after)
    rows = spec.vocabulary.geometry.lines
    assert spec.vocabulary.num_rows == rows
    assert 1.1 * own_ids(pool.admit_after) <= rows <= 1.3 * own_ids(pool.admit_after)
    states = {name: mpembed.init(jax.random.key(0), spec, TX) for name, spec in plan.specs.items()}
    assert plan.device_bytes == sum(map(nbytes, states.values())) <= plan.budget
    assert choice.device_bytes == nbytes(states[choice.name])
    text = str(plan)
    seen = " / ".join(f"{own_ids(times):,}" for times in (1, 2, 3))
    assert f"{seen} ids of the sample occur at least 1 / 2 / 3 times" in text
    assert f"{rows:,} rows: one for each id that occurs at least k = {pool.admit_after}" in text
    assert planner.RAW_SOURCE in text and f"{choice.device_bytes:,}" in text


def test_nearly_all_ids_that_a_pool_was_made_for_get_rows_of_their_own():
    spec = plan_of_raw_ids(1.0).specs["raw16"]
    state = mpembed.init(jax.random.key(0), spec, TX)
    kept = {"user": SAMPLES["user"], "city": [v for v in SAMPLES["city"] if v]}
    num_ids = {name: len(set(column)) for name, column in kept.items()}
    assert {t.name: round(t.initial_bound**-2) for t in spec.tables} == num_ids
    pairs = spec.raw_ids(kept)
    counts = jax.tree.map(lambda p: np.ones(len(p), np.int64), pairs)
    state = vocabularies.from_counts(state, pairs, counts)
    assert mpembed.stats(state).vocabulary.num_owned >= 0.95 * own_ids(2)


def test_devices_that_cannot_divide_a_cache_are_named():
    tables = [(100_000, 64)]
    with pytest.raises(
        ValueError, match=r"smallest budget .*with 3 devices, a cache or pool cannot be"
    ):
        memory.plan(tables, "3MB", tx=TX, devices=3)
    (choice,) = memory.plan(tables, "8MB", tx=TX, devices=3).choices
    assert choice.placement.kind == "replicated"
    assert choice.reason.endswith("each device, because 3 devices cannot divide its cache")
    (choice,) = memory.plan(tables, "3MB", tx=TX, devices=4).choices
    assert "because" not in choice.reason


def test_a_table_without_ids_in_its_sample_starts_as_usual():
    ids = {"user": [1, 1, 2, 2], "ad": [None, None]}
    plan = memory.plan({"user": (None, 16), "ad": (None, 16)}, "1MB", tx=TX, ids=ids)
    (choice,) = plan.choices
    assert [table.initial_bound for table in choice.spec.tables] == [2**-0.5, None]


def test_a_tight_budget_admits_later_and_too_tight_a_one_names_the_smallest():
    least = smallest_budget(RAW, 1000, ids=SAMPLES)
    plan = memory.plan(RAW, least, tx=TX, ids=SAMPLES)
    assert plan.device_bytes == least
    spec = plan.specs["raw16"]
    assert (spec.storage.name, spec.vocabulary.admit_after) == ("int4", 3)
    assert smallest_budget(RAW, least - 1, ids=SAMPLES) == least


def test_host_memory_takes_the_rows_of_a_pool():
    plan = memory.plan(RAW, 200_000, tx=TX, ids=SAMPLES, host_budget="1GB")
    (choice,) = [choice for choice in plan.choices if choice.spec.vocabulary is not None]
    assert choice.spec.memory_kind == "pinned_host" and choice.spec.vocabulary.admit_after == 2
    state = mpembed.init(jax.random.key(0), choice.spec, TX)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.table)}
    assert kinds == {"pinned_host"}
    assert choice.host_bytes == nbytes(state.table)
    assert choice.device_bytes == nbytes(state) - choice.host_bytes
    assert plan.device_bytes <= plan.budget
    assert "its packed rows are in host memory, its cache is on the device" in str(plan)


def test_masked_entries_of_a_sample_are_padding():
    sample = np.ma.array([3, 3, 1, 999], mask=[False, False, False, True])
    plans = [memory.plan([(9, 4)], "1MB", tx=TX, ids={"table0": s}) for s in (sample, [3, 3, 1])]
    assert str(plans[0]) == str(plans[1])


def test_the_bytes_of_a_pool_over_a_mesh_are_those_of_each_device():
    ids = {"user": np.arange(40_000) // 2}
    plan = memory.plan({"user": (None, 64)}, "2MB", tx=TX, ids=ids, devices=4)
    (choice,) = plan.choices
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    state = mpembed.init(jax.random.key(0), choice.spec, TX, mesh=mesh, placement=choice.placement)
    assert choice.placement.kind == "rows"
    for device in mesh.devices:
        held = [s for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards]
        assert choice.device_bytes == sum(s.data.nbytes for s in held if s.device == device)


def test_the_command_line_plans_a_pool_for_raw_ids(tmp_path, capsys):
    file = tmp_path / "ids.csv"
    file.write_text("user,item\n" + "".join(f"u{i % 70},{i}\n" for i in range(300)) + ",7\n")
    command = ["plan", str(file), "--budget", "1MB", "--raw"]
    assert __main__.main(command) == 1
    assert "give --dim" in capsys.readouterr().err
    assert __main__.main([*command, "--dim", "16"]) == 0
    printed = capsys.readouterr().out
    assert "370 / 71 / 70 ids of the sample occur at least 1 / 2 / 3 times" in printed
    assert re.search(r"raw16 +98 +16 +float32, k = 2", printed)
    tables = tmp_path / "tables.csv"
    tables.write_text("rows,dim\n5,6\n")
    assert __main__.main(["plan", str(tables), "--budget", "1MB", "--raw"]) == 1
    assert "is a file of tables" in capsys.readouterr().err
    polars = pytest.importorskip("polars")
    polars.read_csv(file).write_parquet(tmp_path / "ids.parquet")
    command[1] = str(tmp_path / "ids.parquet")
    assert __main__.main([*command, "--dim", "16"]) == 0
    assert capsys.readouterr().out == printed


def test_the_command_line_reads_the_csv_of_a_spreadsheet_and_no_other_bytes(tmp_path, capsys):
    file = tmp_path / "tables.csv"
    file.write_text("rows,dim\n500,16\n", encoding="utf-8-sig")
    assert __main__.main(["plan", str(file), "--budget", "8MB"]) == 0
    assert re.search(r"small16 +500 +16", capsys.readouterr().out)
    file.write_bytes(b"\xff\x80")
    assert __main__.main(["plan", str(file), "--budget", "8MB"]) == 1
    assert "tables.csv cannot be read as CSV" in capsys.readouterr().err


def test_the_command_line_reads_tables_and_ids(tmp_path, capsys):
    file = tmp_path / "tables.csv"
    lines = [f"{name},{rows},{dim}" for name, (rows, dim) in TABLES.items()]
    file.write_text("name,rows,dim\n" + "\n".join(lines) + "\n")
    assert __main__.main(["plan", str(file), "--budget", "8MB"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"dim64 +50,000 +64", printed) and "of 8,000,000 bytes" in printed
    assert __main__.main(["plan", str(file), "--budget", "1MB"]) == 1
    assert "smallest budget that works" in capsys.readouterr().err
    file.with_name("longer.csv").write_text("rows,dim\n3,4\n5,6,7\n")
    assert __main__.main(["plan", str(file.with_name("longer.csv")), "--budget", "8MB"]) == 1
    assert "row 2 of" in capsys.readouterr().err
    ids = tmp_path / "ids.csv"
    ids.write_text("user,item\n" + "".join(f"u{i % 70},{i}\n" for i in range(300)))
    assert __main__.main(["plan", str(ids), "--budget", "1MB"]) == 1
    assert "give --dim" in capsys.readouterr().err
    assert __main__.main(["plan", str(ids), "--budget", "1MB", "--dim", "16"]) == 0
    assert "370 " in capsys.readouterr().out
    polars = pytest.importorskip("polars")
    polars.read_csv(file).write_parquet(tmp_path / "tables.parquet")
    assert __main__.main(["plan", str(tmp_path / "tables.parquet"), "--budget", "8MB"]) == 0
    assert capsys.readouterr().out == printed
    (tmp_path / "no.parquet").write_text("rows,dim")
    assert __main__.main(["plan", str(tmp_path / "no.parquet"), "--budget", "8MB"]) == 1
    assert "cannot be read as parquet" in capsys.readouterr().err


HEADERS = ("rows,dim,name", "Rows, DIM ,NAME", "rows ,dim,name,,")


@pytest.mark.parametrize("header", HEADERS)
def test_a_file_of_tables_is_known_however_its_columns_are_written(header, tmp_path, capsys):
    file = tmp_path / "a.csv"
    file.write_text(f"{header}\n500,16,a\n1e3,16.0,b\n")
    assert __main__.main(["plan", str(file), "--budget", "8MB", "--dim", "4"]) == 0
    assert re.search(r"small16 +1,500 +16", capsys.readouterr().out)


WRONG_FILES = {
    "equal columns of ids": ("user,item,user\n1,2,3\n", "several columns of the name 'user'"),
    "equal columns of tables": ("rows,dim,Rows\n1,2,3\n", "several columns of the name 'rows'"),
    "equal tables": ("name,rows,dim\na,5,4\nb,5,4\na,6,4\n", r"got \['a'\] several times"),
    "a half": ("rows,dim\n5.5,4\n", "must be whole numbers, got '5.5'"),
    "negative": ("rows,dim\n-5,4\n", "must be whole numbers, got '-5'"),
    "no cell": ("rows,dim\n5\n", "must be whole numbers, got None"),
    "not a number": ("rows,dim\nnan,4\n", "must be whole numbers, got 'nan'"),
}


@pytest.mark.parametrize("case", named(WRONG_FILES))
def test_a_file_that_says_two_things_is_refused(case, tmp_path, capsys):
    text, message = case
    (tmp_path / "a.csv").write_text(text)
    assert __main__.main(["plan", str(tmp_path / "a.csv"), "--budget", "8MB", "--dim", "4"]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_empty_cells_of_parquet_are_those_of_csv(tmp_path, capsys):
    polars = pytest.importorskip("polars")
    columns = {"user": ["a", "b", "", None, "a"], "item": [7.0, float("nan"), None, 3.0, 7.0]}
    polars.DataFrame(columns).write_parquet(tmp_path / "ids.parquet")
    (tmp_path / "ids.csv").write_text("user,item\na,7\nb,\n,\n,3\na,7\n")
    printed = []
    for name in ("ids.csv", "ids.parquet"):
        words = ["plan", str(tmp_path / name), "--budget", "8MB", "--dim", "16"]
        assert __main__.main(words) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and re.search(r"small16 +4 +16", printed[0])
    polars.DataFrame({"rows": [1e3, 500.0], "dim": [16, 16]}).write_parquet(
        tmp_path / "tables.parquet"
    )
    assert __main__.main(["plan", str(tmp_path / "tables.parquet"), "--budget", "8MB"]) == 0
    assert re.search(r"small16 +1,500 +16", capsys.readouterr().out)


@pytest.mark.parametrize(
    "mistake",
    named([
        Refused(lambda: memory.plan(5, 1, tx=TX), "tables must be", TypeError),
        Refused(lambda: memory.plan([], 1, tx=TX), "tables must name at least one table"),
        Refused(
            lambda: memory.plan([(0, 4)], 1, tx=TX),
            "'table0' must have 1 to .*, got 0 rows of dim 4",
        ),
        Refused(lambda: memory.plan([(3, 4, 5)], 1, tx=TX), r"'table0' must be \(rows, dim\)"),
        Refused(lambda: memory.plan([(3, 4)], "much", tx=TX), "budget must be a number of bytes"),
        Refused(lambda: memory.plan([(3, 4)], 99, tx=TX, devices=0), "devices must be"),
        Refused(
            lambda: memory.plan([(3, 4)], 99, tx=TX, devices="2"),
            "devices must be an integer, got '2'",
            TypeError,
        ),
        Refused(
            lambda: memory.plan([(3, 4)], 99, tx=TX, host_budget="x"),
            "host_budget must be a number of bytes .*, got 'x'",
        ),
        Refused(
            lambda: memory.plan([(3, 4)], 99, tx=TX, ids=[[1]]),
            r"ids must be \{table: sample\}, got list",
            TypeError,
        ),
        Refused(
            lambda: memory.plan([(3, 4)], 99, tx=TX, devices=2, batch_shape=(3,)),
            "must be a multiple of 2, the devices that divide a batch, got 3",
        ),
        Refused(
            lambda: memory.plan([(3, 4)], 99, tx=TX, devices=16, batch_shape=(32,)),
            "compiled for 16 devices, and there are 8; .*device_count=16",
        ),
        Refused(
            lambda: memory.plan([(3, 4)], 99, tx=TX, devices=2, host_budget="1GB"),
            "over 2 devices has its tables in device memory, got host_budget='1GB'",
        ),
        Refused(lambda: memory.plan([(3, 4)], 99, tx=TX, ids={"b": []}), r"ids name tables \['b'"),
        Refused(
            lambda: memory.plan([(9, 4)], 99, tx=TX, ids={"table0": [0.5]}),
            r"must be row numbers, integers, got float64.*\(None, dim\)",
            TypeError,
        ),
        Refused(
            lambda: memory.plan([(9, 4)], 99, tx=TX, ids={"table0": [NO_ID, 3, 9]}),
            r"sample of table 'table0' must be in \[0, 9\), got 3 to 9",
        ),
        Refused(lambda: memory.plan([(3, 4)], 99, tx=TX, batch_shape=5), "batch_shape must be"),
        Refused(lambda: memory.plan([(3, 4)], 99, tx=TX, batch_shape=(0,)), "batch_shape must be"),
        Refused(
            lambda: memory.plan(TABLES, 99, tx=TX, devices=2),
            "the smallest budget that works is [0-9,]+ bytes$",
        ),
        Refused(lambda: memory.plan([(None, 4)], 99, tx=TX), "its ids are raw: give a sample"),
        Refused(lambda: memory.plan([(3, None)], 99, tx=TX), r"or \(None, dim\) for raw ids"),
        Refused(lambda: memory.plan([("3", 4)], 99, tx=TX), r"'table0' must be \(rows, dim\), or"),
        Refused(
            lambda: memory.plan([(None, 4)], 99, tx=TX, ids={"table0": [1, 2, None]}),
            "no id occurs twice",
        ),
        Refused(
            lambda: memory.plan([(None, 4)], 99, tx=TX, ids={"table0": [0.5]}),
            "raw ids must be all integers, or all bytes and strings.*float",
            TypeError,
        ),
    ]),
)  # fmt: skip
def test_what_is_wrong_is_said(mistake):
    with pytest.raises(mistake.error, match=mistake.message):
        mistake.call()


def test_sizes_are_numbers_or_texts():
    sizes = {"16GB": 16 * 10**9, "1.5 GiB": 3 * 2**29, "300": 300, 7: 7, "2k": 2000, "1_000": 1000}
    sizes |= {"16e9": 16 * 10**9, "1.5E+3 kB": 1_500_000, "2PB": 2 * 10**15, "2 PiB": 2**51}
    assert {size: planner.parse_bytes(size) for size in sizes} == sizes
