"""The chunk grid: arithmetic, for any model and any length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from latentmill.encoding.chunks import Chunker, Chunking
from latentmill.errors import ConfigError
from latentmill.models.base import ModelSpec, Stitch
from support.chunk_cases import PADDED, Case, cases, decoded, make_spec, windows


@given(cases(), st.lists(st.integers(0, 40), max_size=12))
def test_chunks_do_not_depend_on_how_the_audio_is_pushed(case: Case, sizes: list[int]) -> None:
    whole, pieces = case.chunks(), case.chunks(sizes)
    assert [chunk.frame for chunk in pieces] == [chunk.frame for chunk in whole]
    for piece, chunk in zip(pieces, whole, strict=True):
        assert np.array_equal(piece.audio, chunk.audio)


@given(cases(), st.integers(0, 300), st.lists(st.integers(0, 40), max_size=12))
def test_chunks_do_not_depend_on_what_the_header_promises(
    case: Case, expected: int, sizes: list[int]
) -> None:
    for promised in (expected, case.total):
        chunker = Chunker(case.spec, case.chunking, promised)
        blocks = np.split(case.source, np.cumsum(sizes), axis=1)
        chunks = [chunk for block in blocks for chunk in chunker.push(block)]
        chunks += chunker.finish()
        assert [chunk.frame for chunk in chunks] == [chunk.frame for chunk in case.chunks()]
        for one, other in zip(chunks, case.chunks(), strict=True):
            assert np.array_equal(one.audio, other.audio)


@given(cases(), st.lists(st.integers(0, 40), max_size=12))
def test_interleaved_channels_give_the_same_chunks_and_are_put_apart(
    case: Case, sizes: list[int]
) -> None:
    """The level meter reads what `pushed` returns, also where a block ends in another chunk."""
    source = np.concatenate([case.source, -case.source])
    chunker = Chunker(dataclasses.replace(case.spec, channels=2), case.chunking)
    chunks = []
    for block in np.split(source, np.cumsum(sizes), axis=1):
        chunks += chunker.push(np.ascontiguousarray(block.T).T)
        apart = chunker.pushed(np.ascontiguousarray(block.T).T)
        assert np.array_equal(apart, block)
        assert all(channel.flags.c_contiguous for channel in apart)
    chunks += chunker.finish()
    for chunk, mono in zip(chunks, case.chunks(), strict=True):
        assert np.array_equal(chunk.audio, np.concatenate([mono.audio, -mono.audio]))


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


@given(windows())
def test_the_last_window_is_as_short_as_its_audio(case: Case) -> None:
    """Of frames without context, alone or several in a chunk; nothing is encoded twice."""
    chunks, size = case.chunks(), case.chunking.samples
    assert np.array_equal(np.concatenate([chunk.audio for chunk in chunks], axis=1), case.source)
    frames = [n * size // case.spec.hop for n in range(len(chunks))]
    assert [chunk.frame for chunk in chunks] == frames
    assert {chunk.audio.shape[1] for chunk in chunks[:-1]} <= {size}


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


CODES = replace(MDCT, codebook_size=16)
CAUSAL = replace(make_spec(16, 0, 16, 16), step_frames=4)


def test_codes_can_be_trimmed_and_a_chunk_of_one_step_has_a_state() -> None:
    assert Chunking.for_model(CODES, stitch="trim") == Chunking.for_model(MDCT, stitch="trim")
    for frames in (4, 5):
        chunking = Chunking.for_model(CAUSAL, stitch="state", samples=16 * frames)
        assert chunking == Chunking("state", 16 * frames, 16 * frames, 0)


@pytest.mark.parametrize(
    ("spec", "wanted", "says"),
    [
        (PADDED, {"seconds": 100.0, "overlap": 0.6}, "overlap 0.6"),
        (PADDED, {"seconds": 100.0, "overlap": float("nan")}, "overlap nan"),
        (make_spec(512, 0, 512, 512, None), {"stitch": "trim"}, "stitch crossfade"),
        (MDCT, {"stitch": "trim", "overlap": 0.1}, "share 2 latent frames"),
        (MDCT, {"stitch": "crossfade", "overlap": 0.0}, "share 1 latent frames"),
        (make_spec(10, 0, 10, 100), {"seconds": 0.2}, "--chunk-seconds 2.2 or more"),
        (make_spec(10, 0, 20, 20), {"seconds": 0.3}, "--chunk-seconds 0.6 or more"),
        (CODES, {"stitch": "crossfade"}, "use --stitch trim"),
        (replace(CODES, context=None), {"stitch": "crossfade"}, "use --stitch none"),
        (replace(CODES, context=None), {"stitch": "trim"}, "use --stitch none"),
        (CAUSAL, {"stitch": "state", "samples": 48}, "must have at least 64 samples"),
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
    with pytest.raises(ConfigError, match=r"0\.2 s is too short.* 2\.2 or more"):
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
            assert "increase the overlap" in str(error)
            return
        assert chunking.samples == samples
        assert stitch != "none" or chunking.step == samples - int(samples * 0.25)
        return
    with pytest.raises(ConfigError, match="do not decode to the same length") as caught:
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
    assert one_sentence(caught.value).endswith("use the nearest valid length, 47104.")
    with pytest.raises(ConfigError, match="cannot be combined"):
        Chunking.for_model(LINCAE, samples=441_000, seconds=10)
