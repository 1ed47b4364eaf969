"""Loads lanes of a unit in a process of their own, and sends what it has loaded in parcels.

Samples are sent as 16 bits if that is exact.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import numpy as np

from latentmill.encoding.chunks import Chunk
from latentmill.encoding.lanes import Numbered, in_turn
from latentmill.encoding.loading import Event, Loading, Opened
from latentmill.engine.node_trouble import NodeTrouble
from latentmill.engine.trial_load import HANG_SECONDS, TrialLoader
from latentmill.sources.reading import UnitReader

PARCEL_BYTES = 2 << 20
ALIVE_SECONDS = 0.5  # between looks whether bytes have arrived; a cancelled task ends by then


@dataclass(frozen=True)
class Parcel:
    """Events of one message, each with its item's number, and the seconds that the task spent.

    With `trouble`, it is the last one of a task that has not loaded everything.
    """

    events: tuple[tuple[int, Event], ...] = ()
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    trouble: NodeTrouble | None = None


def parcels(
    lanes: Sequence[Sequence[Numbered]],
    loading: Loading,
    trial: float | None,
    on_progress: Callable[[], object] = lambda: None,
) -> Iterator[Parcel]:
    """Load lanes side by side. Only the measured seconds differ between two calls.

    The first parcel is empty: it shows that the task has started. With `trial`, each item is first
    loaded in another process, and fails if it ends that process or makes no progress there for
    `trial` seconds. `on_progress` is called, in any thread, whenever bytes have arrived and before
    each event; if it raises, nothing more is loaded.
    """
    yield Parcel()
    spec, settings = loading.spec, loading.settings
    items = [item for lane in lanes for _, item in lane if item.key not in loading.absent]
    with (
        UnitReader(
            items,
            allow_changed=settings.allow_changed,
            unchanged=loading.encoded,
            on_bytes=on_progress,
        ) as reader,
        TrialLoader(
            spec.sample_rate,
            spec.channels,
            allow_truncated=settings.allow_truncated,
            hang_seconds=HANG_SECONDS if trial is None else trial,
            on_progress=on_progress,
        ) as trials,
    ):

        def events_of(lane: Sequence[Numbered]) -> Iterator[tuple[int, Event]]:
            for number, item in lane:
                tried = trial is not None and item.key not in loading.absent
                reason = trials.failure_reason(item) if tried else None
                refused = {item.key: reason} if reason else loading.refused
                for event in replace(loading, refused=refused).read(item, reader):
                    on_progress()
                    yield number, event

        events: list[tuple[int, Event]] = []
        size, read, decoded, start = 0, 0.0, 0.0, time.perf_counter()
        for number, event in in_turn([events_of(lane) for lane in lanes]):
            seconds = time.perf_counter() - start
            read, decoded = (
                (read + seconds, decoded)
                if isinstance(event, Opened)
                else (read, decoded + seconds)
            )
            events.append((number, packed(event)))
            size += event.audio.nbytes if isinstance(event, Chunk) else 0
            if size >= PARCEL_BYTES:
                yield Parcel(tuple(events), read, decoded)
                events, size, read, decoded = [], 0, 0.0, 0.0
            start = time.perf_counter()
        yield Parcel(tuple(events), read, decoded)


class _Cancelled(Exception):  # noqa: N818  nothing is wrong
    """The task was cancelled while it was loading."""


def parcels_with_progress(
    lanes: Sequence[Sequence[Numbered]], loading: Loading, trial: float | None
) -> Iterator[Parcel]:
    """Yield the parcels, and empty ones while bytes of the next one arrive.

    Otherwise a worker that waits for a slow download would be replaced.
    """
    moved, cancelled = threading.Event(), threading.Event()

    def on_progress() -> None:
        if cancelled.is_set():
            raise _Cancelled
        moved.set()

    loaded = parcels(lanes, loading, trial, on_progress)
    pool = ThreadPoolExecutor(1, thread_name_prefix="parcels")
    try:
        while True:
            upcoming = pool.submit(next, loaded, None)
            while not wait([upcoming], ALIVE_SECONDS).done:
                if moved.is_set():
                    moved.clear()
                    yield Parcel()
            parcel = upcoming.result()
            if parcel is None:
                return
            yield parcel
    finally:
        cancelled.set()  # ends a download at its next bytes, for which nobody waits
        pool.shutdown(wait=False)


def packed(event: Event) -> Event:
    """Convert a chunk to 16-bit samples if that is exact; return other events unchanged."""
    if not isinstance(event, Chunk):
        return event
    for part in (event.audio[:, :256], event.audio):  # inexact chunks usually differ at the start
        scaled = part * np.float32(32768)
        whole = np.clip(scaled, -32768, 32767).astype(np.int16)
        if not np.array_equal(whole, scaled):
            return event
    return Chunk(event.frame, whole)  # type: ignore[arg-type]  # int16 until `unpacked`


def unpacked(event: Event) -> Event:
    """Undo `packed`."""
    if isinstance(event, Chunk) and event.audio.dtype == np.int16:
        return Chunk(event.frame, event.audio.astype(np.float32) / np.float32(32768))
    return event
