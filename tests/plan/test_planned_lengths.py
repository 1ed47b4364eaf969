"""Lengths from headers: those that filters rely on are those of the audio that is then loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from audio.audio_files import RATE, music, sound, with_pyav
from latentmill.audio import open_audio
from latentmill.plan import probe
from latentmill.plan.probe import probed
from latentmill.sources.base import Item
from latentmill.sources.filters import Filters
from latentmill.sources.folder import FolderSource
from latentmill.sources.reading import UnitReader
from latentmill.sources.webdataset import WebDatasetSource
from support.sources import put, tar_of

ID3V1 = b"TAG" + bytes(125)


def mp3(seconds: float, **options: str) -> bytes:
    return with_pyav(music(round(seconds * RATE)), RATE, "libmp3lame", "mp3", options)


def flac(seconds: float) -> bytes:
    return sound(music(round(seconds * RATE)), RATE, "FLAC", "PCM_16")


def m4a(seconds: float, **options: str) -> bytes:
    return with_pyav(music(round(seconds * RATE)), RATE, "aac", "mp4", options)


def flac_that_counts(samples: int) -> bytes:
    data = bytearray(flac(8))
    data[22:26] = samples.to_bytes(4, "big")
    return bytes(data)


def apev2(size: int) -> bytes:
    """A tag with an item, without a header."""
    item = (size - 14).to_bytes(4, "little") + bytes(4) + b"Cover" + b"\0" + bytes(size - 14)
    count = (len(item) + 32).to_bytes(4, "little") + (1).to_bytes(4, "little")
    return item + b"APETAGEX" + (2000).to_bytes(4, "little") + count + bytes(12)


def found_in(path: Path, source: str = "folder") -> Item:
    """The only item of a source, with what its header tells."""
    if source == "folder":
        items: Iterator[Item] = FolderSource(str(path.parent), [path.suffix[1:]]).items()
    else:
        items = WebDatasetSource(str(path), ["m4a", "mp3", "flac"]).items()
    (item,) = probed(items)
    return item


def loaded_seconds(item: Item) -> float:
    with UnitReader([item]) as reader, reader.open(item) as media:
        stream = open_audio(media)
        return sum(block.shape[1] for block in stream.blocks()) / stream.sample_rate


LONGER: dict[str, tuple[Callable[[], bytes], float]] = {
    "joined.mp3": (lambda: mp3(3) + mp3(8), 11),
    "joined by an advert.mp3": (lambda: mp3(60) + mp3(2), 62),
    "joined with tags.mp3": (lambda: mp3(8) + ID3V1 + mp3(0.3) + ID3V1, 8.3),
    "joined.flac": (lambda: flac(3) + flac(8), 11),
    "the longer one first.flac": (lambda: flac(8) + flac(3), 11),
    "counted too few.flac": (lambda: flac_that_counts(2 * RATE), 8),
    "fragments.m4a": (lambda: m4a(8, movflags="+frag_keyframe+empty_moov"), 8),
}


@pytest.mark.parametrize("name", LONGER)
def test_no_filter_relies_on_a_header_that_counts_a_part_of_the_file(
    name: str, tmp_path: Path
) -> None:
    make, seconds = LONGER[name]
    put(str(tmp_path / name), make())
    item = found_in(tmp_path / name)
    assert item.seconds is None
    assert Filters(min_seconds=seconds, max_seconds=seconds).of_source(item, {}) is None
    assert loaded_seconds(item) == pytest.approx(seconds, abs=0.1)


WHOLE: dict[str, Callable[[], bytes]] = {
    "a.mp3": lambda: mp3(8),
    "with a tag.mp3": lambda: mp3(8) + ID3V1,
    "with tags.mp3": lambda: mp3(8) + apev2(500) + ID3V1,
    "of variable rate.mp3": lambda: mp3(8, q="2"),
    "a.flac": lambda: flac(8),
    "with a tag.flac": lambda: flac(8) + ID3V1,
    "a.m4a": lambda: m4a(8),
}


@pytest.mark.parametrize("name", WHOLE)
def test_headers_of_whole_files_have_the_exact_length(name: str, tmp_path: Path) -> None:
    put(str(tmp_path / name), WHOLE[name]())
    item = found_in(tmp_path / name)
    assert item.seconds == 8.0
    assert loaded_seconds(item) == 8.0


PARTS: dict[str, tuple[Callable[[], bytes], float | None]] = {
    "fragments.m4a": (lambda: m4a(20, movflags="+frag_keyframe+empty_moov"), None),
    "dash.m4a": (lambda: m4a(20, movflags="+dash", frag_duration="1000000"), None),
    "joined.mp3": (lambda: mp3(20) + mp3(20), None),
    "joined.flac": (lambda: flac(3) + flac(8), None),
    "whole.m4a": (lambda: m4a(20), 20.0),
    "whole.mp3": (lambda: mp3(20), 20.0),
    "whole.flac": (lambda: flac(20), 20.0),
}


@pytest.mark.parametrize("name", PARTS)
def test_of_a_member_of_a_tar_whose_ends_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file in fragments, the first bytes describe the first fragments only."""
    monkeypatch.setattr(probe, "ENDS", 40_000)
    make, seconds = PARTS[name]
    put(f"{tmp_path}/in.tar", tar_of([(name, make())]))
    item = found_in(tmp_path / "in.tar", "webdataset")
    assert item.seconds == seconds
    # Without any length, planning estimates it from the size.
    assert item.estimate is None or item.estimate == pytest.approx(loaded_seconds(item), rel=0.1)
