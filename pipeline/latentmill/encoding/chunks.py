"""The chunk grid: splitting audio into chunks of one length, and stitching their latents.

Chunks start on multiples of the model's hop, counted from sample 0, so that stems of one song
share the grid and their latents can be added. The last chunk is moved back to end with the audio
(rounded up to a whole frame), because in an encoder that normalises over the chunk, a tail of zeros
would change every frame. An item shorter than one chunk is encoded at its own length, and so is
the last chunk if the model continues from its state after the chunk before (`stitch: state`).
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
from latentmill.record import FloatArray, Latent

LONG_BYTES = 64 << 20  # size of a latent from which freed memory is returned to the system


@dataclass(frozen=True)
class Chunking:
    """How items are split into chunks, and how their latents are stitched.

    Attributes:
        stitch: `trim` keeps each chunk's inner frames, `crossfade` blends the overlapping
            frames of neighbouring chunks, `none` stores the overlapping chunks unchanged, `state`
            encodes chunks that do not overlap, each with the model's state after the one before.
        samples: Length of a chunk in samples. The model sees `model_samples` of them.
        step: Samples from the start of one chunk to the start of the next.
        overlap: Number of latent frames that neighbouring chunks share (0 with `none`).
        skew: With `trim`, how many more of the shared frames come from the earlier chunk than from
            the later one: the model's left context minus its right context.
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
        """The chunking for a model, with the model's defaults for arguments that are None.

        `seconds` is rounded to a length that the model accepts; `samples` sets the exact length
        instead. `overlap` is the share of a chunk that the next chunk repeats, 0 to 0.5.
        """
        stitch = stitch or spec.stitch
        if samples is None:
            samples = _rounded(spec, seconds)
        elif seconds is not None:
            raise ConfigError(
                f"chunk_seconds ({seconds:g}) and chunk_samples ({samples}) cannot be combined: "
                "set one of them."
            )
        else:
            _check_samples(spec, stitch, samples)
        if overlap is not None and not 0 <= overlap <= 0.5:
            raise ConfigError(f"Invalid overlap {overlap}: expected a share of a chunk, 0 to 0.5.")
        if stitch == "crossfade" and spec.codebook_size is not None:
            raise ConfigError(
                f"{spec.name} returns codes, which cannot be blended: use --stitch "
                f"{'none' if spec.context is None else 'trim'}."
            )
        if stitch == "state":
            _check_state(spec, samples, overlap)
            return cls(stitch, samples, samples, 0)
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

    def ends_short(self, spec: ModelSpec) -> bool:
        """Whether the last chunk has only the audio that the other chunks do not cover.

        Otherwise it is moved back or padded with zeros. A frame without context may be a window
        of its own (CLAP), which must not be padded.
        """
        if self.stitch == "state":
            return True
        if self.stitch == "none" or not spec.short_last_chunk:
            return spec.short_last_chunk
        windows = spec.context == (0, 0) and spec.min_samples <= spec.hop
        return self.step == self.samples and (windows or spec.hop == self.samples)

    def model_samples(self, spec: ModelSpec) -> int:
        """Number of samples of a chunk that the model sees.

        With `stitch: none` and a length in samples, up to `spec.sample_multiple - 1` samples at
        the end are dropped, as the linear-cae package does.
        """
        return self.samples - self.samples % spec.sample_multiple


def _rounded(spec: ModelSpec, seconds: float | None) -> int:
    """The model's chunk length, or `seconds` rounded up to a whole frame."""
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
        f"Chunks of {samples} samples do not decode to the same length with {spec.name} and stitch "
        f"{stitch}: use the nearest valid length, {nearest}."
    )


def _decodes_whole(spec: ModelSpec, stitch: Stitch, samples: int) -> bool:
    """Whether a chunk's frames decode to all of its samples, and to no more if stitched."""
    seen = samples - samples % spec.sample_multiple
    if seen < spec.min_samples:
        return False
    decoded = spec.samples(spec.frames(seen))
    return decoded >= samples if stitch == "none" else decoded == samples


