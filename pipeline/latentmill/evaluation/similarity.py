"""Duplicates and outliers among the pooled latents of a store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from latentmill.evaluation.shard_pass import RecordTable

NEAR = 0.01  # cosine distance of near duplicates; other music is beyond 0.1
LENGTHS = 0.02  # relative difference in length of near duplicates at most, and four frames
EXACT_RECORDS = 16_384  # up to here all pairs are compared
TABLES, MAX_BITS, NEIGHBOURS = 12, 20, 64
BLOCK, HASHED_BLOCK = 1024, 256
PAIRS = 1 << 17
DEVIATION, RATIO = 6.0, 2.0  # of an outlier's distance, in robust deviations and in medians

Half = npt.NDArray[np.float16]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RepeatedRecords:
    """Positions of records that are the same sound, and which records are not repeated.

    Attributes:
        same_file, same_audio: Groups of records.
        near: Groups of near duplicates, with the largest distance of a pair.
        others: Whether a record is compared and is not a repeat of an earlier one.
    """

    same_file: list[list[int]]
    same_audio: list[list[int]]
    near: list[tuple[list[int], float]]
    others: npt.NDArray[np.bool_]


def find_repeats(
    table: RecordTable, frames: Positions, use: npt.NDArray[np.bool_]
) -> RepeatedRecords:
    """Compare some records. Of each group that was found, the first one is compared further."""
    others = use.copy()
    same_file = equal_groups(table.files, others)
    others[[at for group in same_file for at in group[1:]]] = False
    same_audio = equal_groups(table.audio, others)
    others[[at for group in same_audio for at in group[1:]]] = False
    near = near_groups(table.positions, frames, others)
    others[[at for records, _ in near for at in records[1:]]] = False
    return RepeatedRecords(same_file, same_audio, near, others)


def equal_groups(hashes: npt.NDArray[np.uint64], use: npt.NDArray[np.bool_]) -> list[list[int]]:
    """Groups of records with equal hashes."""
    chosen = np.flatnonzero(use)
    order = chosen[np.argsort(hashes[chosen], kind="stable")]
    borders = np.concatenate([[0], np.flatnonzero(np.diff(hashes[order])) + 1, [len(order)]])
    larger = np.flatnonzero(np.diff(borders) > 1)
    return [order[borders[n] : borders[n + 1]].tolist() for n in larger.tolist()]


class Groups:
    """Records that are connected by pairs; pairs are added in any order, and not kept."""

    def __init__(self, count: int) -> None:
        self._leader = np.arange(count)  # a record of the same group, not after it
        self._distance = np.zeros(count)

    def connect(
        self, first: Positions, second: Positions, distances: npt.NDArray[np.float64] | float = 0.0
    ) -> None:
        """Add pairs of records, with their distances."""
        np.maximum.at(self._distance, first, distances)
        while len(first):
            first, second = self._leaders(first), self._leaders(second)
            apart = first != second
            first, second = first[apart], second[apart]
            np.minimum.at(self._leader, np.maximum(first, second), np.minimum(first, second))

    def found(self) -> list[tuple[list[int], float]]:
        """The groups, with the largest distance of a pair, in the order of their first record."""
        leaders = self._leaders(np.arange(len(self._leader)))
        order = np.argsort(leaders, kind="stable")
        borders = np.flatnonzero(np.diff(leaders[order], prepend=-1, append=-1))
        larger = np.flatnonzero(np.diff(borders) > 1)
        groups = (order[borders[n] : borders[n + 1]] for n in larger.tolist())
        return [(group.tolist(), float(self._distance[group].max())) for group in groups]

    def _leaders(self, records: Positions) -> Positions:
        """The first record of each one's group; shortens the way to it."""
        while True:
            leaders = self._leader[records]
            above = self._leader[leaders]
            if np.array_equal(leaders, above):
                return leaders
            self._leader[records] = above


def near_groups(
    vectors: Half, frames: Positions, use: npt.NDArray[np.bool_]
) -> list[tuple[list[int], float]]:
    """Groups of near duplicates, with the largest distance of a pair; see `connect_near`."""
    groups = Groups(len(vectors))
    connect_near(groups, vectors, frames, use)
    return groups.found()


