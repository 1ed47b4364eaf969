"""Replaced rows of a plan: the totals are those of the items that it then has."""

from __future__ import annotations

import dataclasses

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentmill.plan import Plan, UnitLimits, draft, extend, freeze, load, read_items
from latentmill.plan.amend import RowsByKey, amend
from latentmill.plan.compare import compare
from latentmill.plan.plan import PlanPart
from latentmill.sources.base import ByteRange, Item
from latentmill.storage.storage import Storage

LIMITS = UnitLimits(unit_seconds=7.0)
RATES = {"wav": 176_400, "flac": 100_000, "mp3": 20_000}  # bytes per second of an unknown length

File = tuple[str, int, float | None]  # extension, size and length

FILE = st.tuples(
    st.sampled_from(sorted(RATES)), st.integers(1, 10**6), st.none() | st.floats(0, 50)
)


def item(number: int, file: File, version: int, scale: float | None = None) -> Item:
    """An item; `scale` is the factor between an approximate length in its header and its size."""
    extension, size, seconds = file
    guess = None if scale is None or seconds is not None else scale * size / RATES[extension]
    uri = f"/in/{number}.{extension}"
    return Item(f"k{number:02d}", uri, size, f"v{version}", seconds=seconds, estimate=guess)


def frozen(items: list[Item], storage: Storage) -> Plan:
    with draft(items, LIMITS) as drafted:
        return freeze(Plan("/in", {}, "mdct", {}, "parquet", {}), drafted, storage)


def length(one: Item) -> float:
    guess = one.size / RATES[one.uri.rpartition(".")[2]] if one.estimate is None else one.estimate
    return guess if one.seconds is None else one.seconds


def assert_totals(part: PlanPart, items: list[Item]) -> None:
    guessed = [one for one in items if one.seconds is None]
    formats = [one.uri.rpartition(".")[2] for one in items]
    assert part.seconds == pytest.approx(sum(map(length, items)), abs=1e-4)
    assert part.bytes == sum(one.size for one in items)
    assert part.estimated_items == len(guessed)
    assert part.estimated_seconds == pytest.approx(sum(map(length, guessed)), abs=1e-4)
    assert part.formats == {name: formats.count(name) for name in sorted(set(formats))}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(FILE, min_size=1, max_size=12),
    st.lists(FILE, min_size=1, max_size=12),
    st.lists(FILE, min_size=24, max_size=24),
    st.sets(st.integers(0, 23)),
    st.none() | st.floats(0.1, 10),
    st.uuids(),
)
def test_the_totals_are_those_of_the_new_files(
    first: list[File],
    second: list[File],
    others: list[File],
    numbers: set[int],
    scale: float | None,
    name: object,
) -> None:
    storage = Storage(f"memory://amended/{name}")
    files = first + second
    items = [item(number, file, 0, scale) for number, file in enumerate(files)]
    plan = frozen(items[: len(first)], storage)
    with draft(items[len(first) :], LIMITS) as drafted:
        plan = extend(plan, drafted, storage)
    after = [
        item(n, others[n] if n in numbers else file, int(n in numbers), scale)
        for n, file in enumerate(files)
    ]
    with draft(after, LIMITS) as listed:
        found, fresh = compare(plan, storage, listed, LIMITS)
        fresh.close()
    amended = amend(plan, found.changed, found.units, storage)
    assert load(storage) == amended
    assert_totals(amended.parts[0], after[: len(first)])
    assert_totals(amended.parts[1], after[len(first) :])
    planned = {one.key: one for one in after}
    for unit in amended.units:
        own = [planned[one.key] for one in read_items(storage, unit)]
        assert unit.seconds == pytest.approx(sum(map(length, own)), abs=1e-4)
        assert unit.bytes == sum(one.size for one in own)


def test_files_in_tars_keep_their_formats_and_their_share_of_the_length() -> None:
    """What their lengths were estimated from is not stored: their extension, or their header."""

    def members(tar: str, version: str, size: int) -> list[Item]:
        place = ByteRange(512, size)
        return [
            Item(f"{tar}/{n}", f"s3://in/{tar}.tar", size, version, place=place, extension="wav")
            for n in range(2)
        ]

    storage = Storage("memory://amended/tars")
    plan = frozen(members("a", "1", 176_400) + members("b", "1", 352_800), storage)
    assert [unit.seconds for unit in plan.units] == [6.0]
    with draft(members("a", "1", 176_400) + members("b", "2", 529_200), LIMITS) as listed:
        found, fresh = compare(plan, storage, listed, LIMITS)
        fresh.close()
    (part,) = amend(plan, found.changed, found.units, storage).parts
    assert part.formats == {"wav": 4}
    assert part.seconds == part.estimated_seconds == pytest.approx(2 * 1.0 + 2 * 3.0)
    assert (part.bytes, part.estimated_items) == (2 * 176_400 + 2 * 529_200, 4)


def test_new_metadata_leaves_the_totals_as_they_are() -> None:
    storage = Storage("memory://amended/metadata")
    items = [item(n, ("wav", 100_000 + n, None), 0) for n in range(9)]
    items = [dataclasses.replace(one, estimate=0.1) for one in items]  # from headers
    plan = frozen(items, storage)
    captioned = [dataclasses.replace(one, metadata='{"bpm": 90}', estimate=None) for one in items]
    with draft(captioned, LIMITS) as listed:
        found, fresh = compare(plan, storage, listed, LIMITS, described_rows=True)
        fresh.close()
    rows, units = found.described_rows, found.described_units
    amended = amend(plan, rows, units, storage, ("sidecars", "metadata", "sidecar_versions"))
    assert amended.units != ()
    assert [dataclasses.replace(unit, file="") for unit in amended.units] == [
        dataclasses.replace(unit, file="") for unit in plan.units
    ]
    (before,), (after,) = plan.parts, amended.parts
    names = ("seconds", "estimated_seconds", "estimated_items", "bytes", "formats")
    assert [getattr(after, name) for name in names] == [getattr(before, name) for name in names]


@given(st.lists(st.text(max_size=3), unique=True), st.sets(st.text(max_size=3), min_size=1))
def test_rows_are_found_by_their_keys(keys: list[str], wanted: set[str]) -> None:
    chunks = [keys[:3], keys[3:]]
    table = pa.table({"key": pa.chunked_array(chunks, pa.string()), "n": range(len(keys))})
    found = RowsByKey(table).of(pa.chunked_array([sorted(wanted)], pa.string()))
    assert found.to_pylist() == [row for row in table.to_pylist() if row["key"] in wanted]


def test_rows_with_equal_hashes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xxhash.xxh3_64_intdigest", len)
    table = pa.table({"key": ["b", "aa", "a"]})
    found = RowsByKey(table).of(pa.chunked_array([["a"]]))
    assert "a" in found["key"].to_pylist()
    assert "aa" not in found["key"].to_pylist()