def _check_state(spec: ModelSpec, samples: int, overlap: float | None) -> None:
    if not spec.step_frames:
        raise ConfigError(
            f"{spec.name} cannot continue from a state, because it is not causal or does not "
            f"return one: use --stitch {spec.stitch}."
        )
    if overlap:
        raise ConfigError(
            "With stitch state, chunks do not overlap: leave out --overlap, or use --stitch trim."
        )
    if spec.frames(samples) < spec.step_frames:
        raise ConfigError(
            f"With stitch state, chunks of {spec.name} must have at least "
            f"{spec.samples(spec.step_frames)} samples: increase the chunk length."
        )


def _check_overlap(spec: ModelSpec, stitch: Stitch, frames: int, overlap: int) -> None:
    # With fewer shared frames, samples between two chunks would be lost.
    needed = max(0, math.ceil(-spec.overhang / spec.hop))
    if stitch == "trim":
        if spec.context is None:
            raise ConfigError(
                f"{spec.name} cannot be stitched by trimming, because each frame depends on its "
                "whole chunk: use --stitch "
                f"{'crossfade' if spec.codebook_size is None else 'none'}."
            )
        needed = max(needed, sum(spec.context))
    if overlap < needed:
        raise ConfigError(
            f"With stitch {stitch}, neighbouring chunks of {spec.name} must share {needed} latent "
            f"frames, but they share {overlap} of {frames}: increase the overlap or the chunk "
            "length."
        )


# The smallest number that rounds to infinity in float16, whose largest number is 65504.
FLOAT16_OVERFLOW = 65520.0


@dataclass(frozen=True)
class Chunk:
    """A window of an item's samples. `frame` is its first frame in the item's latent."""

    frame: int
    audio: FloatArray  # [C, T]


