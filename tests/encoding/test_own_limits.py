"""A worker without space or open files fails no item: its unit is tried again."""

from __future__ import annotations

import contextlib
import io
import tarfile
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill.audio import fetch, open_media
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.loading import EncodeSettings, Facts, Loading
from latentmill.encoding.timings import Timings
from latentmill.encoding.unit_audio import LocalAudio
from latentmill.errors import StorageError
from latentmill.models.families import mdct
from latentmill.sources.base import ByteRange, Item, TableCell
from support import runs
from support.open_files import no_more_files

SPEC = mdct.build(hop=64, sample_rate=8000).spec
LOADING = Loading(SPEC, Chunking.for_model(SPEC, seconds=0.5), EncodeSettings(load_threads=1))


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return next(runs.write_songs(tmp_path_factory.mktemp("songs"), 1).rglob("*.wav"))


def in_memory(data: bytes) -> str:
    url = f"memory://{uuid.uuid4().hex}/a"
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.pipe_file(path, data)
    return url


def local(song: Path) -> Item:
    return Item("a", str(song), 0, "")


def remote(song: Path) -> Item:
    return Item("a", in_memory(song.read_bytes()), song.stat().st_size, "")


def member(song: Path) -> Item:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(song, "a.wav")
    size = song.stat().st_size
    return Item("a", in_memory(file.getvalue()), size, "", place=ByteRange(512, size))


def cell(song: Path) -> Item:
    path = song.with_suffix(".parquet")
    pq.write_table(pa.table({"audio": [{"bytes": song.read_bytes(), "path": "a.wav"}]}), path)
    return Item("a", str(path), 0, "", place=TableCell(0, 0, "audio"))


def described(song: Path) -> Item:
    sidecar = song.with_suffix(".json")
    sidecar.write_text("{}")
    return Item("a", in_memory(song.read_bytes()), 0, "", sidecars=(str(sidecar),))


def load(item: Item) -> list[Any]:
    with contextlib.closing(LocalAudio([item], LOADING, Timings())) as audio:
        return [event for _, _, event in audio]


@pytest.mark.parametrize("kind", [remote, member])
def test_a_full_disk_for_temporary_files(
    kind: Callable[[Path], Item],
    song: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_sentence: Callable[[BaseException], str],
) -> None:
    item = kind(song)
    monkeypatch.setattr(fetch, "MEMORY_LIMIT", 1000)
    assert isinstance(load(item)[-1], Facts)

    def full(**options: Any) -> Any:
        return Path("/dev/full").open("r+b", **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(StorageError) as caught:
        load(item)
    if kind is remote:
        with pytest.raises(StorageError, match="Cannot write temporary files to "):
            open_media(item.uri, item.size)
    assert one_sentence(caught.value).startswith(
        f"Cannot write temporary files to {tempfile.gettempdir()}: No space left on device; "
    )


@pytest.mark.parametrize("kind", [local, remote, member, cell, described])
def test_too_many_open_files(
    kind: Callable[[Path], Item], song: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    item = kind(song)
    assert isinstance(load(item)[-1], Facts)  # and what it needs is imported
    with no_more_files(), pytest.raises(StorageError) as caught:
        load(item)
    assert one_sentence(caught.value).startswith("Cannot open more files: Too many open files; ")
    assert isinstance(load(item)[-1], Facts)
