"""Temporary files, locked while they are written; an unlocked one was left by a killed process."""

from __future__ import annotations

import contextlib
import fcntl
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from latentmill.errors import ConfigError, StorageError, StoreError

_File = TypeVar("_File")
SCRATCH = "tmp"  # the folder of temporary files in a local store
_NAME = re.compile(r"[0-9a-f]{32}\..+", re.DOTALL)  # of a temporary file
_ATTEMPTS = 1000  # a cause that lasts longer is not a race: e.g. a file has the folder's name


@contextlib.contextmanager
def temporary_file(folder: Path, name: str) -> Iterator[Path]:
    """Create an empty file, and its folder if needed; remove both at the end.

    Raises StoreError if the folder is a link.
    """
    _refuse_link(folder)
    # Not mkstemp: only its user could read the finished file.
    temporary = folder / f"{uuid.uuid4().hex}.{name}"
    while True:
        file = open_in_folder(temporary, lambda path: path.open("xb"))
        if lock(file) and temporary.exists():
            break
        file.close()  # `clear` removed it before it was locked
    try:
        with file:
            yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        _remove_if_empty(folder)


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
    Raises StoreError if the folder is a link.
    """
    _refuse_link(folder)
    for left in filter(is_temporary, folder.iterdir() if folder.is_dir() else ()):
        with contextlib.suppress(OSError), left.open("rb") as file:
            if lock(file):
                left.unlink()
    _remove_if_empty(folder)


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
    """Lock a file until it is closed; False if another process has locked it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks: assume that it is free
        return True
    return True


def _refuse_link(folder: Path) -> None:
    """It may lead to files of the user."""
    if folder.is_symlink():
        raise StoreError(f"{folder} is a link: remove it first.")


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
