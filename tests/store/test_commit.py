"""One unit, one shard, one commit: everything is there, or nothing is."""

from __future__ import annotations

import dataclasses
import json
import resource
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from store_files import FORMATS, make_record

from latentmill.errors import StorageError, StoreError
from latentmill.fields.inputs import InOrder
from latentmill.record import Outcome
from latentmill.storage.storage import Storage
from latentmill.store.commit import (
    Tally,
    committed_revisions,
    iter_commits,
    next_revisions,
    read_commit,
    read_commits,
    write_commit,
    write_unit,
)
from latentmill.store.formats import extension
from latentmill.store.parquet import ParquetShardWriter
from latentmill.store.schema import Commit

each_format = pytest.mark.parametrize("name", FORMATS)


def encoded(key: str, frames: int = 100) -> Outcome:
    rng = np.random.default_rng(frames)
    latent = rng.standard_normal((64, frames), np.float32).astype(np.float16)
    return Outcome(key, "encoded", record=make_record(key, latent))


def write(folder: Path | str, name: str, outcomes: Iterator[Outcome] | list[Outcome]) -> Commit:
    return write_unit(
        Storage(str(folder)), "000007", outcomes, format_name=name, fingerprint="f00", info={}
    )


@each_format
@pytest.mark.parametrize("committed", [True, False])
def test_a_name_is_never_written_twice(name: str, committed: bool, tmp_path: Path) -> None:
    """Nor by a unit that has no records any more: then an older shard is not of its commit."""
    storage = Storage(str(tmp_path))
    first = write(tmp_path, name, [encoded("a")])
    assert first.shard is not None
    bytes_before = (tmp_path / first.shard).read_bytes()
    if committed:
        first = write_commit(storage, first, {})
    second = write(tmp_path, name, [encoded("a", 30)])
    assert second.shard == first.shard.replace("000007.", "000007.r1.")
    assert second.revision == 1
    empty = write(tmp_path, name, [Outcome("a", "failed", "changed since")])
    assert (empty.shard, empty.revision) == (None, 2)
    assert (tmp_path / first.shard).read_bytes() == bytes_before
    for commit in (empty, second):  # in any order the highest one counts
        written = write_commit(storage, commit, {})
        assert json.loads((tmp_path / f"commits/000007.r{commit.revision}.json").read_text())
        assert Commit.model_validate_json(written.model_dump_json()) == written
    assert read_commits(storage)["000007"].revision == 2
    assert next_revisions(storage) == {"000007": 3}


def test_a_tally_counts_each_status(tmp_path: Path) -> None:
    skips = [Outcome(f"skipped {number}", "skipped", "min_seconds") for number in range(3)]
    failures = [Outcome("failed", "failed", "why"), Outcome("failed, too", "failed")]
    tally = Tally.of(write(tmp_path, "parquet", [encoded("a"), *skips, *failures]))
    assert (tally.items, tally.encoded, tally.skipped, tally.failed) == (6, 1, 3, 2)
    assert tally.failures == (("failed", "why"), ("failed, too", ""))
    assert tally.skips == tuple((one.key, "min_seconds") for one in skips)
    assert tally.bytes == sum(path.stat().st_size for path in (tmp_path / "shards").iterdir())


