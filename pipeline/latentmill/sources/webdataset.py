"""WebDataset tars: each audio member is an item, which is read by its position in the tar.

Listing reads only headers and small metadata members; encoding reads each item with one range
request. Only members with listed extensions are used, and no member is ever executed or unpacked.
"""

from __future__ import annotations

import io
import json
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from latentmill.errors import ItemError, SourceError
from latentmill.sources.base import ByteRange, Item
from latentmill.sources.columns import METADATA_LIMIT
from latentmill.sources.files import File, Place, find_files
from latentmill.sources.metadata import parse_sidecar
from latentmill.sources.names import (
    APPLE_DOUBLE,
    as_key,
    dotted,
    is_apple_double,
    without_extensions,
)
from latentmill.storage.remote import Retries, cause_of, retrying, storage_errors
from latentmill.storage.threads import map_in_threads

METADATA = (".json", ".txt", ".cls")
TARS = (".tar",)
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED_NAMES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

# webdataset's own rule: up to the first dot of the base name.
_SAMPLE = re.compile(r"(?P<key>(?:.*/)?[^/.]+)\.(?P<extension>[^/]*)", re.DOTALL)

LARGEST_HEADER = 1 << 20  # bytes; long names need large headers
LARGEST_TAR = 1 << 62  # bytes; a member that ends beyond is invalid
READ_AHEAD = 128 << 10  # bytes of a request for a header in a remote tar
_ZEROS = 64 << 10  # bytes that are read at a time between tars
PARALLEL_TARS = 8  # remote tars whose headers are read at the same time


@dataclass(frozen=True)
class _Member:
    """A regular file in a tar; `text` is the content of a small metadata member."""

    name: str
    offset: int
    size: int
    text: bytes | None = None


class WebDatasetSource:
    """The audio members of tars: a tar, a folder of tars, a glob or a brace pattern.

    A key is the tar's name without `.tar`, a slash, and the member's name without its extension
    (`shard-000/album/song`), so that the items of a tar are adjacent in the plan. Consecutive
    members with the same WebDataset key (the name up to the first dot) are a sample: its `.json`,
    `.txt` and `.cls` members are the metadata of its audio members. If a sample has several audio
    members, `song.drums.json` belongs to `song.drums.wav` only.
    """

    def __init__(self, uri: str, extensions: Sequence[str]) -> None:
        self._place = Place(uri)
        self._extensions = dotted(extensions)
        self.uri = self._place.uri
        self.ignored: Counter[str] = Counter()

    def items(self) -> Iterator[Item]:
        """Yield the items; see `Source.items`."""
        self.ignored.clear()
        if self.uri.lower().endswith(_COMPRESSED_NAMES):
            raise SourceError(_compressed(self.uri))
        tars = find_files(self._place, TARS, self.ignored)
        scanned = (
            map(self._scan, tars)
            if self._place.local
            else map_in_threads(self._scan, tars, threads=PARALLEL_TARS, prefetch=PARALLEL_TARS + 1)
        )
        found = 0
        for items, ignored in scanned:
            found += len(items)
            self.ignored.update(ignored)
            yield from items
        if not found:
            raise SourceError(
                f"Source {self.uri} contains no audio: no member of its {len(tars)} tars ends in "
                f"{', '.join(self._extensions)}; set --extensions."
            )

    def _scan(self, tar: File) -> tuple[list[Item], Counter[str]]:
        """The items and ignored members of a tar."""
        ignored: Counter[str] = Counter()
        retries = Retries()
        try:
            # A retry after a lost connection must read the tar from its start.
            items: list[Item] = retrying(lambda: self._read(tar, ignored, retries), retries)
            return items, ignored
        # ValueError: from `tarfile` for invalid numbers, from fsspec's http without ranges.
        except storage_errors(ValueError) as error:
            cause = cause_of(error).split(". ")[0]
            raise SourceError(f"Tar {tar.uri} cannot be read: {cause}.") from error
        except (tarfile.TarError, RecursionError) as error:  # recursion: thousands of headers
            raise SourceError(
                f"Tar {tar.uri} is not a valid tar file ({error}): recreate it or exclude it."
            ) from error

    def _read(self, tar: File, ignored: Counter[str], retries: Retries) -> list[Item]:
        ignored.clear()
        items: list[Item] = []
        sample: list[_Member] = []
        key = None
        with self._open(tar) as file:
            for member in _members(file, tar, ignored):
                retries.progress()
                if is_apple_double(member.name):
                    ignored[APPLE_DOUBLE] += 1
                    continue
                match = _SAMPLE.fullmatch(member.name)
                if match is None:
                    ignored["members without an extension"] += 1
                    continue
                if match["key"] != key:
                    items += self._items_of(tar, sample, ignored)
                    sample, key = [], match["key"]
                sample.append(member)
        items += self._items_of(tar, sample, ignored)
        uses = Counter(item.key for item in items)
        if duplicates := sorted(key for key, count in uses.items() if count > 1):
            name = duplicates[0].removeprefix(f"{posixpath.splitext(tar.name)[0]}/")
            raise SourceError(
                f"Tar {tar.uri} contains several audio members with the key {name!r} "
                f"({len(duplicates)} such keys): rename them and recreate the tar."
            )
        return items

    def _open(self, tar: File) -> IO[bytes]:
        if self._place.local:
            return Path(tar.path).open("rb")
        file: IO[bytes] = self._place.fs.open(
            tar.path, "rb", block_size=READ_AHEAD, cache_type="readahead"
        )
        return file

    def _items_of(self, tar: File, sample: list[_Member], ignored: Counter[str]) -> Iterator[Item]:
        """The items of one sample: one per audio member."""
        audio = [m for m in sample if _extension(m.name) in self._extensions]
        others = [m for m in sample if _extension(m.name) not in self._extensions]
        used: set[str] = set()
        names = without_extensions([member.name for member in audio])
        for member in audio:
            own = [other for other in others if _belongs(other, member, alone=len(audio) == 1)]
            used |= {other.name for other in own}
            metadata, broken = _metadata(tar.uri, own)
            yield Item(
                key=f"{posixpath.splitext(tar.name)[0]}/{as_key(names[member.name])}",
                uri=tar.uri,
                size=member.size,
                version=tar.version,
                place=ByteRange(member.offset, member.size),
                sidecars=tuple(broken),
                metadata=json.dumps(metadata, ensure_ascii=False),
                extension=_extension(member.name).removeprefix("."),
            )
        for other in others:
            if other.name not in used:
                ignored[_extension(other.name)] += 1


