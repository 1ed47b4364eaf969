"""Loading gives what FFmpeg gives, or a failure that says why: files that were refused though they
are whole, and files that lost samples in silence.

The right values come from `ffmpeg -i FILE -f f32le -`, of Vorbis from `oggdec`. Where an edit list
or the tables of an MP4 end the audio within its last frame, it ends there; FFmpeg before version 9
gives the whole frame, the encoder's padding included.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from audio_files import RATE, encoded, music, sound, with_pyav

from latentmill.audio import media_from_bytes, open_audio, open_media
from latentmill.audio.stream import BLOCK
from latentmill.errors import ItemError

LENGTH = 132_300  # 3 s


def decode(data: bytes, **options: float | bool) -> np.ndarray:
    with media_from_bytes(data) as media:
        return np.concatenate(list(open_audio(media, **options).blocks()), axis=1)


def pages(data: bytes) -> Iterator[bytearray]:
    """The pages of an Ogg file."""
    at = 0
    while at < len(data):
        count = data[at + 26]
        end = at + 27 + count + sum(data[at + 27 : at + 27 + count])
        yield bytearray(data[at:end])
        at = end


def page(data: bytearray, granule: int, sequence: int) -> bytes:
    """A page with another granule position and sequence number, and a new checksum."""
    struct.pack_into("<q", data, 6, granule)
    struct.pack_into("<II", data, 18, sequence, 0)
    crc = 0
    for byte in data:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x104C11DB7 if crc >> 31 else 0)) & 0xFFFF_FFFF
    struct.pack_into("<I", data, 22, crc)
    return bytes(data)


def moved(data: bytes, samples: int, *, without: int = 0) -> bytes:
    """An Ogg file whose granule positions are `samples` higher, less its first pages of audio."""
    result = []
    for old in pages(data):
        granule = struct.unpack_from("<q", old, 6)[0]
        if granule > 0 and without:
            without -= 1
            continue
        result.append(page(old, granule + samples if granule > 0 else granule, len(result)))
    return b"".join(result)


def aac(container: str = "mp4", length: int = LENGTH, **options: str) -> bytes:
    return with_pyav(music(length), RATE, "aac", container, options)


def with_stated_length(data: bytes, milliseconds: int) -> bytes:
    """An MP4 whose edit list is longer."""
    at = data.rindex(b"elst") + 12
    duration = struct.unpack_from(">I", data, at)[0] + milliseconds
    return data[:at] + struct.pack(">I", duration) + data[at + 4 :]


def in_whole_frames(data: bytes) -> bytes:
    """An AAC file whose tables count the padding of its last frame, as some encoders write them."""
    at = data.index(b"stts") + 8
    (count,) = struct.unpack_from(">I", data, at)
    at += 8 * count
    return data[:at] + struct.pack(">I", 1024) + data[at + 4 :]


def mp3(length: int = LENGTH, **options: str) -> bytes:
    return with_pyav(music(length), RATE, "libmp3lame", "mp3", {"id3v2_version": "0", **options})


def flac_that_counts(samples: int) -> bytes:
    data = bytearray(sound(music(LENGTH), RATE, "FLAC", "PCM_16"))
    data[22:26] = samples.to_bytes(4, "big")
    return bytes(data)


def in_mp4(codec: str, rate: int) -> bytes:
    return with_pyav(music(3 * rate, rate), rate, codec, "mp4", {})


def opus() -> bytes:
    return with_pyav(music(144_000, 48_000), 48_000, "libopus", "ogg", {})


def vorbis(length: int = LENGTH) -> bytes:
    return sound(music(length), RATE, "OGG", "VORBIS")


WHOLE: dict[str, tuple[Callable[[], bytes], int]] = {
    "edit list rounded to milliseconds": (lambda: aac(length=130_048), 130_048),
    "edit list in samples": (
        lambda: in_whole_frames(aac(length=55_266, movie_timescale="44100")),
        55_266,
    ),
    "edit list seconds longer": (lambda: with_stated_length(aac(), 2000), 133_120),
    "421 samples": (lambda: aac(length=421), 421),
    "421 samples, QuickTime": (lambda: aac("mov", length=421), 421),
    "no edit list": (lambda: aac(use_editlist="0"), 133_324),
    "fragments": (lambda: aac(movflags="+frag_keyframe+empty_moov"), 134_144),
    "fragments for DASH": (lambda: aac(movflags="+dash", frag_duration="1000000"), 134_144),
    "QuickTime": (lambda: aac("mov"), 132_300),
    "3GP": (lambda: aac("3gp"), 132_300),
    "Matroska": (lambda: aac("matroska"), 133_120),
    "AC-3 in MP4": (lambda: in_mp4("ac3", 48_000), 144_128),
    "MP3 in MP4": (lambda: in_mp4("libmp3lame", RATE), 132_300),
    "MP3 in WAV": (lambda: with_pyav(music(LENGTH), RATE, "libmp3lame", "wav", {}), 133_632),
    "Opus from 100 s on": (lambda: moved(opus(), 4_800_000), 144_000),
    "Vorbis from 100 s on": (lambda: moved(vorbis(), 4_410_000), 132_300),
    "MP3 twice": (lambda: mp3() * 2, 267_311),
    "MP3 twice, tags between": (lambda: (b"ID3\4\0\0\0\0\0\12" + bytes(10) + mp3()) * 2, 266_159),
    "MP3 without Xing twice": (lambda: mp3(write_xing="0") * 2, 267_264),
    "MP3 of 421 samples": (lambda: mp3(421), 421),
    "FLAC twice": (lambda: flac_that_counts(LENGTH) * 2, 264_600),
    "FLAC that counts too few": (lambda: flac_that_counts(100_000), 132_300),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_files_are_loaded_to_the_sample(kind: str) -> None:
    make, samples = WHOLE[kind]
    assert decode(make()).shape[1] == samples


def test_what_joined_files_hold_comes_in_order() -> None:
    once, twice = decode(flac_that_counts(LENGTH)), decode(flac_that_counts(LENGTH) * 2)
    assert np.array_equal(twice, np.concatenate([once, once], axis=1))


def test_vorbis_that_was_cut_by_copying_packets_is_not_cut_further() -> None:
    """`ffmpeg -ss 1.2 -i IN.ogg -c copy`: the first page counts fewer samples than it holds."""
    data = vorbis()
    whole = decode(data)
    granules = [struct.unpack_from("<q", old, 6)[0] for old in pages(data)]
    first = next(granule for granule in granules if granule > 0)
    cut = moved(data, -first - 7160, without=1)
    audio = decode(cut)
    # The first packet gives nothing, and libvorbis drops the last block of the first page.
    assert audio.shape[1] == whole.shape[1] - first - 1024 - 1024
    assert np.abs(audio[:, -20_000:] - whole[:, -20_000:]).max() < 1e-6
    assert np.abs(audio[:, :5000] - whole[:, first + 1024 : first + 6024]).max() < 1e-6


def late_webm(pts: int) -> bytes:
    """Opus whose first packet has a time."""
    target, signal = io.BytesIO(), music(144_000, 48_000)
    with av.open(target, "w", format="webm") as output:
        stream = output.add_stream("libopus", rate=48_000)
        stream.layout = "stereo"
        for start in range(0, len(signal), 960):
            part = signal[start : start + 960].reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(part, format="flt", layout="stereo")
            frame.sample_rate, frame.pts = 48_000, pts + start
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return target.getvalue()


SAME: dict[str, Callable[[], tuple[bytes, bytes]]] = {
    "Matroska from 0.7 s on": lambda: (late_webm(0), late_webm(33_600)),
    "WavPack, a tag behind": lambda: with_tail(encoded("wavpack"), b"TAG" + bytes(125)),
    "MPEG-TS, junk behind": lambda: with_tail(
        with_pyav(music(LENGTH), RATE, "mp2", "mpegts", {}), b"qwerty" * 500
    ),
    # Above 48 kHz FFmpeg writes WAVE_FORMAT_EXTENSIBLE, which libsndfile takes for integers.
    "Wave64 of extensible floats": lambda: (
        sound(music(LENGTH), 96_000, "WAV", "FLOAT"),
        with_pyav(music(LENGTH), 96_000, "pcm_f32le", "w64", {}),
    ),
}


def test_a_long_mp3_has_no_wrong_samples_between_blocks() -> None:
    """Frames of a steady tone are so small that they use bits of many frames before them."""
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(3 * BLOCK) / RATE)
    data = sound(np.stack([tone, tone], axis=1).astype(np.float32), RATE, "MP3", "MPEG_LAYER_III")
    with av.open(io.BytesIO(data)) as file:
        right = np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], axis=1)
    audio = decode(data)
    assert audio.shape == right.shape
    assert np.abs(audio - right).max() < 1e-5


def with_tail(data: bytes, tail: bytes) -> tuple[bytes, bytes]:
    return data, data + tail


@pytest.mark.parametrize("kind", SAME)
def test_what_does_not_change_the_sound_changes_no_sample(kind: str) -> None:
    plain, odd = map(decode, SAME[kind]())
    assert np.array_equal(plain, odd)


def test_a_short_vorbis_cut_by_copying_packets_keeps_its_end() -> None:
    """All audio is on one page, which counts fewer samples than it holds."""
    data = vorbis(30_000)
    whole = decode(data).shape[1]
    assert decode(moved(data, -10_000)).shape[1] > whole - 2048


def frame_at(data: bytes, number: int) -> tuple[int, int]:
    """Where a frame of 128 kbit/s begins and ends."""
    at = data.index(b"\xff\xfb")
    for _ in range(number):
        at += 417 + (data[at + 2] >> 1 & 1)
    return at, at + 417 + (data[at + 2] >> 1 & 1)


RATES = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)


def frames_of(data: bytes) -> list[slice]:
    """The frames of an MP3 at 44.1 kHz without tags."""
    frames, at = [], 0
    while at < len(data):
        end = at + 144_000 * RATES[data[at + 2] >> 4] // RATE + (data[at + 2] >> 1 & 1)
        frames.append(slice(at, end))
        at = end
    return frames


def damaged(data: bytes, kind: str) -> bytes:
    begin, end = frame_at(data, 60)
    middle = {"zeros": bytes(end - begin), "noise": b"\x55" * 418, "removed": b""}[kind]
    return data[:begin] + middle + data[end:]


LOST = [("1", "zeros"), ("1", "noise"), ("1", "removed"), ("0", "zeros"), ("0", "noise")]


@pytest.mark.parametrize(("xing", "kind"), LOST)
def test_a_lost_mp3_frame_fails(xing: str, kind: str) -> None:
    """Decoders skip it, and all that follows comes 26 ms early."""
    data = damaged(mp3(write_xing=xing), kind)
    text = {"removed": "^truncated: the header states 133632 samples, 132480"}.get(
        kind, r"loading stopped at sample (67968|69120), 41[78] bytes at byte [0-9]+ are not MPEG"
    )
    with pytest.raises(ItemError, match=text):
        decode(data)


@pytest.mark.parametrize(("xing", "kind"), [pair for pair in LOST if pair[1] != "removed"])
def test_a_lost_mp3_frame_is_silent_where_that_is_allowed(xing: str, kind: str) -> None:
    data = mp3(write_xing=xing)
    whole, kept = decode(data), decode(damaged(data, kind), allow_truncated=True)
    assert kept.shape == whole.shape
    same = np.abs(kept - whole).max(axis=0) < 1e-4
    first, last = np.flatnonzero(~same)[[0, -1]]
    assert 66_000 < first < 70_000
    assert last - first < 8 * 1152  # the frames behind it lean on its bits
    assert np.abs(kept[:, first : last + 1]).max() < 1


def test_an_impossible_length_is_not_filled_with_silence() -> None:
    """A Xing header that counts four billion frames, in a file with a damaged one."""
    data = mp3(write_xing="1")
    at = min(place for place in (data.find(b"Xing"), data.find(b"Info")) if place > 0) + 8
    broken = bytearray(damaged(data, "zeros"))
    broken[at : at + 4] = b"\xff\xff\xff\x00"
    kept = decode(bytes(broken), allow_truncated=True)
    assert abs(kept.shape[1] - LENGTH) < 2 * 1152


def test_a_time_that_jumps_by_ages_ends_the_audio() -> None:
    """Behind a lost page, a granule position that no recording reaches."""
    old = [(bytes(one), struct.unpack_from("<q", one, 6)[0]) for one in pages(vorbis())]
    audio = [number for number, (_, granule) in enumerate(old) if granule > 0]
    lost, late = audio[len(audio) // 2], audio[len(audio) // 2 + 1]
    data = b"".join(
        page(bytearray(one), granule + (1 << 60 if number >= late else 0), number)
        for number, (one, granule) in enumerate(old)
        if number != lost
    )
    count = 0
    with media_from_bytes(data) as media:
        for block in open_audio(media, allow_truncated=True).blocks():
            count += block.shape[1]
            assert count < LENGTH
    assert count >= old[lost - 1][1]


def test_joined_mp3_of_two_sample_rates_fails() -> None:
    other = with_pyav(music(9000, 48_000), 48_000, "libmp3lame", "mp3", {})
    with pytest.raises(ItemError, match=r"^damaged or joined: at byte [0-9]+ MPEG audio"):
        decode(mp3() + other)


def with_vbri(data: bytes) -> bytes:
    """An MP3 whose first frame holds a VBRI header in place of the Xing header."""
    every = frames_of(data)
    vbri = struct.pack(">4s3HII", b"VBRI", 1, 0, 75, len(data), len(every) - 1)
    end = every[0].stop
    return data[:4] + (bytes(32) + vbri).ljust(end - 4, b"\0") + data[end:]


def zeroed_frame(data: bytes, number: int) -> bytes:
    frame = frames_of(data)[number]
    return data[: frame.start] + bytes(frame.stop - frame.start) + data[frame.stop :]


def removed_frame(data: bytes, number: int) -> bytes:
    frame = frames_of(data)[number]
    return data[: frame.start] + data[frame.stop :]


LOST_ELSEWHERE: dict[str, Callable[[], bytes]] = {
    "behind the Xing header": lambda: zeroed_frame(mp3(), 1),
    "second, no Xing": lambda: zeroed_frame(mp3(write_xing="0"), 1),
    "last": lambda: zeroed_frame(mp3(), -1),
    "removed, VBRI": lambda: removed_frame(with_vbri(mp3()), 60),
}


@pytest.mark.parametrize("kind", LOST_ELSEWHERE)
def test_a_lost_mp3_frame_fails_at_the_ends_and_with_a_vbri_header(kind: str) -> None:
    with pytest.raises(ItemError, match=r"^truncated"):
        decode(LOST_ELSEWHERE[kind]())
    assert decode(with_vbri(mp3())).shape[1] == 133_632


def test_a_damaged_opus_packet_in_mp4_fails() -> None:
    """Zeros are a valid packet of another length, and FFmpeg reports nothing."""
    with pytest.raises(ItemError, match=r"the file's tables state at least 14[0-9]{4} samples"):
        decode(zeroed(in_mp4("libopus", 48_000)))


@pytest.mark.parametrize("xing", ["0", "1"])
def test_bytes_put_into_an_mp3_shift_nothing(xing: str) -> None:
    data = mp3(write_xing=xing)
    at = frame_at(data, 60)[0]
    whole, kept = decode(data), decode(data[:at] + b"\x11" * 50 + data[at:], allow_truncated=True)
    assert kept.shape == whole.shape
    assert np.abs(kept[:, -20_000:] - whole[:, -20_000:]).max() < 1e-4


def sparse_wav(path: Path, seconds: int, size: int) -> Path:
    """A stereo WAV of 16 bits whose header gives a size; the samples are a hole in the file."""
    target = io.BytesIO(sound(np.zeros((1, 2)), RATE, "WAV", "PCM_16")[:44])
    head = bytearray(target.getvalue())
    struct.pack_into("<I", head, 40, size)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(44 + seconds * 4 * RATE)
    return path


def test_a_wav_whose_size_has_wrapped_fails(tmp_path: Path) -> None:
    seconds = 24_349
    path = sparse_wav(tmp_path / "long.wav", seconds, seconds * 4 * RATE & 0xFFFF_FFFF)
    with (
        open_media(str(path)) as media,
        pytest.raises(ItemError, match=r"wrapped at 4 GiB: it is 196304 bytes, but 4294967296"),
    ):
        open_audio(media)


def test_a_flac_that_begins_later_is_whole() -> None:
    """`ffmpeg -ss 1.2 -i IN.flac -c copy`: frames keep their numbers, the header its count."""
    data = encoded("flac", LENGTH)
    whole = decode(data)
    place = [at for at in range(len(data)) if data.startswith(b"\xff\xf8", at)]
    head = place[0]
    cut = data[:head] + data[next(at for at in place[10:] if data[at + 4] == 10) :]
    audio = decode(cut)
    assert 0 < audio.shape[1] < whole.shape[1]
    assert np.array_equal(audio, whole[:, -audio.shape[1] :])


SOUGHT: dict[str, Callable[[], bytes]] = {
    "vorbis": vorbis,
    "vorbis, one page": lambda: vorbis(30_000),
    "vorbis from 100 s on": lambda: moved(vorbis(), 4_410_000),
    "mp3 at 22 kHz": lambda: with_pyav(
        music(100_000, 22_050)[:, :1], 22_050, "libmp3lame", "mp3", {}, layout="mono"
    ),
    "mp3": mp3,
}


@pytest.mark.parametrize("kind", SOUGHT)
def test_segments_anywhere_are_exact(kind: str) -> None:
    """libsndfile's own seek is 15 to 448 samples off near the end of most Vorbis files."""
    data = SOUGHT[kind]()
    rate = 22_050 if "22" in kind else RATE
    whole = decode(data)
    length = whole.shape[1]
    for first in range(500, length - 1000, length // 24):
        part = decode(data, start=first / rate, duration=1000 / rate)
        assert np.abs(part - whole[:, first : first + 1000]).max() < 1e-5, first


def bitstream(sync: bytes, distance: int) -> bytes:
    """A WAV of noise in which sync words come at a distance in bytes."""
    body = bytearray(np.random.default_rng(1).integers(0, 256, 120_000, np.uint8).tobytes())
    for at in range(4_000, len(body) - 8, distance):
        body[at : at + len(sync)] = sync
    return sound(np.frombuffer(body, "<i2").reshape(-1, 2), RATE, "WAV", "PCM_16")


BITSTREAMS = {
    "DTS, 14 bits": (b"\xff\x1f\x00\xe8\xf1\x07", 4096, "DTS"),
    "DTS, 14 bits, swapped": (b"\x1f\xff\xe8\x00\x07\xf1", 4096, "DTS"),
    "DTS, 16 bits": (b"\xfe\x7f\x01\x80", 2012, "DTS"),
    "DTS, 16 bits, swapped": (b"\x7f\xfe\x80\x01", 2012, "DTS"),
    "S/PDIF": (b"\x72\xf8\x1f\x4e", 6144, "S/PDIF"),
}


@pytest.mark.parametrize("kind", BITSTREAMS)
def test_coded_audio_in_pcm_is_not_taken_for_sound(kind: str) -> None:
    sync, distance, name = BITSTREAMS[kind]
    with pytest.raises(ItemError, match=f"^the samples are .*{name}.*, not sound"):
        decode(bitstream(sync, distance))
    once = bitstream(sync, 1 << 20)  # by chance
    assert decode(once).shape[1] == 30_000


def shift(one: np.ndarray, other: np.ndarray) -> int:
    """Samples by which `other` lies behind `one`, by their correlation."""
    size = 1 << (2 * len(one)).bit_length()
    found = np.fft.irfft(np.conj(np.fft.rfft(one, size)) * np.fft.rfft(other, size))
    at = int(np.argmax(found))
    return at if at < size // 2 else at - size


def without_page(data: bytes, number: int) -> bytes:
    every = [bytes(old) for old in pages(data)]
    return b"".join(every[:number] + every[number + 1 :])


def zeroed(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(3000) + data[middle + 3000 :]


KEPT: dict[str, Callable[[], tuple[bytes, bytes]]] = {
    "flac": lambda: (encoded("flac", LENGTH), zeroed(encoded("flac", LENGTH))),
    "m4a": lambda: (encoded("m4a", LENGTH), zeroed(encoded("m4a", LENGTH))),
    "opus": lambda: (opus(), zeroed(opus())),
    "opus, no page": lambda: (opus(), without_page(opus(), 3)),
    "vorbis": lambda: (vorbis(), zeroed(vorbis())),
    "vorbis, no page": lambda: (vorbis(), without_page(vorbis(), 7)),
    "ogg-flac": lambda: (encoded("ogg-flac", LENGTH), zeroed(encoded("ogg-flac", LENGTH))),
    "ac-3 in mp4": lambda: both(in_mp4("ac3", 48_000)),
    "mp3 in wav": lambda: both(with_pyav(music(LENGTH), RATE, "libmp3lame", "wav", {})),
    "webm": lambda: both(encoded("webm", 240_000)),
    "tta": lambda: both(with_pyav(music(LENGTH), RATE, "tta", "tta", {}, sample="s16")),
}


def both(data: bytes) -> tuple[bytes, bytes]:
    return data, zeroed(data)


@pytest.mark.parametrize("kind", KEPT)
def test_what_lies_behind_damage_stays_in_its_place(kind: str) -> None:
    data, broken = KEPT[kind]()
    whole, kept = decode(data), decode(broken, allow_truncated=True)
    assert kept.shape == whole.shape
    assert np.abs(kept[:, :40_000] - whole[:, :40_000]).max() < 1e-6
    assert np.abs(kept - whole).max() > 0.1
    assert shift(whole[0, -20_000:], kept[0, -20_000:]) == 0
    with pytest.raises(ItemError, match="damaged"):
        decode(broken)


def test_a_matroska_file_whose_end_cannot_be_read_fails() -> None:
    """FFmpeg ends at the damaged cluster without an error."""
    with pytest.raises(ItemError, match=r"the header states 3\.0[0-9]+ s"):
        decode(zeroed(encoded("webm", 144_000)))
