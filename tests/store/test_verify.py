"""`verify`: a whole store has no faults, and each thing that goes wrong is one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from store_files import KEYS, index_file, write_store

from latentmill.errors import ItemError, StorageError
from latentmill.record import Record
from latentmill.storage.storage import Storage
from latentmill.store.index import Index
from latentmill.store.seal import read_origin
from latentmill.store.store import LatentStore
from latentmill.store.verify import VerifyReport, _decode, read_source, verify


def faults(folder: Path) -> list[str]:
    return verify(LatentStore(str(folder), device="cpu"), decode=1).faults


def shard(folder: Path) -> Path:
    return sorted((folder / "shards").iterdir())[1]


def commit(folder: Path) -> Path:
    return folder / "commits/000001.json"


def change(path: Path, edit: Callable[[dict], object]) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def flip_a_byte(folder: Path) -> None:
    data = bytearray(shard(folder).read_bytes())
    data[len(data) // 2] ^= 1
    shard(folder).write_bytes(data)


def cut_short(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-1])


def repackage(folder: Path) -> None:
    """A shard of other bytes whose commit was made to fit, but not the records' hashes."""
    item = json.loads(commit(folder).read_text())["items"][0]
    data = bytearray(shard(folder).read_bytes())
    data[item["offset"]] ^= 1
    shard(folder).write_bytes(data)
    change(commit(folder), lambda d: d.update(hash=xxhash.xxh3_128_hexdigest(bytes(data))))


def move_a_record(folder: Path) -> None:
    change(commit(folder), lambda d: d["items"][0].update(offset=d["items"][0]["offset"] - 1))


def write_origin_of(folder: Path, origin: np.ndarray) -> None:
    np.save(folder / "origin.npy", origin)


def nudge_statistics(folder: Path, factor: float) -> None:
    change(folder / "dataset.json", lambda d: d["mean"].__setitem__(0, d["mean"][0] * factor))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (flip_a_byte, "does not match the hash in its commit: restore the shard"),
    "shard cut short": (cut_short, "bytes, but its commit lists "),
    "missing shard": (lambda f: shard(f).unlink(), "No such file or directory: restore the shard"),
    "stray shard": (
        lambda f: shutil.copy(shard(f), f / "shards/999999.parquet"),
        "shards/999999.parquet does not belong to a commit",
    ),
    "stray temporary file": (
        lambda f: ((f / "tmp").mkdir(exist_ok=True), (f / "tmp" / f"{'0' * 32}.x").write_text("")),
        f"tmp/{'0' * 32}.x was left by a killed run",
    ),
    "stray file in tmp": (
        lambda f: ((f / "tmp").mkdir(exist_ok=True), (f / "tmp/x").write_text("")),
        "tmp/x was not written by latentmill",
    ),
    "linked tmp": (lambda f: (f / "tmp").symlink_to(f.parent), "tmp is a link: remove it"),
    "damaged commit": (lambda f: commit(f).write_text("{"), "000001.json is damaged: restore it"),
    "stray commit": (
        lambda f: shutil.copy(commit(f), f / "commits/000099.json"),
        "commits/000099.json does not belong to a unit",
    ),
    "other fingerprint": (
        lambda f: change(commit(f), lambda d: d.update(fingerprint="0" * 32)),
        "commit 000001 has a different fingerprint than the plan",
    ),
    "other items": (
        lambda f: change(commit(f), lambda d: d["items"][0].update(key="other")),
        "commit 000001 does not list the items",
    ),
    "other bytes": (repackage, "the latent does not match its hash"),
    "moved record": (move_a_record, "the latent does not match its hash"),
    "dataset.json": (
        lambda f: change(f / "dataset.json", lambda d: d.update(encoded=3)),
        "dataset.json does not match the plan and the commits (encoded): delete dataset.json",
    ),
    "other dataset.json": (
        lambda f: change(
            f / "dataset.json",
            lambda d: d.update(
                hours=1.0,
                source="elsewhere",
                model=d["model"] | {"name": "other"},
                dtype="float32",
            ),
        ),
        "the plan and the commits (dtype, hours, model, source): delete dataset.json",
    ),
    "other statistics": (
        lambda f: nudge_statistics(f, 1 + 1e-8),
        "dataset.json does not match the plan and the commits (mean): delete dataset.json",
    ),
    "fewer statistics": (
        lambda f: change(
            f / "dataset.json",
            lambda d: (d["mean"].pop(), d["std"].pop(), d["model"].update(latent_channels=63)),
        ),
        "dataset.json does not match the plan and the commits (mean, model, std): delete",
    ),
    "not sealed": (
        lambda f: (f / "dataset.json").unlink(),
        "all units are committed, but dataset.json is missing: run the same encode command again",
    ),
    "missing origin": (
        lambda f: (f / "origin.npy").unlink(),
        "origin.npy is missing or damaged: delete it and run the same encode command again",
    ),
    "damaged origin": (
        lambda f: (f / "origin.npy").write_bytes((f / "origin.npy").read_bytes()[:-1]),
        "origin.npy is missing or damaged",
    ),
    "origin of other channels": (
        lambda f: write_origin_of(f, np.load(f / "origin.npy")[1:]),
        "origin.npy does not contain 64 x ",
    ),
    "origin of other frames": (
        lambda f: write_origin_of(f, np.load(f / "origin.npy")[:, 1:]),
        "origin.npy does not contain 64 x ",
    ),
    "origin of NaN": (
        lambda f: write_origin_of(f, np.load(f / "origin.npy") * np.float32(np.nan)),
        "origin.npy does not contain 64 x ",
    ),
    "origin of text": (
        lambda f: write_origin_of(f, np.load(f / "origin.npy").astype(str)),
        "origin.npy is missing or damaged",
    ),
    "missing index": (lambda f: index_file(f).unlink(), ".arrow is missing or damaged"),
}


