"""Latents -> audio, window by window, so that long items decode in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from latentmill.chunks import Chunking
from latentmill.errors import ConfigError
from latentmill.models.base import Autoencoder, ModelSpec
from latentmill.record import Latent

Audio = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Window:
    """A stretch of one latent that is decoded at once, and the samples that it gives."""

    frame: int  # its first frame on the item's time line
    latent: Latent  # [D, Z]
    start: int  # its first sample
    samples: int


def decode_latent(
    model: Autoencoder,
    latent: Latent,
    num_samples: int,
    chunking: Chunking,
    *,
    seed: int = 0,
    batch_size: int = 1,
) -> Audio:
    """Decode one item's latent to audio `[C, num_samples]`, float32.

    Neighbouring windows overlap and are crossfaded in the waveform. With `stitch: none` the
    windows are the stored chunks and the fade spans their whole overlap, as in the linear-cae
    package; otherwise it spans the middle half, away from the windows' edges.

    Args:
        model: The autoencoder that encoded the item.
        latent: `[D, Z]`, or the overlapping chunks `[N, D, Z]` of `stitch: none`.
        num_samples: Length of the item at the model's rate.
        chunking: How the item was encoded.
        seed: Noise of a stochastic decoder; equal seeds share it frame by frame.
        batch_size: Windows per forward pass.

    Raises:
        ConfigError: The latent does not hold so many samples.
    """
    spec = model.spec
    most = spec.samples(latent.shape[-1])
    if latent.ndim == 3 and len(latent) > 1:
        most = chunking.samples + (len(latent) - 1) * chunking.step
    if not 0 <= num_samples <= most:
        raise ConfigError(
            f"A latent of shape {latent.shape} decodes to at most {most} samples of {spec.name}, "
            f"not {num_samples}."
        )
    windows = _chunk_windows if latent.ndim == 3 else _stitched_windows
    needed = itertools.takewhile(
        lambda window: window.start < num_samples, windows(latent, num_samples, spec, chunking)
    )
    audio: Audio = np.zeros((spec.channels, num_samples), np.float32)
    end = 0  # of the window before
    for batch in _batches(needed, batch_size):
        latents = np.stack([window.latent for window in batch]).astype(np.float32)
        decoded = model.decode(  # [B, C, T]
            torch.from_numpy(latents),
            batch[0].samples,
            seed=seed,
            positions=[window.frame for window in batch],
        )
        for window, samples in zip(batch, decoded.float().cpu().numpy(), strict=True):
            _blend(audio, samples, window.start, end - window.start, whole=latent.ndim == 3)
            end = window.start + window.samples
    return audio


def _stitched_windows(
    latent: Latent, num_samples: int, spec: ModelSpec, chunking: Chunking
) -> Iterator[_Window]:
    """Windows of the chunk's length; the last one is moved back to end with the latent."""
    total = latent.shape[1]
    size = spec.frames(chunking.samples)
    overlap = max(chunking.overlap, min(size // 4, 4))
    if total <= size:
        yield _Window(0, latent, 0, num_samples)
        return
    starts = [*range(0, total - size, size - overlap), total - size]
    for start in starts:
        yield _Window(start, latent[:, start : start + size], start * spec.hop, chunking.samples)


def _chunk_windows(
    latent: Latent, num_samples: int, spec: ModelSpec, chunking: Chunking
) -> Iterator[_Window]:
    if len(latent) == 1:
        yield _Window(0, latent[0], 0, min(num_samples, chunking.samples))
        return
    for index, chunk in enumerate(latent):
        start = index * chunking.step
        yield _Window(start // spec.hop, chunk, start, chunking.samples)


def _batches(windows: Iterator[_Window], batch_size: int) -> Iterator[list[_Window]]:
    while batch := list(itertools.islice(windows, batch_size)):
        yield batch


def _blend(audio: Audio, new: Audio, start: int, overlap: int, *, whole: bool) -> None:
    """Write `new` at `start`, fading from what is there over the overlap (or its middle half)."""
    room = audio[:, start : start + new.shape[1]]  # less than `new` where the audio ends
    new = new[:, : room.shape[1]]
    if overlap > 0:
        begin, width = (0, overlap) if whole else (overlap // 4, overlap // 2)
        fade = np.zeros(overlap, np.float32)
        fade[begin : begin + width] = np.linspace(0, 1, width, dtype=np.float32)
        fade[begin + width :] = 1
        fade = fade[: room.shape[1]]
        old, faded = room[:, :overlap], new[:, :overlap]
        new = np.concatenate([old + fade * (faded - old), new[:, overlap:]], axis=1)
    room[:] = new
