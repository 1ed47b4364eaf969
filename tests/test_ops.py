"""Latent arithmetic against the same arithmetic on waveforms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from latentmill.chunks import Chunker, Chunking, Stitcher
from latentmill.errors import ConfigError
from latentmill.models import mdct
from latentmill.ops import Origin, gain, mix, subtract
from latentmill.record import DTYPES

MDCT = mdct.build(hop=32, sample_rate=3200).load("cpu")
RANDOM = np.random.default_rng(11)
SOUNDS = RANDOM.uniform(-1, 1, (3, 320)).astype(np.float32)


def with_mdct(audio: np.ndarray) -> np.ndarray:
    return MDCT.encode(torch.from_numpy(audio.astype(np.float32))[None, None])[0].numpy()


A = RANDOM.standard_normal((5, 32))
C = RANDOM.standard_normal((5, 10))  # another constant in every frame, as at the borders


def affine(audio: np.ndarray) -> np.ndarray:
    """An affine encoder, [5, 10] of 320 samples: z = A x + c."""
    return (A @ audio.reshape(10, 32).T + C).astype(np.float32)


ORIGIN = Origin(affine(np.zeros(320)))
GAINS = arrays(np.float64, 3, elements=st.floats(-4, 4))


@given(GAINS)
def test_sums_of_latents_are_latents_of_sums(gains: np.ndarray) -> None:
    mixture = gains @ SOUNDS
    raw = mix([with_mdct(sound) for sound in SOUNDS], list(gains))
    assert raw.dtype == np.float32
    assert np.allclose(raw, with_mdct(mixture), atol=1e-4)
    shifted = mix([affine(sound) for sound in SOUNDS], list(gains), origin=ORIGIN)
    assert np.allclose(shifted, affine(mixture), atol=2e-4)
    unshifted = mix([affine(sound) for sound in SOUNDS], list(gains))
    assert np.allclose(unshifted, shifted - (1 - gains.sum()) * ORIGIN.frames, atol=2e-4)


@given(st.floats(-4, 4))
def test_gain_is_the_latent_of_the_louder_sound(factor: float) -> None:
    sound = SOUNDS[0]
    assert np.allclose(gain(with_mdct(sound), factor), with_mdct(factor * sound), atol=1e-4)
    louder = gain(affine(sound), factor, origin=ORIGIN)
    assert np.allclose(louder, affine(factor * sound), atol=1e-4)
    assert np.array_equal(gain(affine(sound), factor), np.float32(factor) * affine(sound))


def test_subtracting_takes_a_sound_away() -> None:
    mixture = SOUNDS[0] + SOUNDS[1]
    assert np.allclose(
        subtract(with_mdct(mixture), with_mdct(SOUNDS[1])), with_mdct(SOUNDS[0]), atol=1e-5
    )
    rest = subtract(affine(mixture), affine(SOUNDS[1]), origin=ORIGIN)
    assert np.allclose(rest, affine(SOUNDS[0]), atol=1e-5)
    silence = subtract(affine(mixture), affine(mixture), origin=ORIGIN)
    assert np.allclose(silence, ORIGIN.frames, atol=1e-6)


def test_float16_latents_are_added_in_float32() -> None:
    large = np.full((2, 3), 60000, np.float16)
    assert np.array_equal(mix([large, large]), np.full((2, 3), 120000, np.float32))


def test_overlapping_chunks_are_mixed_with_the_origin_of_each_chunk() -> None:
    chunks = np.stack([affine(sound) for sound in SOUNDS])  # [N, C, T]
    louder = gain(chunks, 2.0, origin=ORIGIN)
    assert np.allclose(louder, np.stack([affine(2 * s) for s in SOUNDS]), atol=1e-5)


@given(have=st.integers(1, 9), frames=st.integers(1, 30))
def test_the_origin_of_any_length_keeps_its_borders(have: int, frames: int) -> None:
    silence = np.arange(2 * have, dtype=np.float32).reshape(2, have)
    origin = Origin(silence).of_length(frames)
    assert origin.shape == (2, frames)
    left, right = min(have, frames) // 2, min(have, frames) - min(have, frames) // 2
    assert np.array_equal(origin[:, :left], silence[:, :left])
    assert np.array_equal(origin[:, frames - right :], silence[:, have - right :])
    middle = origin[:, left : frames - right]
    assert np.all(middle == silence[:, have // 2, None])
    if frames == have:
        assert np.array_equal(origin, silence)


@pytest.mark.parametrize("stitch", ["trim", "crossfade"])
@given(have=st.integers(4, 9), overlap=st.integers(2, 4), hops=st.integers(1, 60))
def test_the_origin_of_a_long_item_is_stitched_as_the_item_is(
    stitch: str, have: int, overlap: int, hops: int
) -> None:
    spec = replace(MDCT.spec, overhang=0, sample_multiple=32, min_samples=32)
    overlap = min(overlap, have // 2)
    chunking = Chunking(stitch, have * 32, (have - overlap) * 32, overlap)  # type: ignore[arg-type]
    silence = np.random.default_rng(have).standard_normal((5, have)).astype(np.float32)
    chunker = Chunker(spec, chunking)
    stitcher = Stitcher(chunking, DTYPES["float32"])
    for chunk in [*chunker.push(np.zeros((1, hops * 32), np.float32)), *chunker.finish()]:
        stitcher.add(chunk.frame, silence)
    origin = Origin(silence, chunking)
    if hops >= have:
        assert np.array_equal(origin.of_length(hops), stitcher.finish())
    else:
        assert np.array_equal(origin.of_length(hops), Origin(silence).of_length(hops))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: mix([]), "at least one latent"),
        (lambda: mix([C, C], [1.0]), "2 and 1 given"),
        (lambda: mix([C, C[:, :4]]), r"(5, 4), (5, 10)"),
        (lambda: gain(C[:3], 0.5, origin=ORIGIN), "5 channels and the latents 3"),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    wrong: Callable[[], object], says: str, one_sentence: Callable[[BaseException], str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        wrong()
    assert says in one_sentence(caught.value)
