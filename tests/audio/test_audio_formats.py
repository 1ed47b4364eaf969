"""The formats that FFmpeg alone reads: as another FFmpeg reads them, cut, and in a folder."""

import shutil
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from audio_files import DSD_RATE, RARE, channels_of, dsd, encoded, music, rate_of

from latentmill.audio import media_from_bytes, open_audio
from latentmill.audio.formats import AUDIO_EXTENSIONS, DECODERS, FORMATS
from latentmill.audio.sniff import sniff
from latentmill.errors import ItemError
from latentmill.sources.folder import FolderSource

FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="the ffmpeg command is not installed")


def load(data: bytes, *, keep: bool = False) -> np.ndarray:
    """The samples `[n, C]`."""
    with media_from_bytes(data) as media:
        blocks = list(open_audio(media, allow_truncated=keep).blocks())
    return np.concatenate(blocks, axis=1).T


def count_kept(cut: bytes) -> int:
    """How many samples `--allow-truncated` gives."""
    try:
        return len(load(cut, keep=True))
    except ItemError:
        return 0


def by_ffmpeg(path: Path, channels: int) -> np.ndarray:
    """The samples `[n, C]` by the command line tool, a build of its own."""
    command = [FFMPEG, "-v", "error", "-i", str(path), "-map", "0:a:0", "-f", "f32le", "-"]
    done = subprocess.run(command, capture_output=True, check=False)
    return np.frombuffer(done.stdout, np.float32).reshape(-1, channels)


def assert_equal(found: np.ndarray, wanted: np.ndarray, kind: str) -> None:
    assert found.shape == wanted.shape
    begin = 32 if kind in ("dsf", "dff") else 0  # versions of FFmpeg begin DSD's filter differently
    assert np.abs(found - wanted)[begin:].max() < 1e-4


