"""Checks the fields of a manifest and their types: it may come from an untrusted source.

The code that reads a checkpoint may rely on what `check` has checked. Sizes are compared elsewhere:
with those of the target in `restoring` and `convert`, and with those of the files in `array_files`.
"""

import base64
import binascii
import re
from typing import Any

from mpembed_jax.cache.spec import POLICIES
from mpembed_jax.checkpoint import array_files
from mpembed_jax.vocabulary.spec import PLACE_BITS

_MAX_INT = 2**63 - 1
_MAX_SHARDS = 2**20
# The names of the arrays that every embedding state has.
_ALWAYS = ("table.rows", "key", "step", "pending", "counters", "fingerprint")
_OF_CACHE = ("cache.tags", "cache.priority", "cache.dirty", "cache.rows")
_OF_VOCABULARY = ("vocabulary.owners", "vocabulary.sketch", "vocabulary.counters")
# The name of an array's folder. Earlier versions took the percent-encoded name of the array.
_KEY = re.compile(r"[A-Za-z0-9_.~%-]{1,255}", re.ASCII)


class SchemaError(ValueError):
    """Raised if a field of a manifest is missing or wrong. The message names the field."""


def is_count(value: Any) -> bool:
    """Returns whether a JSON value is an integer from 0 to 2**63 - 1."""
    return type(value) is int and 0 <= value <= _MAX_INT


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_list(value: Any, kind: Any, length: int | None = None) -> bool:
    return (
        isinstance(value, list)
        and (length is None or len(value) == length)
        and all(kind(item) for item in value)
    )


def _is_map(value: Any, kind: Any) -> bool:
    return isinstance(value, dict) and all(kind(item) for item in value.values())


