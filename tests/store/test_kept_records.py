"""A unit that is encoded again keeps the records of items whose files cannot be loaded any more."""

from __future__ import annotations

import os
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from latentmill.cli import show
from latentmill.engine import worker as worker_module
from latentmill.errors import StorageError
from latentmill.plan import load
from latentmill.record import Record
from latentmill.storage.storage import Storage
from latentmill.store.commit import read_commits
from latentmill.store.earlier import EarlierRecords
from latentmill.store.formats import SHARD_FORMATS
from latentmill.store.schema import ItemEntry
from latentmill.store.store import open_store
from latentmill.store.verify import verify
from support import runs
from support.in_process import encode, spoil, tone
from support.latent_store import latent_of, write_latents
from support.rounds import shard_rounds

pytestmark = pytest.mark.usefixtures("inline")


@pytest.fixture(params=list(SHARD_FORMATS))
def options(request: pytest.FixtureRequest) -> dict[str, object]:
    return {"format": request.param, "unit_seconds": 60.0}  # one unit


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    for number, name in enumerate("abc"):
        tone(tmp_path / "songs" / f"{name}.wav", 3000 + 1000 * number)
    (tmp_path / "songs" / "b.json").write_text('{"genre": "rock"}')
    return tmp_path / "songs"


def records(store: Path) -> dict[str, Record]:
    return {record.key: record for record in open_store(str(store))}


def entries(store: Path) -> dict[str, ItemEntry]:
    (commit,) = read_commits(open_store(str(store)).storage).values()
    assert [entry.key for entry in commit.items] == sorted(entry.key for entry in commit.items)
    return {entry.key: entry for entry in commit.items}


def assert_equal(one: Record, other: Record) -> None:
    assert one.latent.tobytes() == other.latent.tobytes()
    assert replace(one, latent=other.latent) == other  # metadata, levels, hashes


