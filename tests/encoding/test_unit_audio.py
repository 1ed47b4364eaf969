"""A unit's files through decode threads: what fails says why, and its neighbours stay whole."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import soundfile as sf

from latentmill.audio import MediaFile
from latentmill.encoding import unit_audio
from latentmill.encoding.chunks import Chunk
from latentmill.encoding.lanes import LANES
from latentmill.encoding.loading import EncodeSettings, Event, Facts, Loading, Opened
from latentmill.encoding.loudness import LevelMeter
from latentmill.encoding.timings import Timings
from latentmill.encoding.unit_audio import LocalAudio
from latentmill.record import Outcome
from latentmill.sources.base import Item
from latentmill.sources.filters import Filters
from latentmill.sources.folder import FolderSource
from latentmill.sources.reading import UnitReader
from support.recordings import noise
from support.units import (
    CHUNKING,
    EXTENSIONS,
    MODEL,
    RATE,
    encode,
    items_of,
    load_threads,
    records,
    sparse_wav,
    statuses,
    without_length,
)


def test_an_error_of_a_decode_thread_is_raised_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Loading, item: Item, reader: UnitReader) -> Iterator[object]:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Loading, "read", broken)
    sf.write(tmp_path / "a.wav", noise(1.0, RATE), RATE)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        encode(items_of(tmp_path))
    assert not load_threads()


def test_the_number_of_load_threads_changes_no_bit(corpus: Path) -> None:
    items = items_of(corpus)
    one, *others = (
        encode(items, settings=EncodeSettings(batch_size=3, load_threads=threads))
        for threads in (1, 2, 4)
    )
    for outcomes in others:
        for outcome, wanted in zip(outcomes, one, strict=True):
            assert outcome.record is not None
            assert wanted.record is not None
            assert outcome.record.latent.tobytes() == wanted.record.latent.tobytes()


def test_the_level_meter_gets_channels_that_are_contiguous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interleaved channels take three times as long, and round sums of squares differently."""
    got = []
    real = LevelMeter.push
    monkeypatch.setattr(
        LevelMeter, "push", lambda self, block: got.append(block) or real(self, block)
    )
    sf.write(tmp_path / "a.wav", noise(40.0, RATE, 2), RATE)
    stereo = replace(MODEL.spec, channels=2)
    loading = Loading(stereo, CHUNKING, EncodeSettings())
    with contextlib.closing(LocalAudio(items_of(tmp_path), loading, Timings())) as audio:
        levels = [event.levels for _, _, event in audio if isinstance(event, Facts)]
    assert len(levels) == 1
    assert all(channel.flags.c_contiguous for block in got for channel in block)


