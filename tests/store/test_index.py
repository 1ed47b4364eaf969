from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from latentmill.errors import StoreError
from latentmill.store.index import Index, to_batch
from latentmill.store.schema import Commit, ItemEntry

keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


def width(place: int) -> int:
    """Bytes of a value: float16 or float32."""
    return 4 if place % 3 else 2


def commit(number: int, some_keys: list[str]) -> Commit:
    items = [ItemEntry(key=f"failed {number}", status="failed", reason="why")]
    for place, key in enumerate(some_keys):
        chunks = (place,) if place % 2 else ()
        items.append(
            ItemEntry(
                key=key,
                status="encoded",
                offset=100 * place,
                length=width(place) * math.prod((*chunks, 2, place + 3)),
                hash=f"{2**64 - 1 - place:016x}",
                shape=(*chunks, 2, place + 3),
                num_samples=7,
            )
        )
    return Commit(
        unit=f"{number:06d}",
        fingerprint="f00",
        shard=f"shards/{number:06d}.parquet" if some_keys else None,
        bytes=1,
        hash="00",
        rows=len(some_keys),
        audio_seconds=1.0,
        items=items,
        timings={},
    )


def test_more_text_than_an_index_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is that of 32-bit offsets; here it is small."""
    batches = [to_batch(commit(number, [f"{number}ä"])) for number in range(4)]
    monkeypatch.setattr("latentmill.store.index.MAX_KEY_BYTES", 12)
    assert len(Index.from_batches(batches)) == 4
    monkeypatch.setattr("latentmill.store.index.MAX_KEY_BYTES", 11)
    with pytest.raises(StoreError, match="these 4 records have more than 2 GiB of text"):
        Index.from_batches(batches)


def test_the_names_of_the_shards_are_read_once() -> None:
    """What is done for each shard asks for them."""
    index = Index.from_batches([to_batch(commit(number, [str(number)])) for number in range(3)])
    assert index.shards is index.shards


@given(units=st.lists(st.lists(keys, max_size=6), max_size=5), absent=keys)
def test_every_key_is_found_in_order(units: list[list[str]], absent: str) -> None:
    """Units need not be in the order of the keys, as in a plan that was extended."""
    seen: set[str] = set()
    units = [[k for k in unit if not (k in seen or seen.add(k))] for unit in units]
    built = Index.from_batches([to_batch(commit(n, unit)) for n, unit in enumerate(units)])
    for index in (built, Index.from_file(built.to_bytes())):
        assert [index.key(n) for n in range(len(index))] == sorted(seen)
        assert absent in seen or index.find(absent) is None
        for number, unit in enumerate(units):
            for place, key in enumerate(unit):
                position = index.find(key)
                assert position is not None
                entry = index.entry(position)
                assert (entry.key, entry.shard) == (key, f"shards/{number:06d}.parquet")
                assert (entry.row, entry.offset) == (place, 100 * place)
                assert entry.length == width(place) * math.prod(entry.shape)
                assert entry.hash == 2**64 - 1 - place
                assert entry.shape == ((place,) if place % 2 else ()) + (2, place + 3)


@given(st.lists(keys, max_size=6, unique=True))
def test_the_hash_of_items_is_that_of_their_keys_and_shapes(some_keys: list[str]) -> None:
    """It is part of what a reader saves, so that it must stay what it is."""
    index = Index.from_batches([to_batch(commit(0, some_keys))])
    ordered = sorted(enumerate(some_keys), key=lambda one: one[1])
    digest = xxhash.xxh3_128()
    if ordered:
        texts = [key.encode() for _, key in ordered]
        digest.update(np.cumsum([0, *map(len, texts)], dtype=np.int32).tobytes())
        digest.update(b"".join(texts))
    for values in (
        np.array([place % 2 * place for place, _ in ordered], np.int32),
        np.array([2 for _ in ordered], np.int32),
        np.array([place + 3 for place, _ in ordered], np.int32),
        np.array([7 for _ in ordered], np.int64),
    ):
        digest.update(values.tobytes())
    assert index.items_hash == digest.hexdigest()


@pytest.mark.parametrize("count", [0, 1, 3, 6, 7])
def test_all_keys_are_read_some_at_a_time(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentmill.store.index._KEYS", 3)
    some_keys = [f"item {number}" for number in range(count)]
    index = Index.from_batches([to_batch(commit(0, some_keys))] if count else [])
    read, real = [], Index.keys
    monkeypatch.setattr(Index, "keys", lambda *given: read.append(1) or real(*given))
    assert list(index.all_keys()) == some_keys
    assert len(read) == math.ceil(count / 3)


def test_a_commit_counts_its_items_by_status() -> None:
    made = commit(3, ["a", "b", "c"])
    assert (made.count("encoded"), made.count("failed"), made.count("skipped")) == (3, 1, 0)


@given(one=st.lists(keys, max_size=6, unique=True), other=st.lists(keys, max_size=6, unique=True))
def test_keys_are_found_in_another_index(one: list[str], other: list[str]) -> None:
    first, second = (Index.from_batches([to_batch(commit(0, some))]) for some in (one, other))
    found = first.positions_of(second)
    if sorted(one) == sorted(other):
        assert found is None
    else:
        assert found is not None
        places = {key: place for place, key in enumerate(sorted(one))}
        assert found.tolist() == [places.get(key, -1) for key in sorted(other)]
    for some in (one, other):
        assert first.has_keys(pa.chunked_array([sorted(some)], pa.string())) == (
            sorted(one) == sorted(some)
        )


@given(st.lists(keys, min_size=1, max_size=8, unique=True), st.data())
def test_an_index_of_some_rows_has_their_shards_only(
    some_keys: list[str], data: st.DataObject
) -> None:
    half = len(some_keys) // 2
    parts = [some_keys[:half], some_keys[half:]]
    whole = Index.from_batches([to_batch(commit(n, part)) for n, part in enumerate(parts)])
    start = data.draw(st.integers(0, len(some_keys) - 1))
    kept = sorted(some_keys)[start:]
    index = Index.from_tables([whole.table.slice(start)])
    assert index.keys(np.arange(len(index))) == kept
    assert index.shards == [
        f"shards/{n:06d}.parquet" for n, part in enumerate(parts) if set(part) & set(kept)
    ]
    part = Index(whole.table.slice(start))  # a view, whose keys do not begin at its first byte
    assert part.positions_of(index) is None
    assert index.positions_of(part) is None
    order, starts = index.by_shard()
    for number, shard in enumerate(index.shards):
        entries = [index.entry(at) for at in order[starts[number] : starts[number + 1]].tolist()]
        assert {entry.shard for entry in entries} == {shard}
        assert [entry.row for entry in entries] == sorted(entry.row for entry in entries)
    assert starts[-1] == len(kept)


@pytest.mark.parametrize("store", ["store-of-version-1", "store-of-0badd19/store"])
def test_an_index_of_an_earlier_version_is_read(store: str) -> None:
    data = (Path(__file__).parents[1] / "data" / store / "index.arrow").read_bytes()
    rows = pa.ipc.open_file(data).read_all().to_pylist()
    index = Index.from_file(data)
    assert [asdict(index.entry(number)) for number in range(len(index))] == rows
