"""Latents to audio, window by window, so that items of any length are decoded in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from latentmill.encoding.chunks import Chunking
from latentmill.errors import ConfigError, ModelError
from latentmill.models.base import Autoencoder, ModelSpec
from latentmill.record import FloatArray, Latent, LatentLike, as_array

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LatentSource:
    """A latent that is read in pieces, so that it need not fit into memory.

    Attributes:
        shape: `[D, T]`, or `[N, D, Z]` for the overlapping chunks of `stitch: none`.
        read: Called with `start` and `n`; returns `n` frames from `start` on, `[D, n]`, or `n`
            chunks `[n, D, Z]`.
    """

    shape: tuple[int, ...]
    read: Callable[[int, int], Latent]

    @classmethod
    def of(cls, latent: Latent) -> LatentSource:
        """Wrap a latent that is in memory."""
        if latent.ndim == 3:
            return cls(latent.shape, lambda start, count: latent[start : start + count])
        return cls(latent.shape, lambda start, count: latent[:, start : start + count])


@dataclass(frozen=True)
class _Window:
    """A part of a latent that is decoded in one piece, and the samples that it decodes to."""

    frame: int  # index of its first frame in the item
    latent: Latent  # [D, Z]
    start: int  # index of its first sample in the item
    samples: int


def decode_latent(
    model: Autoencoder,
    latent: LatentLike | LatentSource,
    num_samples: int | None,
    chunking: Chunking,
    *,
    seed: int = 0,
    batch_size: int = 1,
) -> FloatArray:
    """Decode one item's latent to audio `[C, num_samples]`, float32; see `decode_blocks`."""
    source = _of_one_item(latent, chunking)
    num_samples = _length(model.spec, source.shape, num_samples, chunking)
    blocks = decode_blocks(model, source, num_samples, chunking, seed=seed, batch_size=batch_size)
    return _whole(model.spec, blocks, num_samples)


def decode_latents(
    model: Autoencoder,
    latents: LatentLike | LatentSource,
    num_samples: int | None,
    chunking: Chunking,
    *,
    seed: int = 0,
    batch_size: int = 1,
) -> FloatArray:
    """Decode the latent of one item, or a batch of latents with one more axis in front.

    The result is float32 `[C, num_samples]`, or `[B, C, num_samples]` for a batch, whose items
    share the forward passes. See `decode_blocks`.
    """
    given: Latent | LatentSource = as_array(latents)
    of_item, axes = _item_shape(chunking)
    shape = given.shape
    if len(shape) not in (axes, axes + 1) or not shape[0]:
        raise ConfigError(
            f"Latents of shape {list(shape)} cannot be decoded: give {of_item}, or "
            f"[B, {of_item[1:]} for several items."
        )
    if isinstance(given, LatentSource) or len(shape) == axes:
        return decode_latent(model, given, num_samples, chunking, seed=seed, batch_size=batch_size)
    spec = model.spec
    num_samples = _length(spec, shape[1:], num_samples, chunking)
    items = [list(_windows(LatentSource.of(one), num_samples, spec, chunking)) for one in given]
    decoded = _decoded(model, itertools.chain.from_iterable(items), seed, batch_size)
    skew = _skew(spec, chunking)
    audio = []
    for windows in items:
        blocks = _joined(itertools.islice(decoded, len(windows)), num_samples, skew)
        audio.append(_whole(spec, blocks, num_samples))
    return np.stack(audio)


def most_samples(spec: ModelSpec, shape: tuple[int, ...], chunking: Chunking) -> int:
    """Maximum number of samples of a latent `[D, T]`, or of chunks `[N, D, Z]`."""
    samples = spec.samples(shape[-1])
    if len(shape) == 3:
        return min(samples, chunking.samples) + (shape[0] - 1) * chunking.step
    return samples