def connect_near(
    groups: Groups, vectors: Half, frames: Positions, use: npt.NDArray[np.bool_]
) -> None:
    """Connect records of about the same length whose cosine distance is less than `NEAR`.

    Of large stores, records are compared whose vectors are on the same side of random planes, in
    one of 12 sets of planes, with at least their next 64 neighbours: a pair at a distance of 0.001
    is found with a probability of 99.99 %.
    """
    chosen = np.flatnonzero(use)
    candidates = _all_pairs if len(chosen) <= EXACT_RECORDS else _hashed_pairs
    for first, second in candidates(vectors, chosen):
        longer = np.maximum(frames[first], frames[second])
        alike = abs(frames[first] - frames[second]) <= np.maximum(4, LENGTHS * longer)
        first, second = first[alike], second[alike]  # noqa: PLW2901
        a, b = vectors[first].astype(np.float32), vectors[second].astype(np.float32)
        distances = 1 - np.einsum("ij,ij->i", a, b)
        near = distances < NEAR
        groups.connect(first[near], second[near], distances[near].clip(min=0))


def _all_pairs(vectors: Half, chosen: Positions) -> Iterator[tuple[Positions, Positions]]:
    used = vectors[chosen].astype(np.float32)
    for start in range(0, len(chosen), BLOCK):
        for rows, columns in _close(used[start : start + BLOCK], used[start:]):
            yield chosen[start + rows], chosen[start + columns]


def _close(
    some: npt.NDArray[np.float32], following: npt.NDArray[np.float32]
) -> Iterator[tuple[Positions, Positions]]:
    """Numbers of similar vectors: of each of `some`, and of a later one in `following`.

    `following` begins with `some`. The distance of each pair is computed again, more exactly, of at
    most `PAIRS` pairs at once.
    """
    similar = some @ following.T > 1 - 1.1 * NEAR
    step = max(1, PAIRS // len(following))
    for start in range(0, len(some), step):
        rows, columns = np.nonzero(similar[start : start + step])
        later = start + rows < columns
        if later.any():
            yield start + rows[later], columns[later]


def _hashed_pairs(vectors: Half, chosen: Positions) -> Iterator[tuple[Positions, Positions]]:
    random = np.random.default_rng(0)
    bits = min(MAX_BITS, int(np.log2(len(chosen))))
    mean = vectors[chosen[:: max(1, len(chosen) // 10_000)]].astype(np.float32).mean(axis=0)
    for _ in range(TABLES):
        planes = random.standard_normal((vectors.shape[1], bits)).astype(np.float32)
        codes = np.zeros(len(chosen), np.int32)
        for start in range(0, len(chosen), 1 << 16):
            part = slice(start, start + (1 << 16))
            sides = (vectors[chosen[part]].astype(np.float32) - mean) @ planes > 0
            codes[part] = sides @ (1 << np.arange(bits))
        order = chosen[np.argsort(codes, kind="stable")]
        for start in range(0, len(order), HASHED_BLOCK):
            near = order[start : start + HASHED_BLOCK + NEIGHBOURS]
            used = vectors[near].astype(np.float32)
            for rows, columns in _close(used[:HASHED_BLOCK], used):
                yield near[rows], near[columns]


def outliers(shapes: Half, use: npt.NDArray[np.bool_]) -> list[tuple[int, float]]:
    """Records whose spectrum is unlike that of the others, with their distance, farthest first.

    The distance is the RMS difference from the median shape; it is divided by the median distance
    of all records. An outlier is beyond two medians and beyond six robust standard deviations.
    """
    chosen = np.flatnonzero(use)
    if len(chosen) < 8:
        return []
    total = np.zeros(len(chosen), np.float32)
    for column in shapes.T:  # one at a time, to save memory
        values = column[chosen].astype(np.float32)
        total += np.square(values - np.median(values))
    distances = np.sqrt(total / shapes.shape[1])
    middle = float(np.median(distances))
    spread = 1.4826 * float(np.median(abs(distances - middle)))
    far = distances > max(RATIO * middle, middle + DEVIATION * spread)
    order = np.flatnonzero(far)[np.argsort(-distances[far])]
    return [(int(chosen[n]), float(distances[n] / middle) if middle else 0.0) for n in order]
