"""What is fetched ahead: the right bytes, in bounds, and nothing left open."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentmill.audio.media import MediaFile, media_from_bytes
from latentmill.errors import ItemError
from latentmill.sources import prefetch, reading
from latentmill.sources.base import ByteRange, Item, Segment, TableCell
from latentmill.sources.prefetch import (
    LARGEST,
    PREFETCH_BYTES,
    PREFETCH_ITEMS,
    Prefetch,
    prefetchable,
)
from latentmill.sources.reading import UnitReader


class Shelf:
    """Opens items, and knows which are open and how many were at once."""

    def __init__(self) -> None:
        self.opened: list[MediaFile] = []
        self.asked: list[str] = []
        self.threads: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, item: Item) -> MediaFile:
        media = media_from_bytes(item.key.encode())
        with self._lock:
            self.asked.append(item.key)
            self.threads.add(threading.current_thread().name)
            self.opened.append(media)
        if item.key.endswith("missing"):
            media.close()
            raise ItemError("there is no such file")
        return media

    def assert_closed(self) -> None:
        for media in self.opened:
            with pytest.raises(ValueError, match="closed"):
                media.fileno()


def remote(sizes: Sequence[int]) -> list[Item]:
    return [Item(f"{n}", f"s3://bucket/{n}", size, "") for n, size in enumerate(sizes)]


def read(media: MediaFile) -> str:
    with media:
        return media.read_at(0, 100).decode()


@pytest.mark.parametrize(
    ("protocol", "ahead"), [("s3", prefetch.OBJECT_ITEMS), ("https", PREFETCH_ITEMS)]
)
def test_items_are_asked_for_once_and_before_they_are_needed(protocol: str, ahead: int) -> None:
    items = [replace(item, uri=f"{protocol}://host/a.wav") for item in remote([1000] * 200)]
    shelf = Shelf()
    with Prefetch(items, shelf, shelf) as reader:
        assert read(reader.open(items[0])) == "0"
        reader._pool.submit(lambda: None).result()  # what was asked for before it has begun
        assert len(reader._futures) == ahead
        assert [read(reader.open(item)) for item in items[1:]] == [item.key for item in items[1:]]
    assert sorted(shelf.asked) == sorted(item.key for item in items)
    assert any(name.startswith("prefetch") for name in shelf.threads)
    shelf.assert_closed()


def test_what_nobody_opens_is_closed() -> None:
    items, shelf = remote([1000] * 20), Shelf()
    reader = Prefetch(items, shelf, shelf)
    with reader.open(items[0]):
        pass
    reader.release(items[0])
    for item in items[1:5]:
        reader.release(item)  # a filter skipped it
    assert sum(reader._sizes.values()) <= 15 * 1000
    assert len(reader._sizes) == 15
    reader.close()
    reader.close()
    shelf.assert_closed()


def test_a_missing_item_says_so_where_it_is_opened() -> None:
    items, shelf = remote([1, 1]), Shelf()
    gone = Item("missing", "s3://bucket/missing", 1, "")
    with Prefetch([items[0], gone, items[1]], shelf, shelf) as reader:
        read(reader.open(items[0]))
        with pytest.raises(ItemError, match="no such file"):
            reader.open(gone)
        assert read(reader.open(items[1])) == "1"
    shelf.assert_closed()


@given(st.lists(st.integers(0, LARGEST), max_size=80), st.randoms())
def test_bytes_ahead_are_bounded_whatever_the_order(sizes: list[int], random: object) -> None:
    items, shelf = remote(sizes), Shelf()
    most = 0
    with Prefetch(items, shelf, shelf) as reader:
        order = sorted(range(len(items)), key=lambda n: n + random.uniform(0, 4))  # type: ignore[attr-defined]
        for number in order:
            assert read(reader.open(items[number])) == str(number)
            assert reader._sizes.keys() == reader._futures.keys()
            most = max(most, sum(reader._sizes.values()))
            reader.release(items[number])
        assert not reader._futures
    assert most <= max(PREFETCH_BYTES, prefetch.UNKNOWN_SIZE)
    assert sorted(shelf.asked, key=int) == [item.key for item in items]
    shelf.assert_closed()


def test_a_size_that_nobody_knew_counts_once_it_is_known() -> None:
    items = [replace(item, size=0) for item in remote([0] * 100)]
    at_first = PREFETCH_BYTES // prefetch.UNKNOWN_SIZE
    with Prefetch(items, shelf := Shelf(), shelf) as reader:
        reader.open(items[0]).close()
        assert len(reader._futures) <= at_first
        most = 0
        for item in items[1:]:
            reader._pool.submit(lambda: None).result()  # what was asked for before it has begun
            reader.open(item).close()
            most = max(most, len(reader._futures))
        assert at_first < most <= prefetch.OBJECT_ITEMS  # they are small


def test_only_small_bytes_of_an_items_own_elsewhere_are_fetched_ahead() -> None:
    assert prefetchable(Item("a", "s3://b/a", 1, ""))
    assert prefetchable(Item("a", "s3://b/t.tar", 1, "", place=ByteRange(512, 1)))
    for item in [
        Item("a", "/local/a", 1, ""),
        Item("a", "s3://b/a", LARGEST + 1, ""),
        Item("a", "s3://b/a", 1, "", segment=Segment(1.0, 2.0)),
        Item("a", "s3://b/a", 1, "", place=TableCell(0, 0, "audio")),
    ]:
        assert not prefetchable(item)


def test_a_unit_of_objects_is_read_through_it() -> None:
    files = fsspec.filesystem("memory")
    items = []
    for number in range(50):
        files.pipe(f"/ahead/{number}", b"%d" % number)
        size = len(str(number))
        items.append(Item(f"{number}", f"memory://ahead/{number}", size, ""))
    with UnitReader(items) as reader:
        assert [read(reader.open(item)) for item in items] == [item.key for item in items]
    files.rm("/ahead", recursive=True)


def test_a_recording_that_is_long_after_all_waits_until_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = fsspec.filesystem("memory")
    for number in range(20):
        files.pipe(f"/ahead/{number}", bytes(100 if number % 2 else 10))
    items = [Item(f"{number}", f"memory://ahead/{number}", 0, "") for number in range(20)]
    monkeypatch.setattr(reading, "LARGEST", 50)
    with UnitReader(items) as reader:
        reader.open(items[0]).close()
        ahead = reader._prefetch
        ahead._pool.submit(lambda: None).result()
        found = {key: one.result() for key, one in ahead._futures.items()}
        assert {key for key, media in found.items() if media is None} >= {"1", "3", "5"}
        assert all(media is None or media.size == 10 for media in found.values())
        for item in items[1:]:
            with reader.open(item) as media:
                assert media.size == len(files.cat(f"/ahead/{item.key}"))
    files.rm("/ahead", recursive=True)
