"""Records of remote stores are read in groups: a few requests for a shard, not one for each."""

from __future__ import annotations

import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest

import latentmill as lm
from latentmill.errors import DamagedShardError, restore_hint
from latentmill.store import prefetch
from latentmill.store.prefetch import prefetched
from latentmill.store.store import LatentStore
from latentmill.store.verify import verify
from support.latent_store import latent_of, write_again, write_latents
from support.rounds import shard_rounds

COUNT, PER_UNIT = 128, 64
FEW = COUNT // 8  # the footer and the fields of a Parquet shard have requests of their own


@pytest.fixture(params=["parquet", "webdataset"])
def url(request: pytest.FixtureRequest) -> str:
    """A store in memory."""
    url = f"memory://{uuid.uuid4().hex}"
    write_latents(url, [16] * COUNT, per_unit=PER_UNIT, format_name=request.param)
    return url


def flip(url: str, key: str) -> None:
    """Change a byte of a latent."""
    entry = LatentStore(url).entry(key)
    fs, path = fsspec.core.url_to_fs(f"{url}/{entry.shard}")
    data = bytearray(fs.cat_file(path))
    data[entry.offset] ^= 1
    fs.pipe_file(path, bytes(data))


def test_iterating_reads_groups(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = shard_rounds(monkeypatch, url)
    records = list(lm.open(url))
    assert 0 < len(rounds) <= FEW
    assert sum(map(len, rounds)) <= COUNT / 2  # neighbours are read together
    assert [record.latent.tobytes() for record in records] == [
        latent_of(number, 16).tobytes() for number in range(COUNT)
    ]
    assert not LatentStore(url).ranges._found


def test_verify_reads_a_shard_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LatentStore(url)
    rounds = shard_rounds(monkeypatch, url)
    assert verify(store).faults == []
    assert 0 < len(rounds) <= FEW
    latents = {(one.shard, one.offset, one.length) for one in map(store.entry, store.keys())}
    assert not latents & {one for ranges in rounds for one in ranges}


def test_verify_of_a_view_reads_groups(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = LatentStore(lm.select(url, tmp_path / "view").dest)
    rounds = shard_rounds(monkeypatch, url)
    assert verify(view).faults == []
    assert 0 < len(rounds) <= FEW
    flip(url, "item/00070")
    (fault,) = verify(view).faults
    assert "is damaged at record item/00070: the latent does not match its hash" in fault


@pytest.mark.parametrize("limit", [1, 700, 1 << 20])
def test_the_size_of_a_group_is_limited(
    url: str, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(prefetch, "GROUP_BYTES", limit)
    store = lm.open(url)
    for entry in prefetched(store, map(store.index.entry, range(COUNT))):
        kept = sum(length for _, _, length in store.ranges._found)
        assert kept <= max(limit, entry.length + max(0, entry.fields_length))
        number = int(entry.key[-5:])
        assert np.array_equal(store.read(entry).latent, latent_of(number, 16))


def test_requests_read_neighbours_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_MAX_GAP", 10)
    monkeypatch.setattr(prefetch, "_REQUEST_BYTES", 100)
    ranges = [
        ("a", 0, 40),
        ("a", 50, 40),
        ("a", 95, 5),
        ("a", 111, 5),
        ("a", 111, 200),
        ("b", 0, 9),
    ]
    assert (
        list(prefetch._merged(ranges))
        == [
            ("a", 0, 100, ranges[:3]),
            ("a", 111, 5, ranges[3:4]),  # another 200 would be too many
            ("a", 111, 200, ranges[4:5]),
            ("b", 0, 9, ranges[5:]),
        ]
    )
    assert list(prefetch._merged([])) == []


def test_a_damaged_record_is_reported_and_the_next_ones_are_read(url: str) -> None:
    flip(url, "item/00001")
    store, found = lm.open(url), []
    for entry in prefetched(store, map(store.index.entry, range(4))):
        try:
            found.append(store.read(entry).key)
        except DamagedShardError as error:
            found.append(str(error).partition(": ")[2])
    hint = f"the latent does not match its hash; {restore_hint('the shard')}."
    assert found == ["item/00000", hint, "item/00002", "item/00003"]


def test_records_that_were_encoded_again_are_read_where_they_are_now() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    store = write_latents(url, [16] * 16, per_unit=8)
    store.index  # noqa: B018  of the seal before
    again = [latent_of(number + 1, 16) for number in range(16)]
    write_again(url, [0], again)
    found = [record.latent.tobytes() for record in store]
    expected = again[:8] + [latent_of(number, 16) for number in range(8, 16)]
    assert found == [latent.tobytes() for latent in expected]
