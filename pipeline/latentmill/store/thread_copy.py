"""Copies of open stores and readers for another thread, which share what does not change."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeVar

from latentmill.store.fields import ShardFields
from latentmill.store.prefetch import PrefetchedRanges

if TYPE_CHECKING:
    from latentmill.store.store import LatentStore

T = TypeVar("T")
_SHARED = (
    "_info",
    "_model",
    "_loading",
    "_reloading",
    "_shard_fields",
    "ranges",
    "index",
    "plan",
    "commits",
    "origin",
    "annotations",
)


def thread_copy(one: T, memo: dict[int, Any], shared: Collection[str]) -> T:
    """A deep copy of all attributes, also of cached ones, except those whose names are `shared`."""
    copied = object.__new__(type(one))
    memo[id(one)] = copied
    for name, value in vars(one).items():
        copied.__dict__[name] = value if name in shared else copy.deepcopy(value, memo)
    return copied


def copy_of_store(store: LatentStore, memo: dict[int, Any]) -> LatentStore:
    """A copy that shares the index, the model and whatever else was read of the store."""
    for info in [] if store.bases is None else store.bases.infos:
        memo[id(info)] = info
    copied = thread_copy(store, memo, _SHARED)
    copied._shard_fields = ShardFields(copied.storage)
    copied.ranges = PrefetchedRanges(copied.storage)
    return copied
