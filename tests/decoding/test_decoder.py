"""Latents back to audio, window by window: the windows leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from latentmill.decoding.decoder import (
    LatentSource,
    decode_blocks,
    decode_latent,
    decode_latents,
)
from latentmill.encoding.chunks import Chunker, Chunking, Stitcher
from latentmill.errors import ConfigError, ModelError
from latentmill.models.base import Autoencoder, ModelSpec
from latentmill.models.families import mdct
from latentmill.record import DTYPES, Latent
from support.small_memory import SmallMemory

MODEL = mdct.build(hop=16, sample_rate=1600).load("cpu")


def encoded(audio: np.ndarray, chunking: Chunking, dtype: str = "float32") -> Latent:
    """What the mill stores of audio `[C, T]`."""
    chunker = Chunker(MODEL.spec, chunking)
    stitcher = Stitcher(chunking, DTYPES[dtype])
    for chunk in [*chunker.push(audio), *chunker.finish()]:
        stitcher.add(chunk.frame, MODEL.encode(torch.from_numpy(chunk.audio[None]))[0].numpy())
    return stitcher.finish()


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(3).uniform(-1, 1, (1, samples)).astype(np.float32)


def snr_db(signal: np.ndarray, other: np.ndarray) -> float:
    power = np.square(signal, dtype=np.float64).sum()
    return float(10 * np.log10(power / np.square(signal - other, dtype=np.float64).sum()))


CHUNKINGS = [
    Chunking.for_model(MODEL.spec, seconds=0.7),
    Chunking.for_model(MODEL.spec, seconds=0.1, overlap=0.5),
    Chunking.for_model(MODEL.spec, seconds=0.5, stitch="none"),
    Chunking.for_model(MODEL.spec, seconds=0.3, stitch="none", overlap=0.5),
    Chunking.for_model(MODEL.spec, seconds=0.3, stitch="none", overlap=0.0),
]


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_batches_are_halved_if_the_memory_is_too_small(chunking: Chunking) -> None:
    latent = encoded(noise(20_011), chunking)
    model = SmallMemory(MODEL, 2)
    audio = decode_latent(model, latent, 20_011, chunking, batch_size=8)
    assert max(model.sizes) > 2
    assert np.abs(audio - decode_latent(MODEL, latent, 20_011, chunking)).max() < 1e-5


def test_a_window_that_does_not_fit_into_the_memory(
    one_sentence: Callable[[BaseException], str],
) -> None:
    latent = encoded(noise(20_011), CHUNKINGS[0])
    with pytest.raises(ConfigError) as caught:
        decode_latent(SmallMemory(MODEL, 0), latent, 20_011, CHUNKINGS[0], batch_size=8)
    assert "use --device cpu" in one_sentence(caught.value)


@pytest.mark.parametrize(("dtype", "least"), [("float32", 100), ("float16", 60)])
@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_a_long_item_comes_back_whole(chunking: Chunking, dtype: str, least: float) -> None:
    audio = noise(20_011)
    decoded = decode_latent(MODEL, encoded(audio, chunking, dtype), 20_011, chunking)
    assert decoded.dtype == np.float32
    assert decoded.shape == audio.shape
    assert snr_db(audio, decoded) > least


@pytest.mark.parametrize("chunking", CHUNKINGS)
@given(samples=st.integers(1, 4000))
@example(samples=1)
@example(samples=16)
@example(samples=17)
@example(samples=1120)
def test_every_length_comes_back_exactly(chunking: Chunking, samples: int) -> None:
    audio = noise(samples)
    decoded = decode_latent(MODEL, encoded(audio, chunking), samples, chunking)
    assert decoded.shape == (1, samples)
    assert np.abs(decoded - audio).max() < 1e-4


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_the_batch_size_and_the_length_asked_for_change_nothing(chunking: Chunking) -> None:
    latent = encoded(noise(7001), chunking)
    whole = decode_latent(MODEL, latent, 7001, chunking)
    for batch_size in (2, 5, 100):
        batched = decode_latent(MODEL, latent, 7001, chunking, batch_size=batch_size)
        assert np.abs(batched - whole).max() < 1e-6
    for samples in (0, 1, 500, 1120, 6999):
        part = decode_latent(MODEL, latent, samples, chunking)
        assert part.shape == (1, samples)
        assert np.abs(part - whole[:, :samples]).max(initial=0) < 1e-4


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_more_samples_than_the_latent_holds_are_refused(
    chunking: Chunking, one_sentence: Callable[[BaseException], str]
) -> None:
    latent = encoded(noise(5000), chunking)
    with pytest.raises(ConfigError) as caught:
        decode_latent(MODEL, latent, 6000, chunking)
    assert "6000" in one_sentence(caught.value)


class Clock:
    """A decoder that plays each sample's own place on the item's time line."""

    def __init__(self, spec: ModelSpec, value: float | None = None, margin: int = 0) -> None:
        self.spec = spec
        self.value = value
        self.margin = margin  # samples at both ends of a window that are wrong
        self.seeds: set[int] = set()

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def decode(
        self,
        latents: torch.Tensor,
        num_samples: int,
        *,
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> torch.Tensor:
        assert positions is not None
        assert len(positions) == len(latents)
        assert num_samples <= self.spec.samples(latents.shape[2])
        self.seeds.add(seed)
        starts = torch.tensor(positions, dtype=torch.float32)[:, None, None] * self.spec.hop
        audio = starts + torch.arange(num_samples)
        audio = audio if self.value is None else torch.full_like(audio, self.value)
        if self.margin:
            audio[..., : self.margin] = audio[..., -self.margin :] = 50.0
        return audio


SPECS = [
    replace(MODEL.spec, overhang=0),
    replace(MODEL.spec, overhang=6, sample_multiple=2),
    replace(MODEL.spec, overhang=-16),
]


@pytest.mark.parametrize("spec", SPECS, ids=["padded", "overhang", "mdct"])
@given(
    frames=st.integers(4, 40),
    shared=st.integers(2, 20),
    total=st.integers(1, 300),
    batch_size=st.integers(1, 4),
)
def test_windows_lie_where_they_belong(
    spec: ModelSpec, frames: int, shared: int, total: int, batch_size: int
) -> None:
    shared = min(shared, frames // 2)
    chunking = Chunking("crossfade", spec.samples(frames), (frames - shared) * 16, shared)
    samples = spec.samples(max(2, total))
    latent = np.zeros((16, max(2, total)), np.float16)
    clock: Autoencoder = Clock(spec)
    audio = decode_latent(clock, latent, samples, chunking, seed=7, batch_size=batch_size)
    assert np.abs(audio - np.arange(samples)).max() <= 1e-3
    assert clock.seeds == {7}  # type: ignore[attr-defined]
    constant = decode_latent(Clock(spec, 0.3), latent, samples, chunking)
    assert np.array_equal(constant, np.full_like(constant, 0.3))


@pytest.mark.parametrize("total", [41, 60, 99])
def test_what_is_wrong_at_the_edges_of_windows_is_not_heard(total: int) -> None:
    spec = SPECS[0]
    chunking = Chunking("crossfade", spec.samples(20), 12 * 16, 8)  # windows share 128 samples
    latent, samples = np.zeros((16, total), np.float16), total * 16
    audio = decode_latent(Clock(spec, 0.5, margin=32), latent, samples, chunking)
    assert np.abs(audio[:, 32:-32] - 0.5).max() < 1e-4


@given(
    step=st.integers(4, 8).map(lambda n: n * 16),  # positions are whole frames
    chunks=st.integers(1, 9),
    cut=st.integers(0, 63),
)
def test_unstitched_windows_lie_where_they_belong(step: int, chunks: int, cut: int) -> None:
    spec = SPECS[0]
    chunking = Chunking("none", 128, step, 0)
    samples = (chunks - 1) * step + 128 - cut
    latent = np.zeros((chunks, 16, 8), np.float16)
    audio = decode_latent(Clock(spec), latent, samples, chunking, batch_size=2)
    assert np.abs(audio - np.arange(samples)).max() <= 1e-3


@pytest.mark.parametrize(("size", "shared"), [(40, 4), (12, 3)])
def test_windows_share_frames_even_where_chunks_do_not(size: int, shared: int) -> None:
    """A quarter of a window, and at most four frames, so that a decoder's edges are blended."""
    chunking = Chunking("trim", size * 16 - 16, size * 16 - 16, 0)  # overhang is -16
    assert MODEL.spec.frames(chunking.samples) == size
    latent = encoded(noise(16 * 500), chunking)
    reads: list[tuple[int, int]] = []

    def read(start: int, count: int) -> Latent:
        reads.append((start, count))
        return latent[:, start : start + count]

    source = LatentSource(latent.shape, read)
    for _ in decode_blocks(MODEL, source, 16 * 499, chunking):
        pass
    step = size - shared
    last = latent.shape[1] - size
    assert reads == [(start, size) for start in [*range(0, last, step), last]]


