"""A store that grows: new files become new units, changed and vanished ones are named."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from latentmill.cli import show, show_status
from latentmill.config import load_config
from latentmill.engine import launch
from latentmill.errors import ConfigError
from latentmill.plan import Plan, UnitLimits, draft, extend, freeze, iter_keys, load, read_items
from latentmill.plan import compare as plan_compare
from latentmill.plan import files as plan_files
from latentmill.plan import items as plan_items
from latentmill.plan.amend import amend
from latentmill.plan.compare import compare
from latentmill.plan.items import ITEMS_SCHEMA
from latentmill.run.forecast import forecast
from latentmill.run.run import RunSummary, run
from latentmill.sources.base import Item
from latentmill.storage.storage import Storage
from latentmill.store.store import open_store
from latentmill.store.verify import verify
from support import runs

LIMITS = UnitLimits(unit_seconds=3.0)


def item(number: int, version: int = 0) -> Item:
    return Item(f"k{number:03d}", f"/in/{number}.wav", 9 + version, f"v{version}", seconds=1.0)


def frozen(items: list[Item], storage: Storage) -> Plan:
    with draft(items, LIMITS) as drafted:
        return freeze(Plan("/in", {}, "mdct", {}, "parquet", {}), drafted, storage)


VERSIONS = st.dictionaries(st.integers(0, 30), st.integers(0, 2), max_size=20)


@settings(max_examples=50, deadline=None)
@given(before=VERSIONS, after=VERSIONS, chance=st.randoms(use_true_random=False))
def test_what_has_become_of_a_source(
    before: dict[int, int], after: dict[int, int], chance: random.Random
) -> None:
    storage = Storage(f"memory://extend/{chance.getrandbits(60)}")
    plan = frozen([item(*pair) for pair in before.items()], storage)
    listing = [item(*pair) for pair in after.items()]
    chance.shuffle(listing)
    new = sorted(after.keys() - before.keys())
    changed = sorted(n for n in after.keys() & before.keys() if after[n] != before[n])
    with draft(listing, LIMITS) as listed:
        found, fresh = compare(plan, storage, listed, LIMITS)
        with fresh:
            assert (found.new, found.vanished) == (len(new), len(before.keys() - after.keys()))
            assert found.changed["key"].to_pylist() == [f"k{n:03d}" for n in changed]
            amended = amend(plan, found.changed, found.units, storage) if changed else plan
            longer = extend(amended, fresh, storage) if new else amended
    assert load(storage) == longer
    old = {one.key: one for unit in amended.units for one in read_items(storage, unit)}
    wanted = {n: after.get(n, version) for n, version in before.items()}
    assert old == {one.key: one for one in (item(*pair) for pair in wanted.items())}
    added = longer.units[len(plan.units) :]
    assert [one.key for unit in added for one in read_items(storage, unit)] == [
        f"k{n:03d}" for n in new
    ]
    stale = [a.number for a, b in zip(plan.units, amended.units, strict=True) if a.hash != b.hash]
    assert set(stale) == set(found.units)


@pytest.mark.parametrize("wanted", [False, True])
def test_rows_of_items_with_other_metadata_are_collected_if_asked_for(wanted: bool) -> None:
    storage = Storage(f"memory://described/{wanted}")
    plan = frozen([item(0), item(1), item(2)], storage)
    captioned = dataclasses.replace(item(1), metadata='{"bpm": 90}')
    options = {"described_rows": True} if wanted else {}
    with draft([item(0), captioned, item(2)], LIMITS) as listed:
        found, fresh = compare(plan, storage, listed, LIMITS, **options)  # type: ignore[arg-type]
        fresh.close()
    assert (found.new, found.described, found.described_keys) == (0, 1, ["k001"])
    rows = [("k001", '{"bpm": 90}')] if wanted else []
    columns = (found.described_rows[name].to_pylist() for name in ("key", "metadata"))
    assert list(zip(*columns, strict=True)) == rows
    assert found.described_units == [0] * wanted


pytestmark = pytest.mark.usefixtures("inline")


def encode(source: Path, store: Path, **options: Any) -> RunSummary:
    defaults = {"device": "cpu", "unit_seconds": 3.0, "threads": 1}
    return run(load_config(None, {"source": str(source), "out": str(store), **defaults, **options}))


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    return runs.write_songs(tmp_path / "songs", 5)


@pytest.fixture
def store(songs: Path, tmp_path: Path) -> Path:
    encode(songs, tmp_path / "store")
    return tmp_path / "store"


def files(store: Path, *folders: str) -> dict[str, tuple[int, bytes]]:
    """What lies in folders, with the times at which it was written."""
    paths = [path for folder in folders for path in (store / folder).iterdir()]
    return {str(p.relative_to(store)): (p.stat().st_mtime_ns, p.read_bytes()) for p in paths}


def test_new_files_become_new_units(songs: Path, store: Path, tmp_path: Path) -> None:
    reader = open_store(str(store))
    old = files(store, "plan", "commits", "shards")
    before = runs.latents(store)
    runs.write_songs(songs, 4, first=10)
    assert encode(songs, store).info.items == 5  # a resume does not list the source
    summary = encode(songs, store, extend=True)
    assert summary.extension is not None
    found = summary.extension
    assert (found.new, found.changed, found.vanished) == (4, 0, 0)
    assert summary.info.items == summary.info.encoded == 9
    runs.assert_whole(store)
    del old["plan/plan.json"]
    assert old.items() <= files(store, "plan", "commits", "shards").items()
    assert before.items() <= runs.latents(store).items()
    # Opened before the store grew: it holds what it held.
    assert {record.key for record in reader} == set(reader.keys()) == before.keys()
    assert set(reader.index.shards) == reader.shard_sizes().keys()
    fresh = encode(songs, tmp_path / "at once")
    assert runs.latents(tmp_path / "at once") == runs.latents(store)
    assert fresh.info.mean == pytest.approx(summary.info.mean)
    again = encode(songs, store, extend=True)
    assert again.resumed_units == again.units
    assert "no new files in the source" in show.summary(again)


def test_a_plan_of_cells_in_the_order_of_their_keys_is_continued_and_extended(
    songs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, store = tmp_path / "table", tmp_path / "store"
    table.mkdir()
    audio = [path.read_bytes() for path in sorted(songs.rglob("*.wav"))]

    def write(name: str, ids: list[str]) -> None:
        rows = pa.table({"audio": audio[: len(ids)], "id": ids})
        pq.write_table(rows, table / name, row_group_size=2)

    def encode_table(**options: Any) -> RunSummary:
        return encode(table, store, source_type="parquet", key_column="id", **options)

    def keys() -> list[str]:
        storage = Storage(str(store))
        plan = load(storage)
        assert plan is not None
        return list(iter_keys(storage, plan))

    write("a.parquet", ["d", "b", "e", "a", "c"])
    with monkeypatch.context() as earlier:
        earlier.setattr(plan_items, "_block", lambda item: item.group or item.key)
        encode_table()
    assert keys() == ["a", "b", "c", "d", "e"]
    before, old = runs.latents(store), runs.commits(store)
    for path in (store / "dataset.json", *store.glob("*/000001.*")):  # as after an interruption
        path.unlink()
    assert encode_table().resumed_units == len(old) - 1
    assert runs.latents(store) == before
    write("b.parquet", ["z", "f", "y"])
    summary = encode_table(extend=True)
    assert summary.extension is not None
    found = summary.extension
    assert (found.new, found.changed, found.vanished) == (3, 0, 0)
    assert keys() == ["a", "b", "c", "d", "e", "z", "f", "y"]
    assert before.items() <= runs.latents(store).items()
    runs.assert_whole(store)


def test_an_extension_that_is_killed_keeps_the_old_store_readable(
    songs: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.write_songs(songs, 4, first=10)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(launch, "encode_units", _killed)
        encode(songs, store, extend=True)
    reader = open_store(str(store))
    assert reader.sealed
    assert not reader.complete
    assert len(reader) == reader.info.items == 5
    assert all(record.frames for record in reader)
    assert show_status.StoreStatus.of(reader).items == 9
    assert [fault for fault in verify(reader).faults if "not committed" not in fault] == []
    assert encode(songs, store).info.encoded == 9  # a plain resume finishes it
    runs.assert_whole(store)


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_an_extension_killed_before_its_seal_is_sealed_by_the_next_run(
    songs: Path, store: Path
) -> None:
    sealed = (store / "dataset.json").read_bytes()
    runs.write_songs(songs, 2, first=10)
    encode(songs, store, extend=True)
    (store / "dataset.json").write_bytes(sealed)
    assert any(
        "dataset.json does not match" in fault for fault in verify(open_store(str(store))).faults
    )
    assert encode(songs, store).info.items == 7
    runs.assert_whole(store)


def test_changed_and_vanished_files_are_named(songs: Path, store: Path) -> None:
    changed, gone = songs / "album 1" / "song 01.wav", songs / "album 2" / "song 02.wav"
    audio, rate = soundfile.read(changed)
    soundfile.write(changed, audio[::-1], rate, subtype="FLOAT")
    os.utime(changed, ns=(1, 1))
    gone.unlink()
    before, old = runs.latents(store), files(store, "commits", "shards", "plan")
    summary = encode(songs, store, extend=True)
    found = summary.extension
    assert found is not None
    assert (found.new, found.changed, found.vanished) == (0, 1, 1)
    assert found.changed_keys == ("album 1/song 01",)
    assert found.vanished_keys == ("album 2/song 02",)
    text = show.summary(summary)
    assert (
        "1 item changed since planning (--retry-changed encodes them again): album 1/song 01"
        in text
    )
    assert "1 item no longer in the source (their latents are kept): album 2/song 02" in text
    assert files(store, "commits", "shards", "plan") == old  # reported, and no more

    summary = encode(songs, store, extend=True, retry_changed=True)
    assert summary.units - summary.resumed_units == 1
    runs.assert_whole(store)
    after = runs.latents(store)
    assert after["album 1/song 01"] != before["album 1/song 01"]
    others = before.keys() - {"album 1/song 01", "album 2/song 02"}
    assert {key: after[key] for key in others} == {key: before[key] for key in others}
    quiet = encode(songs, store, extend=True).extension
    assert quiet is not None
    assert (quiet.changed, quiet.vanished) == (0, 1)


def test_changed_files_are_still_due_after_a_kill(
    songs: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = songs / "album 1" / "song 01.wav"
    audio, rate = soundfile.read(changed)
    soundfile.write(changed, -audio, rate, subtype="FLOAT")
    os.utime(changed, ns=(1, 1))
    before = runs.latents(store)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(launch, "encode_units", _killed)
        encode(songs, store, extend=True, retry_changed=True)
    stale = [fault for fault in verify(open_store(str(store))).faults if "have changed" in fault]
    assert len(stale) == 1
    value = show_status.StoreStatus.of(open_store(str(store)))
    assert (value.complete, value.committed) == (False, value.units - 1)
    assert show_status.status(value).startswith(f"{store}: not complete; to resume, run the same")
    summary = encode(songs, store)  # nobody asks again
    assert summary.units - summary.resumed_units == 1
    value = show_status.StoreStatus.of(open_store(str(store)))
    assert (value.complete, value.committed, value.encoded) == (True, value.units, 5)
    runs.assert_whole(store)
    assert runs.latents(store)["album 1/song 01"] != before["album 1/song 01"]


def test_retry_changed_alone_is_refused(
    songs: Path, tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    with pytest.raises(ConfigError, match="--retry-changed needs --extend") as caught:
        encode(songs, tmp_path / "new", retry_changed=True)
    assert one_sentence(caught.value)
    assert not (tmp_path / "new").exists()


def test_extending_a_new_store_makes_it(songs: Path, tmp_path: Path) -> None:
    summary = encode(songs, tmp_path / "new", extend=True)
    assert summary.extension is None
    assert summary.info.encoded == 5
    opened = open_store(str(tmp_path / "new"))
    assert len(list(iter_keys(opened.storage, opened.plan))) == 5


def test_of_new_files_the_headers_are_read(songs: Path, store: Path) -> None:
    for number in range(2):  # an hour in few bytes: FLAC of silence
        silence = np.zeros(3600 * 100, np.float32)
        soundfile.write(songs / f"silence {number}.flac", silence, 100)
    plan = load(Storage(str(store)))
    options = {"source": str(songs), "out": str(store), "device": "cpu", "unit_seconds": 3.0}
    options |= {"extend": True}
    value = forecast(load_config(None, options), calibrated=False)
    longer = load(Storage(str(store)))
    assert plan is not None
    assert longer is not None
    assert longer.parts[0] == plan.parts[0]
    assert longer.parts[1].estimated_items == 0
    assert longer.parts[1].seconds == 7200.0
    assert (value.units - value.committed, value.estimated_items) == (2, 0)


def test_what_a_listing_leaves_out_is_no_change() -> None:
    from latentmill.plan.compare import ComparedItem

    whole = ComparedItem("k", "/k.wav", 5, "v", None, None, [], None, "{}")
    assert whole.same(dataclasses.replace(whole, size=0, version="", unit=3))
    assert not whole.same(dataclasses.replace(whole, size=6))
    assert not whole.same(dataclasses.replace(whole, version="w"))
    assert not whole.same(dataclasses.replace(whole, start=1.0))
    assert not whole.same(dataclasses.replace(whole, uri="/k.flac"))


def test_captions_that_came_or_changed_after_encoding_are_reported(
    songs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key_of(*paths: Path) -> tuple[str, ...]:
        return tuple(str(path.relative_to(songs).with_suffix("")) for path in paths)

    one, two, three = sorted(songs.rglob("*.wav"))[:3]
    one.with_suffix(".txt").write_text("first")
    two.with_suffix(".json").write_text('{"bpm": 90}')
    store = tmp_path / "captions"
    encode(songs, store)
    again = encode(songs, store, extend=True, retry_changed=True)
    assert again.extension is not None
    assert (again.extension.described, again.extension.changed) == (0, 0)
    one.with_suffix(".txt").write_text("second")
    three.with_suffix(".txt").write_text("new")
    for retry in (False, True):
        found = encode(songs, store, extend=True, retry_changed=retry).extension
        assert found is not None
        assert (found.new, found.changed, found.described) == (0, 0, 2)
        assert found.described_keys == key_of(one, three)
    assert "2 items with new or changed sidecars or metadata" in show._extension(found)
    two.with_suffix(".json").unlink()
    gone = encode(songs, store, extend=True).extension
    assert gone is not None
    assert gone.described_keys == key_of(one, two, three)
    for limit in (2, 3):
        monkeypatch.setattr(plan_compare, "MAX_NAMED", limit)
        named = encode(songs, store, extend=True).extension
        assert named is not None
        assert (named.described, named.described_keys) == (3, key_of(one, two, three)[:limit])


def test_a_plan_of_an_earlier_version_knows_no_versions_of_sidecars(
    songs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = sorted(songs.rglob("*.wav"))[:2]
    one.with_suffix(".txt").write_text("first")
    older = pa.schema([field for field in ITEMS_SCHEMA if field.name != "sidecar_versions"])
    with monkeypatch.context() as patch:
        patch.setattr(plan_files, "ITEMS_SCHEMA", older)
        encode(songs, tmp_path / "older")
    one.with_suffix(".txt").write_text("second")  # nobody can know
    two.with_suffix(".txt").write_text("new")
    found = encode(songs, tmp_path / "older", extend=True).extension
    assert found is not None
    assert found.described_keys == (str(two.relative_to(songs).with_suffix("")),)


def test_a_group_that_makes_a_long_unit_is_warned_of(
    songs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"source": str(songs), "out": str(tmp_path / "g"), "device": "cpu"}
    options |= {"unit_seconds": 0.5, "group_by": "^(?P<group>.)"}
    forecast(load_config(None, options), calibrated=False)
    assert "the longest group makes a unit of" in caplog.messages[-1]
    caplog.clear()
    plain = {"source": str(songs), "out": str(tmp_path / "p"), "device": "cpu"}
    forecast(load_config(None, plain | {"unit_seconds": 0.5}), calibrated=False)
    assert not [text for text in caplog.messages if "group" in text]
