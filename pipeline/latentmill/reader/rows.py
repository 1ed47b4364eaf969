"""Reading records by row, also after the store was sealed again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from latentmill.errors import DamagedShardError, LatentmillError, StorageError, StoreError
from latentmill.reader.order import Ints
from latentmill.storage.remote import was_removed
from latentmill.store.index import Index
from latentmill.store.seal import check_fingerprint
from latentmill.store.store import LatentStore
from latentmill.store.thread_copy import thread_copy

T = TypeVar("T")


class RowReader:
    """Base of the readers that read records by row (position in the sorted keys).

    A reader keeps the index that it was created with, even if the store has loaded a later seal.
    If a superseded shard was removed, it switches to the current index, provided that this has the
    same items and fingerprint.
    """

    def __init__(self, store: LatentStore, *options: Any) -> None:
        """`options` are the constructor's other arguments, for pickling."""
        self.store, self._options = store, options
        self._fingerprint = store.info.fingerprint
        self._use_index(store.index)

    def __reduce__(self) -> tuple[Callable[..., RowReader], tuple[Any, ...]]:
        made_for = (self._fingerprint, self.items_hash)
        return _unpickled, (type(self), made_for, self.store, *self._options)

    def __deepcopy__(self, memo: dict[int, Any]) -> RowReader:
        """A copy for another thread: it shares the index, but not what `_reset` makes."""
        copied = thread_copy(self, memo, vars(self).keys() - {"store"})
        copied._reset()
        return copied

    def _use_index(self, index: Index) -> None:
        """Use an index to find records."""
        self._index = index
        self._reset()

    @abstractmethod
    def _reset(self) -> None:
        """Start without open files and without anything kept that was read."""

    @property
    def items_hash(self) -> str:
        """A hash of the items that the rows refer to; see `Index.items_hash`."""
        return self._index.items_hash

    def key(self, row: int) -> str:
        return self._index.key(row)

    def keys(self, rows: Ints) -> list[str]:
        return self._index.keys(rows)

    def row(self, key: str) -> int:
        row = self._index.find(key)
        if row is None:
            raise KeyError(key)
        return row

    def rows_of(self, other: RowReader) -> Ints | None:
        """This reader's rows of another's records, -1 for those it lacks; None if all are equal."""
        return self._index.positions_of(other._index)

    def _with_current_index(self, read: Callable[[], T]) -> T:
        """Call `read`, again after each new seal; see `with_current_index`."""
        return with_current_index([self], read)

    def renew(self) -> bool:
        """Use the index of the current seal; returns whether it is another one.

        Raises StoreError if the items or the fingerprint are no longer the same.
        """
        if self.store.index is self._index and not self.store.reload():
            return False
        check_items(self.store, self._fingerprint, self.items_hash)
        self._use_index(self.store.index)
        return True


def with_current_index(readers: Sequence[RowReader], read: Callable[[], T]) -> T:
    """Call `read`, which uses these readers, again after each new seal.

    It is called again if a shard was removed or another file has its name.
    """
    while True:
        try:
            return read()
        except StorageError as error:
            if not (isinstance(error, DamagedShardError) or was_removed(error.__cause__)):
                raise
            renewed = [reader.renew() for reader in dict.fromkeys(readers)]
            if not any(renewed):
                raise


def with_current_rows(stores: Sequence[LatentStore], read: Callable[[], T]) -> T:
    """Call `read`, again after each new seal, until its rows are those of the stores' indexes."""
    while True:
        indexes = [store.index for store in stores]
        try:
            found = read()
        except LatentmillError:
            if _are_current(stores, indexes):
                raise
        else:
            if _are_current(stores, indexes):
                return found


def _are_current(stores: Sequence[LatentStore], indexes: Sequence[Index]) -> bool:
    return all(store.index is index for store, index in zip(stores, indexes, strict=True))


def _unpickled(
    kind: type[RowReader], made_for: tuple[str, str], store: LatentStore, *options: Any
) -> RowReader:
    check_items(store, *made_for)  # the caller may hold rows of the old index
    return kind(store, *options)


def check_items(store: LatentStore, fingerprint: str, items_hash: str) -> None:
    """Raise StoreError if the rows of the store's index no longer refer to the same items.

    Also if its values were computed with other settings; see `check_fingerprint`.
    """
    check_fingerprint(store.url, store.info, fingerprint)
    if store.index.items_hash != items_hash:
        raise StoreError(
            f"{store.url} was sealed again with other items while it was being read: open it again."
        )
