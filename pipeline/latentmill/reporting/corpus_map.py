"""A map of a corpus: the pooled latents of a sample of records, projected to two dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from latentmill.errors import StorageError
from latentmill.evaluation.shard_pass import used_frames
from latentmill.record import DTYPES
from latentmill.store.store import LatentStore

MAX_POINTS = 5000
PIECE_BYTES, MAX_FRAMES, PIECES = 64 << 10, 128, 8  # that are read of a record
_BATCH = 64  # records that are read at once
_ROUNDS, _EXTRA = 12, 6

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CorpusMap:
    """Points from -1 to 1, and the share of the variance that each axis shows."""

    points: Matrix  # [n, 2]
    shares: tuple[float, float]


def corpus_map(store: LatentStore, sample: npt.NDArray[np.int64]) -> CorpusMap | None:
    """Place records by the mean and the level of each channel; None with fewer than three.

    Of each record at most 128 frames are read, from eight places.
    """
    if len(sample) < 3 or store.codes:
        return None
    channels = store.info.model["latent_channels"]
    pooled = np.zeros((len(sample), 2 * channels), np.float32)
    for number, frames in enumerate(_frames(store, sample)):
        pooled[number] = _pooled(frames)
    points, shares = principal(pooled)
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = 2 * (points - low) / np.where(high > low, high - low, 1) - 1
    return CorpusMap(scaled, shares)


def _pooled(frames: Matrix) -> Matrix:
    """The mean of each channel, and the logarithm of its RMS, of frames `[F, D]`."""
    rms = np.sqrt(np.square(frames).mean(axis=0))
    result: Matrix = np.concatenate([frames.mean(axis=0), np.log(rms + 1e-3)])
    return result


def principal(values: Matrix) -> tuple[Matrix, tuple[float, float]]:
    """The first two principal components of standardised columns, and their shares of the variance.

    By subspace iteration, because the exact decomposition takes long for thousands of columns.
    """
    deviation = values.std(axis=0)
    used = (values - values.mean(axis=0))[:, deviation > 0] / deviation[deviation > 0]
    total = float(np.square(used, dtype=np.float64).sum())
    if used.shape[1] < 2 or not total:
        return np.zeros((len(values), 2), np.float32), (0.0, 0.0)
    random = np.random.default_rng(0)
    size = min(2 + _EXTRA, *used.shape)
    basis = random.standard_normal((used.shape[1], size)).astype(np.float32)
    for _ in range(_ROUNDS):
        basis = np.linalg.qr(used.T @ (used @ basis))[0]
    left, sizes, right = np.linalg.svd(used @ basis, full_matrices=False)
    axes = basis @ right[:2].T
    signs = np.sign(axes[abs(axes).argmax(axis=0), range(2)])  # the same on every machine
    shares = np.square(sizes[:2], dtype=np.float64) / total
    return left[:, :2] * sizes[:2] * signs, (float(shares[0]), float(shares[1]))


def _frames(store: LatentStore, sample: npt.NDArray[np.int64]) -> Iterator[Matrix]:
    """Some frames `[F, D]` of each record."""
    dtype, index = DTYPES[store.info.dtype], store.index
    for first in range(0, len(sample), _BATCH):
        entries = [index.entry(position) for position in sample[first : first + _BATCH].tolist()]
        ranges = [_ranges(e.offset, e.length, e.frames, e.chunks) for e in entries]
        flat = [
            (entry.shard, offset, length)
            for entry, pieces in zip(entries, ranges, strict=True)
            for offset, length in pieces
        ]
        found = iter(store.storage.read_ranges(flat))
        for entry, pieces in zip(entries, ranges, strict=True):
            data = b"".join(itertools.islice(found, len(pieces)))
            if not data or len(data) != sum(length for _, length in pieces):
                raise StorageError(
                    f"{store.url}/{entry.shard} is damaged at record {entry.key}: run `latentmill "
                    "verify`."
                )
            values = np.frombuffer(data, dtype)
            shape = (entry.channels, -1) if entry.chunks else (-1, entry.channels)
            frames = values.reshape(shape).astype(np.float32)
            if entry.chunks:
                frames = frames[:, : used_frames(frames)].T
            yield np.nan_to_num(frames)


def _ranges(offset: int, length: int, frames: int, chunks: int) -> list[tuple[int, int]]:
    """What is read of a record: pieces spread over it, or its middle chunk."""
    if chunks:
        size = length // chunks
        return [(offset + chunks // 2 * size, size)]
    width = length // max(1, frames)
    most = max(PIECES, min(MAX_FRAMES, PIECE_BYTES // max(1, width)))
    if frames <= most:
        return [(offset, length)]
    piece = most // PIECES
    starts = [n * (frames - piece) // (PIECES - 1) for n in range(PIECES)]
    return [(offset + start * width, piece * width) for start in starts]
