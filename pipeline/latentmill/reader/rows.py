"""Reading records by row: by the index of one seal, as long as its shards are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from latentmill.errors import StorageError, StoreError
from latentmill.store.index import Index
from latentmill.store.store import LatentStore

T = TypeVar("T")


class RowReader:
    """Reads records by row (position in the sorted keys).

    It has an index of its own: the store may meanwhile show another one, of a later seal. When a
    superseded shard is gone, it goes on with the present index, if that has the same items.

    Attributes:
        store: The store.
    """

    def __init__(self, store: LatentStore) -> None:
        self.store = store
        self._place(store.index)

    def _place(self, index: Index) -> None:
        """Find the records by an index."""
        self._index = index

    @property
    def items_hash(self) -> str:
        """A hash of what the rows mean: see `Index.items_hash`."""
        return self._index.items_hash

    def key(self, row: int) -> str:
        """The key of a row."""
        return self._index.key(row)

    def row(self, key: str) -> int:
        """The row of a key; KeyError if there is none."""
        row = self._index.find(key)
        if row is None:
            raise KeyError(key)
        return row

    def _following(self, read: Callable[[], T]) -> T:
        """Read; again by the present index, as often as a shard is gone and there is a new seal.

        Raises:
            StoreError: The store was sealed again with other items.
        """
        while True:
            try:
                return read()
            except StorageError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                if self.store.index is self._index and not self.store.reload():
                    raise
                check_items(self.store, self.items_hash)
                self._place(self.store.index)


def check_items(store: LatentStore, items_hash: str) -> None:
    """Make sure that rows mean what they meant to a reader of an index with this hash.

    Raises:
        StoreError: The store was sealed again with other items, or items of other lengths.
    """
    if store.index.items_hash != items_hash:
        raise StoreError(
            f"{store.url} was sealed again with other items while it was read: open it again."
        )
