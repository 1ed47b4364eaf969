from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from latentmill.store.statistics import BLOCK_FRAMES, ChannelStatistics


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    offset=st.sampled_from([0.0, -5.0, 1e3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_merged_parts_equal_the_whole(
    sizes: list[int], scale: float, offset: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    parts = [(rng.standard_normal((3, n)) * scale + offset).astype(np.float32) for n in sizes]
    merged = ChannelStatistics.empty(3)
    for part in parts:
        merged = merged.merge(ChannelStatistics.of(part))
    whole = np.concatenate(parts, axis=1).astype(np.float64)
    assert merged.frames == whole.shape[1]
    if merged.frames:
        spread = scale + abs(offset) * 1e-9
        np.testing.assert_allclose(merged.mean, whole.mean(axis=1), rtol=1e-12, atol=1e-12 * scale)
        np.testing.assert_allclose(merged.std, whole.std(axis=1), rtol=1e-9, atol=1e-9 * spread)


def test_nothing_has_finite_statistics() -> None:
    nothing = ChannelStatistics.empty(2).merge(ChannelStatistics.empty(2))
    assert nothing.frames == 0
    assert nothing.mean.tolist() == nothing.std.tolist() == [0, 0]


def test_long_latents_and_chunks() -> None:
    latent = np.random.default_rng(0).standard_normal((2, 3 * BLOCK_FRAMES + 17)) * 60000
    stored = np.clip(latent, -65000, 65000).astype(np.float16)  # its squares overflow float16
    statistics = ChannelStatistics.of(stored)
    whole = stored.astype(np.float64)
    np.testing.assert_allclose(statistics.mean, whole.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, whole.std(axis=1), rtol=1e-12)
    chunks = np.ascontiguousarray(stored[:, :12000].reshape(2, 4, 3000).transpose(1, 0, 2))
    chunked, flat = ChannelStatistics.of(chunks), ChannelStatistics.of(stored[:, :12000])
    assert chunked.frames == flat.frames == 12000
    np.testing.assert_allclose(chunked.mean, flat.mean, rtol=1e-12)
    np.testing.assert_allclose(chunked.m2, flat.m2, rtol=1e-12)


def test_frames_that_pad_the_last_chunk_do_not_count() -> None:
    chunks = np.random.default_rng(1).standard_normal((3, 2, 10)).astype(np.float32)
    chunks[0, :, 8:] = 0  # not the last one
    chunks[2, :, 6:] = 0
    chunks[2, 1, 5] = 0  # not all channels
    statistics = ChannelStatistics.of(chunks)
    counted = np.concatenate([chunks[0], chunks[1], chunks[2, :, :6]], axis=1).astype(np.float64)
    assert statistics.frames == 26
    np.testing.assert_allclose(statistics.mean, counted.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, counted.std(axis=1), rtol=1e-12)
    assert ChannelStatistics.of(chunks[2]).frames == 10  # a whole latent is not padded
    assert ChannelStatistics.of(np.zeros((2, 2, 10), np.float32)).frames == 20
