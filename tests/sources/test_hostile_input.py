"""Archives and manifests made to exhaust memory: an error of one sentence, in bounded memory."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MIB = 1 << 20
ALLOWED_MIB = 120  # beside what importing takes: a row of 16 MiB, as text and parsed

SCRIPT = """
import json, resource, sys
from latentmill.errors import SourceError
from latentmill.plan.items import draft_table
from latentmill.sources.manifest import ManifestSource
from latentmill.sources.webdataset import WebDatasetSource

def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

for path in sys.argv[1:]:
    source = WebDatasetSource(path, ["wav"]) if path.endswith(".tar") else ManifestSource(path)
    before = used()
    try:
        for item in source.items():
            draft_table([item])
        said = "nothing"
    except SourceError as error:
        said = str(error)
    except Exception as error:
        said = repr(error)
    print(json.dumps([used() - before, said]))
"""


def header(name: str, size: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT)


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)


def record(name: str, value: str) -> bytes:
    """A PAX record, which begins with its own length."""
    rest = f" {name}={value}\n".encode()
    length = len(rest)
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


SONG = member("a.wav", b"abc") + bytes(1024)


def pax(**records: str) -> Iterator[bytes]:
    fields = {name.replace("_", "."): value for name, value in records.items()}
    yield member("x", b"".join(record(*one) for one in fields.items()), tarfile.XHDTYPE)
    yield SONG


def large_pax(kind: bytes) -> Iterator[bytes]:
    yield header("x", 200 * MIB, kind)
    yield from (b"x" * MIB for _ in range(200))
    yield SONG


def many_pax(kind: bytes, count: int, size: int) -> Iterator[bytes]:
    for number in range(count):
        yield member("x", record(f"comment{number}", "x" * size), kind)
        if kind == tarfile.XGLTYPE:
            yield member(f"{number}.txt", b"")
    yield SONG


def one_line(begin: str, end: str) -> Iterator[bytes]:
    yield begin.encode()
    yield from (b"x" * MIB for _ in range(300))
    yield end.encode()


def many_lines() -> Iterator[bytes]:
    """One row of a CSV file, each of whose fields has a line end in it."""
    yield b'path,x\n"a.wav"'
    yield from (b',"\n' + b"x" * MIB + b'"' for _ in range(300))
    yield b"\n"


def parquet(columns: dict[str, object], **options: object) -> Iterator[bytes]:
    table = pa.table({"path": [f"{n}.wav" for n in range(len(columns["x"]))], **columns})
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", **options)
    yield out.getvalue()


def zstd(parts: Iterator[bytes]) -> Iterator[bytes]:
    out = io.BytesIO()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        for part in parts:
            stream.write(part)
        stream.flush()
        yield out.getvalue()


CASES: dict[str, tuple[str, Callable[[], Iterator[bytes]], str]] = {
    "one PAX header of 200 MiB": ("a.tar", lambda: large_pax(tarfile.XHDTYPE), "headers are larg"),
    "a name of 200 MiB": ("a.tar", lambda: large_pax(tarfile.GNUTYPE_LONGNAME), "headers are larg"),
    "200 PAX headers": ("a.tar", lambda: many_pax(tarfile.XHDTYPE, 200, MIB // 2), "headers are l"),
    "deep PAX headers": ("a.tar", lambda: many_pax(tarfile.XHDTYPE, 1000, 1), "is not a valid tar"),
    "global headers": ("a.tar", lambda: many_pax(tarfile.XGLTYPE, 200, MIB // 2), "global headers"),
    "a huge size": ("a.tar", lambda: pax(size="9" * 20), "a member of 9{20} bytes"),
    "a size of 63 bits": (
        "a.tar",
        lambda: pax(size=str(2**63 - 1)),
        "a member of 9223372036854775",
    ),
    "a negative size": ("a.tar", lambda: pax(size="-1024"), "is not a valid tar file"),
    "a huge sparse size": (
        "a.tar",
        lambda: pax(GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_realsize="9" * 20),
        "cannot be read",
    ),
    "a list of 8 million numbers": (
        "m.parquet",
        lambda: parquet({"x": pa.array([[0.0] * 8_000_000], pa.list_(pa.float32()))}),
        "row 1 exceeds 16 MiB",
    ),
    "a page of 200 MiB": (
        "m.parquet",
        lambda: parquet({"x": ["y" * MIB] * 200}, use_dictionary=False),
        "of column x decompress to 200 MiB",
    ),
    "a JSON line": (
        "m.jsonl.gz",
        lambda: one_line('{"path": "a.wav", "x": "', '"}\n'),
        "line 1 is",
    ),
    "a JSON line without path": (
        "m.jsonl.gz",
        lambda: one_line("", ""),
        "line 1 is longer than 16",
    ),
    "a JSON line, by zstd": (
        "m.jsonl.zst",
        lambda: zstd(one_line('{"path": "a.wav", "x": "', '"}\n')),
        "line 1 is longer than 16",
    ),
    "a CSV line": ("m.csv.gz", lambda: one_line("path,x\na.wav,", "\n"), "line 2 is longer than"),
    "a CSV header": ("m.csv.gz", lambda: one_line("path,", "\na.wav,"), "line 1 is longer than"),
    "a CSV row of lines": ("m.csv.gz", many_lines, "line 18 is longer than 16 MiB"),
    "a TSV line": ("m.tsv.gz", lambda: one_line("path\tx\na.wav\t", "\n"), "line 2 is longer than"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """MiB of memory that each case took, and what was said; all in one process of its own."""
    paths = []
    for name, content, _ in CASES.values():
        paths.append(tmp_path_factory.mktemp("case") / name)
        with gzip.open(paths[-1], "wb", 1) if name.endswith(".gz") else paths[-1].open("wb") as out:
            out.writelines(content())
    command = [sys.executable, "-c", SCRIPT, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_memory_is_bounded_and_the_error_says_what_is_wrong(
    case: str, results: dict[str, tuple[int, str]]
) -> None:
    used, said = results[case]
    assert re.search(CASES[case][2], said)
    assert said == "nothing" or re.fullmatch(r"(Tar|Manifest|Table) [^\n]*\.", said)
    assert ". " not in said
    assert used < ALLOWED_MIB
