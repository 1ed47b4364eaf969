"""Ranges of bytes in shards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """One shard as its commit describes it: path, size and hash."""

    path: str
    bytes: int
    hash: str


@dataclass(frozen=True)
class Piece:
    """Bytes to read: `target` is filled from `offset` on."""

    shard: Shard
    offset: int
    target: memoryview
