"""Storage for writing during a run: each write first checks that the run still owns the store."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from latentmill.errors import StoreError
from latentmill.storage.storage import Storage


class GuardedStorage(Storage):
    """A store that this run owns by a lease, which it may lose while its process is paused.

    `check` runs right before each write and each retry of one; it raises StoreError if another run
    owns the store. Between the check and the write, another run's files are protected as well: new
    files are created only if the name is free, and `write` replaces a file in `followed` only if it
    is the version from the start of this run, or a version that this run wrote. This needs a
    backend that can compare versions (docs/storage.md).
    """

    def __init__(self, url: str, check: Callable[[], None], followed: tuple[str, ...] = ()) -> None:
        super().__init__(url)
        self._check = check
        self._versions = {path: self.version(path) for path in followed}

    def __reduce__(self) -> NoReturn:
        # The method of Storage would make a copy without the check.
        raise TypeError(
            "GuardedStorage cannot be pickled: send the lease owner's name and use guarded()."
        )

    def check_writable(self) -> None:
        """Raise StoreError if this run no longer owns the store."""
        self._check()

    def write(self, path: str, data: bytes) -> None:
        """Write a file atomically; StoreError if another run has the store or replaced the file."""
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
        super().delete(path)
        if path in self._versions:
            self._versions[path] = None
