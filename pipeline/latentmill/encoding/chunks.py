"""The chunk grid: cutting audio into chunks of one length, packing them, stitching latents.

Chunks start on multiples of the model's hop, counted from sample 0, so that stems of one song
share the grid and their latents can be added. The last chunk is moved back to end with the audio
(rounded up to a whole frame): an encoder that normalises over the chunk would answer to a tail of
zeros in every frame. An item shorter than one chunk is encoded at its own length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from latentmill.errors import ConfigError
from latentmill.models.base import ModelSpec, Stitch
from latentmill.models.inference.device import trim_memory
from latentmill.record import Latent

Audio = npt.NDArray[np.float32]

LONG_BYTES = 64 << 20  # a latent that costs memory worth giving back


@dataclass(frozen=True)
class Chunking:
    """How items are cut and put together again.

    Attributes:
        stitch: `trim` keeps each chunk's inner frames, `crossfade` blends the overlapping
            frames of neighbours, `none` stores the overlapping chunks as they are.
        samples: Length of a chunk; the model sees `model_samples` of them.
        step: Samples from one chunk's start to the next one's.
        overlap: Latent frames that neighbouring chunks share (0 with `none`).
        skew: With `trim`, how many more of the shared frames are taken from the earlier chunk
            than from the later one: the model's context on the left less that on the right.
    """

    stitch: Stitch
    samples: int
    step: int
    overlap: int
    skew: int = 0

    @classmethod
    def for_model(
        cls,
        spec: ModelSpec,
        *,
        stitch: Stitch | None = None,
        seconds: float | None = None,
        samples: int | None = None,
        overlap: float | None = None,
    ) -> Chunking:
        """The chunking for a model: its own defaults, or what the user asks for.

        Args:
            spec: The model.
            stitch: How to stitch; default is the model's.
            seconds: Chunk length, rounded to a length that the model takes.
            samples: Chunk length, exactly, instead of `seconds`.
            overlap: Share of a chunk that its neighbour repeats, 0 to 0.5.

        Raises:
            ConfigError: The chunk is too short, the overlap does not fit the stitch, or `samples`
                is no length that decodes whole.
        """
        stitch = stitch or spec.stitch
        if samples is None:
            samples = _rounded(spec, seconds)
        elif seconds is not None:
            raise ConfigError("Give chunk_seconds or chunk_samples, not both.")
        else:
            _check_samples(spec, stitch, samples)
        if overlap is not None and not 0 <= overlap <= 0.5:
            raise ConfigError(f"An overlap of {overlap} is no share of a chunk from 0 to 0.5.")
        if stitch == "crossfade" and spec.codebook_size is not None:
            raise ConfigError(
                f"{spec.name} gives codes, which cannot be blended: use --stitch "
                f"{'none' if spec.context is None else 'trim'}."
            )
        if stitch == "none":
            shared = int(samples * (0.25 if overlap is None else overlap))
            return cls(stitch, samples, samples - shared, 0)
        frames = spec.frames(samples)
        shared = min(spec.overlap_frames, frames // 2)
        if overlap is not None:
            shared = round(overlap * frames)
        _check_overlap(spec, stitch, frames, shared)
        skew = 0
        if stitch == "trim" and spec.context is not None:
            skew = spec.context.left - spec.context.right
        return cls(stitch, samples, (frames - shared) * spec.hop, shared, skew)

    def model_samples(self, spec: ModelSpec) -> int:
        """Samples of a chunk that the model sees: as many as it takes.

        With `stitch: none` and a length in samples, up to `spec.sample_multiple - 1` samples at
        the end are left out, as by the front end of the linear-cae package.
        """
        return self.samples - self.samples % spec.sample_multiple


def _rounded(spec: ModelSpec, seconds: float | None) -> int:
    """A chunk length that the model takes: its own, or `seconds` up to a whole frame."""
    frames = spec.chunk_frames
    if seconds is not None:
        frames = spec.frames(round(seconds * spec.sample_rate))
    samples = spec.samples(frames)
    if samples < spec.min_samples or spec.padded(samples) != samples:
        least = 2 * (spec.min_samples + spec.hop) / spec.sample_rate
        raise ConfigError(
            f"A chunk of {samples / spec.sample_rate:g} s is too short for {spec.name}: use "
            f"--chunk-seconds {math.ceil(1000 * least) / 1000} or more."
        )
    return samples


def _check_samples(spec: ModelSpec, stitch: Stitch, samples: int) -> None:
    if _decodes_whole(spec, stitch, samples):
        return
    around = range(max(1, samples - spec.hop), max(samples, spec.min_samples) + 2 * spec.hop)
    good = [length for length in around if _decodes_whole(spec, stitch, length)]
    nearest = min(good, key=lambda length: abs(length - samples))
    raise ConfigError(
        f"Chunks of {samples} samples do not decode whole with {spec.name} and stitch {stitch}: "
        f"the nearest length that does is {nearest}."
    )


def _decodes_whole(spec: ModelSpec, stitch: Stitch, samples: int) -> bool:
    """Whether a chunk's frames decode to all of its samples, and if stitched to no more."""
    seen = samples - samples % spec.sample_multiple
    if seen < spec.min_samples:
        return False
    decoded = spec.samples(spec.frames(seen))
    return decoded >= samples if stitch == "none" else decoded == samples


