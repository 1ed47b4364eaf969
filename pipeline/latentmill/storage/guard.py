"""Storage that a run writes through: each write first checks that the store is still this run's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from latentmill.errors import StoreError
from latentmill.storage.storage import Storage


class GuardedStorage(Storage):
    """A store that this run holds by a lease, which it may lose while it is paused.

    The check comes right before each write and each new attempt of one. What another run writes
    between the check and the write is not lost either: new names are create-only, and `write`
    replaces a file of `followed` only if it is the version that was there when this run began, or
    that this run wrote (where the backend can compare: docs/storage.md).

    Args:
        url: The store.
        check: Raises StoreError when the store is another run's.
        followed: The paths of files that runs replace.
    """

    def __init__(self, url: str, check: Callable[[], None], followed: tuple[str, ...] = ()) -> None:
        super().__init__(url)
        self._check = check
        self._versions = {path: self.version(path) for path in followed}

    def __reduce__(self) -> NoReturn:
        # Storage's would make a copy that checks nothing.
        raise TypeError("GuardedStorage cannot be pickled: another process takes the owner's name.")

    def check_writable(self) -> None:
        """Make sure that the store is still this run's.

        Raises:
            StoreError: It is not.
        """
        self._check()

    def write(self, path: str, data: bytes) -> None:
        """Write a whole file, or nothing.

        Raises:
            StoreError: Another run has taken the store, or has replaced the file.
        """
        if path not in self._versions:
            super().write(path, data)
            return
        if not self.replace(path, data, self._versions[path]):
            raise StoreError(
                f"Another run has replaced {self.root}/{path}: wait until that run has ended, then "
                "run again."
            )
        self._versions[path] = self.version(path)

    def delete(self, path: str) -> None:
        """Remove a file, if it is there."""
        super().delete(path)
        if path in self._versions:
            self._versions[path] = None
