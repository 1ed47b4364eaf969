"""Temporary files, each with a lock while it is written, which ends with the process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from latentmill.errors import ConfigError, StorageError, StoreError

_File = TypeVar("_File")
SCRATCH = "tmp"  # the folder of temporary files in a local store
_DIGITS = 32
_NAME = re.compile(rf"[0-9a-f]{{{_DIGITS}}}\..+", re.DOTALL)  # of a temporary file
_LOCK = ".lock"  # the file DIGITS.lock is locked while DIGITS.NAME is written
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_ATTEMPTS = 1000  # a cause that lasts longer is not a race: e.g. a file has the folder's name


@contextlib.contextmanager
def temporary_file(folder: Path, name: str) -> Iterator[Path]:
    """Create an empty file, and its folder if needed; remove both at the end.

    A second file is locked meanwhile, because on SMB a locked file can only be written to through
    the descriptor that has the lock. Raises StoreError if the folder is a link.
    """
    _refuse_link(folder)
    number = uuid.uuid4().hex
    temporary = folder / f"{number}.{name}"
    with _locked_file(folder / f"{number}{_LOCK}"):
        temporary.touch(exist_ok=False)  # not mkstemp: only its user could read the finished file
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked_file(path: Path) -> Iterator[None]:
    """Create and lock an empty file; remove it at the end, and its folder if that is empty."""
    try:
        while True:
            with open_in_folder(path, lambda path: path.open("xb")) as file:
                if lock(file) and path.exists():  # else `clear` removed it before it was locked
                    yield
                    break
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        _remove_if_empty(path.parent)


@contextlib.contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file that is renamed to it when it is complete.

    For files in a user's folder, where no folder for temporary files is wanted. The folder of
    `path` is created if needed; what is left of the file at the end is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".latentmill-{uuid.uuid4().hex}.part")  # `path` may be a long name
    try:
        yield partial
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def check_replaceable(path: Path) -> None:
    """Raise ConfigError if a path is a folder, a device or another special file."""
    if path.is_dir():
        raise ConfigError(f"{str(path)!r} is a folder: give the name of a file in it.")
    if path.exists() and not path.is_file():
        raise ConfigError(
            f"{path} is not a regular file and cannot be replaced: choose another output path."
        )


def clear(folder: Path) -> None:
    """Remove temporary files that killed processes left in a folder.

    Files that are being written stay, and so does everything that `temporary_file` did not create.
    On a file system without locks nothing is removed. Raises StoreError if the folder is a link.
    """
    _refuse_link(folder)
    try:
        found = [*folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):  # another process may remove it at any time
        return
    for left in filter(is_temporary, found):
        with contextlib.suppress(OSError), _open_guard(left) as file:
            if try_lock(file):
                left.unlink()
    _remove_if_empty(folder)


def _open_guard(temporary: Path) -> BinaryIO:
    """Open the file that is locked while a temporary file is written."""
    try:
        return open_to_lock(temporary.with_name(temporary.name[:_DIGITS] + _LOCK))
    except FileNotFoundError:  # an earlier version has locked the temporary file itself
        return open_to_lock(temporary)


def is_temporary(path: Path) -> bool:
    """Whether a file has a name that `temporary_file` gives. It may be gone meanwhile."""
    named = _NAME.fullmatch(path.name) is not None
    return named and not path.is_symlink() and (path.is_file() or not path.exists())


def has_only_temporary(folder: Path) -> bool:
    """Whether a folder has nothing that `clear` would keep. It may not exist."""
    try:
        return not folder.is_symlink() and all(map(is_temporary, folder.iterdir()))
    except FileNotFoundError:
        return True
    except OSError:  # it is a file, or cannot be read
        return False


def entries(folder: Path) -> set[str]:
    """Names in a folder, which may not exist, without `tmp` if it has only temporary files."""
    try:
        names = {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise StorageError(
            f"Cannot list {folder}: {error.strerror}: use another folder, or make it readable."
        ) from error
    return names - {SCRATCH} if has_only_temporary(folder / SCRATCH) else names


def open_in_folder(path: Path, open_file: Callable[[Path], _File]) -> _File:
    """Open a file in a folder that other threads and processes create, and remove when it is empty.

    The folder may vanish between any two steps: also inside `mkdir`, which then reports that a file
    exists although none does.
    """
    attempts = _ATTEMPTS
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return open_file(path)
        except (FileNotFoundError, FileExistsError):
            attempts -= 1
            if not attempts:
                raise


def lock(file: BinaryIO, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock a file until it is closed; False if another process has locked it.

    On a network file system without locks, it is assumed to be free.
    """
    try:
        return try_lock(file, kind)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return True


def try_lock(file: BinaryIO, kind: int = fcntl.LOCK_EX) -> bool:
    """Like `lock`, but raises OSError on a file system without locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter on SMB
        return False
    return True


def open_to_lock(path: Path) -> BinaryIO:
    """Open a file that exists: for writing if possible, which NFS demands for exclusive locks."""
    with contextlib.suppress(OSError):
        return path.open("r+b")
    return path.open("rb")


def _refuse_link(folder: Path) -> None:
    """Raise StoreError if the folder is a link, which may lead to files of the user."""
    if folder.is_symlink():
        raise StoreError(f"{folder} is a link: remove it first.")


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def link(temporary: Path, target: Path) -> None:
    """Link a file under a new name; FileExistsError if the name is taken."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # SMB and FAT have no hard links: check the name, then rename.
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        temporary.replace(target)
