"""Parts of recordings, exact to the sample, and stems that stay where they were."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from decimal import Decimal
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from audio_files import ALL, RATE, SECONDS, encoded, rate_of, sound, with_pyav
from hypothesis import assume, example, given
from hypothesis import strategies as st

from latentmill.audio import media_from_bytes, open_audio, open_media
from latentmill.errors import ItemError
from latentmill.sources.address import address_of, item_at
from latentmill.sources.base import Item, Segment


def decode(data: bytes, **part: float | bool | None) -> np.ndarray:
    with media_from_bytes(data) as media:
        stream = open_audio(media, **part)
        audio = np.concatenate(list(stream.blocks()), axis=1)
    assert stream.num_samples in (None, audio.shape[1])
    return audio


@pytest.mark.parametrize("kind", ALL)
def test_a_part_is_what_the_whole_holds_there(kind: str) -> None:
    data, rate = encoded(kind), rate_of(kind)
    whole = decode(data)
    end = whole.shape[1] / rate
    parts = ((0.0, 0.5), (0.3, None), (0.123456, 1.234567), (1.0, end - 1.0), (end - 0.01, None))
    for start, duration in parts:
        last = None if duration is None else round((start + duration) * rate)
        part = decode(data, start=start, duration=duration)
        wanted = whole[:, round(start * rate) : last]
        assert part.shape == wanted.shape
        # A decoder that begins elsewhere may round differently: MP3 and Vorbis overlap blocks.
        assert np.abs(part - wanted).max() < 1e-5


@pytest.mark.parametrize("kind", ["wav", "vorbis", "mp3", "m4a", "opus"])
def test_neighbouring_parts_share_and_lose_nothing(kind: str) -> None:
    data, rate = encoded(kind), rate_of(kind)
    cuts = [0.0, 0.1 + 0.2, 0.7000001, 1.3, float(SECONDS)]
    parts = [
        decode(data, start=start, duration=end - start) for start, end in itertools.pairwise(cuts)
    ]
    joined = np.concatenate(parts, axis=1)
    assert joined.shape[1] == SECONDS * rate
    assert np.abs(joined - decode(data)).max() < 1e-5


@cache
def minute(rate: int) -> bytes:
    return sound(np.zeros(60 * rate), rate, "WAV", "PCM_U8")


def length_of(segment: Segment, rate: int) -> int | None:
    with media_from_bytes(minute(rate)) as media:
        return open_audio(media, start=segment.start, duration=segment.duration).num_samples


@given(
    st.sampled_from([8000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000]),
    st.integers(1, 6),
    st.sets(st.integers(0, 59_999_999), min_size=3, max_size=3).map(sorted),
)
@example(22_050, 2, [39_960_000, 40_550_000, 41_140_000])
def test_parts_at_decimal_times_share_and_lose_nothing(
    rate: int, digits: int, micros: list[int]
) -> None:
    """Sums of decimal numbers are not exact: 39.96 + 0.59 is more than 40.55."""
    start, middle, end = (Decimal(at // 10 ** (6 - digits)).scaleb(-digits) for at in micros)
    assume(middle - start > Decimal("0.001") and end - middle > Decimal("0.001"))
    one, two = (
        Segment(float(start), float(middle - start)),
        Segment(float(middle), float(end - middle)),
    )
    both = Segment(float(start), float(end - start))
    lengths = [length_of(segment, rate) for segment in (one, two, both)]
    assert lengths[0] + lengths[1] == lengths[2]
    for segment, length in zip((one, two, both), lengths, strict=True):
        again = item_at(address_of(Item("k", "/a.wav", 0, "", segment=segment))).segment
        assert length_of(again, rate) == length


def flac_that_counts_too_few() -> bytes:
    data = bytearray(encoded("flac"))
    data[22:26] = (30_000).to_bytes(4, "big")
    return bytes(data)


LONGER: dict[str, Callable[[], tuple[bytes, int]]] = {
    "flac": lambda: (encoded("flac", 50_000) + encoded("flac"), 50_000 + SECONDS * RATE),
    "flac twice": lambda: (encoded("flac") * 2, 2 * SECONDS * RATE),
    "flac that counts too few": lambda: (flac_that_counts_too_few(), SECONDS * RATE),
}


@pytest.mark.parametrize("kind", LONGER)
def test_parts_of_files_with_more_than_their_header_counts(kind: str) -> None:
    data, samples = LONGER[kind]()
    whole, end = decode(data), samples / RATE
    assert whole.shape[1] == samples
    for start, duration in ((0.5, None), (0.5, 0.8), (1.8, None), (end - 0.5, 0.5)):
        last = None if duration is None else round((start + duration) * RATE)
        part = decode(data, start=start, duration=duration)
        assert np.array_equal(part, whole[:, round(start * RATE) : last])
    with pytest.raises(ItemError, match=r"the recording ends at"):
        decode(data, start=end - 0.5, duration=1.0)


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3-without-xing", "webm"])
def test_parts_beyond_the_end_are_refused(kind: str) -> None:
    data = encoded(kind)
    for start, duration in ((SECONDS - 0.5, 1.0), (SECONDS + 1.0, 1.0), (0.0, 90.0)):
        with pytest.raises(ItemError, match=r"segment is from|recording ends at|no samples"):
            decode(data, start=start, duration=duration)
    with pytest.raises(ItemError, match="the segment has no samples"):
        decode(data, start=1.0, duration=0.0)


def test_a_part_may_end_a_little_late() -> None:
    """Manifests round their numbers."""
    data = encoded("flac")
    assert np.array_equal(
        decode(data, start=1.0, duration=SECONDS - 1 + 0.04), decode(data, start=1.0)
    )


def clicks(seconds: float, rate: int, period: float) -> np.ndarray:
    """Short bursts `[n, 2]`, float32, every `period` seconds."""
    audio = np.zeros((round(seconds * rate), 2), np.float32)
    burst = np.hanning(64)[:, None] * np.sin(np.arange(64)[:, None] * 0.7) * 0.8
    for at in np.arange(0.1, seconds - 0.1, period):
        audio[round(at * rate) : round(at * rate) + 64] += burst.astype(np.float32)
    return audio


def shift(one: np.ndarray, other: np.ndarray, most: int = 3000) -> int:
    """Samples by which `other` lies behind `one`, by their correlation."""
    size = 1 << (len(one) + len(other)).bit_length()
    spectrum = np.conj(np.fft.rfft(one, size)) * np.fft.rfft(other, size)
    correlation = np.fft.irfft(spectrum)
    around = np.concatenate([correlation[-most:], correlation[: most + 1]])
    return int(np.argmax(around)) - most


STEMS = {
    "mp3": lambda audio: sound(audio, RATE, "MP3", "MPEG_LAYER_III"),
    "lame": lambda audio: with_pyav(audio, RATE, "libmp3lame", "mp3", {}),
    "aac": lambda audio: with_pyav(audio, RATE, "aac", "mp4", {}),
    "vorbis": lambda audio: sound(audio, RATE, "OGG", "VORBIS"),
    "opus": lambda audio: with_pyav(audio, 48000, "libopus", "ogg", {}),
    "flac": lambda audio: sound(audio, RATE, "FLAC", "PCM_16"),
}


@pytest.mark.parametrize("kind", STEMS)
@pytest.mark.parametrize("start", [0.0, 0.75])
def test_clicks_stay_where_they_are(kind: str, start: float) -> None:
    """What an encoder puts in front (priming) is taken away, in stems of any format."""
    rate = 48000 if kind == "opus" else RATE
    audio = clicks(2.0, rate, 0.31)
    data = STEMS[kind](audio)
    found = decode(data, start=start) if start else decode(data)
    wanted = audio[round(start * rate) :]
    assert shift(wanted[:, 0], found[0]) == 0
    assert found.shape[1] == len(wanted)


def test_real_aac_stems_lie_on_one_time_line(shared_audio: Path) -> None:
    folder = shared_audio / "stems" / "potassium"
    lengths = set()
    for path in sorted(folder.iterdir()):
        with open_media(str(path)) as media, open_audio(media, start=60, duration=1) as stream:
            assert stream.num_samples == stream.sample_rate
        with open_media(str(path)) as media, open_audio(media) as stream:
            lengths.add(stream.info.num_samples)
    assert len(lengths) == 1
    with open_media(str(folder / "4.Potassium_Stem_KICK.m4a")) as media:
        stream = open_audio(media, start=60, duration=10)
        rate, kick = stream.sample_rate, np.concatenate(list(stream.blocks()), axis=1)
    assert (rate, kick.std() > 1e-3) == (48000, True)  # written below as if it were at RATE
    for kind in ("aac", "mp3", "vorbis", "flac"):  # a stem in another format stays beside it
        again = decode(STEMS[kind](np.ascontiguousarray(kick.T)))
        # MP4 counts the length in milliseconds.
        assert 0 <= kick.shape[1] - again.shape[1] < (RATE / 1000 if kind == "aac" else 1)
        assert shift(kick[0], again[0]) == 0
