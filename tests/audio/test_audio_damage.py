"""Damage in containers, one kind at a time: it is noticed, and with `allow_truncated` what is left
keeps its place in time.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import av
import numpy as np
import pytest
from audio_files import RATE, encoded, music, sound, with_pyav
from test_audio_as_ffmpeg import LENGTH, decode, opus, page, pages, shift, vorbis

from latentmill.errors import ItemError


def audio_pages(data: bytes) -> list[int]:
    """The numbers of the Ogg pages that hold audio."""
    numbered = enumerate(pages(data))
    return [number for number, one in numbered if int.from_bytes(one[6:14], "little") > 0]


def with_noise_in_page(data: bytes, number: int) -> bytes:
    """A byte in the middle of an Ogg page flipped; its header stays."""
    every = list(pages(data))
    every[number][len(every[number]) // 2] ^= 0x10
    return b"".join(map(bytes, every))


def without_pages(data: bytes, numbers: list[int]) -> bytes:
    return b"".join(bytes(one) for at, one in enumerate(pages(data)) if at not in numbers)


OGG: dict[str, Callable[[], bytes]] = {
    "opus": lambda: with_pyav(music(152_000, 48_000), 48_000, "libopus", "ogg", {}),
    "vorbis": vorbis,
    "flac": lambda: encoded("ogg-flac", LENGTH),
}


@pytest.mark.parametrize("codec", OGG)
@pytest.mark.parametrize("place", ["first", "second last"])
@pytest.mark.parametrize("kind", ["damaged", "missing"])
def test_the_pages_behind_a_lost_ogg_page_keep_their_place(
    codec: str, place: str, kind: str
) -> None:
    """The first page tells where the audio begins; the last one may count less than it holds."""
    data = OGG[codec]()
    audio = audio_pages(data)
    number = audio[0] if place == "first" else audio[-2]
    broken = with_noise_in_page if kind == "damaged" else lambda d, n: without_pages(d, [n])
    whole, kept = decode(data), decode(broken(data, number), allow_truncated=True)
    assert kept.shape == whole.shape
    assert not np.array_equal(kept, whole)
    if codec == "vorbis" and place == "second last" and kind == "missing":
        return  # nothing tells how much of the last page counts
    end = int.from_bytes(list(pages(data))[number][6:14], "little")
    end -= 312 if codec == "opus" else 0  # what its decoder drops at the start
    # Vorbis needs two packets until it sounds as before, Opus longer.
    settled = end + min(4096, (whole.shape[1] - end) // 2)
    assert np.abs(kept[:, settled:] - whole[:, settled:]).max() < 0.05
    assert shift(whole[0, end:], kept[0, end:]) == 0


def test_a_late_ogg_stream_without_its_first_page_is_not_filled_from_0_on() -> None:
    late = [
        page(old, granule + 48_000_000 if granule > 0 else granule, number)
        for number, old in enumerate(pages(opus()))
        for granule in [int.from_bytes(old[6:14], "little")]
    ]
    first = audio_pages(b"".join(late))[0]
    kept = decode(b"".join(late[:first] + late[first + 1 :]), allow_truncated=True)
    assert kept.shape[1] < 144_000


def tta() -> bytes:
    return with_pyav(music(LENGTH), RATE, "tta", "tta", {}, sample="s16")


@pytest.mark.parametrize(
    ("data", "at"), [(tta, 40_000), (lambda: encoded("wavpack"), 10_000)], ids=["tta", "wavpack"]
)
def test_the_first_frame_is_silent_if_it_is_lost(data: Callable[[], bytes], at: int) -> None:
    whole, broken = data(), bytearray(data())
    broken[at : at + 100] = bytes(100)
    with pytest.raises(ItemError, match=r"first frames are damaged \(--allow-truncated"):
        decode(bytes(broken))
    clean, kept = decode(whole), decode(bytes(broken), allow_truncated=True)
    assert kept.shape == clean.shape
    assert not kept[:, :1000].any()
    assert np.array_equal(kept[:, -30_000:], clean[:, -30_000:])


@pytest.mark.parametrize("container", ["matroska", "mp4"])
def test_a_bit_flipped_in_flac_is_noticed_in_any_container(container: str) -> None:
    data = bytearray(with_pyav(music(LENGTH), RATE, "flac", container, {"strict": "-2"}))
    assert decode(bytes(data)).shape[1] == LENGTH
    data[len(data) // 2] ^= 4
    with pytest.raises(ItemError, match=r"^truncated or damaged: loading stopped at sample"):
        decode(bytes(data))


def test_wave64_ends_where_its_header_says() -> None:
    """libsndfile reads the padding, and whatever follows, as audio."""
    data = sound(music(1001), RATE, "W64", "PCM_16")
    junk = b"junk\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a" + (124).to_bytes(8, "little")
    assert decode(data).shape[1] == 1001
    assert np.array_equal(decode(data + junk + b"\1" * 100), decode(data))
    part = decode(data, start=1000 / RATE, duration=0.04)
    assert np.array_equal(part, decode(data)[:, 1000:])


def by_ffmpeg(data: bytes, channels: int) -> np.ndarray:
    """All samples, by nothing but PyAV."""
    with av.open(io.BytesIO(data)) as container:
        packer = av.AudioResampler("flt")  # planar frames of eight channels crash PyAV
        frames = [*container.decode(audio=0), None]
        packed = [out.to_ndarray().reshape(-1) for one in frames for out in packer.resample(one)]
    return np.concatenate(packed).reshape(-1, channels).T


@pytest.mark.parametrize("channels", [3, 5, 6, 7, 8])
def test_the_channels_of_vorbis_have_the_order_that_ffmpeg_gives(channels: int) -> None:
    time = np.arange(RATE) / RATE
    tones = np.stack([np.sin(2 * np.pi * 300 * (n + 1) * time) for n in range(channels)], 1) / 4
    data = sound(tones, RATE, "OGG", "VORBIS")
    assert np.abs(decode(data) - by_ffmpeg(data, channels)).max() < 1e-5


def test_ima_adpcm_in_wav_has_the_samples_that_ffmpeg_gives() -> None:
    data = with_pyav(music(20_000)[:, :1], RATE, "adpcm_ima_wav", "wav", {}, layout="mono")
    assert np.array_equal(decode(data), by_ffmpeg(data, 1))


SHORT: dict[str, Callable[[], bytes]] = {
    "voc": lambda: encoded("voc"),
    "real": lambda: encoded("real"),
}


@pytest.mark.parametrize("kind", SHORT)
def test_a_file_that_ends_before_its_last_block_is_truncated(kind: str) -> None:
    data = SHORT[kind]()
    whole = decode(data)
    with pytest.raises(ItemError, match=r"^truncated: [0-9]+ bytes are missing at the end"):
        decode(data[: len(data) // 2])
    kept = decode(data[: len(data) // 2], allow_truncated=True)
    there = kept.shape[1] - 2048  # the last frame may be cut
    assert np.array_equal(kept[:, :there], whole[:, :there])
    assert kept.shape[1] > whole.shape[1] // 3


OTHER = {
    "16 bits": (music(50_000), RATE, "PCM_16"),
    "24 bits": (music(50_000), RATE, "PCM_24"),
    "1 channels": (music(50_000)[:, :1], RATE, "PCM_24"),
    "48000 Hz": (music(50_000), 48_000, "PCM_24"),
}


@pytest.mark.parametrize(
    ("one", "two"), [("16 bits", "24 bits"), ("24 bits", "48000 Hz"), ("24 bits", "1 channels")]
)
@pytest.mark.parametrize("length", [1000, 50_000])
def test_joined_flac_of_two_kinds_fails(one: str, two: str, length: int) -> None:
    """FFmpeg repeats the first stream, or reports invalid data."""
    pair = (OTHER[one], OTHER[two])
    first, second = (sound(signal[:length], rate, "FLAC", bits) for signal, rate, bits in pair)
    match = rf"^joined: at byte {len(first)} a FLAC stream of .*{two}.* follows one of "
    with pytest.raises(ItemError, match=match):
        decode(first + second)
    assert decode(first + second, allow_truncated=True).shape[1] >= length


def test_aac_in_wav_that_cannot_be_decoded_is_named() -> None:
    data = with_pyav(music(LENGTH), RATE, "aac", "wav", {})
    with pytest.raises(ItemError, match="AAC in WAV has no frame positions"):
        decode(data)
