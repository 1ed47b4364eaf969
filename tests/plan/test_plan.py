"""The plan: limits units, freezing, reading back what was frozen, whatever the listing's order."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from latentmill.config import RunConfig
from latentmill.errors import SourceError, StorageError, StoreError
from latentmill.plan import (
    DEFAULT_SHARD_SIZE,
    ITEMS_PATH,
    PLAN_PATH,
    UNITS_PATH,
    Plan,
    Unit,
    UnitLimits,
    check_items,
    copy,
    draft,
    drafting,
    estimated_seconds,
    extend,
    freeze,
    iter_keys,
    iter_units,
    load,
    read_items,
)
from latentmill.plan import files as files_module
from latentmill.plan.drafting import UnitSize, split
from latentmill.plan.items import known_seconds
from latentmill.plan.plan import PlanPart
from latentmill.sources.base import ByteRange, Item, Segment, TableCell
from latentmill.storage.storage import Storage

LIMIT = 30.0


def item(number: int, size: int, extension: str = "wav", **more: object) -> Item:
    sidecars = ("/ä/b.json", "/ä/b.txt")[: number % 3]
    return Item(f"ä/{number}", f"/ä/{number}.{extension}", size, f"v{number}", sidecars, **more)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
PLACES = st.none() | st.builds(ByteRange, st.integers(0, 9), st.integers(0, 9))
CELLS = st.builds(TableCell, st.integers(0, 9), st.integers(0, 9), TEXT)
SEGMENTS = st.builds(Segment, st.floats(0, 99), st.none() | st.floats(0, 99))
ITEM = st.builds(
    Item,
    key=TEXT,
    uri=TEXT,
    size=st.integers(0, 2**33),
    version=TEXT,
    sidecars=st.lists(TEXT, max_size=2).map(tuple),
    place=PLACES | CELLS,
    segment=st.none() | SEGMENTS,
    seconds=st.none() | st.floats(0, 1e6),
    metadata=st.just('{"a": 1}') | st.just("{}"),
    group=st.none() | st.sampled_from(["", "a", "b", "song"]),
    role=st.none() | TEXT,
)
ITEMS = st.lists(ITEM, min_size=1, max_size=40, unique_by=lambda item: item.key)
BLOCKS = st.lists(
    st.builds(UnitSize, st.integers(1, 4), st.integers(0, 2**40), st.integers(0, 9)), max_size=60
)


@given(BLOCKS, st.floats(1, 2**41))
def test_units_hold_every_block_once_in_order(blocks: list[UnitSize], limit: float) -> None:
    units = list(split(blocks, limit))
    ends = set(itertools.accumulate(block.items for block in blocks))
    assert set(itertools.accumulate(unit.items for unit in units)) <= ends
    for name in ("items", "micros", "bytes"):
        assert sum(getattr(u, name) for u in units) == sum(getattr(b, name) for b in blocks)
    largest = max((block.micros for block in blocks), default=0)
    assert all(unit.micros <= max(limit, largest) for unit in units)
    waiting = iter(blocks)
    for unit in units[:-1]:  # none is cut too early
        taken = list(itertools.takewhile(lambda _: True, _taken(waiting, unit.items)))
        following = blocks[len(taken) :]
        del blocks[: len(taken)]
        assert unit.micros + following[0].micros > limit
        waiting = iter(blocks)


def _taken(blocks: Iterator[UnitSize], items: int) -> Iterator[UnitSize]:
    while items > 0:
        block = next(blocks)
        items -= block.items
        yield block


@given(ITEMS, st.floats(0, 100))
def test_totals_are_those_of_the_items(items: list[Item], chunk_seconds: float) -> None:
    with draft(items, UnitLimits(chunk_seconds=chunk_seconds)) as drafted:
        totals = drafted.totals
    micros = {one: round(1e6 * estimated_seconds(one)) for one in items}
    guessed = [one for one in items if known_seconds(one) is None]
    assert (totals.items, totals.bytes) == (len(items), sum(one.size for one in items))
    assert totals.micros == sum(micros.values())
    assert totals.estimated_items == len(guessed)
    assert totals.estimated_micros == sum(micros[one] for one in guessed)
    short = [value for value in micros.values() if value < 1e6 * chunk_seconds]
    assert totals.short_micros == sum(short)
    assert totals.grouped == any(one.group for one in items)


@given(st.lists(st.integers(0, 9)), st.integers(1, 4), st.integers(1, 20))
def test_a_batch_to_sort_is_full_by_its_items_or_its_bytes(
    lengths: list[int], most: int, most_bytes: int
) -> None:
    items = [item(number, 1, metadata="x" * length) for number, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "SORT_ITEMS", most)
        patch.setattr(drafting, "SORT_BYTES", most_bytes)
        batches = list(drafting._batches(items))
    assert list(itertools.chain.from_iterable(batches)) == items
    for number, batch in enumerate(batches):
        full = len(batch) == most or sum(len(one.metadata) for one in batch) >= most_bytes
        assert full or number == len(batches) - 1
        assert len(batch) <= most
        assert sum(len(one.metadata) for one in batch[:-1]) < most_bytes


@given(sizes=st.lists(st.integers(0, 1), min_size=1, max_size=40), most=st.integers(1, 9))
@example(sizes=[0] * 18, most=9)
def test_a_unit_has_a_bounded_number_of_items(sizes: list[int], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "MAX_UNIT_ITEMS", most)
        units = list(split([UnitSize(1, size, size) for size in sizes], 1e9))
    assert [unit.items for unit in units[:-1]] == [most] * (len(units) - 1)
    assert units[-1].items <= most


def cuts(items: list[Item], limits: UnitLimits) -> tuple[UnitSize, ...]:
    with draft(items, limits) as drafted:
        return drafted.sizes


def test_units_grow_with_the_corpus() -> None:
    minute = 60 * 176_400
    assert len(cuts([item(n, minute // 4) for n in range(8)], UnitLimits())) == 2
    large = cuts([item(n, 10 * minute) for n in range(3000)], UnitLimits())
    assert 200 <= len(large) <= 300
    assert max(unit.micros for unit in large) < 4 * 3600e6


def test_the_size_of_a_shard_cuts_units_too() -> None:
    items = [item(n, 1, seconds=10.0) for n in range(12)]
    by_size = cuts(items, UnitLimits(shard_size=3000, bytes_per_second=100.0))  # 30 s
    assert [unit.items for unit in by_size] == [3, 3, 3, 3]
    smaller = cuts(items, UnitLimits(unit_seconds=20.0, shard_size=3000, bytes_per_second=100.0))
    assert [unit.items for unit in smaller] == [2] * 6


def rows_of(items: list[Item], limits: UnitLimits) -> list[list[tuple[str, float]]]:
    """Key and length of each item, by unit."""
    with draft(items, limits) as drafted:
        rows = [
            (row["key"], row["micros"] / 1e6)
            for table in drafted.tables()
            for row in table.select(["key", "micros"]).to_pylist()
        ]
        ends = list(itertools.accumulate(one.items for one in drafted.sizes))
    return [rows[start:end] for start, end in zip([0, *ends], ends, strict=False)]


SHORT = UnitLimits(unit_seconds=600.0, chunk_seconds=10.0)


def test_units_of_short_items_have_few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "SPAN_SECONDS", 7200)
    chance = random.Random(0)
    items = [item(n, 1, seconds=chance.choice([2.0, 3.5, 6.0, 9.9])) for n in range(2000)]
    items += [item(n, 1, seconds=chance.uniform(10, 30)) for n in range(2000, 2100)]
    in_order = sorted(items, key=lambda one: one.key)
    rows = [row for unit in rows_of(items, SHORT) for row in unit]
    start, spans, seen = 0, 0, 0.0
    while start < len(in_order):  # what follows is independent of the order inside of a span
        some = []
        while start < len(in_order) and seen < 7200 * (spans + 1):
            some.append(in_order[start])
            seen += in_order[start].seconds or 0
            start += 1
        expected = sorted(some, key=lambda one: (min(one.seconds or 0, 10.0), one.key))
        assert [key for key, _ in rows[start - len(some) : start]] == [one.key for one in expected]
        spans += 1
    assert spans > 1
    shuffled = list(items)
    chance.shuffle(shuffled)
    assert rows_of(shuffled, SHORT) == rows_of(items, SHORT)


@pytest.mark.parametrize("kind", ["long", "few", "grouped", "segments"])
def test_other_plans_keep_the_order_of_keys(kind: str) -> None:
    more: dict[str, object] = {
        "grouped": {"group": "a"},
        "segments": {"segment": Segment(1.0)},
    }.get(kind, {})  # type: ignore[assignment]
    chance = random.Random(0)
    lengths = [chance.uniform(1, 9) + (10 if kind == "long" else 0) for _ in range(1000)]
    items = [item(n, 1, seconds=seconds) for n, seconds in enumerate(lengths)]
    if kind == "few":
        items = items[:500]
    items[7] = dataclasses.replace(items[7], **more)
    rows = [key for unit in rows_of(items, SHORT) for key, _ in unit]
    blocks = {one.key: (one.group or one.key, one.key) for one in items}
    assert rows == sorted(blocks, key=lambda key: blocks[key])


def test_what_items_share_determines_their_order() -> None:
    places = [
        (f"/{file}.parquet", group, row) for file in "ab" for group in (2, 10) for row in (9, 10)
    ]
    cells = [
        Item(f"k{97 * n % 100}", uri, 9, "", place=TableCell(group, row, "audio"), seconds=1.0)
        for n, (uri, group, row) in enumerate(places)
    ]
    starts = [(f"s3://b/{name}.wav", start) for name in "ab" for start in (0.5, 2.0, 10.0)]
    segments = [
        Item(f"k{98 - 7 * n}", uri, 9, "", segment=Segment(start, 1.0), seconds=1.0)
        for n, (uri, start) in enumerate(starts)
    ]
    for items in (cells, segments):
        keys = [one.key for one in items]
        assert keys != sorted(keys)
        shuffled = random.Random(0).sample(items, len(items))
        rows = [key for unit in rows_of(shuffled, SHORT) for key, _ in unit]
        assert rows == keys
        # A group comes before that.
        grouped = [dataclasses.replace(one, group="g") for one in shuffled]
        rows = [key for unit in rows_of(grouped, SHORT) for key, _ in unit]
        assert rows == sorted(keys)


@pytest.mark.parametrize("runs", [100, 1])
def test_equal_keys_of_items_that_share_are_refused(
    runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafting, "SORT_ITEMS", runs)
    items = [
        Item(f"k{n % 8}", "/t.parquet", 9, "", place=TableCell(n, 0, "audio")) for n in range(9)
    ]
    with pytest.raises(SourceError, match=r"key 'k0' \(in /t.parquet\)"):
        cuts(items, UnitLimits())


@pytest.mark.parametrize(("seconds", "by_length"), [(3600.0, True), (3599.999999, False)])
def test_an_hour_of_short_items_is_sorted_by_length(seconds: float, by_length: bool) -> None:
    long = UnitLimits(chunk_seconds=5000.0)
    with draft([item(0, 1, seconds=seconds - 1), item(1, 1, seconds=1.0)], long) as drafted:
        assert drafted.totals.by_length == by_length


def test_the_default_size_of_a_shard_is_what_the_help_says() -> None:
    assert "[default: 1GiB]" in str(RunConfig.model_fields["shard_size"].description)
    assert DEFAULT_SHARD_SIZE == 1024**3


def test_equal_keys_of_other_lengths_are_refused() -> None:
    items = [item(n, 1, seconds=float(n % 9 + 1)) for n in range(2000)]
    items.append(dataclasses.replace(item(4, 1, seconds=9.5), uri="/other.wav"))
    with pytest.raises(SourceError, match=r"key 'ä/4' \(/other.wav and /ä/4.wav\)"):
        cuts(items, SHORT)


def test_lengths_are_known_or_guessed() -> None:
    assert estimated_seconds(item(0, 176_400)) == 1.0
    assert estimated_seconds(item(0, 176_400, seconds=7.5)) == 7.5
    assert estimated_seconds(item(0, 40_000, "MP3")) == 2.0
    assert estimated_seconds(item(0, 0)) == 180.0  # a manifest's row
    assert estimated_seconds(item(0, 40_000, "mp3", segment=Segment(0.5))) == 1.5
    assert estimated_seconds(item(0, 40_000, "mp3", segment=Segment(0.5, 9.0))) == 9.0
    assert estimated_seconds(item(0, 20_000, "mp3", seconds=float("nan"))) == 1.0


def new_plan() -> Plan:
    return Plan(
        source="s3://bucket/music",
        fingerprint={"model": {"name": "mdct", "scale": 1.5, "none": None}, "settings": {}},
        model="mdct",
        model_options={"hop": 512},
        format="webdataset",
        ignored={".jpg": 2, "no extension": 1},
    )


def write(items: list[Item], storage: Storage) -> Plan:
    with draft(items, UnitLimits(LIMIT)) as drafted:
        return freeze(new_plan(), drafted, storage)


def contents(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read(f"plan/{name}") for name in storage.list("plan")}


def normal(item: Item) -> Item:
    return dataclasses.replace(item, group=item.group or None)


@settings(max_examples=30, deadline=None)
@given(ITEMS)
def test_a_frozen_plan_comes_back_as_it_was(items: list[Item]) -> None:
    storage = Storage("memory://plans/a")
    plan = write(items, storage)
    assert load(storage) == plan
    read = [one for unit in plan.units for one in read_items(storage, unit)]
    assert sorted(read, key=lambda one: one.key) == [
        normal(one) for one in sorted(items, key=lambda one: one.key)
    ]
    assert [one.key for one in read] == list(iter_keys(storage, plan))
    assert plan.num_items == len(items) == sum(plan.formats.values())
    assert [unit.number for unit in plan.units] == list(range(len(plan.units)))
    assert [unit.name for unit in plan.units][:2] == ["000000", "000001"][: len(plan.units)]
    for unit in plan.units:
        assert unit.bytes == sum(one.size for one in read_items(storage, unit))
    units_of = [{one.group for one in read_items(storage, unit)} for unit in plan.units]
    for group in {one.group for one in read} - {None}:  # a song's stems are never parted
        assert sum(group in groups for groups in units_of) == 1


@settings(max_examples=30, deadline=None)
@given(ITEMS, st.randoms(use_true_random=False))
def test_the_order_of_a_listing_does_not_matter(items: list[Item], chance: random.Random) -> None:
    one, other = Storage("memory://plans/b"), Storage("memory://plans/c")
    shuffled = list(items)
    chance.shuffle(shuffled)
    with pytest.MonkeyPatch.context() as patch:
        write(items, one)
        patch.setattr(drafting, "SORT_ITEMS", 3)  # the other one merges many runs
        write(shuffled, other)
    assert contents(one) == contents(other)


def test_many_runs_are_merged_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentmill.plan import sort

    monkeypatch.setattr(drafting, "SORT_ITEMS", 500)
    monkeypatch.setattr(sort, "LARGEST_BATCH", 64)
    numbers = list(range(5000))
    random.Random(1).shuffle(numbers)
    monkeypatch.setattr(files_module, "ROW_GROUP_ITEMS", 300)
    plan = write([item(number, 10**6) for number in numbers], Storage(str(tmp_path)))
    assert list(iter_keys(Storage(str(tmp_path)), plan)) == sorted(f"ä/{n}" for n in numbers)
    assert pq.ParquetFile(tmp_path / ITEMS_PATH).num_row_groups > 10
    opened: list[str] = []
    plain = Storage.open
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "open", lambda self, path: opened.append(path) or plain(self, path))
        assert sum(len(table) for _, table in iter_units(Storage(str(tmp_path)), plan)) == 5000
    assert opened == [ITEMS_PATH]  # its footer grows with the number of row groups
    some = plan.units[77]
    table = dict(iter_units(Storage(str(tmp_path)), plan))[some]
    keys = [one.key for one in read_items(Storage(str(tmp_path)), some)]
    assert table["key"].to_pylist() == keys


def test_keys_that_no_index_can_hold_are_refused_before_encoding(
    monkeypatch: pytest.MonkeyPatch, one_sentence: Callable[[BaseException], str]
) -> None:
    items = [item(number, 10**6) for number in range(50)]
    text = sum(len(one.key.encode()) for one in items)
    monkeypatch.setattr(drafting, "MAX_KEY_BYTES", text)
    with draft(items, UnitLimits()) as found:
        assert (found.totals.items, found.totals.key_bytes) == (50, text)
    monkeypatch.setattr(drafting, "MAX_KEY_BYTES", text - 1)
    with pytest.raises(SourceError, match="the first 50 items have more than 2 GiB") as caught:
        draft(items, UnitLimits())
    one_sentence(caught.value)


def test_more_runs_than_files_may_be_open_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    from latentmill.plan import sort

    monkeypatch.setattr(drafting, "SORT_ITEMS", 2)
    monkeypatch.setattr(sort, "FAN_IN", 8)
    numbers = list(range(400))
    random.Random(1).shuffle(numbers)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with draft([item(0, 1)], UnitLimits()):  # what the first one opens and keeps
        taken = max(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 30, hard))
    try:
        with draft([item(number, 1) for number in numbers], UnitLimits()) as drafted:
            keys = [key for table in drafted.tables() for key in table["key"].to_pylist()]
            assert len(list((drafted.folder / "sorting").iterdir())) <= 8
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert keys == sorted(f"ä/{number}" for number in numbers)


@pytest.mark.parametrize(
    ("groups", "runs"), [((None, None), 100), (("a", "b"), 100), (("a", None), 1), ((None,) * 2, 1)]
)
def test_a_key_that_comes_twice_is_refused_by_name(
    groups: tuple[str | None, str | None], runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafting, "SORT_ITEMS", runs)
    items = [item(number, 1) for number in range(9)]
    items += [dataclasses.replace(item(4, 1), uri="/other.wav", group=groups[0])]
    items[4] = dataclasses.replace(items[4], group=groups[1])
    with pytest.raises(SourceError, match=r"key 'ä/4' \(/other.wav and /ä/4.wav\)"):
        cuts(items, UnitLimits())


def test_drafts_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cuts([item(0, 1)], UnitLimits())
    with pytest.raises(SourceError):
        cuts([item(0, 1), item(0, 1)], UnitLimits())
    assert not list(tmp_path.iterdir())


def test_an_extension_moves_nothing(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    plan = write([item(number, 10**7) for number in range(5)], storage)
    before = contents(storage)
    with draft([item(number, 10**7) for number in range(5, 9)], UnitLimits(LIMIT)) as drafted:
        longer = extend(plan, drafted, storage)
    after = contents(storage)
    assert {name for name in after if after[name] != before.get(name)} == {
        "items-0001.parquet",
        "units-0001.parquet",
        "plan.json",
    }
    assert load(storage) == longer
    assert longer.units[: len(plan.units)] == plan.units
    assert longer.num_items == 9
    assert sorted(iter_keys(storage, longer)) == [f"ä/{number}" for number in range(9)]
    # Killed before plan.json was replaced: the plan is what it was.
    storage.write(PLAN_PATH, before["plan.json"])
    assert load(storage) == plan
    copy(longer, storage, Storage(str(tmp_path / "copy")))
    assert contents(Storage(str(tmp_path / "copy"))) == after


def test_a_store_without_a_plan_has_none(tmp_path: Path) -> None:
    assert load(Storage(str(tmp_path / "nothing"))) is None


@pytest.fixture
def frozen(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path))
    write([item(n, 10**7) for n in range(5)], storage)
    return storage


def test_without_its_items_a_plan_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Storage, path: str, data: bytes) -> bool:
        raise StorageError("the disk is full.")

    monkeypatch.setattr(Storage, "create", full)
    with pytest.raises(StorageError):
        write([item(0, 1)], Storage(str(tmp_path)))
    assert [path.name for path in (tmp_path / "plan").iterdir()] == ["items.parquet"]
    assert load(Storage(str(tmp_path))) is None  # plan.json comes last


def edited(**changes: object) -> Callable[[bytes], bytes]:
    return lambda text: json.dumps({**json.loads(text), **changes}).encode()


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes] | None]] = {
    "cut json": (PLAN_PATH, lambda text: text[: len(text) // 2]),
    "no json": (PLAN_PATH, lambda _: b"\xff\x00"),
    "another json": (PLAN_PATH, lambda _: b"[]"),
    "missing fields": (PLAN_PATH, lambda _: b'{"format_version": 2}'),
    "newer format": (PLAN_PATH, edited(format_version=99)),
    "later packing": (PLAN_PATH, edited(packing=99)),
    "packing without a number": (PLAN_PATH, edited(packing="2")),
    "fewer parts": (PLAN_PATH, edited(parts=[])),
    "cut items": (ITEMS_PATH, lambda data: data[:-1]),
    "no items": (ITEMS_PATH, None),
    "cut units": (UNITS_PATH, lambda data: data[:-1]),
    "no units": (UNITS_PATH, None),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_plan_is_refused(
    frozen: Storage, kind: str, one_sentence: Callable[[BaseException], str]
) -> None:
    path, spoil = DAMAGE[kind]
    if spoil is None:
        frozen.delete(path)
    else:
        frozen.write(path, spoil(frozen.read(path)))
    with pytest.raises(StoreError) as caught:
        load(frozen)
    assert frozen.root in one_sentence(caught.value)


@pytest.mark.parametrize("at", [10, 400, -200, -5])
def test_items_with_a_flipped_byte_are_refused(frozen: Storage, at: int) -> None:
    plan = load(frozen)
    assert plan is not None
    check_items(plan, frozen)
    data = bytearray(frozen.read(ITEMS_PATH))
    data[at] ^= 0xFF
    frozen.write(ITEMS_PATH, bytes(data))
    assert load(frozen) == plan  # which does not read them
    with pytest.raises(StoreError, match=r"items.parquet is missing, damaged or"):
        check_items(plan, frozen)


def test_a_unit_of_another_plan_is_refused(frozen: Storage) -> None:
    plan = load(frozen)
    assert plan is not None
    for odd in ({"items": 17}, {"number": 99}, {"row_group": 5}):
        with pytest.raises(StoreError):
            read_items(frozen, dataclasses.replace(plan.units[0], **odd))


def test_a_unit_is_a_plain_value() -> None:
    unit = Unit(0, 1, 2.0)
    assert unit == Unit(0, 1, 2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        unit.number = 1  # type: ignore[misc]


def test_files_of_a_part() -> None:
    def part(number: int, revision: int) -> str:
        return PlanPart(number, revision, 0, 0, 0.0, 0.0, 0, 0, {}).items_file

    assert part(0, 0) == ITEMS_PATH
    assert part(2, 0) == "plan/items-0002.parquet"
    assert part(0, 1) == "plan/items-0000.1.parquet"
