"""A unit's audio that is loaded once for several models: what each gets is what it gets alone."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from latentmill.encoding import unit_audio
from latentmill.encoding.chunks import Chunk, Chunking
from latentmill.encoding.lanes import LANES
from latentmill.encoding.loading import EncodeSettings, Facts, ItemEvent, Loading
from latentmill.encoding.timings import Timings
from latentmill.encoding.unit_audio import LoadingStopped, LocalAudio, SharedAudio, UnitAudio
from latentmill.models.families import mdct
from latentmill.record import Outcome
from latentmill.sources.base import Item
from latentmill.sources.filters import Filters
from support.recordings import noise
from support.units import RATE, items_of, load_threads, sparse_wav


def loading(seconds: float, rate: int = RATE, channels: int = 1, **settings: object) -> Loading:
    spec = mdct.build(hop=64, sample_rate=rate, channels=channels).spec
    return Loading(spec, Chunking.for_model(spec, seconds=seconds), EncodeSettings(**settings))  # type: ignore[arg-type]


def plain(events: Sequence[ItemEvent]) -> list[tuple[object, ...]]:
    """The events as values that can be compared."""
    return [
        (number, item.key, event.frame, event.audio.tobytes())
        if isinstance(event, Chunk)
        else (number, item.key, event)
        for number, item, event in events
    ]


def shared(items: Sequence[Item], loadings: Sequence[Loading]) -> SharedAudio:
    return SharedAudio(items, loadings, [Timings() for _ in loadings])


def taken(audio: SharedAudio) -> list[list[ItemEvent]]:
    """The events of each model, taken in a thread for each."""
    with contextlib.closing(audio), ThreadPoolExecutor() as pool:
        return list(pool.map(list, audio.shares()))


def alone(items: Sequence[Item], one: Loading) -> list[ItemEvent]:
    with contextlib.closing(LocalAudio(items, one, Timings())) as audio:
        return list(audio)


@pytest.mark.parametrize("threads", [1, 3])
def test_each_model_gets_what_it_gets_alone(corpus: Path, threads: int) -> None:
    loadings = [
        loading(0.5, load_threads=threads),
        loading(0.2, 11_025),
        loading(2.0, 16_000, channels=2),
        loading(0.5),
    ]
    items = items_of(corpus)
    for events, one in zip(taken(shared(items, loadings)), loadings, strict=True):
        assert plain(events) == plain(alone(items, one))
    assert not load_threads()


def test_what_a_field_gets_of_items_that_the_store_lacks(tmp_path: Path, corpus: Path) -> None:
    """It skips them at once. An item that only its own model cannot take fails there alone."""
    good = (corpus / "album/stereo.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(good[: len(good) * 3 // 4])
    (tmp_path / "b.wav").write_bytes(b"no audio")
    sf.write(tmp_path / "c.wav", np.zeros((RATE, 3)), RATE)
    sf.write(tmp_path / "d.wav", noise(0.3, RATE), RATE)
    sf.write(tmp_path / "e.wav", noise(1.0, RATE), RATE)
    filters = Filters(min_seconds=0.5)
    base = loading(0.2, filters=filters)
    found = taken(shared(items_of(tmp_path), [base, loading(0.3, 16_000, channels=2)]))
    ends = [
        {item.key: event for _, item, event in events if isinstance(event, Facts | Outcome)}
        for events in found
    ]
    lacking = {key: end.status for key, end in ends[0].items() if isinstance(end, Outcome)}
    assert lacking == {"a": "failed", "b": "failed", "d": "skipped"}
    for key, end in ends[0].items():
        if isinstance(end, Outcome):
            reason = f"{end.status} in the base store: {end.reason}"
            assert ends[1][key] == Outcome(key, "skipped", reason)
    three = ends[1]["c"]
    assert isinstance(three, Outcome)
    assert three.status == "failed"
    assert "it has 3 channels" in str(three.reason)
    assert isinstance(ends[0]["c"], Facts)
    assert isinstance(ends[1]["e"], Facts)


def long_and_short(folder: Path) -> tuple[Item, ...]:
    """Three long files and sixty short ones."""
    for number in range(60):
        sparse_wav(folder / f"{number:02}.wav", 4000 + 700 * (number % 7))
    for number in range(3):
        sparse_wav(folder / f"long {number}.wav", 400_000)
    return items_of(folder)


@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.parametrize("packing", [1, 2, 3])
def test_memory_is_limited_and_no_model_waits_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: int, packing: int
) -> None:
    """One model takes nothing until the other one has to wait for it."""
    monkeypatch.setattr(unit_audio, "BUFFER_BYTES", 100_000)
    items = long_and_short(tmp_path)
    loadings = [loading(0.1, packing=packing), loading(1.0, 16_000, packing=packing)]
    audio = shared(items, loadings)
    most, counts = 0, [0, 0]

    def take(model: int, share: UnitAudio, go: threading.Event) -> list[ItemEvent]:
        nonlocal most
        go.wait(60)
        events = []
        for event in share:
            events.append(event)
            most = max(most, audio._size)
            counts[model] += 1
        return events

    go, ready = threading.Event(), threading.Event()
    ready.set()
    with contextlib.closing(audio), ThreadPoolExecutor() as pool:
        futures = [
            pool.submit(take, model, share, go if model == slow else ready)
            for model, share in enumerate(audio.shares())
        ]
        before = -1
        while before != counts[1 - slow] or not counts[1 - slow]:  # until it waits
            before = counts[1 - slow]
            time.sleep(0.2)
        assert not futures[1 - slow].done(), "it is at most the limit ahead"
        go.set()
        found = [future.result(60) for future in futures]
    for events, one in zip(found, loadings, strict=True):
        assert plain(events) == plain(alone(items, one))
    limit = 100_000 * 2 * len(loadings)
    chunks = sum(4 * one.chunking.samples for one in loadings)
    # The chunks of the model that is behind bring others of the other model with them.
    assert most <= limit + chunks * (LANES + 2) * 2


def test_a_model_that_stops_stops_the_others(tmp_path: Path) -> None:
    items = long_and_short(tmp_path)
    audio = shared(items, [loading(0.1), loading(0.2)])
    first, second = audio.shares()
    with contextlib.closing(audio), ThreadPoolExecutor() as pool:
        events = iter(first)
        next(events)
        other = pool.submit(list, second)
        first.close()
        assert isinstance(other.exception(60), LoadingStopped)
    assert not load_threads()


@pytest.mark.parametrize("taken", [0, 1, 30])
def test_a_field_that_leaves_costs_the_others_nothing(tmp_path: Path, taken: int) -> None:
    """The store's model gets all events, and nothing is kept for the one that has left."""
    items = long_and_short(tmp_path)
    loadings = [loading(0.1), loading(0.2)]
    with contextlib.closing(shared(items, loadings[:1])) as alone:
        expected = [number for number, _, _ in alone.shares()[0]]
    with contextlib.closing(shared(items, loadings)) as audio:
        first, second = audio.shares()
        with ThreadPoolExecutor() as pool:
            everything = pool.submit(list, first)
            events = iter(second)
            for _ in range(taken):
                next(events)
            second.close()
            found = [number for number, _, _ in everything.result(60)]
        assert second.queued == 0
    assert found == expected
    assert not load_threads()
