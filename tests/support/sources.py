"""The same recordings as every kind of source, on any storage."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.config import load_config
from latentmill.sources.base import Item, Source
from latentmill.sources.open import open_source


@dataclass(frozen=True)
class Recording:
    """A file: its path without an extension, that, its bytes and what is said of it."""

    name: str
    extension: str
    data: bytes
    metadata: Mapping[str, Any]

    @property
    def path(self) -> str:
        return f"{self.name}{self.extension}"


@dataclass(frozen=True)
class Written:
    """A source that was written: how to open it, and each recording's key by its name."""

    uri: str
    keys: Mapping[str, str]
    ignored: Mapping[str, int]
    options: Mapping[str, Any]

    def open(self, **options: Any) -> Source:
        given = {"source": self.uri, "out": "/nowhere", **self.options, **options}
        return open_source(load_config(None, given))


def put(url: str, data: bytes) -> str:
    """Write an object."""
    fs, path = fsspec.core.url_to_fs(url)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    fs.pipe_file(path, data)
    return url


def sorted_items(source: Source) -> list[Item]:
    return sorted(source.items(), key=lambda item: item.key)


def tar_of(members: Sequence[tuple[str, bytes]]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return target.getvalue()


def as_folder(url: str, recordings: Sequence[Recording]) -> Written:
    for one in recordings:
        put(f"{url}/{one.path}", one.data)
        put(f"{url}/{one.name}.json", json.dumps(one.metadata).encode())
    put(f"{url}/cover.jpg", b"\xff\xd8")
    return Written(url, {one.name: one.name for one in recordings}, {".jpg": 1}, {})


def as_tars(url: str, recordings: Sequence[Recording]) -> Written:
    keys = {}
    for number in range(2):
        members = []
        for one in recordings[number::2]:
            members += [
                (f"{one.name}.json", json.dumps(one.metadata).encode()),
                (one.path, one.data),
                (f"{one.name}.jpg", b"\xff\xd8"),
            ]
            keys[one.name] = f"shard-{number}/{one.name}"
        put(f"{url}/tars/shard-{number}.tar", tar_of(members))
    return Written(f"{url}/tars/shard-{{0..1}}.tar", keys, {".jpg": len(recordings)}, {})


def as_parquet(url: str, recordings: Sequence[Recording]) -> Written:
    fields = sorted({field for one in recordings for field in one.metadata})
    keys = {}
    for number in range(2):
        part = recordings[number::2]
        columns: dict[str, Any] = {
            "audio": pa.array(
                [{"bytes": one.data, "path": None} for one in part],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            **{field: [one.metadata.get(field) for one in part] for field in fields},
        }
        target = io.BytesIO()
        pq.write_table(pa.table(columns), target, row_group_size=3)
        put(f"{url}/data/train-{number}.parquet", target.getvalue())
        keys |= {one.name: f"train-{number}/{row:08d}" for row, one in enumerate(part)}
    return Written(f"{url}/data", keys, {}, {"source_type": "parquet"})


def _rows(recordings: Sequence[Recording]) -> list[dict[str, Any]]:
    return [{"path": f"audio/{one.path}", **one.metadata} for one in recordings]


def _with_audio(url: str, recordings: Sequence[Recording]) -> dict[str, str]:
    for one in recordings:
        put(f"{url}/audio/{one.path}", one.data)
    return {one.name: f"audio/{one.name}" for one in recordings}


def as_csv(url: str, recordings: Sequence[Recording]) -> Written:
    fields = ["path", *sorted({field for one in recordings for field in one.metadata})]
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(_rows(recordings))
    writer.writerow({"title": "nothing to hear"})
    put(f"{url}/list.csv", text.getvalue().encode())
    keys = _with_audio(url, recordings)
    return Written(f"{url}/list.csv", keys, {"rows without a path": 1}, {})


def as_jsonl(url: str, recordings: Sequence[Recording]) -> Written:
    lines = "\n".join(json.dumps(row) for row in _rows(recordings))
    put(f"{url}/list.jsonl.gz", gzip.compress(lines.encode()))
    return Written(f"{url}/list.jsonl.gz", _with_audio(url, recordings), {}, {})


def as_table(url: str, recordings: Sequence[Recording]) -> Written:
    target = io.BytesIO()
    fields = ["path", *sorted({field for one in recordings for field in one.metadata})]
    rows = [{field: row.get(field) for field in fields} for row in _rows(recordings)]
    pq.write_table(pa.Table.from_pylist(rows), target)
    put(f"{url}/list.parquet", target.getvalue())
    return Written(f"{url}/list.parquet", _with_audio(url, recordings), {}, {})


def as_nemo(url: str, recordings: Sequence[Recording]) -> Written:
    rows = [{"audio_filepath": f"audio/{one.path}", **one.metadata} for one in recordings]
    put(f"{url}/nemo.json", "\n".join(json.dumps(row) for row in rows).encode())
    return Written(f"{url}/nemo.json", _with_audio(url, recordings), {}, {})


KINDS = {
    "folder": as_folder,
    "webdataset": as_tars,
    "parquet": as_parquet,
    "csv": as_csv,
    "jsonl": as_jsonl,
    "table": as_table,
    "nemo": as_nemo,
}


def recordings_in(folder: Path, extensions: Sequence[str]) -> list[Recording]:
    """The files of a folder, each with some metadata."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in extensions)
    return [
        Recording(
            name=path.relative_to(folder).with_suffix("").as_posix(),
            extension=path.suffix,
            data=path.read_bytes(),
            metadata={"title": f"Stück {number}", "bpm": 60 + number},
        )
        for number, path in enumerate(paths)
    ]
