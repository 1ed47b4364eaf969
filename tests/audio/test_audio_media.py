import errno
import io
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import xxhash
from audio_files import encoded

from latentmill.audio import media as media_module
from latentmill.audio import media_from_bytes, open_audio, open_media
from latentmill.audio.media import MediaFile
from latentmill.errors import ConfigError, ItemError
from latentmill.storage import remote as remote_module
from latentmill.storage.storage import Storage
from support.open_files import open_files

DATA = bytes(range(256)) * 9000


@pytest.mark.parametrize("form", ["{}", "file://{}"])
@pytest.mark.parametrize("name", ["a.wav", "with space #1?.wav", "a::b.wav", "http:c.wav"])
def test_a_local_file_is_opened_where_it_lies(tmp_path: Path, form: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(DATA)
    with open_media(form.format(path)) as media:
        assert os.fstat(media.fileno()).st_ino == path.stat().st_ino
        assert media.size == len(DATA)
        assert media.content_hash == f"xxh3:{xxhash.xxh3_128(DATA).hexdigest()}"
        assert media.read_at(len(DATA) - 3, 10) == DATA[-3:]


def test_what_is_no_readable_file_is_refused_in_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(remote_module, "FIRST_PAUSE", 0.0)
    fifo, unix = tmp_path / "fifo", socket.socket(socket.AF_UNIX)
    os.mkfifo(fifo)
    unix.bind(str(tmp_path / "socket"))
    refused = {
        str(tmp_path / "missing.wav"): "no such file",
        str(tmp_path): "not a regular file",
        str(fifo): "not a regular file",
        str(tmp_path / "socket"): "not a regular file",
        "/dev/null": "not a regular file",
        str(fifo / "below"): "cannot be opened",
        "memory://nothing/here.wav": "no such file",
        "nosuchscheme://a/b.wav": "cannot be fetched",
        "http://127.0.0.1:9/a.wav?secret=1": "cannot be fetched|no such file",
    }
    for uri, text in refused.items():
        with pytest.raises(ItemError, match=text) as caught:
            open_media(uri)
        message = str(caught.value)
        assert "\n" not in message
        assert str(tmp_path) not in message
        assert "secret" not in message
    unix.close()


def test_no_permission(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(DATA)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything, chmod would not do
    with pytest.raises(ItemError, match=r"^no permission to read the file$"):
        open_media(str(path))


def test_a_missing_package_is_no_fault_of_the_item(monkeypatch) -> None:
    def missing(url: str, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ConfigError, match=r"pip install 'latentmill\[s3\]'"):
        open_media("s3://bucket/a.wav")


def test_closing_leaves_no_descriptor_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    before = open_files()
    for kind in ("wav", "flac", "m4a", "opus", "mp3"):
        path.write_bytes(encoded(kind))
        with open_media(str(path)) as media:
            list(open_audio(media).blocks())
        with open_media(str(path)) as media, open_audio(media):
            pass
    assert open_files() <= before


def test_bytes_become_a_file() -> None:
    with media_from_bytes(b"abc") as media:
        assert isinstance(media, MediaFile)
        assert (media.size, media.read_at(0, 9)) == (3, b"abc")
    media.close()


def test_the_system_may_transfer_fewer_bytes_than_requested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux transfers at most 2 GiB at once: the rest of a longer recording was lost."""
    data = np.random.default_rng(0).bytes(10_000)
    (tmp_path / "shard").write_bytes(data)
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 999), at))
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:999], at))
    partial = Partial(tmp_path / "memory", "w+b")
    monkeypatch.setattr(media_module, "local_file", lambda *_: partial)
    with media_from_bytes(data) as media:
        assert media.size == len(data)
        assert media.read_at(0, len(data)) == data
        assert media.read_at(3, 5000) == data[3:5003]
        os.truncate(media.fileno(), 7000)
        assert media.read_at(0, len(data)) == data[:7000]
    assert Storage(str(tmp_path)).read_range("shard", 7, 9000) == data[7:9007]


class Partial(io.FileIO):
    """A file that writes at most 999 bytes at once."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        return super().write(data[:999])


@pytest.mark.parametrize("suffix", ["flac", "mp3", "wav"])
def test_the_checks_and_the_hash_of_a_short_recording_read_it_once(
    tmp_path: Path, monkeypatch, suffix: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    sf.write(path, np.random.default_rng(0).uniform(-0.1, 0.1, (8000, 2)), 16000)
    data, reads = path.read_bytes(), []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *given: reads.append(given) or pread(*given))
    with open_media(str(path)) as media:
        open_audio(media).close()
        assert media.content_hash == f"xxh3:{xxhash.xxh3_128(data).hexdigest()}"
        assert media.read_at(len(data) - 3, 10) == data[-3:]
        assert len(reads) == 1
        with pytest.raises(ItemError, match="cannot be read"):  # as by the system
            media.read_at(-1, 3)


def test_a_file_that_becomes_shorter_while_it_is_loaded_has_no_hash(tmp_path: Path) -> None:
    """Its readable part, which --allow-truncated keeps, would have the hash of the whole file."""
    path = tmp_path / "a.wav"
    sf.write(path, np.zeros(300_000), 16000)
    with open_media(str(path)) as media:
        blocks = open_audio(media, allow_truncated=True).blocks()
        loaded = next(blocks).shape[1]
        os.truncate(path, 500_000)
        assert loaded + sum(block.shape[1] for block in blocks) < 300_000
        with pytest.raises(ItemError, match=r"truncated to 500000 of 600044 bytes while it was"):
            media.content_hash  # noqa: B018
