"""Latent arithmetic against the same arithmetic on waveforms."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from latentmill.encoding.chunks import Chunker, Chunking, Stitcher
from latentmill.errors import ConfigError
from latentmill.models.families import mdct
from latentmill.ops import (
    Linearity,
    LinearityWarning,
    Origin,
    crossfade,
    fade,
    fit,
    gain,
    mix,
    mixup,
    subtract,
)
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
    raw = mix([with_mdct(sound) for sound in SOUNDS], list(gains), origin=None)
    assert raw.dtype == np.float32
    assert np.allclose(raw, with_mdct(mixture), atol=1e-4)
    shifted = mix([affine(sound) for sound in SOUNDS], list(gains), origin=ORIGIN)
    assert np.allclose(shifted, affine(mixture), atol=2e-4)
    unshifted = mix([affine(sound) for sound in SOUNDS], list(gains), origin=None)
    assert np.allclose(unshifted, shifted - (1 - gains.sum()) * ORIGIN.frames, atol=2e-4)


@given(st.floats(-4, 4))
def test_gain_is_the_latent_of_the_louder_sound(factor: float) -> None:
    sound = SOUNDS[0]
    assert np.allclose(
        gain(with_mdct(sound), factor, origin=None), with_mdct(factor * sound), atol=1e-4
    )
    louder = gain(affine(sound), factor, origin=ORIGIN)
    assert np.allclose(louder, affine(factor * sound), atol=1e-4)
    assert np.array_equal(
        gain(affine(sound), factor, origin=None), np.float32(factor) * affine(sound)
    )


def test_subtracting_takes_a_sound_away() -> None:
    mixture = SOUNDS[0] + SOUNDS[1]
    assert np.allclose(
        subtract(with_mdct(mixture), with_mdct(SOUNDS[1]), origin=None),
        with_mdct(SOUNDS[0]),
        atol=1e-5,
    )
    rest = subtract(affine(mixture), affine(SOUNDS[1]), origin=ORIGIN)
    assert np.allclose(rest, affine(SOUNDS[0]), atol=1e-5)
    silence = subtract(affine(mixture), affine(mixture), origin=ORIGIN)
    assert np.allclose(silence, ORIGIN.frames, atol=1e-6)


def test_float16_latents_are_added_in_float32() -> None:
    large = np.full((2, 3), 60000, np.float16)
    assert np.array_equal(mix([large, large], origin=None), np.full((2, 3), 120000, np.float32))


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


@given(have=st.integers(1, 9), start=st.integers(0, 20), frames=st.integers(0, 20))
def test_the_origin_of_a_causal_model_repeats_its_last_frame(
    have: int, start: int, frames: int
) -> None:
    silence = np.random.default_rng(have).standard_normal((2, have)).astype(np.float32)
    origin = Origin(silence, Chunking("state", have * 32, have * 32, 0))
    long = np.concatenate([silence, np.repeat(silence[:, -1:], 40, axis=1)], axis=1)
    assert np.array_equal(origin.crop(40, start, frames), long[:, start : start + frames])


@pytest.mark.parametrize("stitch", ["trim", "crossfade", None])
@given(have=st.integers(4, 9), overlap=st.integers(2, 4), total=st.integers(1, 90), data=st.data())
def test_a_crop_of_the_origin_is_cut_from_the_whole(
    stitch: str | None, have: int, overlap: int, total: int, data: st.DataObject
) -> None:
    overlap = min(overlap, have // 2)
    silence = np.random.default_rng(have).standard_normal((2, have)).astype(np.float32)
    chunking = None
    if stitch is not None:
        chunking = Chunking(stitch, have * 32, (have - overlap) * 32, overlap)  # type: ignore[arg-type]
    origin = Origin(silence, chunking)
    start = data.draw(st.integers(0, total - 1))
    frames = data.draw(st.integers(1, total - start))
    whole = origin.of_length(total)
    assert whole.shape == (2, total)
    part = origin.crop(total, start, frames)
    assert np.array_equal(part, whole[:, start : start + frames])
    crop = np.zeros((2, frames), np.float32)
    assert np.array_equal(origin.at(total, start).like(crop), part)


@pytest.mark.parametrize("stitch", ["trim", "crossfade", None])
@given(have=st.integers(4, 9), total=st.integers(1, 40), data=st.data())
def test_after_an_items_end_a_crop_is_a_longer_silence(
    stitch: str | None, have: int, total: int, data: st.DataObject
) -> None:
    """Frames from the end on are those of the silence that ends where the crop does."""
    silence = np.random.default_rng(have).standard_normal((2, have)).astype(np.float32)
    chunking = None
    if stitch is not None:
        chunking = Chunking(stitch, have * 32, (have - 2) * 32, 2)  # type: ignore[arg-type]
    origin = Origin(silence, chunking)
    start = data.draw(st.integers(0, total))
    frames = data.draw(st.integers(1, total + have))
    crop = origin.at(total, start).like(np.zeros((2, frames), np.float32))
    own = origin.of_length(total)[:, start : start + frames]
    longer = origin.of_length(start + frames)[:, start:]
    assert np.array_equal(crop, np.concatenate([own, longer[:, own.shape[1] :]], axis=1))


@given(arrays(np.float32, (3, 10), elements=st.floats(-2, 2, width=32)))
def test_a_gain_curve_is_the_affine_encoders_latent_frame_by_frame(curves: np.ndarray) -> None:
    audio = sum(np.repeat(c, 32) * s for c, s in zip(curves, SOUNDS, strict=True))
    mixed = mix([affine(sound) for sound in SOUNDS], list(curves), origin=ORIGIN)
    assert np.allclose(mixed, affine(audio), atol=5e-4)


def test_a_number_and_a_gain_curve_can_be_mixed() -> None:
    curve = np.linspace(-1, 2, 10)
    audio = 0.5 * SOUNDS[0] + np.repeat(curve, 32) * SOUNDS[1]
    mixed = mix([affine(sound) for sound in SOUNDS[:2]], [0.5, curve], origin=ORIGIN)
    assert np.allclose(mixed, affine(audio), atol=5e-4)


def test_a_slow_gain_curve_is_a_slow_gain_of_the_waveform() -> None:
    curve = np.concatenate([np.ones(4), np.linspace(1, 0.5, 43), np.full(4, 0.5)])
    sound = np.random.default_rng(2).uniform(-1, 1, 50 * 32).astype(np.float32)
    decoded = decoded_mdct(gain(with_mdct(sound), curve, origin=None))
    # Frame n of the mdct is in the middle of its two hops at sample 32 * n.
    envelope = np.interp(np.arange(50 * 32), np.arange(51) * 32, curve)
    error = np.abs(decoded - envelope * sound)
    assert error[: 3 * 32].max() < 1e-5  # exact where the curve is constant
    assert error[-3 * 32 :].max() < 1e-5
    assert error.max() < 0.012  # the curve's step of 0.5 / 42


def decoded_mdct(latent: np.ndarray) -> np.ndarray:
    samples = MDCT.spec.samples(latent.shape[1])
    return MDCT.decode(torch.from_numpy(latent)[None], samples)[0, 0].numpy()


@given(weight=st.floats(0, 1))
def test_mixup_needs_no_origin(weight: float) -> None:
    one, other = affine(SOUNDS[0]), affine(SOUNDS[1])
    expected = affine(weight * SOUNDS[0] + (1 - weight) * SOUNDS[1])
    assert np.allclose(mixup(one, other, weight, origin=None), expected, atol=1e-5)
    assert np.allclose(mixup(one, other, weight, origin=ORIGIN), expected, atol=1e-5)


@given(
    fade_in=st.integers(0, 10),
    fade_out=st.integers(0, 10),
    shape=st.sampled_from(["linear", "power"]),
)
def test_a_fade_begins_and_ends_in_silence(fade_in: int, fade_out: int, shape: str) -> None:
    def curve(n: int) -> np.ndarray:
        line = (np.arange(n) + 0.5) / max(n, 1)
        return line if shape == "linear" else np.sin(np.pi / 2 * line)

    envelope = np.ones(10)
    envelope[:fade_in] *= curve(fade_in)
    envelope[10 - fade_out :] *= curve(fade_out)[::-1]
    faded = fade(affine(SOUNDS[0]), fade_in, fade_out, shape=shape, origin=ORIGIN)  # type: ignore[arg-type]
    assert np.allclose(faded, affine(np.repeat(envelope, 32) * SOUNDS[0]), atol=1e-5)


@pytest.mark.parametrize("shape", ["linear", "power"])
@given(frames=st.integers(0, 10))
def test_a_crossfade_is_that_of_the_waveforms(shape: str, frames: int) -> None:
    random = np.random.default_rng(4)
    matrix, constant = random.standard_normal((5, 32)), random.standard_normal(5)

    def encoder(audio: np.ndarray) -> np.ndarray:  # the same constant in all frames
        return (matrix @ audio.reshape(-1, 32).T + constant[:, None]).astype(np.float32)

    origin = Origin(encoder(np.zeros(320)))
    up = (np.arange(frames) + 0.5) / max(frames, 1)
    up = up if shape == "linear" else np.sin(np.pi / 2 * up)
    total = 20 - frames
    audio = np.zeros((total, 32))
    audio[:10] = SOUNDS[0].reshape(10, 32)
    audio[10 - frames : 10] *= up[::-1, None]
    tail = SOUNDS[1].reshape(10, 32).copy()
    tail[:frames] *= up[:, None]
    audio[10 - frames :] += tail
    joined = crossfade(
        encoder(SOUNDS[0]),
        encoder(SOUNDS[1]),
        frames,
        shape=shape,
        origin=origin,  # type: ignore[arg-type]
    )
    assert joined.shape == (5, total)
    assert np.allclose(joined, encoder(audio.ravel()), atol=1e-5)


@pytest.mark.parametrize("offset", [-15, -10, -4, 0, 3, 20, 30, 31])
def test_fit_with_an_offset_is_a_shift_in_the_origin(offset: int) -> None:
    latent = np.random.default_rng(1).standard_normal((5, 10)).astype(np.float16)
    expected = ORIGIN.of_length(30)
    for frame in range(10):
        if 0 <= frame + offset < 30:
            expected[:, frame + offset] = latent[:, frame]
    assert np.array_equal(fit(latent, 30, offset=offset, origin=ORIGIN), expected)
    zeros = fit(latent, 30, offset=offset, origin=None)
    assert np.count_nonzero(zeros.any(axis=0)) == max(0, min(10, 10 + offset, 30 - offset))


@given(frames=st.integers(1, 40))
def test_fit_continues_by_the_origin(frames: int) -> None:
    latent = affine(SOUNDS[0])
    fitted = fit(latent, frames, origin=ORIGIN)
    assert fitted.shape == (5, frames)
    kept = min(10, frames)
    assert np.array_equal(fitted[:, :kept], latent[:, :kept])
    assert np.array_equal(fitted[:, kept:], ORIGIN.of_length(frames)[:, kept:])
    assert not fit(latent, frames, origin=None)[:, 10:].any()


def test_of_means_and_deviations_the_variances_add_up() -> None:
    deviations = np.abs(RANDOM.standard_normal((3, 5, 10))).astype(np.float32)
    latents = [np.concatenate([affine(s), d]) for s, d in zip(SOUNDS, deviations, strict=True)]
    silence = np.concatenate([ORIGIN.frames, np.full((5, 10), 0.1, np.float32)])
    gains = [0.5, -2.0, 1.0]
    mixed = mix(latents, gains, origin=Origin(silence, deviations=5))
    assert np.allclose(mixed[:5], affine(np.array(gains) @ SOUNDS), atol=1e-4)
    drawn = sum(g**2 * d**2 for g, d in zip(gains, deviations, strict=True))
    assert np.allclose(mixed[5:] ** 2, drawn, atol=1e-4)


CARD = Linearity(homogeneity=0.1, homogeneity_raw=0.6, additivity=0.3, additivity_raw=0.9)


def test_a_poor_operation_warns_the_caller() -> None:
    origin = replace(ORIGIN, linearity=CARD)
    one, other = affine(SOUNDS[0]), affine(SOUNDS[1])
    with pytest.warns(LinearityWarning, match="Adding latents is poor.*0.30") as caught:
        mix([one, other], origin=origin)
    assert caught[0].filename == __file__
    with pytest.warns(LinearityWarning, match="Adding") as caught:
        subtract(one, other, origin=origin)
    assert caught[0].filename == __file__
    with pytest.warns(LinearityWarning, match="Scaling a latent is poor.*0.60") as caught:
        gain(one, 0.5, origin=origin.raw())
    assert caught[0].filename == __file__
    for warned in (
        lambda: crossfade(one, other, 3, origin=origin),
        lambda: mixup(one, other, 0.5, origin=origin),
    ):
        with pytest.warns(LinearityWarning, match="Adding") as caught:
            warned()
        line = warned.__code__.co_firstlineno
        assert {(each.filename, each.lineno) for each in caught} == {(__file__, line)}
    measured = replace(ORIGIN, linearity=replace(CARD, removal=3.2, removal_raw=20.0))
    with pytest.warns(LinearityWarning) as caught:  # each operation has its own metric
        subtract(one, other, origin=measured)
    assert [str(one.message) for one in caught] == [
        "Subtracting latents is poor for this model: the SI-SDR measured on the store's audio is "
        "3.2 dB (limit 12)."
    ]
    with pytest.warns(LinearityWarning) as caught:
        mix([one, other, one], [1.0, 1.0, -1.0], origin=measured)
    assert [str(one.message).split()[0] for one in caught] == ["Adding", "Subtracting"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subtract(one, other, origin=measured.raw())  # good in the raw form
        gain(one, 0.5, origin=origin)  # good with the origin
        ducked = np.repeat([0.0, -1.0], 5)  # takes away, and never adds
        removable = replace(ORIGIN, linearity=replace(CARD, removal=20.0))
        mix([one, other], [1.0, ducked], origin=removable)
        mix([one, other], [1.0, 0.0], origin=origin)  # nothing is added
        mix([one, other], origin=ORIGIN)  # never measured


def test_the_raw_form_is_an_origin_of_zeros() -> None:
    one = affine(SOUNDS[0])
    assert np.array_equal(gain(one, 0.5, origin=ORIGIN.raw()), gain(one, 0.5, origin=None))


CODES = replace(ORIGIN, codes=True)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: mix([], origin=None), "at least one latent"),
        (lambda: mix([C, C], [1.0], origin=None), "1 gains given for 2 latents"),
        (lambda: mix([C, C[:, :4]], origin=None), r"(5, 4), (5, 10)"),
        (lambda: gain(C[:3], 0.5, origin=ORIGIN), "5 channels and the latents 3"),
        (lambda: gain(C, 0.5, origin=CODES), "are codes"),
        (lambda: subtract(C, C, origin=CODES.raw()), "are codes"),
        (lambda: gain(np.ones((5, 10), np.int64), 2.0, origin=None), "int64 are codes"),
        (lambda: gain(C, np.ones(9), origin=None), "has shape (9,) but the latent has 10 frames"),
        (lambda: gain(C[None], np.ones(10), origin=None), "overlapping chunks"),
        (lambda: mixup(C, C, 1.5, origin=None), "must be in 0..1"),
        (lambda: fade(C, 11, origin=None), "fade of 11 frames does not fit"),
        (lambda: fade(C, 1, shape="round", origin=None), "linear or power"),  # type: ignore[arg-type]
        (lambda: crossfade(C, C, 11, origin=None), "crossfade of 11 frames"),
        (lambda: crossfade(C, C[:3], 2, origin=None), "5 and 3 channels"),
        (lambda: crossfade(C[None], C[None], 2, origin=None), "cannot be crossfaded"),
        (lambda: fit(C[None], 3, origin=None), "cannot be changed"),
        (lambda: fit(C[:3], 30, origin=ORIGIN), "5 channels and the latents 3"),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    wrong: Callable[[], object], says: str, one_sentence: Callable[[BaseException], str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        wrong()
    assert says in one_sentence(caught.value)


@pytest.mark.parametrize("gain", [float("nan"), float("inf"), 1e300, None, 1j])
def test_gains_are_finite_numbers(gain: object) -> None:
    latents = [np.ones((4, 8), np.float32)] * 2
    with pytest.raises(ConfigError, match="A gain"):
        mix(latents, [1.0, gain], origin=None)  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("origin", [ORIGIN, None])
def test_tensors_are_taken_as_arrays_are(dtype: torch.dtype, origin: Origin | None) -> None:
    a, b = (torch.from_numpy(affine(sound)).to(dtype).requires_grad_() for sound in SOUNDS[:2])
    x, y = (one.detach().float().numpy() for one in (a, b))
    curve = torch.linspace(0, 1, 10, requires_grad=True)
    line = curve.detach().numpy()
    pairs = [
        (mix([a, b], [1.0, 0.5], origin=origin), mix([x, y], [1.0, 0.5], origin=origin)),
        (mix([a, y], [curve, 0.5], origin=origin), mix([x, y], [line, 0.5], origin=origin)),
        (
            mix(torch.stack([a, b]), torch.tensor([1, 0.5]), origin=origin),
            mix([x, y], [1.0, 0.5], origin=origin),
        ),
        (gain(a, curve, origin=origin), gain(x, line, origin=origin)),
        (subtract(a, b, origin=origin), subtract(x, y, origin=origin)),
        (mixup(a, b, curve, origin=origin), mixup(x, y, line, origin=origin)),
        (fade(a, 2, 3, origin=origin), fade(x, 2, 3, origin=origin)),
        (crossfade(a, b, 4, origin=origin), crossfade(x, y, 4, origin=origin)),
        (fit(a, 14, origin=origin), fit(x, 14, origin=origin)),
    ]
    for found, wanted in pairs:
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float32
        assert np.array_equal(found, wanted)


def test_latents_can_be_stacked() -> None:
    latents = [affine(sound) for sound in SOUNDS]
    for gains in (None, [1.0, 0.5, -2.0], np.array([1.0, 0.5, -2.0])):
        wanted = mix(latents, gains, origin=ORIGIN)  # type: ignore[arg-type]
        assert np.array_equal(mix(np.stack(latents), gains, origin=ORIGIN), wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (np.zeros((0, 5, 10), np.float32), "at least one latent"),
        (torch.zeros(0, 5, 10), "at least one latent"),
        (np.zeros((5, 10), np.float32), "not a latent"),
        ([torch.zeros(10)], "not a latent"),
        ([torch.zeros(5, 10, dtype=torch.int64)], "are codes"),
    ],
)
def test_tensors_and_arrays_that_are_no_latents(
    latents: Any, message: str, one_sentence: Callable[[BaseException], str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        mix(latents, origin=ORIGIN)
    assert message in one_sentence(caught.value)