def assert_statistics(store: Path) -> None:
    opened = open_store(str(store))
    frames = np.concatenate([record.latent for record in opened], axis=1).astype(np.float64)
    np.testing.assert_allclose(opened.info.mean, frames.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(opened.info.std, frames.std(axis=1), rtol=1e-4)
    assert opened.info.frames == frames.shape[1]


def test_a_changed_file_is_encoded_again_and_one_that_is_gone_keeps_its_record(
    songs: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    store = tmp_path / "store"
    encode(songs, store, **options)
    before = records(store)
    (songs / "b.wav").unlink()
    tone(songs / "a.wav", 7000, 0.5)
    done = encode(songs, store, extend=True, retry_changed=True, **options)
    assert done.exit_code == 0
    assert [key for key, _ in done.kept] == ["b"]
    text = show.summary(done)
    assert "1 item not encoded again, the earlier latents are kept" in text
    assert f"  kept: b: {done.kept[0][1]}" in text
    for _ in range(2):  # the next run removes the old shard
        after = records(store)
        assert after["a"].num_samples == 7000
        assert_equal(after["b"], before["b"])
        assert after["b"].metadata == {"genre": "rock"}
        assert_equal(after["c"], before["c"])
        assert {key: entry.kept for key, entry in entries(store).items()} == {
            "a": False,
            "b": True,
            "c": False,
        }
        assert verify(open_store(str(store))).faults == []
        assert_statistics(store)
        runs.assert_whole(store)
        assert encode(songs, store, **options).kept == ()
    assert len(list((store / "shards").iterdir())) == 1


def test_failed_items_are_retried_and_the_others_lose_nothing(
    songs: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    """A file that was edited since planning is encoded again only with --retry-changed."""
    store = tmp_path / "store"
    spoil(songs / "a.wav")
    assert encode(songs, store, **options).info.failed == 1
    before = records(store)
    tone(songs / "a.wav", 5000)
    (songs / "b.wav").unlink()
    tone(songs / "c.wav", 9000)
    done = encode(songs, store, retry_failed=True, **options)
    assert (done.info.encoded, done.failures, done.exit_code) == (3, (), 0)
    reasons = dict(done.kept)
    assert reasons.keys() == {"b", "c"}
    assert "changed since the plan was made" in reasons["c"]
    after = records(store)
    assert after["a"].num_samples == 5000
    for key in "bc":
        assert_equal(after[key], before[key])
    assert verify(open_store(str(store))).faults == []

    tone(songs / "b.wav", 4500)  # back again, with other contents
    found = encode(songs, store, extend=True, retry_changed=True, **options)
    assert found.kept == ()
    lengths = {key: record.num_samples for key, record in records(store).items()}
    assert lengths == {"a": 5000, "b": 4500, "c": 9000}
    assert not any(entry.reason for entry in entries(store).values())


def test_kept_items_are_tried_again_with_retry_failed(
    songs: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    store = tmp_path / "store"
    encode(songs, store, **options)
    hidden = songs.parent / "b.wav"
    (songs / "b.wav").rename(hidden)
    tone(songs / "a.wav", 7000)
    encode(songs, store, extend=True, retry_changed=True, **options)
    assert entries(store)["b"].kept
    hidden.rename(songs / "b.wav")
    assert encode(songs, store, **options).kept == ()  # nothing to do
    assert entries(store)["b"].kept
    assert encode(songs, store, retry_failed=True, **options).kept == ()
    assert not entries(store)["b"].kept


def test_a_killed_run_keeps_the_records_when_it_is_resumed(
    songs: Path, tmp_path: Path, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    store = tmp_path / "store"
    encode(songs, store, **options)
    before = records(store)
    (songs / "b.wav").unlink()
    tone(songs / "a.wav", 7000)
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(worker_module, "write_commit", killed)
            encode(songs, store, extend=True, retry_changed=True, **options)
        assert_equal(records(store)["b"], before["b"])
    assert [key for key, _ in encode(songs, store, **options).kept] == ["b"]
    assert_equal(records(store)["b"], before["b"])
    assert records(store)["a"].num_samples == 7000
    assert verify(open_store(str(store))).faults == []


def test_status_lists_kept_items_and_the_speed_is_that_of_the_others(
    songs: Path, tmp_path: Path, options: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    encode(songs, store, **options)
    assert "  kept: " not in runs.call(capsys, "status", store).out
    (songs / "b.wav").unlink()
    tone(songs / "a.wav", 7000)
    done = encode(songs, store, extend=True, retry_changed=True, **options)
    assert done.encoded_seconds == pytest.approx((7000 + 5000) / 44100, abs=1e-9)  # a and c
    assert done.info.hours == pytest.approx((7000 + 4000 + 5000) / 44100 / 3600, abs=1e-6)
    for _ in range(2):
        text = runs.call(capsys, "status", store).out
        assert "  kept: b: there is no such file" in text.splitlines()
        assert runs.outcome(runs.call(capsys, "status", store, "--json"))["kept"] == [
            ["b", "there is no such file"]
        ]
        assert encode(songs, store, **options).encoded_seconds == 0


def test_values_that_a_refresh_has_set_stay_with_a_kept_record(
    songs: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    store = tmp_path / "store"
    encode(songs, store, **options)
    (songs / "b.json").write_text('{"genre": "jazz"}')
    encode(songs, store, extend=True, refresh_metadata=True, **options)
    assert records(store)["b"].metadata == {"genre": "jazz"}
    (songs / "b.wav").unlink()
    tone(songs / "a.wav", 7000)
    encode(songs, store, extend=True, retry_changed=True, **options)
    assert entries(store)["b"].kept
    assert records(store)["b"].metadata == {"genre": "jazz"}


def test_a_record_of_a_truncated_shard_is_not_kept(
    songs: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    store = tmp_path / "store"
    encode(songs, store, **options)
    (shard,) = (store / "shards").iterdir()
    os.truncate(shard, shard.stat().st_size - 1)
    (songs / "b.wav").unlink()
    done = encode(songs, store, **options)
    assert [key for key, _ in done.failures] == ["b"]
    assert verify(open_store(str(store))).faults == []


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["latent", "fields"])
def test_a_damaged_record_fails_its_item_and_the_others_are_kept(
    songs: Path, tmp_path: Path, options: dict[str, object], part: str
) -> None:
    store = tmp_path / "store"
    encode(songs, store, **options)
    before = records(store)
    (shard,) = (store / "shards").iterdir()
    place = open_store(str(store)).entry("b")
    in_fields = place.fields_offset
    if part == "fields" and in_fields < 0:  # the columns of a Parquet shard have checksums
        in_fields = pq.read_metadata(shard).row_group(0).column(0).data_page_offset
    flip_byte(shard, place.offset if part == "latent" else in_fields)
    (songs / "b.wav").unlink()
    tone(songs / "a.wav", 7000)
    done = encode(songs, store, extend=True, retry_changed=True, **options)
    ((key, reason),) = done.failures
    assert (key, done.exit_code, done.kept) == ("b", 3, ())
    assert reason == "there is no such file; its earlier latent is damaged"
    after = records(store)
    assert after.keys() == {"a", "c"}
    assert after["a"].num_samples == 7000
    assert_equal(after["c"], before["c"])
    assert verify(open_store(str(store))).faults == []


def test_a_record_that_cannot_be_read_now_stops_the_run(
    songs: Path, tmp_path: Path, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(self: Storage, path: str, *_: object) -> bytes:
        raise StorageError(f"Cannot read {path}: the storage does not answer.")

    store = tmp_path / "store"
    encode(songs, store, **options)
    before = records(store)
    (songs / "b.wav").unlink()
    tone(songs / "a.wav", 7000)
    with monkeypatch.context() as patch, pytest.raises(StorageError, match="does not answer"):
        patch.setattr(Storage, "read_range", silent)
        encode(songs, store, extend=True, retry_changed=True, **options)
    assert [key for key, _ in encode(songs, store, **options).kept] == ["b"]
    assert_equal(records(store)["b"], before["b"])


@pytest.mark.parametrize("format_name", SHARD_FORMATS)
def test_records_in_a_bucket_are_read_in_groups(
    monkeypatch: pytest.MonkeyPatch, format_name: str
) -> None:
    url, count = f"memory://{uuid.uuid4().hex}", 40
    write_latents(url, [4] * count, per_unit=count, failed=(3,), format_name=format_name)
    storage = Storage(url)
    plan = load(storage)
    assert plan is not None
    earlier = EarlierRecords(storage, replace(plan.units[0], revision=1))
    rounds = shard_rounds(monkeypatch, url)
    found = {one.key: one for one in earlier.outcomes(list(earlier.items))}
    assert len(found) == count
    assert found.pop("item/00003").status == "failed"
    for key, outcome in found.items():
        assert outcome.record is not None
        assert np.array_equal(outcome.record.latent, latent_of(int(key[-5:]), 4))
    assert 0 < len(rounds) < 10