def test_a_whole_store(store: LatentStore) -> None:
    report = verify(store, decode=3)
    assert report.faults == []
    assert report.units == report.committed == len(store.plan.units)
    assert (report.items, report.records) == (27, 25)
    assert len(report.decoded) == 3
    for decoded in report.decoded:
        assert decoded.key in KEYS
        assert decoded.level_db == pytest.approx(0, abs=0.01)
        assert decoded.snr_db is not None
        assert decoded.snr_db > 60


def test_records_are_decoded_in_the_store_s_numeric_mode(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[bool] = []
    decode = store.decode
    monkeypatch.setattr(
        store, "decode", lambda key: modes.append(torch.is_autocast_enabled("cpu")) or decode(key)
    )
    for precision in ("float32", "bf16"):
        monkeypatch.setitem(store.plan.fingerprint["numeric"], "precision", precision)
        report = VerifyReport()
        _decode(store, KEYS[0], report)
        assert report.faults == []
    assert modes == [False, True]


@pytest.mark.parametrize(("spoil", "line"), FAULTS.values(), ids=FAULTS.keys())
def test_each_fault_is_one_line(
    spoilable: Path, spoil: Callable[[Path], object], line: str
) -> None:
    spoil(spoilable)
    found = faults(spoilable)
    assert any(line in fault for fault in found), found
    if spoil is not FAULTS["other items"][0]:  # there the fields name another record, too
        assert len(found) == 1, found
    assert not any("\n" in fault for fault in found)


def test_what_a_whole_store_may_differ_in(spoilable: Path) -> None:
    """Sealed by another version or machine, its seams measured."""
    seams = {"items": 1, "median": 0.1, "largest": 0.2}
    change(spoilable / "dataset.json", lambda d: d.update(latentmill_version="0", seams=seams))
    nudge_statistics(spoilable, 1 + 1e-12)
    assert faults(spoilable) == []


@pytest.mark.parametrize("stitch", ["trim", "crossfade", "none"])
def test_the_origin_of_every_stitch_is_known(corpus: Path, tmp_path: Path, stitch: str) -> None:
    options = {"stitch": stitch, "chunk_seconds": 0.5, "unit_seconds": 60}
    store = write_store(str(tmp_path / "store"), corpus, **options)
    assert verify(store).faults == []
    write_origin_of(tmp_path / "store", store.origin.frames[1:])
    (fault,) = verify(store).faults
    assert fault.startswith("origin.npy does not contain 64 x ")


def test_missing_commits(spoilable: Path) -> None:
    """The unit's shard is then a stray."""
    (spoilable / "dataset.json").unlink()
    commit(spoilable).unlink()
    units = len(LatentStore(str(spoilable)).plan.units)
    unit, stray = faults(spoilable)
    assert unit.startswith(f"1 of {units} units are not committed (the first is 000001): run the")
    assert f"shards/{shard(spoilable).name} does not belong to a commit" in stray


def test_an_index_that_is_not_of_these_commits(spoilable: Path, stores: dict[str, Path]) -> None:
    """Sealed, then a unit was encoded anew with another writer: same counts, other places."""
    other = next(f for f in stores.values() if shard(f).suffix != shard(spoilable).suffix)
    shutil.copy(index_file(other), index_file(spoilable))
    (fault,) = faults(spoilable)
    assert ".arrow is missing or damaged: run the same encode command again" in fault
    document = json.loads((spoilable / "dataset.json").read_text())
    document["index_hash"] = None  # as in a store of format version 1
    (spoilable / "dataset.json").write_text(json.dumps(document))
    assert any(
        f".arrow and the commit differ on where {KEYS[0]} is" in f for f in faults(spoilable)
    )


def test_no_record_is_searched_for_in_a_whole_index(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, real = [], Index.find

    def counted(index: Index, key: str) -> int | None:
        found.append(key)
        return real(index, key)

    monkeypatch.setattr(Index, "find", counted)
    assert verify(store).faults == []
    assert not found


def test_an_unsealed_store_is_verified_too(spoilable: Path) -> None:
    (spoilable / "dataset.json").unlink()
    index_file(spoilable).unlink()
    (fault,) = faults(spoilable)
    assert "dataset.json is missing" in fault
    commit(spoilable).write_text("{")
    (fault,) = faults(spoilable)
    assert "000001.json is damaged" in fault


def test_verify_holds_one_record_at_a_time(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither all commits nor more than a record's bytes at once."""
    largest = max(store.entry(key).length for key in KEYS)
    read_range = Storage.read_range

    def bounded(self: Storage, path: str, offset: int, length: int) -> bytes:
        assert length <= largest
        return read_range(self, path, offset, length)

    def refuse(self: LatentStore) -> None:
        raise AssertionError("all commits are loaded")

    monkeypatch.setattr(Storage, "read_range", bounded)
    monkeypatch.setattr(LatentStore, "commits", property(refuse))
    assert verify(store).faults == []


def test_a_source_that_is_gone_or_changed(spoilable: Path, corpus: Path, tmp_path: Path) -> None:
    record: Record = LatentStore(str(spoilable))["drums"]
    assert read_source(record, 1).shape == (1, record.num_samples)
    with pytest.raises(ItemError, match="there is no such file"):
        read_source(replace(record, source_uri=str(tmp_path / "gone.wav")), 1)
    with pytest.raises(ItemError, match="has changed since it was encoded"):
        read_source(replace(record, source_uri=str(corpus / "one-frame.wav")), 1)


def test_numbers_are_checked(store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read = LatentStore.read

    def with_nan(self: LatentStore, entry: object) -> Record:
        record = read(self, entry)
        if record.key == "drums":
            record = dataclasses.replace(record, latent=np.full((2, 3), np.nan, np.float16))
        return record

    monkeypatch.setattr(LatentStore, "read", with_nan)
    assert verify(store).faults == ["the latent of drums contains NaN or Inf"]
    monkeypatch.setattr(LatentStore, "read", lambda *_: (_ for _ in ()).throw(StorageError("gone")))
    assert verify(store).faults == ["gone"] * len(KEYS)


def test_a_store_of_which_nothing_is_encoded_has_no_origin(tmp_path: Path, one_sentence) -> None:
    with pytest.raises(StorageError) as caught:
        read_origin(Storage(str(tmp_path)))
    assert "run the same encode command again" in one_sentence(caught.value)


def test_a_source_at_another_address_is_read_with_consent_only(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("latentmill.store.remote_sources.source_is_near", lambda *_: False)
    (decoded,) = verify(store, decode=1).decoded
    assert decoded.snr_db is None
    assert "1 source at another address was not read: if you trust the store" in caplog.text
    caplog.clear()
    (decoded,) = verify(store, decode=1, remote_sources=True).decoded
    assert decoded.snr_db is not None
    assert not caplog.text