class Steps(Clock):
    """A decoder that plays the number of the window's first frame."""

    def decode(
        self,
        latents: torch.Tensor,
        num_samples: int,
        *,
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> torch.Tensor:
        assert positions is not None
        return torch.tensor(positions)[:, None, None].float().expand(-1, 1, num_samples)


@pytest.mark.parametrize(("skew", "begin", "width"), [(0, 32, 64), (2, 56, 48), (-2, 24, 48)])
def test_a_fade_spans_half_of_what_is_right_in_both_windows(
    skew: int, begin: int, width: int
) -> None:
    """They share 128 samples; the context on the left is longer by 2 frames of 16 samples."""
    chunking = Chunking("trim", 20 * 16, 12 * 16, 8, skew)
    latent = np.zeros((16, 32), np.float32)
    audio = decode_latent(Steps(SPECS[0]), latent, 32 * 16, chunking)[0]
    fade = np.concatenate([np.zeros(begin), np.linspace(0, 1, width), np.ones(128 - begin - width)])
    wanted = np.concatenate([np.zeros(12 * 16), 12 * fade, np.full(12 * 16, 12)])
    assert np.allclose(audio, wanted, atol=1e-5)


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_short_last_chunk_is_decoded_at_its_own_length(chunks: int) -> None:
    lengths: list[tuple[int, int]] = []

    class Short(Clock):
        def decode(self, latents: torch.Tensor, num_samples: int, **options: Any) -> torch.Tensor:
            lengths.extend((latents.shape[2], num_samples) for _ in latents)
            return super().decode(latents, num_samples, **options)

    def read(start: int, count: int) -> Latent:
        assert start + count <= chunks
        return np.zeros((count, 16, 8), np.float32)

    spec = replace(SPECS[0], short_last_chunk=True)
    chunking = Chunking("none", 128, 96, 0)
    samples = (chunks - 1) * 96 + 60
    audio = decode_latent(Short(spec), LatentSource((chunks, 16, 8), read), samples, chunking)
    assert np.array_equal(audio[0], np.arange(samples))
    if chunks > 1:
        assert lengths == [(8, 128)] * (chunks - 1) + [(4, 60)]


@pytest.mark.parametrize("samples", [97, 111, 112, 127, 128, 129, 224])
def test_a_length_that_ends_in_the_overlap_with_a_short_last_chunk(samples: int) -> None:
    spec = replace(SPECS[0], short_last_chunk=True)
    latent = np.zeros((2, 16, 8), np.float32)
    audio = decode_latent(Clock(spec), latent, samples, Chunking("none", 128, 96, 0))
    assert np.array_equal(audio[0], np.arange(samples))


@pytest.mark.parametrize(
    ("chunks", "frames", "samples"), [(1, 8, 120), (1, 5, 80), (2, 8, 216), (3, 8, 312)]
)
def test_without_a_length_all_samples_of_the_chunks_are_decoded(
    chunks: int, frames: int, samples: int
) -> None:
    """Chunks of 120 samples have 8 frames, which are enough for 128."""
    chunking = Chunking("none", 120, 96, 0)
    latent = np.zeros((chunks, 16, frames), np.float32)
    audio = decode_latents(Clock(SPECS[0]), latent, None, chunking)
    assert np.array_equal(audio, np.arange(samples)[None])
    blocks = list(decode_blocks(Clock(SPECS[0]), latent, None, chunking))
    assert np.array_equal(np.concatenate(blocks, axis=1), audio)
    batch = decode_latents(Clock(SPECS[0]), np.stack([latent, latent]), None, chunking)
    assert np.array_equal(batch, np.stack([audio, audio]))


@pytest.mark.parametrize(
    "chunking", [Chunking("none", 96, 128, 0), Chunking("trim", 300, 200, 4)], ids=["gap", "end"]
)
def test_chunks_that_do_not_cover_the_audio(
    chunking: Chunking, one_sentence: Callable[[BaseException], str]
) -> None:
    latent = np.zeros((2, 16, 6) if chunking.stitch == "none" else (16, 40), np.float32)
    with pytest.raises(ConfigError) as caught:
        decode_latents(Clock(SPECS[0]), latent, None, chunking)
    assert "its dataset.json is damaged" in one_sentence(caught.value)


def test_a_model_that_decodes_too_few_samples(
    one_sentence: Callable[[BaseException], str],
) -> None:
    class TooFew(Clock):
        def decode(self, latents: torch.Tensor, num_samples: int, **options: Any) -> torch.Tensor:
            return super().decode(latents, num_samples, **options)[..., :-1]

    latent = np.zeros((16, 40), np.float32)
    with pytest.raises(ModelError) as caught:
        decode_latent(TooFew(SPECS[0]), latent, 640, Chunking("trim", 640, 640, 0))
    assert "audio of shape [1, 1, 639] instead of [1, 1, 640]" in one_sentence(caught.value)


@pytest.mark.parametrize(
    ("stitch", "shapes"),
    [
        ("crossfade", [(1, 16, 9), (3, 16, 9), (16,)]),
        ("none", [(16, 9), (1, 3, 16, 9), (0, 16, 9)]),
    ],
)
def test_only_one_item_is_decoded_in_blocks(
    stitch: str, shapes: list[tuple[int, ...]], one_sentence: Callable[[BaseException], str]
) -> None:
    chunking = Chunking(stitch, 128, 96, 2 if stitch == "crossfade" else 0)  # type: ignore[arg-type]
    for shape in shapes:
        latent = np.zeros(shape, np.float32)
        source = LatentSource(shape, lambda start, count: np.zeros((16, 9), np.float32))
        for one in (latent, source, torch.from_numpy(latent)):
            with pytest.raises(ConfigError) as caught:
                decode_blocks(MODEL, one, None, chunking)
            assert "decode a batch with decode_latent" in one_sentence(caught.value)


def test_blocks_of_a_tensor_are_those_of_the_array() -> None:
    latent = np.random.default_rng(0).standard_normal((16, 40)).astype(np.float32)
    given = torch.from_numpy(latent).requires_grad_()
    blocks = [list(decode_blocks(MODEL, one, None, CHUNKINGS[1])) for one in (latent, given)]
    assert np.array_equal(*(np.concatenate(one, axis=1) for one in blocks))


@pytest.mark.parametrize(
    ("chunking", "shape", "sizes"),
    [
        (Chunking("crossfade", 128, 96, 2), (5, 16, 8), [4, 1]),  # one window each
        (Chunking("crossfade", 128, 96, 2), (3, 16, 20), [4, 4, 1]),  # three windows each
        (Chunking("none", 128, 96, 0), (3, 2, 16, 9), [4, 2]),
    ],
)
def test_items_of_a_batch_share_forward_passes(
    chunking: Chunking, shape: tuple[int, ...], sizes: list[int]
) -> None:
    found: list[int] = []

    class Counting(Clock):
        def decode(self, latents: torch.Tensor, num_samples: int, **options: Any) -> torch.Tensor:
            found.append(len(latents))
            return MODEL.decode(latents, num_samples, **options)

    batch = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    model = Counting(MODEL.spec)
    audio = decode_latents(model, batch, None, chunking, batch_size=4)
    assert found == sizes
    alone = [decode_latent(MODEL, one, None, chunking) for one in batch]
    assert np.abs(audio - np.stack(alone)).max() < 1e-6


def test_short_last_chunks_of_a_batch_have_their_own_length() -> None:
    spec = replace(SPECS[0], short_last_chunk=True)
    batch = np.zeros((3, 2, 16, 8), np.float32)
    chunking = Chunking("none", 128, 96, 0)
    for samples in (150, 223):  # with 223, the last chunk is short, but has as many frames
        audio = decode_latents(Clock(spec), batch, samples, chunking, batch_size=4)
        assert np.array_equal(audio, np.broadcast_to(np.arange(samples), (3, 1, samples)))


@pytest.mark.parametrize("stitch", ["none", "crossfade"])
def test_latents_of_several_items_are_decoded_as_each_alone(
    stitch: str, one_sentence: Callable[[BaseException], str]
) -> None:
    chunking = Chunking(stitch, 128, 96, 2 if stitch == "crossfade" else 0)  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    one, other = (random.standard_normal((3, 16, 9)).astype(np.float32) for _ in range(2))
    if stitch == "crossfade":
        one, other = one[0], other[0]
    whole = [decode_latent(MODEL, latent, None, chunking) for latent in (one, other)]
    for batch in (np.stack([one, other]), torch.from_numpy(np.stack([one, other]))):
        assert np.array_equal(decode_latents(MODEL, batch, None, chunking), np.stack(whole))
    assert np.array_equal(decode_latents(MODEL, one, None, chunking), whole[0])
    for wrong in (one[0], one[None, None], one[:0]):
        with pytest.raises(ConfigError, match="cannot be decoded: give") as caught:
            decode_latents(MODEL, wrong, None, chunking)
        assert one_sentence(caught.value)


@pytest.mark.parametrize("batch_size", [0, -1])
@pytest.mark.parametrize("decode", [decode_latent, decode_latents, decode_blocks])
def test_a_batch_has_a_window_at_least(
    decode: Callable[..., Any], batch_size: int, one_sentence: Callable[[BaseException], str]
) -> None:
    latent = encoded(noise(2000), CHUNKINGS[0])
    given = [latent, latent[None]] if decode is decode_latents else [latent]
    for one in given:
        with pytest.raises(ConfigError, match=f"must be at least 1, not {batch_size}") as caught:
            decode(MODEL, one, None, CHUNKINGS[0], batch_size=batch_size)
        one_sentence(caught.value)