def _check_overlap(spec: ModelSpec, stitch: Stitch, frames: int, overlap: int) -> None:
    needed = max(0, math.ceil(-spec.overhang / spec.hop))  # with fewer, samples between are lost
    if stitch == "trim":
        if spec.context is None:
            raise ConfigError(
                f"{spec.name} cannot be stitched by trimming, since each frame depends on its "
                "whole chunk: use --stitch "
                f"{'crossfade' if spec.codebook_size is None else 'none'}."
            )
        needed = max(needed, sum(spec.context))
    if overlap < needed:
        raise ConfigError(
            f"{spec.name} needs neighbouring chunks to share {needed} latent frames for stitch "
            f"{stitch}, but {overlap} of {frames} were asked for: raise the overlap or the chunk "
            "length."
        )


# From here on a number rounds to infinity, not to float16's largest, 65504.
FLOAT16_OVERFLOW = 65520.0


@dataclass(frozen=True)
class Chunk:
    """A window of one item's samples, at its place on the item's latent time line."""

    frame: int
    audio: Audio  # [C, T]


class Chunker:
    """Cuts one item's audio, block by block, into chunks; holds about one chunk of it.

    With `stitch: none` the chunks start every `step` samples and the last one is filled up with
    zeros, as the linear-cae package does it, or of `spec.short_last_chunk` left short.
    """

    def __init__(self, spec: ModelSpec, chunking: Chunking) -> None:
        self._spec = spec
        self._chunking = chunking
        self._model_samples = chunking.model_samples(spec)
        self._buffer: Audio = np.zeros((spec.channels, 0), np.float32)
        self._offset = 0  # the sample at which the buffer starts
        self._emitted = 0  # chunks emitted

    def push(self, block: Audio) -> Iterator[Chunk]:
        """Take a block `[C, n]`; give the chunks that it completes."""
        self._buffer = np.concatenate([self._buffer, block], axis=1)
        size, step = self._chunking.samples, self._chunking.step
        while self._offset + self._buffer.shape[1] >= self._emitted * step + size:
            yield self._cut(self._emitted * step)
        # The last chunk may start anywhere after the start of the one before it.
        keep = max(0, (self._emitted - 1) * step) - self._offset
        if keep > 0:
            self._buffer = self._buffer[:, keep:]
            self._offset += keep

    def finish(self) -> Iterator[Chunk]:
        """Give the last chunk, moved back to end with the audio, if frames are still open."""
        spec, chunking = self._spec, self._chunking
        total = self._offset + self._buffer.shape[1]
        if self._emitted == 0 and spec.padded(total) <= chunking.samples:
            yield self._cut(0, spec.padded(total))
            return
        covered = (self._emitted - 1) * chunking.step + chunking.samples
        if chunking.stitch == "none":
            if total > covered:
                start = self._emitted * chunking.step
                size = spec.padded(total - start) if spec.short_last_chunk else None
                yield self._cut(start, size)
            return
        frames = spec.frames(spec.padded(total))
        if spec.samples(frames) > covered:
            yield self._cut(spec.samples(frames) - chunking.samples)

    def _cut(self, start: int, size: int | None = None) -> Chunk:
        size = size or self._model_samples
        first = start - self._offset
        audio = self._buffer[:, first : first + size]
        if audio.shape[1] < size:
            audio = np.pad(audio, ((0, 0), (0, size - audio.shape[1])))
        self._emitted += 1
        return Chunk(start // self._spec.hop, audio.copy())


class Stitcher:
    """Puts the latents of one item's chunks together, in the order of the chunks.

    Frames are settled (converted to the stored dtype) once no later chunk can touch them, so that
    it holds the stored latent and about one chunk in float32.
    """

    def __init__(self, chunking: Chunking, dtype: np.dtype[Any], frames_hint: int = 0) -> None:
        self._chunking = chunking
        self._dtype = dtype
        self._hint = frames_hint
        self._settled: npt.NDArray[np.generic] | None = None  # [capacity, D], time-major
        self._count = 0  # settled frames
        self._open: npt.NDArray[np.float32] | None = None  # [frames, D], after the settled ones
        self._chunks: list[npt.NDArray[np.float32]] = []  # stitch: none
        self.finite = True  # whether all frames fit the stored dtype

    def add(self, frame: int, latent: npt.NDArray[np.float32]) -> None:
        """Add a chunk's latent `[D, Z]`, float32, whose first frame is `frame` of the item."""
        if self._chunking.stitch == "none":
            self._chunks.append(latent)
            return
        new = latent.T  # [Z, D]
        if self._open is None:
            self._open = new
            return
        overlap = self._count + len(self._open) - frame
        width = self._chunking.overlap if self._chunking.stitch == "crossfade" else 0
        before = (overlap - width + self._chunking.skew) // 2  # frames of `new` before the blend
        begin = frame + before - self._count  # where the blend starts in `_open`
        old = self._open[begin : begin + width]
        weight = (np.arange(1, width + 1, dtype=np.float32) / (width + 1))[:, None]
        with np.errstate(invalid="ignore", over="ignore"):  # gated when the frames settle
            blend = old + weight * (new[before : before + width] - old)
        self._settle(self._open[:begin])
        self._open = np.concatenate([blend, new[before + width :]])

    def finish(self) -> Latent:
        """The item's latent `[D, Z]` in the stored dtype (its bytes are time-major), or with
        `stitch: none` the chunks `[N, D, Z]`.
        """
        with np.errstate(over="ignore"):  # the caller gates the range
            if self._chunking.stitch == "none":
                frames = self._chunks[0].shape[1]
                last = self._chunks[-1]
                self._chunks[-1] = np.pad(last, ((0, 0), (0, frames - last.shape[1])))
                chunks: Latent = np.stack(self._chunks).astype(self._dtype)
                self.finite = bool(np.isfinite(chunks).all())
                return chunks
            assert self._open is not None, "an item has at least one chunk"
            self._settle(self._open)
        assert self._settled is not None
        return self._settled[: self._count].T  # type: ignore[return-value]

    def _settle(self, frames: npt.NDArray[np.float32]) -> None:
        end = self._count + len(frames)
        if self._settled is None or end > len(self._settled):
            # The hint comes from a header, which may lie: follow it in steps.
            capacity = min(self._hint, 8 * end) if end <= self._hint else end + end // 4
            room = np.empty((capacity, frames.shape[1]), self._dtype)
            if self._settled is not None:
                room[: self._count] = self._settled[: self._count]
            self._settled = room
            if room.nbytes > LONG_BYTES:  # what it has outgrown is a hole that nothing fits in
                trim_memory()
        # Not numpy, which is 90 times slower on what float16 holds as subnormal numbers.
        import torch  # reading a plan must not wait for it

        target = torch.from_numpy(self._settled[self._count : end])
        target.copy_(torch.from_numpy(frames))
        limit = FLOAT16_OVERFLOW if self._dtype == np.float16 else math.inf
        if len(frames):  # NaN is in no range
            self.finite &= bool(-limit < frames.min() and frames.max() < limit)
        self._count = end


@dataclass(frozen=True)
class Batch:
    """Chunks of one length for one forward pass, with the item that each belongs to."""

    owners: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def audio(self) -> Audio:
        """The batch `[B, C, T]`."""
        return np.stack([chunk.audio for chunk in self.chunks])


class Packer:
    """Packs chunks of many items into full batches of one length.

    What it packs depends on the order of the chunks alone, never on time, so that a unit's
    batches are the same on every worker. A chunk waits for others of its length while at most
    four full batches' samples go by: finished items queue up behind the one that it belongs to.
    """

    def __init__(self, chunking: Chunking, batch_size: int) -> None:
        self._budget = chunking.samples * batch_size
        self._max_batch = max(batch_size, 16)
        self._bins: dict[int, list[tuple[int, Chunk]]] = {}  # by length
        self._begun: dict[int, int] = {}  # samples seen when each bin was begun
        self._seen = 0

    def add(self, owner: int, chunk: Chunk) -> Iterator[Batch]:
        """Take a chunk; give the batches that are due."""
        length = chunk.audio.shape[1]
        waiting = self._bins.setdefault(length, [])
        self._begun.setdefault(length, self._seen)
        waiting.append((owner, chunk))
        self._seen += length
        if len(waiting) >= min(self._max_batch, max(1, self._budget // length)):
            yield self._take(length)
        horizon = self._seen - 4 * self._budget
        for overdue in [other for other, begun in self._begun.items() if begun < horizon]:
            yield self._take(overdue)

    def flush(self) -> Iterator[Batch]:
        """Give what is left."""
        while self._bins:
            yield self._take(next(iter(self._bins)))

    def _take(self, length: int) -> Batch:
        taken = self._bins.pop(length)
        del self._begun[length]
        return Batch(tuple(o for o, _ in taken), tuple(c for _, c in taken))
