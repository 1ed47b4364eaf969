from __future__ import annotations

import math

import numpy as np
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from latentmill.store.index import Index, to_batch
from latentmill.store.schema import Commit, ItemEntry

keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


def commit(number: int, some_keys: list[str]) -> Commit:
    items = [ItemEntry(key=f"failed {number}", status="failed", reason="why")]
    for place, key in enumerate(some_keys):
        chunks = (place,) if place % 2 else ()  # float16
        items.append(
            ItemEntry(
                key=key,
                status="encoded",
                offset=100 * place,
                length=2 * math.prod((*chunks, 2, place + 3)),
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
                assert entry.length == 2 * math.prod(entry.shape)
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


def test_a_commit_counts_its_items_by_status() -> None:
    made = commit(3, ["a", "b", "c"])
    assert (made.count("encoded"), made.count("failed"), made.count("skipped")) == (3, 1, 0)
