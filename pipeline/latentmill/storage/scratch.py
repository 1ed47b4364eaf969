"""Temporary files, locked while they are written; an unlocked one was left by a killed process."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def temporary_file(folder: Path, name: str) -> Iterator[Path]:
    """Create an empty file, and its folder if needed; remove both at the end."""
    temporary, lock = _new_file(folder, name)
    try:
        with lock:
            yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        _remove_if_empty(folder)


def clear(folder: Path) -> None:
    """Remove files that killed processes left in a folder; keep files that are being written."""
    for left in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
                continue
            with left.open("rb") as file:
                if _locked(file):
                    left.unlink()
    _remove_if_empty(folder)


def _new_file(folder: Path, name: str) -> tuple[Path, BinaryIO]:
    # Not mkstemp: only its user could read the finished file.
    temporary = folder / f"{uuid.uuid4().hex}.{name}"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = temporary.open("xb")
        except FileNotFoundError:  # another process has just removed the empty folder
            continue
        if _locked(file) and temporary.exists():
            return temporary, file
        file.close()  # `clear` removed it before it was locked


def _locked(file: BinaryIO) -> bool:
    """Lock a file until it is closed; False if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks: assume that it is free
        return True
    return True


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
