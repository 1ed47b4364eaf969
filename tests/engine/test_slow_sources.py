"""Bytes that arrive count as progress: a worker is not replaced because its source is slow."""

from __future__ import annotations

import contextlib
import io
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from latentmill.audio import fetch
from latentmill.encoding.loading import EncodeSettings, Event, Facts, Loading
from latentmill.encoding.timings import Timings
from latentmill.encoding.unit_audio import LocalAudio
from latentmill.engine import parcels as parcels_module
from latentmill.engine.parcels import Parcel, parcels, parcels_with_progress
from latentmill.sources import parquet_cells, reading
from latentmill.sources.base import ByteRange, Item, Segment, TableCell
from latentmill.sources.reading import UnitReader
from support import runs
from support.gated_server import PARTS, Gate, gated
from support.sources import put, tar_of
from support.units import CHUNKING, MODEL, RATE

LOADING = Loading(MODEL.spec, CHUNKING, EncodeSettings())
PIECE = 10_000


def recording() -> bytes:
    target = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 3 * RATE)
    soundfile.write(target, noise, RATE, format="WAV", subtype="PCM_16")
    return target.getvalue()


DATA = recording()


@pytest.fixture
def slow() -> Iterator[tuple[Item, Gate]]:
    with gated(DATA) as (url, gate):
        yield Item("a", url, len(DATA), ""), gate


def file(url: str) -> Item:
    return Item("a", put(url, DATA), len(DATA), "")


def segment(url: str) -> Item:
    return replace(file(url), segment=Segment(1.0, 1.0))


def member(url: str) -> Item:
    place = ByteRange(512, len(DATA))
    return Item("a", put(url, tar_of([("a.wav", DATA)])), len(DATA), "", place=place)


def cell(url: str) -> Item:
    target = io.BytesIO()
    table = pa.table({"audio": [{"bytes": DATA, "path": "a.wav"}]})
    pq.write_table(table, target, compression="none")
    return Item("a", put(url, target.getvalue()), 0, "", place=TableCell(0, 0, "audio"))


@pytest.mark.parametrize(("kind", "least"), [(file, 5), (segment, 5), (member, 5), (cell, 2)])
def test_every_piece_of_an_object_is_reported(
    kind: Callable[[str], Item], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a table, what pyarrow reads at a time: at most a page."""
    for module, name in ((fetch, "PIECE"), (reading, "_PIECE"), (parquet_cells, "_PIECE")):
        monkeypatch.setattr(module, name, PIECE)
    item = kind(f"memory://{uuid.uuid4().hex}/a")
    pieces: list[None] = []
    with UnitReader([item], on_bytes=lambda: pieces.append(None)) as reader:
        assert not pieces
        with reader.open(item) as media:
            assert media.read_at(0, media.size) == DATA
    assert len(pieces) >= least


def test_a_worker_that_downloads_makes_progress(slow: tuple[Item, Gate]) -> None:
    item, gate = slow
    timings = Timings(parent=Timings())
    with contextlib.closing(LocalAudio([item], LOADING, timings)) as audio:
        try:
            for part in range(1, PARTS):
                gate.pass_part()
                runs.until(lambda part=part: timings.steps >= part, "a part has arrived")  # type: ignore[misc]
                assert not audio.queued
        finally:
            gate.open()
        assert isinstance([event for _, _, event in audio][-1], Facts)
    assert timings.parent is not None
    assert timings.parent.steps == timings.steps > PARTS


@pytest.mark.parametrize("trial", [None, 60.0])
def test_a_load_task_that_downloads_makes_progress(
    slow: tuple[Item, Gate], trial: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    item, gate = slow
    monkeypatch.setattr(parcels_module, "ALIVE_SECONDS", 0.01)
    found = parcels_with_progress([[(0, item)]], LOADING, trial)
    with contextlib.closing(found):
        assert next(found) == Parcel()  # it has started
        for _ in range(1, PARTS):
            gate.pass_part()
            assert next(found) == Parcel()
        gate.open()
        loaded = events([*found])
    assert [type(event) for event in loaded] == [
        type(event) for event in events([*parcels([[(0, item)]], LOADING, trial)])
    ]
    assert isinstance(loaded[-1], Facts)


def test_a_cancelled_load_task_ends_its_download(slow: tuple[Item, Gate]) -> None:
    item, gate = slow
    before = set(threading.enumerate())
    found = parcels_with_progress([[(0, item)]], LOADING, None)
    assert next(found) == Parcel()
    gate.pass_part()
    assert next(found) == Parcel()
    found.close()  # type: ignore[attr-defined]
    gate.pass_part()  # one more is missing
    runs.until(lambda: not loading_threads(before), "the task has ended")


def loading_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    started = set(threading.enumerate()) - before
    return [thread for thread in started if thread.name.startswith("parcels")]


def events(found: list[Parcel]) -> list[Event]:
    return [event for parcel in found for _, event in parcel.events]