@needs_ffmpeg
@pytest.mark.parametrize("kind", RARE)
def test_samples_are_those_of_ffmpeg(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"  # without an extension: the content decides
    path.write_bytes(encoded(kind))
    found = load(encoded(kind))
    assert_equal(found, by_ffmpeg(path, channels_of(kind)), kind)
    assert len(found) > 0.04 * rate_of(kind)


@pytest.mark.parametrize("kind", ["tta", "avi", "voc", "ircam", "sph"])
def test_lossless_formats_give_what_was_encoded(kind: str) -> None:
    found = load(encoded(kind, 9000))
    wanted = music(9000, rate_of(kind))[:, : channels_of(kind)]
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1 / 32768


@pytest.mark.parametrize("kind", ["dsf", "dff"])
def test_dsd_is_the_low_passed_bit_stream(kind: str) -> None:
    rate = DSD_RATE // 8
    signal = 0.4 * np.sin(2 * np.pi * 1000 * np.arange(rate // 10) / rate)
    found = load(dsd(kind, np.stack([signal, -signal], axis=1).astype(np.float32)))
    found = found[: len(signal)]  # DSF pads its last block
    spectrum = np.abs(np.fft.rfft(found[:, 0] * np.hanning(len(signal))))
    assert np.argmax(spectrum[5:]) + 5 == 100  # 1,000 Hz of 0.1 s
    smooth = np.convolve(found[:, 0], np.ones(16) / 16, "same")
    assert abs(np.abs(smooth[200:-200]).max() - 0.4) < 0.03
    assert np.corrcoef(found[:, 0], found[:, 1])[0, 1] < -0.98


@needs_ffmpeg
@pytest.mark.parametrize("kind", RARE)
def test_a_cut_file_fails_with_a_reason_or_gives_what_ffmpeg_gives(
    kind: str, tmp_path: Path
) -> None:
    whole = encoded(kind)
    for share in (0.4, 0.83):
        cut = whole[: int(share * len(whole))]
        path = tmp_path / "file"
        path.write_bytes(cut)
        wanted = by_ffmpeg(path, channels_of(kind))
        try:
            found = load(cut)
        except ItemError as error:
            assert str(error).startswith(("truncated", "cannot be loaded"))
            assert len(wanted) - count_kept(cut) <= 4096
        else:
            assert_equal(found, wanted, kind)


PROMISED = ["wma", "tta", "avi", "avi-mp3", "dsf", "dff", "svx", "gsm-in-wav"]


@pytest.mark.parametrize("kind", PROMISED)
def test_a_cut_file_whose_header_says_its_length_fails(kind: str) -> None:
    cut = encoded(kind)[:-3000]
    with pytest.raises(ItemError, match="truncated"):
        load(cut)
    assert len(load(cut, keep=True))


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["mp3", "mp3-without-xing"])
def test_zeros_before_the_first_mp3_frame(kind: str, tmp_path: Path) -> None:
    data = bytes(200_000) + encoded(kind)
    (tmp_path / "file").write_bytes(data)
    assert_equal(load(data), by_ffmpeg(tmp_path / "file", 2), kind)


def test_nothing_but_zeros_is_no_audio() -> None:
    with pytest.raises(ItemError, match="not a known audio format"):
        load(bytes(400_000))


@needs_ffmpeg
def test_a_transport_stream_that_begins_in_the_middle(tmp_path: Path) -> None:
    data = encoded("mpegts-aac")[188 * 100 :]
    (tmp_path / "file").write_bytes(data)
    assert_equal(load(data), by_ffmpeg(tmp_path / "file", 2), "mpegts-aac")


FOREIGN = {
    "a PNG image": b"\x89PNG\r\n\x1a\n" + bytes(99),
    "a JPEG image": b"\xff\xd8\xff\xe0" + bytes(99),
    "a HEIF or AVIF image": b"\0\0\0\x18ftypheic" + bytes(99),
    "a ZIP archive": b"PK\x03\x04" + bytes(99),
    "a MIDI file": b"MThd\0\0\0\6" + bytes(99),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "an AppleDouble file": b"\0\5\x16\7\0\2\0\0" + bytes(99),
    "a playlist": b"#EXTM3U\nhttp://127.0.0.1/secret.ts\n",
    "an MPEG-DASH manifest": b'<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash"></MPD>',
    "an MPEG-DASH manifest after comments": b"<!-- a -->\n<!---->" * 99 + b"<MPD></MPD>",
    "a session description": b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\n",
    "a concat list": b"ffconcat version 1.0\nfile /etc/hostname\n",
    "FFmpeg metadata": b";FFMETADATA1\n",
    "a web page": b"<!DOCTYPE html><html>",
    "an OptimFROG file": b"OFR \x0c" + bytes(99),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_content_is_named(name: str) -> None:
    named = name.removesuffix(" after comments")
    with pytest.raises(ItemError, match=f"not a known audio format: it is {named}"):
        load(FOREIGN[name])


@pytest.mark.parametrize("comment", [b"<!--x-->", b"<!-- x -->\n"])
def test_a_page_that_begins_with_many_comments_is_no_audio(comment: bytes) -> None:
    """The time doubled with each comment: hundreds would never end."""
    with pytest.raises(ItemError, match="not a known audio format"):
        load(comment * 300 + b"<html>")


def test_every_format_and_decoder_is_in_this_ffmpeg() -> None:
    assert {one.demuxer for one in FORMATS.values()} <= av.formats_available
    assert {av.Codec(name, "r").type for name in DECODERS} == {"audio"}
    opens_others = {
        "hls",
        "dash",
        "concat",
        "image2",
        "sdp",
        "rtsp",
        "ffmetadata",
        "lavfi",
        "tedcaptions",
    }
    assert not opens_others & {one.demuxer for one in FORMATS.values()}
    assert not any(name.endswith("_pipe") for name in (one.demuxer for one in FORMATS.values()))


def test_a_folder_takes_all_of_them_by_default(tmp_path: Path) -> None:
    for extension in AUDIO_EXTENSIONS:
        (tmp_path / f"{extension}.{extension}").write_bytes(b"1")
    source = FolderSource(str(tmp_path), AUDIO_EXTENSIONS)
    assert len(list(source.items())) == len(AUDIO_EXTENSIONS)
    for extension in "wma ac3 eac3 ape tta mpc dsf dff amr avi flv ts".split():  # noqa: SIM905
        assert extension in AUDIO_EXTENSIONS


@pytest.mark.parametrize("kind", RARE)
def test_the_content_decides(kind: str) -> None:
    with media_from_bytes(encoded(kind, 9000)) as media:
        assert sniff(media).format in FORMATS
