"""How far a worker is with a unit: real files, whose lengths the plan has wrong or not at all."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile

from latentmill.encoding.chunks import Chunking
from latentmill.encoding.loading import EncodeSettings, Loading
from latentmill.encoding.timings import Timings
from latentmill.encoding.unit_audio import LocalAudio
from latentmill.engine.dispatch import Assignment
from latentmill.engine.underway import Underway, UnitProgress
from latentmill.engine.worker_slot import Report, WorkerSlot
from latentmill.models import registry
from latentmill.plan import Unit
from latentmill.sources.folder import FolderSource
from support import in_process, runs

SPEC = registry.resolve("mdct").spec
CHUNKING = Chunking.for_model(SPEC, seconds=0.5)


def test_a_unit_moves_with_its_audio_and_ends_with_its_true_length(tmp_path: Path) -> None:
    songs = runs.write_songs(tmp_path, 4, 2.0)
    first, bad, *others = sorted(songs.rglob("*.wav"))
    in_process.spoil(bad)
    true = {path: soundfile.info(path).duration for path in (first, *others)}
    found = {item.uri: item for item in FolderSource(str(songs), ("wav",)).items()}
    known = [replace(found[str(first)], seconds=60.0)]  # wrong
    items = known + [replace(found[str(path)], seconds=None) for path in (bad, *others)]
    underway = Underway(Unit(0, 4, 63.0), items, SPEC)
    assert underway.progress == UnitProgress(0.0, pytest.approx(63.0), 0)
    steps = []
    decoding = Loading(SPEC, CHUNKING, EncodeSettings())
    with contextlib.closing(LocalAudio(items, decoding, Timings())) as audio:
        for index, _, _ in underway.follow(audio):
            steps.append((index, underway.progress))
    assert underway.progress == UnitProgress(
        pytest.approx(sum(true.values())), pytest.approx(sum(true.values())), 4
    )
    done = [progress.audio_seconds for _, progress in steps]
    assert done == sorted(done)
    length = true[first]
    of_first = [progress for index, progress in steps if index == 0]
    assert {progress.items for progress in of_first[:-1]} == {0, 1}  # the bad one ends early
    total = sum(true.values())
    assert any(0.4 * total < p.audio_seconds < 0.8 * total for p in of_first)
    # Once it is open, its header counts, and not the plan.
    assert of_first[0].total_seconds == pytest.approx(3.0 + length, abs=0.1)


def test_a_unit_stays_as_far_as_it_was_until_its_commit_is_known() -> None:
    clock = iter(range(100))
    slot = WorkerSlot(actor=None, clock=lambda: float(next(clock)))
    units = {name: Unit(number, 2, 10.0) for number, name in enumerate(("one", "two"))}
    for name, unit in units.items():
        slot.assign(name, Assignment(unit))
    waiting = UnitProgress(0.0, 10.0, 0)
    assert slot.progress == {0: waiting, 1: waiting}
    now = UnitProgress(9.0, 9.0, 2)
    slot.update(Report(1, {0: now}, None))
    slot.update(Report(2, {}, None))  # encoded; the answer is on its way
    assert slot.progress == {0: now, 1: waiting}
    slot.finished("one")
    assert slot.progress == {1: waiting}