def test_of_two_attempts_at_a_revision_the_first_commit_counts(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    commit = write(tmp_path, "parquet", [Outcome("a", "failed", "why")])
    planned = commit.model_copy(update={"items_hash": "1"})
    first = write_commit(storage, planned, {"total_seconds": 1.0})
    assert write_commit(storage, planned, {"total_seconds": 2.0}) == first
    with pytest.raises(StoreError, match=r"Another run has committed .*commits/000007\.json"):
        write_commit(storage, commit.model_copy(update={"items_hash": "2"}), {})
    assert read_commits(storage) == {"000007": first}


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@each_format
def test_a_unit(name: str, tmp_path: Path) -> None:
    outcomes = [
        Outcome("a", "failed", "the file is empty"),
        encoded("b", 40),
        Outcome("c", "skipped", "min_seconds: 0.1 s"),
        encoded("d", 2000),
        encoded("e", 1),
        Outcome("f", "failed", "late"),
    ]
    commit = write(tmp_path, name, outcomes)
    assert [(i.key, i.status, i.reason) for i in commit.items] == [
        (o.key, o.status, o.reason) for o in outcomes
    ]
    assert commit.shard is not None
    data = (tmp_path / commit.shard).read_bytes()
    assert (commit.rows, commit.bytes) == (3, len(data))
    assert commit.hash == xxhash.xxh3_128_hexdigest(data)
    assert commit.audio_seconds == pytest.approx(3 * 1000 / 22050)
    for item, outcome in zip(commit.items, outcomes, strict=True):
        if outcome.record is None:
            assert item.offset is item.length is item.hash is item.shape is None
        else:
            stored = outcome.record.latent.T.tobytes()
            assert data[item.offset : item.offset + item.length] == stored
            assert item.hash == xxhash.xxh3_64_hexdigest(stored)
            assert item.shape == outcome.record.latent.shape
    frames = np.concatenate([o.record.latent for o in outcomes if o.record], axis=1)
    assert commit.statistics is not None
    assert commit.statistics.frames == frames.shape[1]
    np.testing.assert_allclose(commit.statistics.mean, frames.astype(np.float64).mean(axis=1))

    storage = Storage(str(tmp_path))
    assert read_commits(storage) == {}  # the shard does not count yet
    written = write_commit(storage, commit, {"total_seconds": 1.23456})
    assert read_commits(storage) == {"000007": written}
    assert written.timings == {"total_seconds": 1.2346}
    assert files(tmp_path) == ["commits/000007.json", commit.shard]


@each_format
def test_a_unit_without_records_has_no_shard(name: str, tmp_path: Path) -> None:
    commit = write(tmp_path, name, [Outcome("a", "failed", "why"), Outcome("b", "skipped", "so")])
    assert (commit.shard, commit.hash, commit.bytes, commit.rows) == (None, None, 0, 0)
    assert commit.statistics is None
    storage = Storage(str(tmp_path))
    written = write_commit(storage, commit, {})
    assert read_commits(storage) == {"000007": written}
    assert files(tmp_path) == ["commits/000007.json"]


@each_format
@pytest.mark.parametrize("error", [RuntimeError("boom"), OSError(5, "encoder's own"), SystemExit()])
def test_a_failing_encoder_leaves_nothing(name: str, tmp_path: Path, error: BaseException) -> None:
    def outcomes() -> Iterator[Outcome]:
        for n in range(40):
            yield encoded(str(n))
        raise error

    with pytest.raises(type(error)) as raised:
        write(tmp_path, name, outcomes())
    assert raised.value is error  # an error of the encoder is none of the storage
    assert files(tmp_path) == []


@each_format
@pytest.mark.parametrize("frames", [500, 30000])  # 64 kB records, or one larger than the limit
def test_a_full_disk_leaves_nothing(name: str, tmp_path: Path, frames: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(StorageError) as raised:
            write(
                tmp_path, name, [encoded(str(n), frames) for n in range(40 if frames == 500 else 2)]
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    expected = f"Cannot write {tmp_path}/shards/000007{extension(name)}: File too large."
    assert str(raised.value) == expected
    assert files(tmp_path) == []


def test_the_error_of_a_full_disk_names_the_disk_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard of a bucket is first written to a local disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage = Storage(f"memory://{uuid.uuid4().hex}/store")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(StorageError, match=f"Cannot write {storage.scratch_folder}/"):
            write(storage.root, "parquet", [encoded(str(n), 500) for n in range(40)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@each_format
def test_a_full_disk_at_the_end_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bytes (footer, end of the tar) are what does not fit."""
    size = write(tmp_path / "whole", name, [encoded("a")]).bytes
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            write(tmp_path / "full", name, [encoded("a")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path / "full") == []


def test_an_unwritable_store(tmp_path: Path) -> None:
    (tmp_path / "shards").write_text("a file where a folder must be")
    with pytest.raises(StorageError, match=r"Cannot write .*/shards/000007.parquet: "):
        write(tmp_path, "parquet", [encoded("a")])
    assert files(tmp_path) == ["shards"]


def test_too_large_for_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ParquetShardWriter, "max_latent_bytes", 64 * 2 * 50)
    long = make_record("long", np.zeros((64, 3 << 22), np.float16))  # its memory is not touched
    outcomes = [encoded("fits", 50), encoded("large", 51), Outcome("long", "encoded", record=long)]
    commit = write(tmp_path, "parquet", outcomes)
    assert [item.status for item in commit.items] == ["encoded", "failed", "failed"]
    assert [item.reason for item in commit.items[1:]] == [
        f"its latent of {size} GiB is too large for Parquet: use format webdataset"
        for size in ("0.0", "1.5")
    ]
    assert (commit.rows, commit.statistics and commit.statistics.frames) == (1, 50)


def _nested(levels: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


ODD_FIELDS: dict[str, dict[str, object]] = {
    "half a surrogate pair in a name": {"group": "\ud800"},
    "a rate beyond 32 bits": {"source_sample_rate": 2**31},
    "channels beyond 32 bits": {"source_channels": 2**31},
    "metadata without end": {"metadata": _nested(5000)},
    "a number of 5,000 digits": {"metadata": {"n": 10**5000}},
    "no JSON": {"metadata": {"n": {1, 2}}},
    "a name that is a number": {"role": 7},
}


@each_format
@pytest.mark.parametrize("kind", ODD_FIELDS)
def test_what_cannot_be_stored_of_an_item_fails_it_alone(
    name: str, kind: str, tmp_path: Path
) -> None:
    odd = encoded("odd")
    assert odd.record is not None
    odd = dataclasses.replace(odd, record=dataclasses.replace(odd.record, **ODD_FIELDS[kind]))
    commit = write(tmp_path, name, [encoded("a"), odd, encoded("b")])
    assert [item.status for item in commit.items] == ["encoded", "failed", "encoded"]
    reason = commit.items[1].reason
    assert reason is not None
    assert reason.startswith("its fields cannot be stored (")
    storage = Storage(str(tmp_path))
    written = write_commit(storage, commit, {})
    assert read_commits(storage) == {"000007": written}


@each_format
def test_a_reason_that_is_no_text_is_escaped(name: str, tmp_path: Path) -> None:
    commit = write(tmp_path, name, [Outcome("a", "failed", "cannot open x\udcff.wav")])
    storage = Storage(str(tmp_path))
    write_commit(storage, commit, {})
    reason = read_commits(storage)["000007"].items[0].reason
    assert reason == r"cannot open x\udcff.wav"


def test_commits_come_in_order(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    names = [f"{n:06d}" for n in range(50)]
    for unit in reversed(names):
        commit = write_unit(storage, unit, [], format_name="parquet", fingerprint="f00", info={})
        write_commit(storage, commit, {})
    (tmp_path / "commits/notes.txt").write_text("not a commit")
    assert [commit.unit for commit in iter_commits(storage)] == names
    assert list(read_commits(storage)) == names


def change(document: dict, **values: object) -> str:
    return json.dumps({**document, **values})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: "", "is damaged: restore it"),
        (lambda d: change(d)[:-20], "is damaged: restore it"),
        (lambda d: change(d, rows=2), "is damaged: restore it"),
        (lambda d: change(d, shard=None), "is damaged: restore it"),
        (lambda d: change(d, surprise=1), "is damaged: restore it"),
        (lambda d: change(d, items=[{**d["items"][0], "offset": None}]), "is damaged: restore it"),
        (
            lambda d: change(d, unit="000008"),
            "is the commit of unit 000008, revision 0: restore it",
        ),
        (lambda d: change(d, format_version=3), "has format version 3, but this version"),
    ],
)
def test_a_damaged_commit_is_refused(tmp_path: Path, spoil: object, message: str) -> None:
    storage = Storage(str(tmp_path))
    written = write_commit(storage, write(tmp_path, "parquet", [encoded("a")]), {})
    path = tmp_path / "commits/000007.json"
    assert read_commit(storage, "000007") == written
    assert "null" not in path.read_text()  # earlier versions know the names that have a value
    path.write_text(spoil(json.loads(path.read_text())))
    with pytest.raises(StoreError) as raised:
        read_commits(storage)
    assert f"{path} {message}" in str(raised.value)


def test_a_reason_that_quotes_a_signed_url_is_stored_without_its_signature(tmp_path: Path) -> None:
    """A client's error may quote an address that a server redirected to."""
    reason = "Error: 403, url='https://cdn.example/a.wav?X-Amz-Signature=0123456789abcdef'"
    (item,) = write(tmp_path, "parquet", [Outcome("song", "failed", reason)]).items
    assert item.reason is not None
    assert "0123456789abcdef" not in item.reason
    assert "cdn.example/a.wav" in item.reason


def test_commits_are_in_the_order_of_the_plan(tmp_path: Path) -> None:
    """From unit 1,000,000 on, names have another digit."""
    storage = Storage(str(tmp_path))
    units = ["100000", "100001", "999999", "1000000", "1000001"]
    for unit in reversed(units):
        commit = write_unit(storage, unit, [], format_name="parquet", fingerprint="f00", info={})
        write_commit(storage, commit, {})
    assert list(committed_revisions(storage)) == units
    found = InOrder(iter_commits(storage))
    assert [commit and commit.unit for commit in map(found.of, units)] == units