def _require(is_right: bool, field: str, value: Any) -> None:
    if not is_right:
        raise SchemaError(f"{field} is {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}.."


def check(body: Any, step: int, version: int) -> None:
    """Checks a whole manifest.

    Args:
      body: any JSON value.
      step: the step that the manifest must have.
      version: the newest version that the manifest may have.

    Raises:
      SchemaError: if `body` is not a manifest of this step, or is of a newer version.
    """
    _require(isinstance(body, dict), "it", body)
    told = body.get("version")
    _require(is_count(told) and 1 <= told <= version, "version", told)
    _require(type(body.get("step")) is int and body["step"] == step, "step", body.get("step"))
    base = body.get("base", ...)
    is_base = (
        isinstance(base, dict) and is_count(base.get("step")) and is_count(base.get("identity"))
    )
    _require(base is None or is_base, "base", base)
    for field in ("values", "arrays", "embeddings", "files"):
        _require(isinstance(body.get(field), dict), field, body.get(field))
    for name, saved in body["values"].items():
        _require(_is_value(saved), f"values[{name!r}]", saved)
    for name, size_and_sum in body["files"].items():
        _require(_is_inside(name), "a name of files", name)
        _require(_is_list(size_and_sum, is_count, 2), f"files[{name!r}]", size_and_sum)
    for name, record in body["arrays"].items():
        _check_array(f"arrays[{name!r}]", record)
    keys = [record["key"] for record in body["arrays"].values()]
    _require(len(set(keys)) == len(keys), "arrays", "two arrays in one folder")
    _require(not body["arrays"].keys() & body["values"].keys(), "values", "a name of an array too")
    for name, record in body["arrays"].items():
        _check_patch(f"arrays[{name!r}]", body, record)
    for name, entry in body["embeddings"].items():
        _check_embedding(f"embeddings[{name!r}]", body, entry)


def _is_value(saved: Any) -> bool:
    """Returns whether a JSON value is one that `leaves.split` makes of a Python value."""
    if not _is_list(saved, lambda _: True, 2):
        return False
    kind, value = saved
    if kind == "bytes":
        try:
            return _is_text(value) and base64.b64decode(value, validate=True) is not None
        except (binascii.Error, ValueError):
            return False
    return kind in ("bool", "int", "float", "str") and type(value).__name__ == kind


def _is_inside(name: str) -> bool:
    """Returns whether a name is that of a file in the checkpoint's folder, or one folder below."""
    parts = name.split("/")
    return len(parts) <= 2 and all(
        part not in ("", ".", "..") and len(part) <= 255 and not {"\\", "\0"} & set(part)
        for part in parts
    )


def _check_array(field: str, record: Any) -> None:
    _require(isinstance(record, dict), field, record)
    key = record.get("key")
    is_key = _is_text(key) and _KEY.fullmatch(key) and key not in (".", "..")
    _require(bool(is_key), f"{field}['key']", key)
    shape = record.get("shape")
    _require(_is_list(shape, is_count) and len(shape) <= 64, f"{field}['shape']", shape)
    dtype = record.get("dtype")
    is_dtype = _is_text(dtype) and array_files.zarr_dtype(dtype) is not None
    _require(is_dtype, f"{field}['dtype']", dtype)
    for name in ("random_key", "patch"):
        value = record.get(name, "")
        _require(_is_text(value), f"{field}[{name!r}]", value)


def _check_patch(field: str, body: dict[str, Any], record: dict[str, Any]) -> None:
    """Checks a patch: its indices are int32 [n] and saved whole, and the checkpoint has a base.

    There may be no more indices than the array has rows.
    """
    if "patch" not in record:
        return
    index = body["arrays"].get(record["patch"])
    _require(index is not None and "patch" not in index, f"{field}['patch']", record["patch"])
    is_index = index["dtype"] == "int32" and len(index["shape"]) == 1
    _require(is_index, f"{field}['patch']", index)
    is_part = len(record["shape"]) > 0 and index["shape"][0] <= record["shape"][0]
    _require(is_part, f"{field}['patch']", index)
    _require(body["base"] is not None, f"{field}['patch']", "a patch without a base")


def _check_embedding(field: str, body: dict[str, Any], entry: Any) -> None:
    _require(isinstance(entry, dict), field, entry)

    def require(name: str, is_right: Any) -> None:
        value = entry.get(name)
        _require(bool(is_right(value)), f"{field}[{name!r}]", value)

    def is_table(value: Any) -> bool:
        return _is_list(value, lambda _: True, 2) and _is_text(value[0]) and is_size(value[1])

    def is_size(value: Any) -> bool:
        return is_count(value) or (value is None and entry.get("vocabulary") is not None)

    def is_vocabulary(value: Any) -> bool:
        sizes = {"sets", "ways", "groups", "first_sets", "sketch_width", "counter_bits"}
        sizes.add("shared_rows")
        return value is None or (
            isinstance(value, dict)
            and value.keys() - {"place_bits"} == sizes
            and all(is_count(value[name]) and value[name] > 0 for name in sizes)
            # Checkpoints of pools with OLD_PLACE_BITS do not tell them.
            and value.get("place_bits", PLACE_BITS) == PLACE_BITS
        )

    def is_ngrams(value: Any) -> bool:
        return value is None or (
            _is_map(value, lambda field: field is None or is_count(field))
            and value.keys() == {"boundary", "padding", "seed"}
        )

    def is_storage(value: Any) -> bool:
        return (
            _is_list(value, lambda _: True, 3)
            and _is_text(value[0])
            and (value[1] is None or type(value[1]) is bool)
            and (value[2] is None or _is_text(value[2]))
        )

    def is_cache(value: Any) -> bool:
        sizes = ("sets", "ways", "groups")
        return value is None or (
            isinstance(value, dict)
            and value.keys() == {*sizes, "policy"}
            and all(is_count(value[name]) and value[name] > 0 for name in sizes)
            and value["policy"] in POLICIES
            and value["sets"] % value["groups"] == 0
        )

    def is_pair(value: Any) -> bool:
        return _is_list(value, is_count, 2) and max(value) < 2**32

    require("tables", lambda v: _is_list(v, is_table))
    require("embedding_dim", lambda v: is_count(v) and v > 0)
    require("storage", is_storage)
    require("cache", is_cache)
    require("vocabulary", is_vocabulary)
    # Earlier versions wrote none of these three.
    require("ngrams", is_ngrams)
    require("features", lambda v: v is None or _is_list(v, lambda p: _is_list(p, _is_text, 2)))
    require("rounding", lambda v: v is None or _is_text(v))
    require("row_state_dtype", lambda v: v is None or _is_text(v))
    require("shards", lambda v: is_count(v) and 0 < v <= _MAX_SHARDS)
    require("table_shards", lambda v: v is None or _is_list(v, is_count))
    if entry.get("table_shards") is not None:
        is_placed = len(entry["table_shards"]) == len(entry["tables"])
        require("table_shards", lambda v: is_placed and all(n < entry["shards"] for n in v))
    for name in ("fingerprint", "key", "digest"):
        require(name, is_pair)
    require("step", is_count)
    require("is_pending", lambda v: type(v) is bool)
    require("names", lambda v: _is_map(v, lambda n: _is_text(n) and n in body["arrays"]))
    needed = {*_ALWAYS, *(_OF_CACHE if entry["cache"] is not None else ())}
    if entry.get("vocabulary") is not None:
        needed.update(_OF_VOCABULARY)
    require("names", lambda v: needed <= v.keys() and len(set(v.values())) == len(v))
    for inner, (shape, dtype) in {
        "key": ([2], "uint32"),
        "step": ([], "int32"),
        "pending": ([], "bool"),
        "fingerprint": ([2], "uint32"),
    }.items():
        record = body["arrays"][entry["names"][inner]]
        is_such = (record["shape"], record["dtype"]) == (shape, dtype)
        _require(is_such, f"{field}: {inner}", record)


def shape_on_disk(body: dict[str, Any], record: dict[str, Any]) -> list[int]:
    """Returns the shape of the array that a record's files hold: for a patch, its rows alone."""
    shape = list(record["shape"])
    if "patch" in record:
        shape[0] = body["arrays"][record["patch"]]["shape"][0]
    return shape


def check_base(body: dict[str, Any], base: dict[str, Any]) -> None:
    """Checks that a base has every array that `body` patches, with the same shape and dtype.

    Raises:
      SchemaError: if it does not.
    """
    for name, record in body["arrays"].items():
        if "patch" in record:
            below = base["arrays"].get(name)
            is_same = below is not None and all(below[f] == record[f] for f in ("shape", "dtype"))
            _require(is_same, f"arrays[{name!r}] of the base", below)
