"""What a copy of a store lacks, and what it has that the store no longer has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from latentmill.errors import ConfigError
from latentmill.export.conversion import refuse_unless_empty
from latentmill.plan import PLAN, Plan, load
from latentmill.publishing.contents import StoreFile, StoreFiles, UnitFiles
from latentmill.storage.remote import protocol_of
from latentmill.storage.storage import Storage
from latentmill.store.annotations import ANNOTATIONS, annotation_path, is_annotation_file
from latentmill.store.card import MARKER
from latentmill.store.commit import READERS, hash_of
from latentmill.store.field_layout import FIELDS
from latentmill.store.measurement import EVALUATION
from latentmill.store.results import VECTORS_FILE
from latentmill.store.schema import (
    CARD_PATH,
    COMMITS,
    DATASET_PATH,
    INDEX_NAME,
    METADATA_NAME,
    SHARDS,
    parse_name,
)
from latentmill.store.tidy import PLAN_FILE

# What must be equal in the plans of a store and its copy.
_IDENTITY = ("source", "fingerprint", "format", "model", "model_options", "field")


@dataclass(frozen=True)
class CopyDifference:
    """What to write to a copy, in this order, and what to remove after that.

    Attributes:
        first: As in `StoreFiles`.
        units: For each unit what the copy lacks: the shard, and then the commit, or one of them.
        last: As in `StoreFiles`.
        seal: Whether dataset.json differs.
        kept: Number of files that the copy has already.
        remove: Files that no seal needs any more.
    """

    first: tuple[StoreFile, ...]
    units: tuple[tuple[StoreFile, ...], ...]
    last: tuple[StoreFile, ...]
    seal: bool
    kept: int
    remove: tuple[str, ...]

    def files(self) -> Iterator[StoreFile]:
        """The files to write, without dataset.json."""
        yield from self.first
        for unit in self.units:
            yield from unit
        yield from self.last


def difference(
    contents: StoreFiles,
    dest: Storage,
    check_new: Callable[[Storage], None] = refuse_unless_empty,
) -> CopyDifference:
    """Compare a destination with the store, without writing. `check_new` refuses other contents.

    A commit is written after its shard was verified, so the shard of an equal commit is only
    checked for its size. If the destination has the same dataset.json, its commits are trusted,
    too.

    Raises:
        ConfigError: The destination has something else, or is another store.
    """
    existing = load(dest)
    if existing is None:
        check_new(dest)
    else:
        _check_same_plan(contents, existing, dest)
    sealed = dest.read_if_exists(DATASET_PATH) == contents.seal
    listed = {
        f"{folder}/{name}".lstrip("/"): size
        for folder in ("", PLAN, SHARDS, COMMITS, *_folders(contents.last))
        for name, size in dest.list(folder).items()
    }
    uncommitted = _uncommitted(contents, dest, listed, sealed=sealed)
    units = []
    for unit in contents.units:
        lacking = [unit.commit] if unit in uncommitted else []
        shard = unit.shard
        if shard is not None and (lacking or listed.get(shard.path) != shard.size):
            lacking.insert(0, shard)
        if lacking:
            units.append(tuple(lacking))
    _check_annotations(contents, dest, listed)
    first, last = (
        tuple(file for file in files if not _has(dest, file, listed, trusted=sealed))
        for files in (contents.first, contents.last)
    )
    if _is_own_card(contents, dest, listed):
        last = tuple(file for file in last if file.path != CARD_PATH)
    everything = dest.local or protocol_of(dest.root) == "hf"  # a commit removes them
    lacking_files = len(first) + sum(map(len, units)) + len(last) + (not sealed)
    return CopyDifference(
        first,
        tuple(units),
        last,
        not sealed,
        kept=sum(1 for _ in contents.files()) + 1 - lacking_files,
        remove=tuple(_superseded(contents, listed, everything=everything)),
    )


def _check_same_plan(contents: StoreFiles, existing: Plan, dest: Storage) -> None:
    plan = contents.plan
    same = all(getattr(existing, name) == getattr(plan, name) for name in _IDENTITY)
    for part in existing.parts if same else ():
        newer = plan.parts[part.number] if part.number < len(plan.parts) else None
        same = newer is not None and (newer == part or newer.revision > part.revision)
        if not same:
            break
    if not same:
        raise ConfigError(
            f"{dest.root} is not a copy of {contents.storage.root}, but another store: "
            f"{_advice(dest)}."
        )


def _uncommitted(
    contents: StoreFiles, dest: Storage, listed: Mapping[str, int], *, sealed: bool
) -> set[UnitFiles]:
    """The units whose commits the destination lacks; ConfigError if it has other commits."""
    revisions = {unit.unit: unit.revision for unit in contents.units}
    for path in listed:
        folder, _, name = path.rpartition("/")
        parsed = parse_name(name) if folder == COMMITS else None
        if parsed and parsed[1] > revisions.get(parsed[0], -1):
            raise _encoded_itself(dest, path)
    there = [unit for unit in contents.units if unit.commit.path in listed]
    todo = set(contents.units) - set(there)

    def is_equal(unit: UnitFiles) -> bool:
        return listed[unit.commit.path] == unit.commit.size and (
            sealed or _matches(dest, unit.commit)
        )

    with ThreadPoolExecutor(READERS, thread_name_prefix="commits") as pool:
        for unit, equal in zip(there, pool.map(is_equal, there), strict=True):
            if not equal:
                raise _encoded_itself(dest, unit.commit.path)
    return todo


def _check_annotations(contents: StoreFiles, dest: Storage, listed: Mapping[str, int]) -> None:
    """Refuse a destination that has been annotated itself, which would lose its annotations.

    It may have files of earlier versions that were deleted in the source.
    """
    entry = contents.info.annotation
    hashes = [] if entry is None else entry.hashes
    expected = {annotation_path(number): digest for number, digest in enumerate(hashes, 1)}
    for path in filter(is_annotation_file, listed):
        with dest.open(path) as file:
            same = hash_of(file) == expected.get(path)
        if not same:
            raise _encoded_itself(dest, path)


def _encoded_itself(dest: Storage, path: str) -> ConfigError:
    return ConfigError(
        f"{dest.root} has changes of its own or is damaged ({path} differs from the source): "
        f"{_advice(dest)}."
    )


def _advice(dest: Storage) -> str:
    """What to do about a destination that cannot be updated. A field in a copy can be removed."""
    base, _, name = dest.root.rpartition(f"/{FIELDS}/")
    plan = load(dest)
    if base and "/" not in name and plan is not None and plan.field is not None:
        return f"run `latentmill drop {base} --field {name}`, then run sync again"
    return "use an empty destination"


def _has(dest: Storage, file: StoreFile, listed: Mapping[str, int], *, trusted: bool) -> bool:
    """Whether the destination has a file. Names that are written once are trusted after a seal."""
    if listed.get(file.path) != file.size:
        return False
    return (trusted and not file.replaced) or _matches(dest, file)


def _matches(dest: Storage, file: StoreFile) -> bool:
    with dest.open(file.path) as opened:
        digest = hash_of(opened)
        return file.matches(opened.tell(), digest)


def _is_own_card(contents: StoreFiles, dest: Storage, listed: Mapping[str, int]) -> bool:
    """Whether README.md was written by hand at the destination only. It stays then."""
    if CARD_PATH not in listed or MARKER.encode() in dest.read(CARD_PATH):
        return False
    card = contents.storage.read_if_exists(CARD_PATH)
    return card is None or MARKER.encode() in card


def _superseded(
    contents: StoreFiles, listed: Mapping[str, int], *, everything: bool
) -> Iterator[str]:
    """Files of earlier seals.

    A shard of a current or later revision that no commit lists may be one that a paused worker of
    another run is about to commit, unless the destination is a disk or the hub (`everything`).
    """
    needed = {file.path for file in contents.files()}
    revisions = {unit.unit: unit.revision for unit in contents.units}
    for path in sorted(set(listed) - needed):
        folder, _, name = path.rpartition("/")
        if folder in (SHARDS, COMMITS) and (parsed := parse_name(name)):
            if everything or parsed[1] < revisions.get(parsed[0], 0):
                yield path
        elif (folder == PLAN and PLAN_FILE.fullmatch(name)) or (
            not folder and re.fullmatch(f"{INDEX_NAME}|{METADATA_NAME}", name)
        ):
            yield path
        elif re.fullmatch(VECTORS_FILE, path) and f"{EVALUATION}/statistics.json" in needed:
            yield path  # of statistics that are replaced, if the copy has any


def _folders(files: tuple[StoreFile, ...]) -> list[str]:
    return sorted({ANNOTATIONS, *(file.path.rpartition("/")[0] for file in files)} - {""})
