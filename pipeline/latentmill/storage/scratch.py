"""Temporary files, locked while they are written; an unlocked one was left by a killed process."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from latentmill.errors import ConfigError

_File = TypeVar("_File")
_ATTEMPTS = 1000  # a cause that lasts longer is not a race: e.g. a file has the folder's name


@contextlib.contextmanager
def temporary_file(folder: Path, name: str) -> Iterator[Path]:
    """Create an empty file, and its folder if needed; remove both at the end."""
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
    """Remove files that killed processes left in a folder; keep files that are being written."""
    for left in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
                continue
            with left.open("rb") as file:
                if lock(file):
                    left.unlink()
    _remove_if_empty(folder)


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


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
