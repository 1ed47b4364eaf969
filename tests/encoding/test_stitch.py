"""Packing and stitching: chunks of many items into batches, latents of chunks into one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from latentmill.encoding.batches import Packer
from latentmill.encoding.chunks import Chunk, Chunking, Stitcher
from latentmill.errors import ConfigError
from latentmill.models.base import Context
from latentmill.models.families import mdct
from support.chunk_cases import PADDED, Case, cases, make_spec

FLOAT16, FLOAT32 = np.dtype("<f2"), np.dtype("<f4")


def stitched(case: Case, latents: list[np.ndarray], dtype: np.dtype = FLOAT32) -> Stitcher:
    stitcher = Stitcher(case.chunking, dtype)
    for chunk, latent in zip(case.chunks(), latents, strict=True):
        stitcher.add(chunk.frame, latent)
    return stitcher


def random_latents(case: Case, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = [(2, case.spec.frames(chunk.audio.shape[1])) for chunk in case.chunks()]
    return [random.random(shape, dtype=np.float32) for shape in shapes]


MODEL = mdct.build(hop=8, sample_rate=400).load("cpu")


@given(total=st.integers(1, 2000), frames=st.integers(4, 30), shared=st.integers(2, 9))
@example(total=8 * 29, frames=30, shared=2)
@example(total=8 * 29 + 1, frames=30, shared=2)
def test_trimmed_chunks_equal_the_whole_item(total: int, frames: int, shared: int) -> None:
    shared = max(2, min(shared, frames // 2))
    spec = MODEL.spec
    case = Case(spec, Chunking("trim", spec.samples(frames), (frames - shared) * 8, shared), total)
    encoded = [MODEL.encode(torch.from_numpy(chunk.audio[None])) for chunk in case.chunks()]
    latent = stitched(case, [one[0].numpy() for one in encoded]).finish()
    whole = torch.zeros(1, 1, spec.padded(total))
    whole[..., :total] = torch.from_numpy(case.source)
    wanted = MODEL.encode(whole)[0].numpy()
    assert latent.shape == wanted.shape
    assert np.abs(latent - wanted).max() <= 1e-6 * np.abs(wanted).max()


def see(audio: np.ndarray, hop: int, context: Context) -> np.ndarray:
    """A latent `[1, Z]` whose frame n is a weighted sum of the samples of the frames n - left to
    n + right; beyond the audio there are zeros."""
    sums = audio.reshape(-1, hop).sum(axis=1, dtype=np.float64)
    padded = np.pad(sums, context)
    reach = sum(context) + 1
    weights = 1.0 / np.arange(1, reach + 1)
    return np.array([[padded[n : n + reach] @ weights for n in range(len(sums))]], np.float32)


@given(
    left=st.integers(0, 7),
    right=st.integers(0, 7),
    spare=st.integers(0, 5),
    more=st.integers(0, 9),
    total=st.integers(1, 900),
    whole_item=st.booleans(),
)
@example(left=7, right=0, spare=0, more=0, total=400, whole_item=False)
@example(left=0, right=7, spare=0, more=0, total=400, whole_item=False)
def test_trimming_is_exact_for_any_context_on_either_side(
    left: int, right: int, spare: int, more: int, total: int, whole_item: bool
) -> None:
    """As many shared frames as both contexts together suffice, and none of them less."""
    hop, context = 4, Context(left, right)
    shared = left + right + spare
    frames = max(2 * shared, 2) + more
    spec = replace(make_spec(hop, 0, hop, hop, context), overlap_frames=shared, latent_channels=1)
    chunking = Chunking.for_model(spec, stitch="trim", samples=frames * hop)
    assert (chunking.overlap, chunking.skew) == (shared, left - right)
    if whole_item:
        total = chunking.samples + 3 * chunking.step
    case = Case(spec, chunking, total)
    latents = [see(chunk.audio, hop, context) for chunk in case.chunks()]
    padded = np.zeros((1, spec.padded(total)), np.float32)
    padded[:, :total] = case.source
    assert np.array_equal(stitched(case, latents).finish(), see(padded, hop, context))
    if shared and not spare:
        with pytest.raises(ConfigError, match=f"share {shared} latent frames"):
            Chunking.for_model(
                spec, stitch="trim", samples=frames * hop, overlap=(shared - 1) / frames
            )


@given(cases(("trim", "crossfade")), st.floats(-1e4, 1e4, width=32))
def test_a_constant_latent_stays_constant(case: Case, value: float) -> None:
    constant = [np.full_like(latent, value) for latent in random_latents(case)]
    latent = stitched(case, constant).finish()
    assert latent.shape == (2, case.spec.frames(case.spec.padded(case.total)))
    assert np.allclose(latent, value, rtol=1e-6, atol=0)


@given(cases(("trim", "crossfade")), st.integers(0, 99))
def test_stitching_is_a_convex_mix_of_the_chunks_that_hold_a_frame(case: Case, seed: int) -> None:
    latents = random_latents(case, seed)
    low = np.full((2, case.spec.frames(case.spec.padded(case.total))), np.inf, np.float32)
    high = -low
    for chunk, latent in zip(case.chunks(), latents, strict=True):
        here = slice(chunk.frame, chunk.frame + latent.shape[1])
        low[:, here] = np.minimum(low[:, here], latent)
        high[:, here] = np.maximum(high[:, here], latent)
    result = stitched(case, latents).finish()
    assert result.shape == low.shape
    assert np.all((result >= low - 1e-6) & (result <= high + 1e-6))


@given(cases(("none",)))
def test_unstitched_latents_are_the_chunks(case: Case) -> None:
    latents = random_latents(case)
    assert np.array_equal(stitched(case, latents).finish(), np.stack(latents))


@given(cases(), st.data())
def test_a_value_beyond_the_stored_dtype_is_noticed_wherever_it_is(
    case: Case, data: st.DataObject
) -> None:
    bad = data.draw(st.sampled_from([7e4, -7e4, np.inf, np.nan]))
    constant = [np.full_like(latent, bad) for latent in random_latents(case)]
    for dtype, finite in ((FLOAT16, False), (FLOAT32, bool(np.isfinite(bad)))):
        stitcher = stitched(case, constant, dtype)
        assert stitcher.finish().dtype == dtype
        assert stitcher.finite is finite
    good = stitched(case, random_latents(case), FLOAT16)
    good.finish()
    assert good.finite


def test_one_bad_frame_of_many_is_noticed() -> None:
    case = Case(PADDED, Chunking("crossfade", 8 * 2048, 6 * 2048, 2), 40 * 2048)
    count = PADDED.frames(case.total)
    for frame in range(count):
        latents = random_latents(case)
        for chunk, latent in zip(case.chunks(), latents, strict=True):
            if 0 <= frame - chunk.frame < latent.shape[1]:
                latent[1, frame - chunk.frame] = np.nan
        stitcher = stitched(case, latents)
        assert np.isnan(stitcher.finish()).sum() == 1
        assert not stitcher.finite


@pytest.mark.parametrize("hint", [0, 1, 40, 41, 10**15])
def test_the_promised_length_changes_nothing_not_even_if_it_lies(hint: int) -> None:
    case = Case(PADDED, Chunking("crossfade", 8 * 2048, 6 * 2048, 2), 40 * 2048)
    latents = random_latents(case)
    stitcher = Stitcher(case.chunking, FLOAT16, hint)
    for chunk, latent in zip(case.chunks(), latents, strict=True):
        stitcher.add(chunk.frame, latent)
    result = stitcher.finish()
    assert result.shape == (2, 40)
    assert result.T.flags.c_contiguous  # time-major in memory, as it will be stored
    assert np.array_equal(result, stitched(case, latents, FLOAT16).finish())


@given(
    lengths=st.lists(st.sampled_from([1, 3, 7, 50, 99, 100, 100, 100]), max_size=200),
    batch_size=st.integers(1, 20),
)
def test_the_packer_loses_nothing_and_keeps_each_items_order(
    lengths: list[int], batch_size: int
) -> None:
    packer = Packer(Chunking("trim", 100, 90, 2), batch_size)
    budget = 100 * batch_size
    chunks = [
        Chunk(position, np.full((1, length), position, np.float32))
        for position, length in enumerate(lengths)
    ]
    batches, seen, taken = [], 0, set()
    for position, chunk in enumerate(chunks):
        new = list(packer.add(position // 5, chunk))
        batches += new
        seen += chunk.audio.shape[1]
        taken |= {one.frame for batch in new for one in batch.chunks}
        waiting = [n for n in range(position + 1) if n not in taken]
        if waiting:  # nobody waits for long, however few share its length
            assert seen - sum(lengths[: waiting[0]]) <= 4 * budget
    batches += packer.flush()
    order = [(owner, one) for b in batches for owner, one in zip(b.owners, b.chunks, strict=True)]
    assert sorted(one.frame for _, one in order) == list(range(len(chunks)))
    assert all(owner == one.frame // 5 for owner, one in order)
    for length in set(lengths):  # an item's chunks are of one length, or it has only one
        positions = [one.frame for _, one in order if one.audio.shape[1] == length]
        assert positions == sorted(positions)
    for batch in batches:
        size, _, length = batch.audio().shape
        assert size <= max(batch_size, 16)
        assert size == 1 or size * length <= budget
    assert not list(packer.flush())


def test_a_short_item_among_long_ones_does_not_hold_them_up() -> None:
    packer = Packer(Chunking("trim", 10, 8, 2), 4)
    short, long = Chunk(0, np.zeros((1, 3), np.float32)), Chunk(0, np.zeros((1, 10), np.float32))
    batches = [*packer.add(0, short), *(b for n in range(1, 99) for b in packer.add(n, long))]
    position = next(n for n, batch in enumerate(batches) if batch.owners == (0,))
    assert position == 4


def test_chunks_of_full_length_make_full_batches() -> None:
    packer = Packer(Chunking("trim", 10, 8, 2), 4)
    audio = np.zeros((1, 10), np.float32)
    sizes = [len(b.chunks) for n in range(8) for b in packer.add(n, Chunk(0, audio))]
    assert sizes == [4, 4]
