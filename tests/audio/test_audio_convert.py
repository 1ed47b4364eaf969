import math
from collections.abc import Iterator

import numpy as np
import pytest
from audio_files import encoded, music, sound
from hypothesis import given, settings
from hypothesis import strategies as st

from latentmill.audio import AudioInfo, AudioStream, media_from_bytes, open_audio, prepare
from latentmill.audio.stream import BLOCK
from latentmill.errors import ItemError


class Pieces:
    """A decoder that hands out a signal `[n, C]` in pieces of the given sizes, over and over."""

    def __init__(self, signal: np.ndarray, rate: int, sizes: list[int]) -> None:
        self.info = AudioInfo(rate, signal.shape[1], len(signal), "wav", "float", "test")
        self.signal, self.sizes = signal, sizes

    def blocks(self) -> Iterator[np.ndarray]:
        at = number = 0
        while at < len(self.signal):
            size = self.sizes[number % len(self.sizes)]
            yield self.signal[at : at + size]
            at, number = at + size, number + 1

    def close(self) -> None:
        pass


def convert(signal: np.ndarray, in_rate: int, out_rate: int, channels: int, sizes: list[int]):
    decoder = Pieces(signal, in_rate, sizes)
    stream = AudioStream(decoder)
    waveform = prepare(stream, sample_rate=out_rate, channels=channels)
    blocks = list(waveform.blocks())
    assert all(b.dtype == np.float32 and b.flags.c_contiguous for b in blocks)
    assert max(b.shape[1] for b in blocks) <= BLOCK
    return np.concatenate(blocks, axis=1), waveform.stats


@pytest.mark.parametrize(("source", "channels"), [(1, 2), (2, 2), (2, 1)])
@pytest.mark.parametrize("out_rate", [44100, 48000])
def test_blocks_that_need_not_be_contiguous_are_equal(source, channels, out_rate):
    signal = music(300_000)[:, :source]
    blocks = [
        list(
            prepare(
                AudioStream(Pieces(signal, 44100, [BLOCK])), sample_rate=out_rate, channels=channels
            ).blocks(contiguous=contiguous)
        )
        for contiguous in (True, False)
    ]
    assert len(blocks[0]) > 1
    assert all(map(np.array_equal, *blocks))
    if out_rate == 44100 and channels == 2:
        assert np.array_equal(
            np.concatenate(blocks[1], axis=1), np.tile(signal.T, (2 // source, 1))
        )


RATES = [8000, 11025, 16000, 22050, 24000, 44056, 44100, 48000, 96000, 192000]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 5000),
    st.sampled_from(RATES),
    st.sampled_from(RATES),
    st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (6, 1)]),
    st.lists(st.integers(1, 700), min_size=1, max_size=4),
)
def test_length_is_exact_and_blocks_leave_no_trace(length, in_rate, out_rate, channels, sizes):
    signal = np.repeat(music(length)[:, :1], channels[0], axis=1)
    whole, stats = convert(signal, in_rate, out_rate, channels[1], [length])
    cut, cut_stats = convert(signal, in_rate, out_rate, channels[1], sizes)
    assert whole.shape == (channels[1], math.ceil(length * out_rate / in_rate))
    assert np.array_equal(whole, cut)
    assert (stats.num_samples, stats.source_num_samples) == (whole.shape[1], length)
    assert cut_stats.peak == stats.peak == np.abs(whole).max()
    for measured in (stats.rms, cut_stats.rms):
        assert measured == pytest.approx(np.sqrt(np.mean(whole.astype(float) ** 2)), rel=1e-6)


def test_mono_is_the_mean_and_stereo_is_a_copy() -> None:
    signal = music(3000)
    mono, _ = convert(signal, 44100, 44100, 1, [500])
    assert np.array_equal(mono[0], signal.mean(axis=1, dtype=np.float32))
    stereo, stats = convert(signal[:, :1], 44100, 44100, 2, [500])
    assert np.array_equal(stereo[0], signal[:, 0])
    assert np.array_equal(stereo[1], signal[:, 0])
    assert stats.rms == pytest.approx(np.sqrt(np.mean(signal[:, 0].astype(float) ** 2)))
    with pytest.raises(ItemError, match="it has 6 channels and the model needs 2"):
        convert(np.zeros((10, 6), np.float32), 44100, 44100, 2, [10])


def test_samples_pass_unchanged_where_nothing_is_to_be_done() -> None:
    signal = 3 * music(300_000)  # beyond 1: no clipping, no gain
    same, stats = convert(signal, 44100, 44100, 2, [300_000])
    assert np.array_equal(same, signal.T)
    assert stats.peak == np.abs(signal).max() > 1


@pytest.mark.parametrize(("in_rate", "out_rate"), [(48000, 44100), (96000, 44100), (44100, 24000)])
def test_nothing_above_the_new_band_leaks_in(in_rate: int, out_rate: int) -> None:
    time = np.arange(in_rate) / in_rate
    for frequency in np.linspace(out_rate / 2 * 1.004, in_rate / 2 * 0.99, 8):
        tone = np.sin(2 * np.pi * frequency * time).astype(np.float32)[:, None]
        left, _ = convert(tone, in_rate, out_rate, 1, [8192])
        middle = left[0, out_rate // 4 : -out_rate // 4].astype(float)
        leak = 20 * math.log10(np.sqrt(np.mean(middle**2)) * math.sqrt(2) + 1e-12)
        assert leak < -130


@pytest.mark.parametrize(("in_rate", "out_rate"), [(48000, 44100), (22050, 44100), (44100, 48000)])
def test_resampling_keeps_time_and_level(in_rate: int, out_rate: int) -> None:
    def tone(rate: int) -> np.ndarray:
        return np.sin(2 * np.pi * 1000 * np.arange(rate) / rate).astype(np.float32)

    resampled, _ = convert(tone(in_rate)[:, None], in_rate, out_rate, 1, [4096])
    middle = slice(2000, -2000)
    assert np.abs(resampled[0, middle] - tone(out_rate)[middle]).max() < 1e-5


def test_a_low_rate_does_not_make_a_large_block() -> None:
    signal = np.ones((1000, 1), np.float32)
    long, _ = convert(signal, 100, 96000, 1, [1000])
    assert long.shape[1] == 960_000


def test_stats_are_not_there_before_the_end() -> None:
    with media_from_bytes(encoded("flac")) as media:
        waveform = prepare(open_audio(media), sample_rate=44100, channels=1)
        with pytest.raises(RuntimeError, match="exhausted"):
            _ = waveform.stats
        assert sum(block.shape[1] for block in waveform.blocks()) == waveform.stats.num_samples


def test_silence_has_no_level() -> None:
    with media_from_bytes(sound(np.zeros(500), 48000)) as media:
        waveform = prepare(open_audio(media), sample_rate=44100, channels=1)
        list(waveform.blocks())
    assert (waveform.stats.rms, waveform.stats.peak) == (0, 0)
