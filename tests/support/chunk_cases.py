"""Any model, any chunking, any length: cases for hypothesis."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from latentmill.encoding.chunks import Chunk, Chunker, Chunking
from latentmill.models.base import Context, ModelSpec

ONE = Context(1, 1)


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


PADDED = make_spec(hop=2048, overhang=0, multiple=2048, min_samples=2048)


@st.composite
def windows(draw: st.DrawFn) -> Case:
    """A model whose frames are windows without context, of which the last one may be short."""
    spec = make_spec(draw(st.integers(1, 12)), 0, 1, 1, Context(0, 0))
    spec = replace(spec, short_last_chunk=True)
    samples = spec.samples(draw(st.integers(1, 6)))
    return Case(spec, Chunking("trim", samples, samples, 0), draw(st.integers(1, 5 * samples)))
