"""Machine code kept on disk between processes."""

import os
import pathlib
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

numba = pytest.importorskip("numba")

import mpembed_jax  # noqa: E402  after importorskip
from mpembed_jax.ops.cpu import call_frame, machine_code  # noqa: E402

PACKAGE = pathlib.Path(mpembed_jax.__file__).parent
SIGNATURE = numba.types.int64(numba.types.int64)

STEP = """
import sys
import jax, jax.numpy as jnp, numpy as np, numba
import mpembed_jax as mp
from mpembed_jax import optim

compilations = []
compile_once = numba.cfunc
numba.cfunc = lambda *args: compilations.append(args) or compile_once(*args)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
tx = optim.rowwise_adagrad(0.1)
spec = mp.EmbeddingSpec([mp.TableSpec("t", 500)], 16, cache=mp.CacheSpec(fraction=0.1, ways=8))

@jax.jit
def step(state, ids):
    if "bags" in sys.argv:
        state, plan, bags = mp.embed(state, ids.reshape(-1, 4), combiner="mean", tx=tx)
        return mp.apply_pooled_gradients(state, plan, bags, tx=tx)
    state, plan = mp.prefetch(state, ids)
    rows = mp.lookup(state, plan)
    return mp.apply_gradients(state, plan, rows, rows, tx=tx)

state = mp.init(jax.random.key(0), spec, tx)
for turn in range(3):
    state = step(state, jnp.arange(40 * turn, 40 * turn + 200, dtype=jnp.int32) % 500)
rows = np.asarray(mp.read(state, np.arange(500)))
print(len(compilations), rows.view(np.uint32).sum(dtype=np.uint64))
"""


def add_seven(number):
    return number + 7


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MPEMBED_JAX_CACHE_DIR", str(tmp_path / "code"))
    return tmp_path / "code"


@pytest.fixture
def compilations(monkeypatch):
    """The signatures that numba was asked to compile."""
    made, compile_once = [], numba.cfunc
    monkeypatch.setattr(numba, "cfunc", lambda kind: made.append(kind) or compile_once(kind))
    return made


def called(address, number):
    import ctypes

    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address)(number)


def test_second_load_reads_the_file(folder, compilations):
    for _ in range(2):
        code, address = machine_code.load("add_seven", add_seven, SIGNATURE)
        assert called(address, 5) == 12
        del code
    assert len(compilations) == 1
    assert [path.name.split("-")[0] for path in folder.iterdir()] == ["add_seven"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_broken_file_is_compiled_anew_and_replaced(folder, compilations, damage):
    machine_code.load("add_seven", add_seven, SIGNATURE)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes(
        {"truncated": whole[:-9], "flipped": bytes(flipped), "empty": b"", "foreign": b"x" * 99}[
            damage
        ]
    )
    for _ in range(2):
        _, address = machine_code.load("add_seven", add_seven, SIGNATURE)
        assert called(address, 5) == 12
    assert len(compilations) == 2  # the second of the two loads read the new file


def test_a_file_is_named_by_the_digest_of_the_package(folder):
    machine_code.load("add_seven", add_seven, SIGNATURE)
    (path,) = folder.iterdir()
    assert path.name == f"add_seven-{machine_code.digest(PACKAGE)}.bin"


def test_nothing_is_kept_if_the_sources_changed_after_they_were_imported(folder, monkeypatch):
    """The name of the file would promise code of the new sources."""
    monkeypatch.setattr(machine_code, "digest", lambda package: "of other sources")
    _, address = machine_code.load("add_seven", add_seven, SIGNATURE)
    assert called(address, 5) == 12
    assert not folder.exists()


def test_other_sources_have_another_digest(tmp_path):
    """Sources of the functions, and of the rooms whose constants they use."""
    same = shutil.copytree(PACKAGE, tmp_path / "same")
    digests = {machine_code.digest(PACKAGE), machine_code.digest(same)}
    assert len(digests) == 1
    changed = (
        "ops/cpu/bag_step",
        "serving/compiled",
        "cache/policy",
        "numerics/packing",
        "vocabulary/pool",
        "row_ids",
    )
    for number, name in enumerate(changed):
        other = shutil.copytree(PACKAGE, tmp_path / str(number))
        with (other / f"{name}.py").open("a") as source:
            source.write("# another\n")
        digests.add(machine_code.digest(other))
    assert len(digests) == 1 + len(changed)


@pytest.mark.parametrize("place", ["off", "a file stands in the way"])
def test_without_a_folder_every_process_compiles(tmp_path, compilations, monkeypatch, place):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("MPEMBED_JAX_CACHE_DIR", "" if place == "off" else str(blocked / "below"))
    for _ in range(2):
        _, address = machine_code.load("add_seven", add_seven, SIGNATURE)
        assert called(address, 5) == 12
    assert len(compilations) == 2


def test_two_threads_register_a_target_at_once():
    def double(frame):
        values = call_frame.argument(frame, 0, np.int32)
        doubled = call_frame.result(frame, 0, np.int32)
        for index in range(len(values)):
            doubled[index] = 2 * values[index]

    name, results, errors = f"test_double_{os.getpid()}", [], []
    barrier = threading.Barrier(4)

    def trace():
        try:
            barrier.wait()
            call_frame.register(name, double)
            call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((3,), jnp.int32))
            results.append(np.asarray(call(jnp.arange(3, dtype=jnp.int32))))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=trace) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(results) == 4
    np.testing.assert_array_equal(results, np.tile([0, 2, 4], (4, 1)))


ONE_OP = """
import sys
import jax.numpy as jnp, numpy as np
from mpembed_jax.ops.cpu import rows

array = jnp.arange(12, dtype=jnp.float32).reshape(4, 3)
index = jnp.asarray([2, 0], jnp.int32)
if "take" in sys.argv:
    np.testing.assert_array_equal(rows.take(array, index), np.asarray(array)[[2, 0]])
if "put" in sys.argv:
    changed = np.array(array)
    changed[[2, 0]] = -1
    np.testing.assert_array_equal(rows.put(array, index, jnp.full((2, 3), -1.0)), changed)
"""


@pytest.mark.slow
def test_code_of_two_processes_works_in_a_third(tmp_path):
    """Each was the first function of its process, so both have the same count in their symbols."""
    env = os.environ | {"MPEMBED_JAX_CACHE_DIR": str(tmp_path)}
    for ops in (["take"], ["put"], ["take", "put"]):
        subprocess.run([sys.executable, "-c", ONE_OP, *ops], env=env, check=True)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("step", ["rows", "bags"])
def test_new_process_loads_code_and_programs(step, tmp_path):
    """Two processes that start at once, and a third one that finds their files and compiles
    nothing.

    The whole command loads the code of single operations, in the test above and the first one.
    """
    env = os.environ | {
        "MPEMBED_JAX_CACHE_DIR": str(tmp_path / "code"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
    }
    command = [sys.executable, "-c", STEP, step]

    def start():
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

    first = [process.communicate()[0].split() for process in (start(), start())]
    programs = set(os.listdir(tmp_path / "programs"))
    later = start().communicate()[0].split()
    num_calls = {"rows": 4, "bags": 3}[step]
    # Who is later may find a file.
    assert num_calls <= sum(int(made) for made, _ in first) <= 2 * num_calls
    assert later == ["0", first[0][1]]
    assert first[1][1] == first[0][1]
    assert {p for p in os.listdir(tmp_path / "programs") if not p.endswith("-atime")} <= programs
