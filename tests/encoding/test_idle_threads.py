"""Load threads that no lane needs load pieces of a long recording."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from latentmill.audio import pieces
from latentmill.audio.pieces import Piece, PieceLoader
from latentmill.encoding.chunks import Chunk
from latentmill.encoding.idle_threads import IdleThreads
from latentmill.encoding.loading import EncodeSettings, Facts, Loading
from latentmill.encoding.timings import Timings
from latentmill.encoding.unit_audio import LocalAudio
from support.recordings import noise
from support.units import CHUNKING, MODEL, items_of, load_threads


def events(folder: Path, threads: int) -> list[object]:
    loading = Loading(MODEL.spec, CHUNKING, EncodeSettings(load_threads=threads))
    with contextlib.closing(LocalAudio(items_of(folder), loading, Timings())) as audio:
        return [event for _, _, event in audio]


def test_a_lone_recording_is_loaded_by_several_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 18)
    sf.write(tmp_path / "long.flac", noise(60.0, 16000), 16000)
    wanted = events(tmp_path, 1)
    load, take = PieceLoader._load, IdleThreads.take
    loaders: set[str] = set()
    two_load = threading.Event()

    def loading(self: PieceLoader, number: int) -> Piece:
        loaders.add(threading.current_thread().name)
        two_load.set()
        return load(self, number)

    def taking(self: IdleThreads, future: object) -> Piece | None:
        assert two_load.wait(60)  # otherwise the lane's thread might load all of a short file
        return take(self, future)  # type: ignore[arg-type]

    monkeypatch.setattr(PieceLoader, "_load", loading)
    monkeypatch.setattr(IdleThreads, "take", taking)
    got = events(tmp_path, 3)
    assert loaders
    assert [type(event) for event in got] == [type(event) for event in wanted]
    for one, other in zip(got, wanted, strict=True):
        if isinstance(one, Chunk):
            assert isinstance(other, Chunk)
            assert np.array_equal(one.audio, other.audio)
        elif isinstance(one, Facts):
            assert one == other
    assert not load_threads()


def test_a_unit_can_be_closed_while_pieces_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 18)
    sf.write(tmp_path / "long.wav", noise(60.0, 16000), 16000)
    loading = Loading(MODEL.spec, CHUNKING, EncodeSettings(load_threads=3))
    with contextlib.closing(LocalAudio(items_of(tmp_path), loading, Timings())) as audio:
        next(iter(audio))
    assert not load_threads()


def test_offered_and_loaded_pieces_are_limited() -> None:
    idle = IdleThreads(threading.Condition(), 2, Timings())
    offers = [idle.offer(list) for _ in range(5)]
    futures = [future for future in offers if future is not None]
    assert len(futures) == idle.prefetch == 3
    assert idle.load_one()
    assert idle.offer(list) is None
    assert idle.take(futures[0]) == []
    assert idle.take(futures[1]) is None  # nobody has begun: the caller loads it
    idle.withdraw(futures[2])
    assert not idle.load_one()
    assert all(idle.offer(list) is not None for _ in range(3))


def test_the_error_of_a_piece_is_raised_where_it_is_taken() -> None:
    def broken() -> Piece:
        raise OSError("gone")

    idle = IdleThreads(threading.Condition(), 2, Timings())
    future = idle.offer(broken)
    assert future is not None
    assert idle.load_one()
    with pytest.raises(OSError, match="gone"):
        idle.take(future)