class Chunker:
    """Splits one item's audio into chunks, block by block. Holds at most two chunks in memory.

    Blocks are copied into the chunk that they complete, and the overlap into the next one; nothing
    else is copied. With `stitch: none` the last chunk is padded with zeros, as the linear-cae
    package does, or stays short; see `Chunking.ends_short`.
    """

    def __init__(self, spec: ModelSpec, chunking: Chunking, expected: int = 0) -> None:
        """`expected` is the number of samples that the header states; 0 if unknown."""
        self._spec = spec
        self._chunking = chunking
        self._model_samples = chunking.model_samples(spec)
        self._last: FloatArray | None = None  # the last complete chunk, [C, samples]
        short = spec.padded(expected) if expected else chunking.samples
        self._current: FloatArray = self._new(min(short, chunking.samples))
        self._filled = 0  # samples of the current chunk
        self._complete = 0  # number of complete chunks

    def push(self, block: FloatArray) -> Iterator[Chunk]:
        """Add a block `[C, n]` in any memory order, and yield the chunks that it completes."""
        size, step = self._chunking.samples, self._chunking.step
        taken = 0
        while taken < block.shape[1]:
            if self._filled == self._current.shape[1]:  # more than the header stated
                short, self._current = self._current, self._new(size)
                self._current[:, : self._filled] = short
            count = min(self._current.shape[1] - self._filled, block.shape[1] - taken)
            self._current[:, self._filled : self._filled + count] = block[:, taken : taken + count]
            self._filled, taken = self._filled + count, taken + count
            if self._filled == size:
                seen = self._model_samples
                audio = self._current if seen == size else self._current[:, :seen]
                yield Chunk(self._complete * step // self._spec.hop, audio)
                self._last, self._current = self._current, self._new(size)
                self._filled = size - step
                self._current[:, : self._filled] = self._last[:, step:]
                self._complete += 1

    def pushed(self, block: FloatArray) -> FloatArray:
        """The block that was just pushed, with contiguous channels; a view if that is possible."""
        count = block.shape[1]
        if block.flags.c_contiguous or self._filled < count:  # it is in two chunks
            return np.ascontiguousarray(block)
        return self._current[:, self._filled - count : self._filled]

    def finish(self) -> Iterator[Chunk]:
        """Yield the last chunk, moved back to end with the audio, if frames are not covered yet."""
        spec, chunking = self._spec, self._chunking
        total = self._complete * chunking.step + self._filled
        if self._complete == 0 and spec.padded(total) <= chunking.samples:
            if self._current.shape[1] == spec.padded(total):
                self._current[:, total:] = 0
                yield Chunk(0, self._current)
            else:
                yield self._chunk(0, spec.padded(total))
            return
        covered = (self._complete - 1) * chunking.step + chunking.samples
        ends_short = chunking.ends_short(spec)
        if chunking.stitch == "none" or ends_short:
            if total > covered:
                start = self._complete * chunking.step
                size = spec.padded(total - start) if ends_short else self._model_samples
                yield self._chunk(start, size)
            return
        frames = spec.frames(spec.padded(total))
        if spec.samples(frames) > covered:
            yield self._chunk(spec.samples(frames) - chunking.samples, self._model_samples)

    def _new(self, samples: int) -> FloatArray:
        return np.empty((self._spec.channels, samples), np.float32)

    def _chunk(self, start: int, size: int) -> Chunk:
        """A chunk of the last samples, from any sample of the last complete chunk on."""
        audio = np.zeros((self._spec.channels, size), np.float32)
        begin = self._complete * self._chunking.step  # of the current chunk
        if self._last is not None and start < begin:
            earlier = self._last[:, start - begin + self._chunking.step :][:, :size]
            audio[:, : earlier.shape[1]] = earlier
        later = self._current[:, max(start - begin, 0) : self._filled]
        offset = max(begin - start, 0)
        audio[:, offset : offset + later.shape[1]] = later[:, : size - offset]
        return Chunk(start // self._spec.hop, audio)


class Stitcher:
    """Stitches the latents of one item's chunks, in the order of the chunks.

    Frames are settled (converted to the stored dtype) as soon as no later chunk can change them, so
    that only about one chunk is in memory as float32.
    """

    def __init__(self, chunking: Chunking, dtype: np.dtype[Any], frames_hint: int = 0) -> None:
        self._chunking = chunking
        self._dtype = dtype
        self._hint = frames_hint
        self._settled: npt.NDArray[np.generic] | None = None  # [capacity, D], time-major
        self._count = 0  # number of settled frames
        self._open: FloatArray | None = None  # [frames, D], after the settled ones
        self._chunks: list[FloatArray] = []  # stitch: none
        self.finite = True  # whether all frames fit the stored dtype

    def add(self, frame: int, latent: FloatArray) -> None:
        """Add a chunk's latent, float32 `[D, Z]`, which starts at the item's frame `frame`."""
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
        with np.errstate(invalid="ignore", over="ignore"):  # checked when the frames are settled
            blend = old + weight * (new[before : before + width] - old)
        self._settle(self._open[:begin])
        self._open = np.concatenate([blend, new[before + width :]])

    def finish(self) -> Latent:
        """Return the latent in the stored dtype: `[D, Z]`, with time-major bytes.

        With `stitch: none` it is the chunks, `[N, D, Z]`.
        """
        with np.errstate(over="ignore"):  # the caller checks the range
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

    def _settle(self, frames: FloatArray) -> None:
        end = self._count + len(frames)
        if self._settled is None or end > len(self._settled):
            # The hint comes from a header, which may be wrong, so the buffer grows in steps.
            capacity = min(self._hint, 8 * end) if end <= self._hint else end + end // 4
            buffer = np.empty((capacity, frames.shape[1]), self._dtype)
            if self._settled is not None:
                buffer[: self._count] = self._settled[: self._count]
            self._settled = buffer
            if buffer.nbytes > LONG_BYTES:  # the old buffer would stay in the heap, unused
                trim_memory()
        # Not numpy, which is 90 times slower for values that are subnormal in float16.
        import torch  # imported here, so that reading a plan does not import it

        target = torch.from_numpy(self._settled[self._count : end])
        target.copy_(torch.from_numpy(frames))
        limit = FLOAT16_OVERFLOW if self._dtype == np.float16 else math.inf
        if len(frames):  # the comparisons are false for NaN
            self.finite &= bool(-limit < frames.min() and frames.max() < limit)
        self._count = end
