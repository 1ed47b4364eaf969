"""Counts the rounds of requests that a remote store answers: those of a round run in parallel."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from latentmill.storage.storage import Storage

Range = tuple[str, int, int]  # path, offset, length


def shard_rounds(patch: pytest.MonkeyPatch, url: str) -> list[Sequence[Range]]:
    """A list that grows with the ranges of each round for shards of the store at `url`."""
    rounds: list[Sequence[Range]] = []
    root = Storage(url).root
    one, many = Storage.read_range, Storage.read_ranges

    def read_range(self: Storage, path: str, offset: int, length: int) -> bytes:
        if self.root == root and path.startswith("shards/"):
            rounds.append([(path, offset, length)])
        return one(self, path, offset, length)

    def read_ranges(self: Storage, ranges: Sequence[Range]) -> Sequence[bytes]:
        if self.root == root and ranges and ranges[0][0].startswith("shards/"):
            rounds.append(ranges)
        return many(self, ranges)

    patch.setattr(Storage, "read_range", read_range)
    patch.setattr(Storage, "read_ranges", read_ranges)
    return rounds
