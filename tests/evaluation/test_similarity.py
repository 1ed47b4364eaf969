"""Near duplicates, compared with their definition; memory with many of them."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from latentmill.evaluation.similarity import LENGTHS, NEAR, Groups, near_groups


def vectors_of(random: np.random.Generator, sizes: list[int], spread: float) -> np.ndarray:
    """Vectors of length 1 in groups that are about as wide as near duplicates are."""
    centres = random.standard_normal((len(sizes), 64)).repeat(sizes, 0)
    vectors = centres + spread * random.standard_normal(centres.shape)
    vectors = vectors[random.permutation(len(vectors))]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def plain(
    vectors: np.ndarray, frames: np.ndarray, use: np.ndarray
) -> list[tuple[list[int], float]]:
    """The definition: connected pairs that are near and of about the same length."""
    exact = vectors.astype(np.float64)
    distances = 1 - exact @ exact.T
    near = (distances < NEAR) & use & use[:, None]
    longer = np.maximum(frames, frames[:, None])
    near &= abs(frames - frames[:, None]) <= np.maximum(4, LENGTHS * longer)
    found, left = [], set(np.flatnonzero(use).tolist())
    while left:
        group, new = set(), {min(left)}
        while new:
            group |= new
            new = set(np.flatnonzero(near[list(new)].any(axis=0)).tolist()) - group
        left -= group
        members = sorted(group)
        if len(members) > 1:
            pairs = distances[np.ix_(members, members)][near[np.ix_(members, members)]]
            found.append((members, max(0.0, float(pairs[pairs != 0].max()))))
    return found


@pytest.mark.parametrize("pairs", [1 << 17, 1000])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_groups_are_those_of_the_definition(
    pairs: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some groups are chains, because not all of their pairs are near; lengths split others."""
    random = np.random.default_rng(seed)
    vectors = vectors_of(random, [1] * 300 + [2] * 50 + [40] * 10 + [900], 0.098)
    frames, use = random.integers(390, 410, len(vectors)), random.random(len(vectors)) < 0.9
    monkeypatch.setattr("latentmill.evaluation.similarity.PAIRS", pairs)
    found, wanted = near_groups(vectors, frames, use), plain(vectors, frames, use)
    assert [records for records, _ in found] == [records for records, _ in wanted]
    assert [d for _, d in found] == pytest.approx([d for _, d in wanted], abs=1e-6)
    assert len(found) > 20
    assert any(len(records) > 100 for records, _ in found)


def test_memory_does_not_grow_with_the_pairs() -> None:
    """2,000 similar records are two million pairs."""
    vectors = vectors_of(np.random.default_rng(1), [2000, *[1] * 500], 0.03)
    count = len(vectors)
    tracemalloc.start()
    (found,) = near_groups(vectors, np.full(count, 100), np.ones(count, bool))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found[0]) == 2000
    assert peak < 150 << 20


@pytest.mark.parametrize("order", ["as they are", "reversed", "shuffled"])
def test_a_long_chain_is_one_group(order: str) -> None:
    first = np.arange(100_000)
    if order == "reversed":
        first = first[::-1]
    if order == "shuffled":
        first = np.random.default_rng(0).permutation(first)
    groups = Groups(100_002)
    groups.connect(first[:50_000], first[:50_000] + 1, 0.25)
    groups.connect(first[50_000:] + 1, first[50_000:], 0.5)
    assert groups.found() == [(list(range(100_001)), 0.5)]