def decode_blocks(
    model: Autoencoder,
    latent: LatentLike | LatentSource,
    num_samples: int | None,
    chunking: Chunking,
    *,
    seed: int = 0,
    batch_size: int = 1,
) -> Iterator[FloatArray]:
    """Decode one item's latent and yield its audio in order, in blocks `[C, n]` of float32.

    Neighbouring windows overlap and are crossfaded in the waveform. With `stitch: none` the windows
    are the stored chunks and the fade spans their whole overlap, as in the linear-cae package.
    Otherwise the fade spans the middle half of the overlap, away from the windows' edges (for a
    causal model: away from their starts). The windows of one batch and one more are in memory.

    `num_samples` is the item's length at the model's rate; None decodes the whole latent. `seed`
    determines the noise of a stochastic decoder, frame by frame. `batch_size` is the number of
    windows per forward pass; it is halved if the memory of the device is too small. `ConfigError`
    is raised at once if the latent is too short or is a batch, or if `batch_size` is less than 1.
    """
    source = _of_one_item(latent, chunking)
    length = _length(model.spec, source.shape, num_samples, chunking)
    windows = _windows(source, length, model.spec, chunking)
    decoded = _decoded(model, windows, seed, batch_size)
    return _joined(decoded, length, _skew(model.spec, chunking))


def _item_shape(chunking: Chunking) -> tuple[str, int]:
    """The shape of one item's latent, and its number of axes."""
    return ("[N, D, Z]", 3) if chunking.stitch == "none" else ("[D, T]", 2)


def _of_one_item(latent: LatentLike | LatentSource, chunking: Chunking) -> LatentSource:
    given = as_array(latent)
    source = given if isinstance(given, LatentSource) else LatentSource.of(given)
    of_item, axes = _item_shape(chunking)
    if len(source.shape) != axes or not source.shape[0]:
        raise ConfigError(
            f"Latents of shape {list(source.shape)} cannot be decoded in blocks: give the latent "
            f"of one item, {of_item}, or decode a batch with decode_latent."
        )
    return source


def _length(
    spec: ModelSpec, shape: tuple[int, ...], num_samples: int | None, chunking: Chunking
) -> int:
    """Check `num_samples`; None is the length of the whole latent."""
    most = most_samples(spec, shape, chunking)
    if num_samples is None:
        num_samples = most
    if not 0 <= num_samples <= most:
        raise ConfigError(
            f"A latent of shape {shape} decodes to at most {most} samples of {spec.name}, "
            f"not {num_samples}."
        )
    return num_samples


def _skew(spec: ModelSpec, chunking: Chunking) -> int | None:
    """See `_blended`."""
    return None if chunking.stitch == "none" else _overlapping(spec, chunking).skew * spec.hop


def _overlapping(spec: ModelSpec, chunking: Chunking) -> Chunking:
    """Decoding has no state, so its windows overlap where the encoder's do not."""
    return Chunking.for_model(spec, stitch="trim") if chunking.stitch == "state" else chunking


def _whole(spec: ModelSpec, blocks: Iterator[FloatArray], num_samples: int) -> FloatArray:
    """The blocks of one item as one array `[C, num_samples]`."""
    audio: FloatArray = np.empty((spec.channels, num_samples), np.float32)
    done = 0
    for block in blocks:
        audio[:, done : done + block.shape[1]] = block
        done += block.shape[1]
    return audio


def _decoded(
    model: Autoencoder, windows: Iterator[_Window], seed: int, batch_size: int
) -> Iterator[tuple[int, FloatArray]]:
    """Decode windows; yields the first sample and the audio `[C, samples]` of each."""
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}.")
    return _decoded_batches(model, _batches(windows, batch_size), seed, batch_size)


def _decoded_batches(
    model: Autoencoder, batches: Iterator[list[_Window]], seed: int, batch_size: int
) -> Iterator[tuple[int, FloatArray]]:
    from latentmill.models.inference.memory import BatchRunner  # imports torch, which is slow

    runner = BatchRunner(model.spec, batch_size)
    for batch in batches:
        samples = batch[0].samples
        step = partial(_decode, model, batch, samples, seed)
        for window, audio in zip(batch, runner.run(len(batch), samples, step), strict=True):
            yield window.start, audio.numpy()


def _decode(
    model: Autoencoder, batch: list[_Window], samples: int, seed: int, part: slice
) -> torch.Tensor:
    """Decode some windows of a batch to `[B, C, samples]` on the CPU."""
    import torch  # slow to import, and not needed to read a store

    windows = batch[part]
    latents = np.stack([window.latent for window in windows]).astype(np.float32)
    positions = [window.frame for window in windows]
    decoded = model.decode(torch.from_numpy(latents), samples, seed=seed, positions=positions)
    wanted = [len(windows), model.spec.channels, samples]
    if list(decoded.shape) != wanted:
        raise ModelError(
            f"Model {model.spec.name}: decode returned audio of shape {list(decoded.shape)} "
            f"instead of {wanted}: correct the model's decode or its spec."
        )
    return decoded.float().cpu()


