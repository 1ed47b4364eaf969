"""WebDataset shards: for each record, a Fortran-ordered `.npy` of `[C, T]` and a `.json`.

numpy loads `[C, T]`, and the bytes are time-major.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from latentmill.record import Latent, Record, time_major_bytes
from latentmill.store.schema import json_fields
from latentmill.store.writers import Location


class TarShardWriter:
    """Writes one WebDataset tar; see `ShardWriter`."""

    max_latent_bytes = 2**40

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        # Fixed times and owners, so that the same records result in the same bytes.
        self._tar = TarWriter(self._file, encoder=False, mtime=0, format="PAX_FORMAT")
        self._headers: list[int] = []  # bytes of each .npy header

    def add(self, record: Record) -> None:
        header = npy_header(record.latent)
        self._headers.append(len(header))
        self._tar.write(
            {
                "__key__": member_key(record.key),
                "json": json.dumps(json_fields(record), ensure_ascii=False).encode(),
                "npy": header + time_major_bytes(record.latent),
            }
        )

    def close(self) -> list[Location]:
        """Complete the tar and read the positions of its members."""
        self._tar.close()
        self._file.close()
        with tarfile.open(self._path, "r:") as tar:
            members = tar.getmembers()
        return [
            Location(npy.offset_data + header, npy.size - header, fields.offset_data, fields.size)
            for fields, npy, header in zip(members[::2], members[1::2], self._headers, strict=True)
        ]

    def abort(self) -> None:
        """Close and remove the file: a tar that ends after any member would be valid."""
        with contextlib.suppress(OSError):
            self._tar.close()
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._path.unlink()


def member_key(key: str) -> str:
    """Return an item's name in a tar; `urllib.parse.unquote` restores the key.

    WebDataset ends a name at the first dot after the last slash, so dots are escaped there. `..`
    and a leading slash are escaped so that unpacking the tar stays inside its folder.
    """
    *folders, name = key.replace("%", "%25").split("/")
    folders = ["%2E" * len(part) if part in (".", "..") else part for part in folders]
    path = "/".join([*folders, name.replace(".", "%2E")])
    return "%2F" + path[1:] if path.startswith("/") else path


def npy_header(latent: Latent) -> bytes:
    """Return the .npy header for a latent's time-major bytes (chunks `[N, C, T]` are C-ordered)."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(  # type: ignore[no-untyped-call]
        buffer,
        {
            "descr": latent.dtype.str,
            "fortran_order": latent.ndim == 2,
            "shape": latent.shape,
        },
    )
    return buffer.getvalue()