def _extension(name: str) -> str:
    return posixpath.splitext(name)[1].lower() or "no extension"


def _belongs(other: _Member, audio: _Member, *, alone: bool) -> bool:
    """Whether a metadata member of a sample belongs to an audio member of the sample."""
    if other.text is None:
        return False
    stem = posixpath.splitext(other.name)[0]
    return alone or "." not in posixpath.basename(stem) or stem == posixpath.splitext(audio.name)[0]


def _metadata(tar: str, members: Sequence[_Member]) -> tuple[dict[str, Any], list[str]]:
    """The merged metadata of some members, and the addresses of invalid ones.

    Encoding reads the invalid ones as sidecars, and their item fails with the reason.
    """
    metadata: dict[str, Any] = {}
    broken = []
    for member in members:
        name = as_key(posixpath.basename(member.name))
        try:
            given = parse_sidecar(name, member.text or b"")
        except ItemError:
            given = None
        if given is None or any(key in metadata and metadata[key] != given[key] for key in given):
            last = member.offset + member.size - 1
            broken.append(f"{tar}#bytes={member.offset}-{last}/{name}")
        else:
            metadata |= given
    return metadata, broken


def _members(file: IO[bytes], tar: File, ignored: Counter[str]) -> Iterator[_Member]:
    """The regular files of a tar, in order; other members are counted in `ignored`."""
    head = file.read(6)
    file.seek(0)
    if any(head.startswith(magic) for magic in COMPRESSED):
        raise SourceError(_compressed(tar.uri))
    offset = 0
    while (found := _next_tar(file, offset, ignored)) is not None:
        headers = _Headers(file)
        with tarfile.open(fileobj=headers, mode="r:") as reader:
            end = 0
            while (info := reader.next()) is not None:
                headers.next_member(reader)
                if info.offset_data <= end and end:
                    raise tarfile.ReadError(f"members overlap at byte {info.offset}")
                end = info.offset_data
                if not info.isreg() or info.issparse():
                    if not info.isdir():
                        ignored[_kind(info)] += 1
                    continue
                if info.offset_data + info.size > LARGEST_TAR:
                    raise tarfile.ReadError(f"a member of {info.size} bytes")
                if info.offset_data + info.size > tar.size:  # reading the member will fail
                    ignored["tars without an end mark"] += 1
                    yield _Member(info.name, info.offset_data, info.size)
                    return
                text = None
                if _extension(info.name) in METADATA and info.size <= METADATA_LIMIT:
                    file.seek(info.offset_data)
                    text = file.read(info.size)
                yield _Member(info.name, info.offset_data, info.size, text)
            _check_end(file, reader.offset, ignored)
            offset = max(reader.offset, found) + tarfile.BLOCKSIZE


def _next_tar(file: IO[bytes], offset: int, ignored: Counter[str]) -> int | None:
    """Go to the next tar in a file made by `cat a.tar b.tar`; None if there is no other."""
    file.seek(offset)
    if offset == 0:
        return 0
    while piece := file.read(_ZEROS):
        zeros = (len(piece) - len(piece.lstrip(b"\0"))) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        offset += zeros
        if zeros < len(piece):
            break
    file.seek(offset)
    header = file.read(tarfile.BLOCKSIZE)
    if not header:
        return None
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        ignored["tars with other bytes after their end"] += 1
        return None
    file.seek(offset)
    return offset


def _kind(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return "links in tars"
    return "sparse members" if info.issparse() else "devices and other special members"


def _check_end(file: IO[bytes], offset: int, ignored: Counter[str]) -> None:
    """Check that a tar ends with a block of zeros; `tarfile` accepts any end."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:  # truncated between two members or in the data of the last one
        ignored["tars without an end mark"] += 1
    elif block.strip(b"\0"):
        raise tarfile.ReadError(f"no valid header at byte {offset}")


class _Headers(io.RawIOBase):
    """The file that `tarfile` reads headers from, with a limit on their size.

    `tarfile` would read as many bytes as a header claims. The headers of one member together may
    have `LARGEST_HEADER` bytes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left = LARGEST_HEADER

    def next_member(self, reader: tarfile.TarFile) -> None:
        """Allow the next member its full headers, and free the previous ones."""
        reader.members = []  # type: ignore[attr-defined]
        self._left = LARGEST_HEADER
        kept = sum(len(name) + len(value) for name, value in reader.pax_headers.items())
        if kept > LARGEST_HEADER:
            raise tarfile.ReadError(f"global headers of more than {LARGEST_HEADER} bytes")

    def read(self, size: int = -1, /) -> bytes:
        self._left -= size
        if size < 0 or self._left < 0:
            raise tarfile.ReadError(f"a member's headers are larger than {LARGEST_HEADER} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if not 0 <= offset <= LARGEST_TAR:
            raise tarfile.ReadError(f"a member that ends at byte {offset}")
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _compressed(uri: str) -> str:
    return (
        f"Tar {uri} is compressed, so single members cannot be read: decompress it to a .tar file."
    )
