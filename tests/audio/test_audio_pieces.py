"""Recordings that are loaded in pieces have exactly the samples of loading them at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from audio_files import music

from latentmill.audio import open_audio, open_media, pieces, prepare
from latentmill.audio.flac import _frame_end
from latentmill.audio.pieces import Piece, restart_step
from latentmill.audio.stream import DecodeError
from latentmill.errors import ItemError

SECONDS = 16
BOTH = music(SECONDS * 48000)


class Chosen:
    """Loads the pieces of some numbers at once, as a thread that is fast enough."""

    prefetch = 3

    def __init__(self, loads: Callable[[int], bool]) -> None:
        self.loads, self.loaded, self.offered = loads, 0, 0

    def offer(self, load: Callable[[], Piece]) -> Future[Piece]:
        future: Future[Piece] = Future()
        self.offered += 1
        if self.loads(self.offered):
            self.loaded += 1
            try:
                future.set_result(load())
            except (ItemError, DecodeError) as error:
                future.set_exception(error)
        return future

    def take(self, future: Future[Piece]) -> Piece | None:
        return future.result() if future.done() else None

    def withdraw(self, future: Future[Piece]) -> None:
        future.cancel()


WAYS: dict[str, Callable[[int], bool]] = {
    "all": lambda number: True,
    "some": lambda number: number % 3 > 0,
    "none": lambda number: False,
}


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 18)


def load(path: Path, rate: int, channels: int, helpers: Chosen | None = None, **part: object):
    """Blocks and stats, or the error."""
    got: list[np.ndarray] = []
    try:
        with open_media(str(path)) as media:
            stream = open_audio(media, **part)
            waveform = prepare(stream, sample_rate=rate, channels=channels, helpers=helpers)
            got.extend(waveform.blocks())
            return got, waveform.stats
    except ItemError as error:
        return got, str(error)


def check(path: Path, rate: int, channels: int, **part: object) -> object:
    """Compare all ways with loading at once; return the stats or the error."""
    wanted, result = load(path, rate, channels, **part)
    for way, loads in WAYS.items():
        helpers = Chosen(loads)
        got, other = load(path, rate, channels, helpers, **part)
        assert other == result, way
        if not isinstance(result, str):
            assert [block.shape for block in got] == [block.shape for block in wanted]
            assert all(map(np.array_equal, got, wanted)), way
            assert helpers.offered > 2
            assert helpers.loaded > 0 or way == "none"
    return result


@pytest.mark.parametrize("out_rate", [44100, 48000, 24000, 16000])
@pytest.mark.parametrize(("source", "channels"), [(2, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("suffix", ["flac", "wav"])
def test_pieces_have_the_samples_of_the_whole(
    tmp_path: Path, suffix: str, source: int, channels: int, out_rate: int
) -> None:
    path = tmp_path / f"a.{suffix}"
    sf.write(path, BOTH[:, :source], 44100, subtype="PCM_16")
    check(path, out_rate, channels)


def test_a_segment_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    sf.write(path, BOTH, 44100, subtype="PCM_24")
    check(path, 48000, 1, start=1.2345, duration=12.7)
    check(path, 44100, 2, start=0.5)


def test_rates_at_which_no_restart_is_exact_are_loaded_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    sf.write(path, BOTH, 44056, subtype="FLOAT")
    helpers = Chosen(WAYS["all"])
    _, stats = load(path, 44100, 1, helpers)
    assert not isinstance(stats, str)
    assert helpers.offered == 0
    assert restart_step(44056, 44100) is None


def broken_flac(path: Path, *, missing: bool) -> None:
    """Noise in a byte of a frame, or without some frames."""
    sf.write(path, BOTH, 44100, subtype="PCM_16")
    data = path.read_bytes()
    starts = [
        found.start()
        for found in re.finditer(rb"\xff[\xf8\xf9]", data)
        if _frame_end(data[found.start() : found.start() + 16], 4096)
    ]
    middle = len(starts) // 2
    if missing:
        path.write_bytes(data[: starts[middle]] + data[starts[middle + 3] :])
    else:
        at = starts[middle] + 500
        path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])


@pytest.mark.parametrize("allowed", [False, True])
def test_faults_are_those_of_the_whole(tmp_path: Path, allowed: bool) -> None:
    """Damage, truncation and values that are not numbers, in files of several pieces."""
    cases = {}
    for missing in (False, True):
        path = tmp_path / f"missing-{missing}.flac"
        broken_flac(path, missing=missing)
        cases[path.stem] = check_fault(path, allowed)
    whole = tmp_path / "whole.wav"
    sf.write(whole, BOTH, 44100, subtype="PCM_16")
    cut = tmp_path / "cut.wav"
    cut.write_bytes(whole.read_bytes()[: -5 * 44100])
    cases["cut"] = check_fault(cut, allowed)
    nan = tmp_path / "nan.wav"
    values = BOTH.copy()
    values[10 * 44100] = np.nan
    sf.write(nan, values, 44100, subtype="FLOAT")
    cases["nan"] = check_fault(nan, allowed)
    assert "first at sample 441000" in str(cases["nan"])
    if not allowed:
        assert "truncated or damaged: loading stopped at" in str(cases["missing-False"])
        assert "truncated: the header states" in str(cases["cut"])


def check_fault(path: Path, allowed: bool) -> object:
    results = []
    for helpers in (None, *map(Chosen, WAYS.values())):
        got, result = load(path, 48000, 2, helpers, allow_truncated=allowed)
        samples = b"".join(block.tobytes() for block in got) if not isinstance(result, str) else b""
        results.append((result, samples))
    assert all(one == results[0] for one in results)
    return results[0][0]


def test_a_piece_that_does_not_continue_the_one_before_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a decoder that seeks to a wrong sample."""
    path = tmp_path / "a.wav"
    sf.write(path, BOTH, 44100, subtype="PCM_16")
    load_piece = pieces.PieceLoader._load

    def wrong(self: pieces.PieceLoader, number: int) -> Piece:
        return load_piece(self, number + (number == 3))

    monkeypatch.setattr(pieces.PieceLoader, "_load", wrong)
    check(path, 48000, 1)


@pytest.mark.parametrize(("in_rate", "out_rate"), [(192000, 8000), (384000, 16000)])
def test_rates_that_differ_too_much_to_compare_pieces_are_loaded_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_rate: int, out_rate: int
) -> None:
    """The samples before a piece would be fewer than are compared."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 16)
    path = tmp_path / "a.wav"
    sf.write(path, np.tile(BOTH[:, :1], (5, 1)), in_rate, subtype="PCM_16")
    helpers = Chosen(WAYS["all"])
    _, stats = load(path, out_rate, 1, helpers)
    assert not isinstance(stats, str)
    assert helpers.offered == 0
