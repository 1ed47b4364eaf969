"""A latent's bytes: time-major, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentmill.record import DTYPES, Record, latent_from_bytes, time_major_bytes

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 7)) | st.tuples(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 7)
)


@given(SHAPES, st.sampled_from(sorted(DTYPES)), st.booleans())
def test_bytes_and_back(shape: tuple[int, ...], dtype: str, fortran: bool) -> None:
    latent = np.random.default_rng(0).standard_normal(shape).astype(DTYPES[dtype])
    if fortran:
        latent = np.asfortranarray(latent)
    data = time_major_bytes(latent)
    assert data.nbytes == latent.nbytes
    back = latent_from_bytes(bytes(data), shape, dtype)
    assert back.dtype == DTYPES[dtype]
    assert np.array_equal(back, latent)
    with pytest.raises(ValueError, match="read-only"):
        back[...] = 0


def test_a_crop_in_time_is_one_range_of_bytes() -> None:
    latent = np.arange(12, dtype="<f4").reshape(3, 4)  # [channels, frames]
    data = bytes(time_major_bytes(latent))
    crop = latent_from_bytes(data[1 * 12 : 3 * 12], (3, 2), "float32")
    assert np.array_equal(crop, latent[:, 1:3])


def test_bytes_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="reshape"):
        latent_from_bytes(b"\0" * 12, (2, 2), "float32")


def test_a_time_major_latent_is_not_copied() -> None:
    latent = np.zeros((9, 4), "<f2").T
    assert np.shares_memory(np.frombuffer(time_major_bytes(latent), "<f2"), latent)


@pytest.mark.parametrize(("shape", "channels", "frames"), [((4, 9), 4, 9), ((3, 4, 9), 4, 9)])
def test_a_record_knows_its_measures(shape: tuple[int, ...], channels: int, frames: int) -> None:
    record = Record(
        key="a",
        latent=np.zeros(shape, np.float16),
        num_samples=22050,
        sample_rate=44100,
        source_uri="a.wav",
        source_sample_rate=48000,
        source_channels=2,
        content_hash="xxh3:0",
        rms=0.1,
        peak=0.5,
    )
    assert (record.channels, record.frames, record.duration) == (channels, frames, 0.5)
