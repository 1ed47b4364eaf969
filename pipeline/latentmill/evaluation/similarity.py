"""Duplicates and outliers among the pooled latents of a store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

NEAR = 0.01  # cosine distance of near duplicates; other music is beyond 0.1
LENGTHS = 0.02  # relative difference in length of near duplicates at most, and four frames
EXACT_RECORDS = 16_384  # up to here all pairs are compared
TABLES, MAX_BITS, NEIGHBOURS = 12, 20, 64
BLOCK, HASHED_BLOCK = 1024, 256
DEVIATION, RATIO = 6.0, 2.0  # of an outlier's distance, in robust deviations and in medians

Half = npt.NDArray[np.float16]
Positions = npt.NDArray[np.int64]


def equal_groups(hashes: npt.NDArray[np.uint64], use: npt.NDArray[np.bool_]) -> list[list[int]]:
    """Groups of records with equal hashes."""
    chosen = np.flatnonzero(use)
    order = chosen[np.argsort(hashes[chosen], kind="stable")]
    borders = np.concatenate([[0], np.flatnonzero(np.diff(hashes[order])) + 1, [len(order)]])
    larger = np.flatnonzero(np.diff(borders) > 1)
    return [order[borders[n] : borders[n + 1]].tolist() for n in larger.tolist()]


def near_pairs(
    vectors: Half, frames: Positions, use: npt.NDArray[np.bool_]
) -> dict[tuple[int, int], float]:
    """Pairs of records of about the same length, closer than `NEAR`, with their cosine distance.

    Of large stores, records are compared whose vectors are on the same side of random planes, in
    one of 12 sets of planes, with at least their next 64 neighbours: a pair at a distance of 0.001
    is found with 99.99 %.
    """
    chosen = np.flatnonzero(use)
    found: dict[tuple[int, int], float] = {}
    candidates = _all_pairs if len(chosen) <= EXACT_RECORDS else _hashed_pairs
    for first, second in candidates(vectors, chosen):
        longer = np.maximum(frames[first], frames[second])
        alike = abs(frames[first] - frames[second]) <= np.maximum(4, LENGTHS * longer)
        first, second = first[alike], second[alike]  # noqa: PLW2901
        a, b = vectors[first].astype(np.float32), vectors[second].astype(np.float32)
        distances = 1 - np.einsum("ij,ij->i", a, b)
        near = distances < NEAR
        for i, j, d in zip(first[near], second[near], distances[near], strict=True):
            found[min(int(i), int(j)), max(int(i), int(j))] = max(0.0, float(d))
    return found


def _all_pairs(vectors: Half, chosen: Positions) -> Iterator[tuple[Positions, Positions]]:
    used = vectors[chosen].astype(np.float32)
    for start in range(0, len(chosen), BLOCK):
        rows, columns = _close(used[start : start + BLOCK], used[start:])
        yield chosen[start + rows], chosen[start + columns]


def _close(
    some: npt.NDArray[np.float32], following: npt.NDArray[np.float32]
) -> tuple[Positions, Positions]:
    """Numbers of similar vectors: of each of `some`, and of a later one in `following`.

    `following` begins with `some`. The distance of each pair is computed again, more exactly.
    """
    rows, columns = np.nonzero(some @ following.T > 1 - 1.1 * NEAR)
    later = rows < columns
    return rows[later], columns[later]


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
            rows, columns = _close(used[:HASHED_BLOCK], used)
            yield near[rows], near[columns]


def joined(pairs: dict[tuple[int, int], float]) -> list[tuple[list[int], float]]:
    """Groups of records that are connected by pairs, with the largest distance of a pair."""
    leader: dict[int, int] = {}

    def find(record: int) -> int:
        while leader.setdefault(record, record) != record:
            leader[record] = leader[leader[record]]
            record = leader[record]
        return record

    for first, second in pairs:
        leader[find(second)] = find(first)
    members: dict[int, set[int]] = defaultdict(set)
    distances: dict[int, float] = defaultdict(float)
    for (first, second), distance in pairs.items():
        root = find(first)
        members[root] |= {first, second}
        distances[root] = max(distances[root], distance)
    return [(sorted(records), distances[root]) for root, records in members.items()]


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
