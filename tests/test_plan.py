"""The plan: cutting units, freezing, and reading back what was frozen."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from latentmill import plan as plan_module
from latentmill.errors import StorageError, StoreError
from latentmill.plan import ITEMS_PATH, PLAN_PATH, Plan, cut_units, estimated_seconds, freeze, load
from latentmill.sources.base import Item
from latentmill.storage import Storage


def item(number: int, size: int, extension: str = "wav") -> Item:
    sidecars = ("/ä/b.json", "/ä/b.txt")[: number % 3]
    return Item(f"ä/{number}", f"/ä/{number}.{extension}", size, f"v{number}", sidecars)


ITEMS = st.lists(
    st.tuples(st.integers(0, 2**33), st.sampled_from(["wav", "mp3", "FLAC"])),
    min_size=1,
    max_size=60,
).map(lambda pairs: [item(n, size, ext) for n, (size, ext) in enumerate(pairs)])


@given(ITEMS, st.none() | st.floats(1e-3, 1e6))
def test_units_hold_every_item_once_in_order(items: list[Item], seconds: float | None) -> None:
    units = cut_units(items, seconds)
    assert [one for unit in units for one in unit.items] == items
    assert [unit.number for unit in units] == list(range(len(units)))
    assert all(unit.items for unit in units)
    assert cut_units(tuple(items), seconds) == units
    if seconds is not None:
        for unit in units:
            audible = [one for one in unit.items if one.size]
            assert unit.seconds <= seconds * 1.001 or len(audible) == 1
        for unit, after in itertools.pairwise(units):  # none is cut too early
            assert unit.seconds + estimated_seconds(after.items[0]) > seconds * 0.999


@given(sizes=st.lists(st.integers(0, 1), min_size=1, max_size=40), most=st.integers(1, 9))
@example(sizes=[0] * 18, most=9)
def test_a_unit_has_a_bounded_number_of_items(sizes: list[int], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "MAX_UNIT_ITEMS", most)
        units = cut_units([item(n, size) for n, size in enumerate(sizes)], 1e9)
    assert [len(unit.items) for unit in units[:-1]] == [most] * (len(units) - 1)
    assert len(units[-1].items) <= most


def test_units_grow_with_the_corpus() -> None:
    minute = 60 * 176_400
    assert len(cut_units([item(n, minute // 4) for n in range(8)])) == 2
    large = cut_units([item(n, 10 * minute) for n in range(3000)])
    assert 200 <= len(large) <= 300
    assert max(unit.seconds for unit in large) < 4 * 3600


def make_plan(items: list[Item]) -> Plan:
    return Plan(
        source="s3://bucket/music",
        units=cut_units(items, 30.0),
        fingerprint={"model": {"name": "mdct", "scale": 1.5, "none": None}, "settings": {}},
        model="mdct",
        model_options={"hop": 512},
        format="webdataset",
        ignored={".jpg": 2, "no extension": 1},
    )


@given(ITEMS)
def test_a_frozen_plan_comes_back_as_it_was(items: list[Item]) -> None:
    storage = Storage("memory://plans/a")
    plan = make_plan(items)
    freeze(plan, storage)
    loaded = load(storage)
    assert loaded == plan
    assert loaded is not None
    assert list(loaded.items) == items
    assert loaded.num_items == len(items)
    assert [unit.name for unit in loaded.units][:2] == ["000000", "000001"][: len(plan.units)]


def test_a_store_without_a_plan_has_none(tmp_path: Path) -> None:
    assert load(Storage(str(tmp_path / "nothing"))) is None


@pytest.fixture
def frozen(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path))
    freeze(make_plan([item(n, 10**7) for n in range(5)]), storage)
    return storage


def test_without_its_items_a_plan_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def full(self: Storage, path: str, data: bytes) -> None:
        written.append(path)
        raise StorageError("the disk is full.")

    monkeypatch.setattr(Storage, "write", full)
    with pytest.raises(StorageError):
        freeze(make_plan([item(0, 1)]), Storage(str(tmp_path)))
    assert written == [ITEMS_PATH]  # plan.json comes last
    assert load(Storage(str(tmp_path))) is None


def edited(**changes: object) -> Callable[[bytes], bytes]:
    return lambda text: json.dumps({**json.loads(text), **changes}).encode()


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes] | None]] = {
    "cut json": (PLAN_PATH, lambda text: text[: len(text) // 2]),
    "no json": (PLAN_PATH, lambda _: b"\xff\x00"),
    "another json": (PLAN_PATH, lambda _: b"[]"),
    "missing fields": (PLAN_PATH, lambda _: b'{"format_version": 1}'),
    "newer format": (PLAN_PATH, edited(format_version=99)),
    "another plan's items": (PLAN_PATH, edited(items_hash="xxh3:0")),
    "cut items": (ITEMS_PATH, lambda data: data[:-1]),
    "no items": (ITEMS_PATH, None),
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


def test_a_unit_is_a_plain_value() -> None:
    unit = cut_units([item(0, 1)])[0]
    assert unit == cut_units([item(0, 1)])[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        unit.number = 1  # type: ignore[misc]
