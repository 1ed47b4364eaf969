"""Parquet shards whose latents can be read by byte range, and that any Parquet tool can read.

The `latent` column is required, PLAIN, uncompressed, without dictionary or statistics, and each row
group is one page. Each value is a 4-byte length and the raw bytes, so the footer determines its
position.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.record import Record, time_major_bytes
from latentmill.store.schema import FIELD_NAMES, FIELDS_TYPE, RECORD_SCHEMA, record_fields
from latentmill.store.writers import Location

ROW_GROUP_ITEMS = 16
ROW_GROUP_BYTES = 1 << 20
LENGTH_PREFIX = 4  # bytes before each value of a PLAIN byte array

_LATENT = RECORD_SCHEMA.get_field_index("latent")
_COLUMN_PATHS = ["shape.list.element" if name == "shape" else name for name in FIELD_NAMES]


class ParquetShardWriter:
    """Writes one Parquet shard; see `ShardWriter`."""

    # A page's size is a signed 32-bit number; 2**16 bytes are reserved for header and prefix.
    max_latent_bytes = 2**31 - 2**16

    def __init__(self, path: Path, info: Mapping[str, Any]) -> None:
        self._path = path
        metadata = {"latentmill": json.dumps(info, sort_keys=True)}
        self._footer: list[pq.FileMetaData] = []  # when the file is closed
        self._sink = pa.OSFile(str(path), "wb")
        self._file = pq.ParquetWriter(
            self._sink,
            RECORD_SCHEMA.with_metadata(metadata),
            compression={"latent": "NONE", **dict.fromkeys(_COLUMN_PATHS, "ZSTD")},
            use_dictionary=[p for p in _COLUMN_PATHS if p != "key"],
            write_statistics=_COLUMN_PATHS,
            data_page_size=2**31 - 1,
            data_page_version="1.0",
            write_page_checksum=True,
            metadata_collector=self._footer,
        )
        self._rows: list[Record] = []
        self._bytes = 0
        self._lengths: list[list[int]] = []  # of the latents, by row group

    def add(self, record: Record) -> None:
        """Add a record; writes the row group when it is full."""
        size = record.latent.nbytes
        if self._rows and self._bytes + size > ROW_GROUP_BYTES:
            self._flush()
        self._rows.append(record)
        self._bytes += size
        if len(self._rows) >= ROW_GROUP_ITEMS:
            self._flush()

    def close(self) -> list[Location]:
        """Write the footer; return the latents' positions according to it, checked in the file."""
        self._flush()
        self._file.close()
        self._sink.close()
        [footer] = self._footer
        locations: list[Location] = []
        with self._path.open("rb") as file:
            for group, lengths in enumerate(self._lengths):
                column = footer.row_group(group).column(_LATENT)
                values = sum(LENGTH_PREFIX + length for length in lengths)
                position = column.data_page_offset + column.total_compressed_size - values
                for length in lengths:
                    file.seek(position)
                    prefix = int.from_bytes(file.read(LENGTH_PREFIX), "little")
                    assert prefix == length, "a row group is one page of plain values"
                    locations.append(Location(position + LENGTH_PREFIX, length))
                    position += LENGTH_PREFIX + length
        return locations

    def abort(self) -> None:
        """Close and remove the file: closing writes a valid footer even to an unfinished file."""
        # RuntimeError: there is no footer, because the disk is full.
        with contextlib.suppress(OSError, pa.ArrowException, RuntimeError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._sink.close()  # else the disk would stay full until the writer is deleted
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _flush(self) -> None:
        if not self._rows:
            return
        fields = [record_fields(record) for record in self._rows]
        latents = [time_major_bytes(record.latent) for record in self._rows]
        columns = dict(zip(FIELD_NAMES, pa.array(fields, FIELDS_TYPE).flatten(), strict=True))
        if len(latents) == 1:  # a large latent is not copied
            offsets = pa.py_buffer(b"".join(n.to_bytes(8, "little") for n in (0, len(latents[0]))))
            buffers = [None, offsets, pa.py_buffer(latents[0])]
            columns["latent"] = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, buffers)
        else:
            columns["latent"] = pa.array([bytes(one) for one in latents], pa.large_binary())
        arrays = [columns[name] for name in RECORD_SCHEMA.names]
        table = pa.Table.from_arrays(arrays, schema=self._file.schema)
        self._file.write_table(table, row_group_size=len(self._rows))
        self._lengths.append([len(latent) for latent in latents])
        self._rows, self._bytes = [], 0
