"""The chunk grid, packing and stitching: arithmetic, for any model and any length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from latentmill.chunks import Chunk, Chunker, Chunking, Packer, Stitcher
from latentmill.errors import ConfigError
from latentmill.models import mdct
from latentmill.models.base import Context, ModelSpec, Stitch

ONE = Context(1, 1)
FLOAT16, FLOAT32 = np.dtype("<f2"), np.dtype("<f4")


def make_spec(
    hop: int,
    overhang: int,
    multiple: int,
    min_samples: int,
    context: Context | None = ONE,
) -> ModelSpec:
    return ModelSpec(
        name="toy",
        sample_rate=100,
        channels=1,
        latent_channels=2,
        hop=hop,
        overhang=overhang,
        sample_multiple=multiple,
        min_samples=min_samples,
        context=context,
        stitch="crossfade",
        chunk_frames=8,
        overlap_frames=2,
        batch_size={"cpu": 2},
        scale_factor=1.0,
        stochastic_decoder=False,
    )


@dataclass(frozen=True)
class Case:
    spec: ModelSpec
    chunking: Chunking
    total: int

    @property
    def source(self) -> np.ndarray:
        return np.arange(1, self.total + 1, dtype=np.float32)[None]

    def chunks(self, sizes: list[int] | None = None) -> list[Chunk]:
        chunker = Chunker(self.spec, self.chunking)
        blocks = np.split(self.source, np.cumsum(sizes or []), axis=1)
        chunks = [chunk for block in blocks for chunk in chunker.push(block)]
        return [*chunks, *chunker.finish()]


def decoded(spec: ModelSpec, samples: int) -> int:
    """Samples that come back of a chunk."""
    return spec.samples(spec.frames(samples - samples % spec.sample_multiple))


@st.composite
def cases(draw: st.DrawFn, stitches: tuple[str, ...] = ("trim", "crossfade", "none")) -> Case:
    """Any model whose chunk lengths are multiples of what it takes, any chunking, any length."""
    multiple = draw(st.integers(1, 5))
    hop = multiple * draw(st.integers(1, 5))
    overhang = multiple * draw(st.integers(-hop // multiple, 4))
    spec = make_spec(hop, overhang, multiple, multiple * draw(st.integers(1, 4)))
    least = max(2, spec.frames(spec.min_samples) + 1)
    frames = draw(st.integers(least, least + 9))
    samples = spec.samples(frames)
    stitch = draw(st.sampled_from(stitches))
    if stitch == "none":  # also lengths of which the model takes only a part
        parts = [(n, n - n % multiple) for n in range(samples - hop + 1, samples + 1)]
        fitting = [n for n, part in parts if part >= spec.min_samples]
        samples = draw(st.sampled_from([n for n in fitting if decoded(spec, n) >= n]))
        chunking = Chunking("none", samples, samples - draw(st.integers(0, samples // 2)), 0)
    else:
        gap = 1 if overhang < 0 else 0
        shared = draw(st.integers(gap, max(gap, frames // 2)))
        chunking = Chunking(stitch, samples, (frames - shared) * hop, shared)  # type: ignore[arg-type]
    return Case(spec, chunking, draw(st.integers(1, 6 * samples)))


@given(cases(), st.lists(st.integers(0, 40), max_size=12))
def test_chunks_do_not_depend_on_how_the_audio_is_pushed(case: Case, sizes: list[int]) -> None:
    whole, pieces = case.chunks(), case.chunks(sizes)
    assert [chunk.frame for chunk in pieces] == [chunk.frame for chunk in whole]
    for piece, chunk in zip(pieces, whole, strict=True):
        assert np.array_equal(piece.audio, chunk.audio)


def check_grid(case: Case) -> None:
    spec, chunking, chunks = case.spec, case.chunking, case.chunks()
    padded = np.pad(case.source, ((0, 0), (0, 20 * chunking.samples)))
    starts = [chunk.frame * spec.hop for chunk in chunks]
    for start, chunk in zip(starts, chunks, strict=True):
        assert np.array_equal(chunk.audio, padded[:, start : start + chunk.audio.shape[1]])
        assert chunk.audio.flags.owndata
    frames = spec.frames(spec.padded(case.total))
    if len(chunks) == 1:
        assert starts == [0]
        assert chunks[0].audio.shape[1] == spec.padded(case.total)
        return
    assert {chunk.audio.shape[1] for chunk in chunks} == {chunking.samples}
    assert starts[:-1] == [index * chunking.step for index in range(len(chunks) - 1)]
    assert 0 < starts[-1] - starts[-2] <= chunking.step <= chunking.samples
    assert starts[-1] + chunking.samples == spec.samples(frames)
    assert spec.samples(frames) - case.total < spec.hop + spec.sample_multiple
    assert starts[-1] // spec.hop + spec.frames(chunking.samples) == frames


@given(cases(("trim", "crossfade")))
def test_chunks_lie_on_the_grid_and_end_with_the_audio(case: Case) -> None:
    check_grid(case)


LINCAE = make_spec(hop=4096, overhang=1536, multiple=512, min_samples=2048)
MDCT = make_spec(hop=512, overhang=-512, multiple=512, min_samples=512)
PADDED = make_spec(hop=2048, overhang=0, multiple=2048, min_samples=2048)


@pytest.mark.parametrize("spec", [LINCAE, MDCT, PADDED], ids=["lin-cae", "mdct", "padded"])
def test_lengths_around_every_border(spec: ModelSpec) -> None:
    chunking = Chunking("crossfade", spec.samples(8), 6 * spec.hop, 2)
    borders = [0, spec.min_samples, spec.hop, chunking.samples]
    borders += [chunking.samples + n * chunking.step for n in (1, 2)]
    for border in borders:
        for total in {max(1, border + offset) for offset in (-spec.hop, -1, 0, 1, spec.hop)}:
            check_grid(Case(spec, chunking, total))
    on_a_border = Case(spec, chunking, chunking.samples + chunking.step)
    assert len(on_a_border.chunks()) == 2
    assert len(Case(spec, chunking, on_a_border.total + 1).chunks()) == 3


@given(cases(("none",)))
def test_unstitched_chunks_step_evenly_and_are_as_few_as_cover_the_audio(case: Case) -> None:
    chunking, chunks = case.chunking, case.chunks()
    padded = np.pad(case.source, ((0, 0), (0, 2 * chunking.samples)))
    for index, chunk in enumerate(chunks):
        start = index * chunking.step
        assert np.array_equal(chunk.audio, padded[:, start : start + chunk.audio.shape[1]])
    if len(chunks) == 1:
        assert case.total <= chunking.samples
    else:
        model_samples = chunking.model_samples(case.spec)
        assert {chunk.audio.shape[1] for chunk in chunks} == {model_samples}
        assert chunking.samples - case.spec.sample_multiple < model_samples <= chunking.samples
        covered_before = (len(chunks) - 2) * chunking.step + chunking.samples
        assert covered_before < case.total <= covered_before + chunking.step


@pytest.mark.parametrize("spec", [LINCAE, MDCT, PADDED], ids=["lin-cae", "mdct", "padded"])
@given(
    seconds=st.none() | st.floats(1, 3000),
    overlap=st.none() | st.floats(0, 0.5),
    stitch=st.sampled_from([None, "trim", "crossfade", "none"]),
)
def test_a_chunking_for_a_model_has_lengths_that_it_takes_and_no_gaps(
    spec: ModelSpec, seconds: float | None, overlap: float | None, stitch: str | None
) -> None:
    try:
        chunking = Chunking.for_model(spec, stitch=stitch, seconds=seconds, overlap=overlap)  # type: ignore[arg-type]
    except ConfigError:
        return
    assert spec.padded(chunking.samples) == chunking.samples
    assert 0 < chunking.step <= chunking.samples
    if seconds is not None:
        assert chunking.samples >= min(seconds * spec.sample_rate - 1, chunking.samples)
    if chunking.stitch != "none":
        assert chunking.step % spec.hop == 0
        assert chunking.overlap == spec.frames(chunking.samples) - chunking.step // spec.hop


@pytest.mark.parametrize(
    ("spec", "wanted", "says"),
    [
        (PADDED, {"seconds": 100.0, "overlap": 0.6}, "overlap of 0.6"),
        (PADDED, {"seconds": 100.0, "overlap": float("nan")}, "overlap of nan"),
        (make_spec(512, 0, 512, 512, None), {"stitch": "trim"}, "stitch crossfade"),
        (MDCT, {"stitch": "trim", "overlap": 0.1}, "share 2 latent frames"),
        (MDCT, {"stitch": "crossfade", "overlap": 0.0}, "share 1 latent frames"),
        (make_spec(10, 0, 10, 100), {"seconds": 0.2}, "at least 2.2 s"),
    ],
)
def test_what_no_chunking_can_be_is_refused_in_one_sentence(
    spec: ModelSpec,
    wanted: dict[str, object],
    says: str,
    one_sentence: Callable[[BaseException], str],
) -> None:
    with pytest.raises(ConfigError) as caught:
        Chunking.for_model(spec, **wanted)  # type: ignore[arg-type]
    assert says in one_sentence(caught.value)


def test_the_advice_on_a_short_chunk_holds() -> None:
    spec = make_spec(10, 0, 10, 100)
    with pytest.raises(ConfigError, match=r"0\.2 s is too short.* 2\.2 s"):
        Chunking.for_model(spec, stitch="crossfade", seconds=0.2)
    assert Chunking.for_model(spec, stitch="crossfade", seconds=2.2).samples == 220


@pytest.mark.parametrize("spec", [LINCAE, MDCT, PADDED], ids=["lin-cae", "mdct", "padded"])
@given(samples=st.integers(1, 60_000), stitch=st.sampled_from(["none", "crossfade"]))
@example(samples=441_000, stitch="none")
@example(samples=47_103, stitch="none")
def test_a_chunk_in_samples_decodes_whole_or_the_nearest_that_does_is_named(
    spec: ModelSpec, samples: int, stitch: Stitch
) -> None:
    def whole(length: int) -> bool:
        spare = decoded(spec, length) - length
        enough = length - length % spec.sample_multiple >= spec.min_samples
        return enough and (spare >= 0 if stitch == "none" else spare == 0)

    wanted = {"stitch": stitch, "overlap": 0.25}
    if whole(samples):
        try:
            chunking = Chunking.for_model(spec, samples=samples, **wanted)  # type: ignore[arg-type]
        except ConfigError as error:
            assert "raise the overlap" in str(error)
            return
        assert chunking.samples == samples
        assert stitch != "none" or chunking.step == samples - int(samples * 0.25)
        return
    with pytest.raises(ConfigError, match="do not decode whole") as caught:
        Chunking.for_model(spec, samples=samples, **wanted)  # type: ignore[arg-type]
    nearest = int(str(caught.value).split()[-1].rstrip("."))
    assert whole(nearest)
    away = abs(nearest - samples)
    assert not any(whole(n) for n in range(samples - away + 1, samples + away))


def test_the_readme_s_chunk_of_linear_cae_is_taken_and_one_that_drifts_is_not(
    one_sentence: Callable[[BaseException], str],
) -> None:
    chunking = Chunking.for_model(LINCAE, stitch="none", samples=441_000, overlap=0.25)
    assert chunking == Chunking("none", 441_000, 330_750, 0)
    assert chunking.model_samples(LINCAE) == 440_832
    with pytest.raises(ConfigError) as caught:
        Chunking.for_model(LINCAE, stitch="none", samples=47_103)
    assert one_sentence(caught.value).endswith("the nearest length that does is 47104.")
    with pytest.raises(ConfigError, match="not both"):
        Chunking.for_model(LINCAE, samples=441_000, seconds=10)


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
