"""Imported values by key, in a temporary file on disk."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from latentmill.errors import StorageError
from latentmill.record import FloatArray

_CACHE = 32 << 10  # KiB of the file that are in memory
_AT_ONCE = 900  # rows of a transaction, keys of a query (SQLite may allow 999)


@dataclass(frozen=True)
class Imported:
    """What is known of a value without reading it.

    Attributes:
        key: The key of its item.
        wrong: Why it cannot be used; None if it can.
        hash: Hash of its shape and its bytes, hex.
        dimensions: Its last dimension.
        ndim: Number of its dimensions, 1 or 2.
        path: The file that has it; None if it is in the table.
    """

    key: str
    wrong: str | None
    hash: str | None
    dimensions: int
    ndim: int
    path: str | None


class ImportTable:
    """A table of values in the folder for temporary files (TMPDIR), without a name there.

    The file is gone when the process ends, however it ends. The memory needed does not depend on
    the number of values.
    """

    def __init__(self) -> None:
        with _using():
            self._db = sqlite3.connect("", isolation_level=None)
            for setting in (f"cache_size = -{_CACHE}", "journal_mode = OFF", "temp_store = FILE"):
                self._db.execute(f"PRAGMA {setting}")
            self._db.execute(
                "CREATE TABLE found (key TEXT UNIQUE NOT NULL, wrong TEXT, hash TEXT, "
                "dimensions INTEGER, ndim INTEGER, path TEXT, dtype TEXT, data BLOB)"
            )

    def add(self, rows: Iterable[tuple[str, FloatArray | str, str | None]]) -> None:
        """Add keys with their values, or with what is wrong with them, and the file that has them.

        Raises:
            ValueError: A key is there twice.
            StorageError: The folder for temporary files is full.
        """
        with _using():
            self._db.execute("BEGIN")
            for number, (key, value, path) in enumerate(rows, 1):
                try:
                    self._db.execute(
                        "INSERT INTO found VALUES (?, ?, ?, ?, ?, ?, ?, ?)", _row(key, value, path)
                    )
                except sqlite3.IntegrityError as error:
                    raise ValueError(f"it has the key {key} more than once") from error
                if number % _AT_ONCE == 0:
                    self._db.execute("COMMIT")
                    self._db.execute("BEGIN")
            self._db.execute("COMMIT")

    def first(self) -> Imported | None:
        """The first value that can be used."""
        return self._first_that("wrong IS NULL")

    def first_wrong(self) -> Imported | None:
        """The first value that cannot be used."""
        return self._first_that("wrong IS NOT NULL")

    def _first_that(self, condition: str) -> Imported | None:
        with _using():
            found = self._db.execute(f"{_SELECT} WHERE {condition} ORDER BY rowid LIMIT 1")
            row = found.fetchone()
        return None if row is None else Imported(*row)

    def find(self, keys: list[str]) -> dict[str, Imported]:
        """What is known of the values of some keys; those that are not there are left out."""
        found: dict[str, Imported] = {}
        with _using():
            for some in _parts(keys):
                marks = ",".join("?" * len(some))
                rows = self._db.execute(f"{_SELECT} WHERE key IN ({marks})", some)
                found |= {row[0]: Imported(*row) for row in rows}
        return found

    def value(self, key: str) -> FloatArray:
        """The value of a key that has one in the table."""
        query = "SELECT dtype, data, dimensions, ndim FROM found WHERE key = ?"
        with _using():
            dtype, data, dimensions, ndim = self._db.execute(query, (key,)).fetchone()
        array = np.frombuffer(data, dtype)
        return array.reshape(-1, dimensions) if ndim == 2 else array

    def unknown(self, keys: Iterable[str], most: int) -> tuple[int, list[str]]:
        """The number of keys in the table that are not among `keys`, and the first of them."""
        with _using():
            self._db.execute("CREATE TEMP TABLE known (key TEXT PRIMARY KEY) WITHOUT ROWID")
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR IGNORE INTO known VALUES (?)", ((key,) for key in keys))
            self._db.execute("COMMIT")
            absent = "FROM found WHERE NOT EXISTS (SELECT 1 FROM known WHERE known.key = found.key)"
            (count,) = self._db.execute(f"SELECT count(*) {absent}").fetchone()
            rows = self._db.execute(f"SELECT key {absent} ORDER BY key LIMIT ?", (most,))
            names = [key for (key,) in rows]
            self._db.execute("DROP TABLE known")
        return count, names


_SELECT = "SELECT key, wrong, hash, dimensions, ndim, path FROM found"


def _row(key: str, value: FloatArray | str, path: str | None) -> tuple[object, ...]:
    if isinstance(value, str):
        return key, value, None, None, None, path, None, None
    kept = None if path is not None else value.tobytes()
    digest = hash_of(value)
    return key, None, digest, value.shape[-1], value.ndim, path, value.dtype.str, kept


def hash_of(value: FloatArray) -> str:
    """Hash of a value's shape and bytes, hex."""
    return xxhash.xxh3_64_hexdigest(repr(value.shape).encode() + value.tobytes())


def _parts(keys: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), _AT_ONCE):
        yield keys[start : start + _AT_ONCE]


@contextlib.contextmanager
def _using() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OverflowError) as error:
        raise StorageError(
            f"Cannot keep imported values in the folder for temporary files ({error}): free space "
            "there, or set TMPDIR to another folder."
        ) from error