@pytest.fixture
def broken(tmp_path: Path, corpus: Path) -> Path:
    """Good files between bad ones."""
    long = (corpus / "album/stereo.flac").read_bytes()
    good = (corpus / "boundary.wav").read_bytes()
    nan = np.full(4 * RATE, 0.1, np.float32)
    nan[3 * RATE] = np.nan  # several chunks are packed by then
    for name in ("a0.wav", "b0.wav", "c0.wav", "d0.wav", "e0.wav", "f0.wav", "g0.wav"):
        (tmp_path / name).write_bytes(good)
    (tmp_path / "a1.flac").write_bytes(long[: len(long) * 3 // 4])
    (tmp_path / "b1.flac").write_bytes(b"")
    sf.write(tmp_path / "c1.wav", nan, RATE, subtype="FLOAT")
    (tmp_path / "d1.ogg").write_bytes(b"no audio at all " * 100)
    (tmp_path / "e1.wav").symlink_to(tmp_path / "nowhere.wav")
    (tmp_path / "f1.wav").write_bytes(good)
    (tmp_path / "f1.json").write_text('{"title": ')
    sf.write(tmp_path / "g1.wav", np.zeros(0, np.float32), RATE)
    return tmp_path


@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_file_that_fails_says_why_and_leaves_its_neighbours_alone(
    broken: Path, batch_size: int, corpus: Path
) -> None:
    settings = EncodeSettings(dtype="float32", batch_size=batch_size)
    outcomes = encode(items_of(broken), settings=settings)
    reasons = {one.key: one.reason for one in outcomes if one.status == "failed"}
    assert list(reasons) == ["a1", "b1", "c1", "d1", "e1", "f1", "g1"]
    for key, says in {
        "a1": "truncated",
        "b1": "empty",
        "c1": "NaN",
        "e1": "no such file",
        "f1": "f1.json is not valid JSON",
    }.items():
        assert says in (reasons[key] or "")
    wanted = records(encode([i for i in items_of(corpus) if i.key == "boundary"]))["boundary"]
    for record in records(outcomes).values():
        assert np.abs(record.latent - wanted.latent).max() <= 1e-6


def test_a_truncated_file_is_kept_where_that_is_allowed(broken: Path) -> None:
    settings = EncodeSettings(dtype="float32", allow_truncated=True)
    assert statuses(encode(items_of(broken), settings=settings))["a1"] == "encoded"


@pytest.fixture
def planned(tmp_path: Path, corpus: Path) -> tuple[Item, ...]:
    """Copies of one file as they were listed, before a test changes them."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.wav").write_bytes((corpus / "boundary.wav").read_bytes())
    return items_of(tmp_path)


def test_a_file_that_changed_after_the_plan_fails(planned: tuple[Item, ...]) -> None:
    longer, rewritten = Path(planned[0].uri), Path(planned[1].uri)
    size = planned[0].size
    sf.write(longer, noise(1.5, RATE), RATE, subtype="FLOAT")
    now = longer.stat().st_size
    os.utime(rewritten, ns=(0, int(planned[1].version) + 1))
    outcomes = encode(planned)
    assert [outcome.reason for outcome in outcomes] == [
        f"changed since the plan was made ({size} bytes then, {now} now)",
        "changed since the plan was made (same size, new modification time)",
        None,
    ]
    mended = EncodeSettings(allow_changed=True)
    assert {outcome.status for outcome in encode(planned, settings=mended)} == {"encoded"}
    # A listing that knew neither size nor version promised nothing.
    unknown = [replace(item, size=0, version="") for item in planned]
    assert {outcome.status for outcome in encode(unknown)} == {"encoded"}


def test_a_remote_file_is_compared_by_its_size(planned: tuple[Item, ...]) -> None:
    remote = fsspec.filesystem("memory")
    data = Path(planned[0].uri).read_bytes()
    for name in ("kept", "grown"):
        remote.pipe_file(f"/changes/{name}.wav", data)
    items = list(FolderSource("memory://changes", EXTENSIONS).items())
    remote.pipe_file("/changes/grown.wav", data + bytes(8))
    items = [replace(item, version="an etag") for item in items]
    assert {one.key: one.reason for one in encode(items)} == {
        "grown": f"changed since the plan was made ({len(data)} bytes then, {len(data) + 8} now)",
        "kept": None,
    }


def test_group_and_role_come_from_the_metadata(planned: tuple[Item, ...]) -> None:
    given: dict[str, dict[str, object]] = {
        "a": {"group": "song", "role": 2.5},
        "b": {"group": 0, "role": None, "x": 1},
        "c": {"group": True, "role": ["drums"]},
    }
    for item in planned[:3]:
        Path(item.uri).with_suffix(".json").write_text(json.dumps(given[item.key]))
    done = records(encode(items_of(Path(planned[0].uri).parent)))
    assert [(done[key].group, done[key].role) for key in "abc"] == [
        ("song", "2.5"),
        ("0", None),
        (None, None),
    ]
    assert [done[key].metadata for key in "abc"] == list(given.values())


def test_an_error_that_nobody_foresaw_fails_its_item_alone(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = UnitReader.open

    def fragile(self: UnitReader, item: Item) -> MediaFile:
        if item.key == "lame":
            raise ZeroDivisionError("a bug\nin a decoder")
        return real(self, item)

    monkeypatch.setattr(UnitReader, "open", fragile)
    outcomes = encode(items_of(corpus))
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    assert [outcome.key for outcome in failed] == ["lame"]
    assert failed[0].reason == "ZeroDivisionError while reading: a bug in a decoder"


def test_filters_skip_by_name(corpus: Path, tmp_path: Path) -> None:
    settings = EncodeSettings(filters=Filters(min_seconds=0.21, max_seconds=2.3))
    outcomes = {one.key: one for one in encode(items_of(corpus), settings=settings)}
    skipped = {key: one.reason for key, one in outcomes.items() if one.status == "skipped"}
    assert skipped == {
        "album/long": "max_seconds: 3.700 s",
        "lame": "max_seconds: 2.600 s",
        "tiny": "min_seconds: 0.004 s",
    }
    assert {one.status for key, one in outcomes.items() if key not in skipped} == {"encoded"}


def test_filters_work_where_the_header_does_not_say_the_length(tmp_path: Path) -> None:
    for name, seconds in (("brief", 0.3), ("middling", 1.0), ("long", 3.0)):
        path = tmp_path / f"{name}.flac"
        sf.write(path, noise(seconds, RATE), RATE)
        path.write_bytes(without_length(path.read_bytes()))
    filters = Filters(min_seconds=0.5, max_seconds=2.0)
    settings = EncodeSettings(filters=filters, batch_size=2)
    outcomes = encode(items_of(tmp_path), settings=settings)
    assert [(one.key, one.status, one.reason) for one in outcomes] == [
        ("brief", "skipped", "min_seconds: 0.300 s"),
        ("long", "skipped", "max_seconds: 3.000 s"),
        ("middling", "encoded", None),
    ]


@pytest.mark.parametrize("events", [0, 1, 3, 20])
def test_closing_in_the_middle_ends_the_threads_at_once(tmp_path: Path, events: int) -> None:
    for name in ("a", "b"):
        sparse_wav(tmp_path / f"{name}.wav", 1_000_000_000)
    Counted.read_to_the_end.clear()
    loading = Counted(MODEL.spec, CHUNKING, EncodeSettings(load_threads=2))
    audio = LocalAudio(items_of(tmp_path), loading, Timings())
    assert len(list(itertools.islice(audio, events))) == events
    audio.close()
    assert not load_threads()
    assert not Counted.read_to_the_end
    audio.close()


class Counted(Loading):
    """Records which items were loaded to their end."""

    read_to_the_end: ClassVar[list[str]] = []

    def read(self, item: Item, reader: UnitReader) -> Iterator[Event]:
        yield from super().read(item, reader)
        self.read_to_the_end.append(item.key)


class Together(Loading):
    """Loads a chunk of an item only when as many threads as given load one at the same moment."""

    barrier: ClassVar[threading.Barrier]

    def read(self, item: Item, reader: UnitReader) -> Iterator[Event]:
        yield Opened(0)
        for frame in range(100):
            self.barrier.wait(60)
            yield Chunk(frame, np.zeros((1, 100), np.float32))
        yield Outcome(item.key, "failed", "that was all")


def test_all_threads_load_until_the_end_of_long_items() -> None:
    """In plans of earlier versions a thread stopped when 16 chunks of its item were loaded."""
    Together.barrier = threading.Barrier(8)
    items = [Item(f"{n}", f"/{n}", 1, "") for n in range(8)]
    loading = Together(MODEL.spec, CHUNKING, EncodeSettings(load_threads=8))
    with contextlib.closing(LocalAudio(items, loading, Timings())) as audio:
        events = list(audio)
    numbers = [number for number, _, event in events if isinstance(event, Chunk)]
    assert numbers == list(range(8)) * 100  # one of each in turn


def test_a_thread_takes_a_lane_once_for_each_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taking one costs as much as loading a second of audio does."""
    taken = []
    real = LocalAudio._next_lane
    monkeypatch.setattr(LocalAudio, "_next_lane", lambda self: taken.append(1) or real(self))
    for number in range(100):
        sparse_wav(tmp_path / f"{number:02}.wav", CHUNKING.samples // 2)
    settings = EncodeSettings(load_threads=2)
    audio = LocalAudio(items_of(tmp_path), Loading(MODEL.spec, CHUNKING, settings), Timings())
    with contextlib.closing(audio):
        events = [event for _, _, event in audio]
    assert sum(isinstance(event, Chunk) for event in events) == 100
    assert len(events) == 300
    assert len(taken) == 100 + LANES + settings.load_threads  # and once at the end of each


@pytest.mark.parametrize("packing", [1, 2])
def test_no_more_audio_is_loaded_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: int
) -> None:
    monkeypatch.setattr(unit_audio, "BUFFER_BYTES", 500_000)
    for number in range(40):
        sparse_wav(tmp_path / f"{number:02}.wav", 80_000)
    settings = EncodeSettings(load_threads=2, packing=packing)
    audio = LocalAudio(items_of(tmp_path), Loading(MODEL.spec, CHUNKING, settings), Timings())
    most, taken = 0, 0
    with contextlib.closing(audio):
        events = iter(audio)
        while most < 1_000_000:  # they load ahead before anything is taken
            most = max(most, audio._size)
            time.sleep(0.01)
        for _, _, event in events:
            most = max(most, audio._size)
            taken += isinstance(event, Chunk)
    chunk = 4 * CHUNKING.samples
    assert most <= 1_000_000 + chunk * (LANES + settings.load_threads)
    assert taken == 40 * len(range(0, 80_000 - CHUNKING.samples + CHUNKING.step, CHUNKING.step))


def test_plans_of_earlier_versions_load_item_after_item(corpus: Path) -> None:
    items = items_of(corpus)
    settings = EncodeSettings(packing=1, load_threads=3)
    audio = LocalAudio(items, Loading(MODEL.spec, CHUNKING, settings), Timings())
    with contextlib.closing(audio):
        numbers = [number for number, _, _ in audio]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(len(items)))