def _batches(windows: Iterator[_Window], size: int) -> Iterator[list[_Window]]:
    """Group windows into batches of one shape and length; an item's last one may be shorter."""
    for _, alike in itertools.groupby(windows, key=lambda one: (one.latent.shape, one.samples)):
        while batch := list(itertools.islice(alike, size)):
            yield batch


def _joined(
    windows: Iterator[tuple[int, FloatArray]], num_samples: int, skew: int | None
) -> Iterator[FloatArray]:
    """Crossfade each window with the one before; yield audio that no later window changes."""
    begin = done = 0  # the first sample of the last window; number of samples given
    held: FloatArray | None = None
    for start, audio in windows:
        if held is None:
            held = audio
        else:
            done += held[:, : start - begin].shape[1]
            yield held[:, : start - begin]
            held = _blended(held[:, start - begin :], audio, skew)
        begin = start
    if held is not None:
        done += held[:, : num_samples - begin].shape[1]
        yield held[:, : num_samples - begin]
    if done != num_samples:
        raise ConfigError(
            f"The chunks of a latent decode to {done} samples instead of {num_samples}: if they "
            "are a store's, its dataset.json is damaged; restore it."
        )


def _windows(
    source: LatentSource, num_samples: int, spec: ModelSpec, chunking: Chunking
) -> Iterator[_Window]:
    """The windows of one item that have some of its first `num_samples` samples."""
    if chunking.stitch == "none":
        windows = _chunk_windows(source, num_samples, spec, chunking)
    else:
        windows = _stitched_windows(source, num_samples, spec, _overlapping(spec, chunking))
    return itertools.takewhile(lambda window: window.start < num_samples, windows)


def _stitched_windows(
    source: LatentSource, num_samples: int, spec: ModelSpec, chunking: Chunking
) -> Iterator[_Window]:
    """Windows of the chunk's length; the last one starts earlier, to end with the latent."""
    total = source.shape[1]
    size = spec.frames(chunking.samples)
    overlap = max(chunking.overlap, min(size // 4, 4))
    if overlap >= size:
        raise ConfigError(
            f"Chunks of {chunking.samples} samples that share {overlap} frames are too short for "
            f"{spec.name}: if they are a store's, its dataset.json is damaged; restore it."
        )
    if total <= size:
        yield _Window(0, source.read(0, total), 0, num_samples)
        return
    for start in itertools.chain(range(0, total - size, size - overlap), (total - size,)):
        yield _Window(start, source.read(start, size), start * spec.hop, chunking.samples)


def _chunk_windows(
    source: LatentSource, num_samples: int, spec: ModelSpec, chunking: Chunking
) -> Iterator[_Window]:
    if source.shape[0] == 1:
        yield _Window(0, source.read(0, 1)[0], 0, min(num_samples, chunking.samples))
        return
    for index in range(source.shape[0]):
        start = index * chunking.step
        latent, samples = source.read(index, 1)[0], chunking.samples
        if spec.short_last_chunk and index == source.shape[0] - 1:
            shared = samples - chunking.step  # with the chunk before, for the whole fade
            samples = max(spec.min_samples, shared, min(samples, num_samples - start))
            latent = latent[:, : spec.frames(samples)]
        yield _Window(start // spec.hop, latent, start, samples)


def _blended(old: FloatArray, new: FloatArray, skew: int | None) -> FloatArray:
    """Fade from `old` to `new` over the samples that they share, or over some of them.

    Without `skew` the fade spans all of them. `skew` is the number of samples by which the model's
    context on the left is longer than on the right; the fade then spans half of the samples that
    are right in both windows, but at least a sixteenth of the overlap.
    """
    overlap = old.shape[1]
    if overlap == 0:
        return new
    begin, width = 0, overlap
    if skew is not None:
        skew = max(-overlap, min(skew, overlap))
        width = max((overlap - abs(skew)) // 2, overlap // 16)
        begin = max(0, min((overlap + skew - width) // 2, overlap - width))
    fade = np.zeros(overlap, np.float32)
    fade[begin : begin + width] = np.linspace(0, 1, width, dtype=np.float32)
    fade[begin + width :] = 1
    return np.concatenate([old + fade * (new[:, :overlap] - old), new[:, overlap:]], axis=1)
