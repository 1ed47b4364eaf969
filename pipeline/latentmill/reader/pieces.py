"""Byte ranges in shards, to be read into buffers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Path, size and hash of a shard, from its commit."""

    path: str
    bytes: int
    hash: str


@dataclass(frozen=True)
class Piece:
    """A range to read: fills `target` with bytes from `offset` on."""

    shard: Shard
    offset: int
    target: memoryview
