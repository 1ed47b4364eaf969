"""Reading a store: records by key, origin, statistics, decoding."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, TypeVar

import pyarrow as pa
import xxhash

from latentmill.decoding.decoder import LatentSource
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.stored import deviations_of, refuse_damaged, refuse_earlier_rows
from latentmill.errors import ConfigError, DamagedShardError, StorageError, StoreError, restore_hint
from latentmill.models.inference.precision import Precision
from latentmill.ops import Linearity, Origin
from latentmill.plan import PLAN_PATH, Plan, load
from latentmill.record import Latent, Record, latent_from_bytes, time_major_bytes
from latentmill.storage.remote import protocol_of, was_removed
from latentmill.storage.storage import Storage
from latentmill.store.annotations import Annotations, open_annotations
from latentmill.store.bases import Bases
from latentmill.store.commit import read_commits
from latentmill.store.decoder import StoreDecoder
from latentmill.store.describe import described, is_complete, read_index, warn_incomplete
from latentmill.store.fields import ShardFields, parse_member
from latentmill.store.index import Index, IndexEntry, to_batch
from latentmill.store.measurement import read_measurement, with_measurements
from latentmill.store.prefetch import PrefetchedRanges, prefetched
from latentmill.store.schema import Commit, DatasetInfo, levels_of, record_from_fields
from latentmill.store.seal import check_fingerprint, dataset_info, read_origin, read_seal
from latentmill.text.shown import Shown

T = TypeVar("T")

# A larger latent is not read at once: decoding reads it window by window.
_WHOLE_BYTES = 64 << 20


def open_store(
    url: str | os.PathLike[str],
    *,
    device: str = "auto",
    trust_model: bool = False,
    model_options: Mapping[str, Any] | None = None,
) -> LatentStore:
    """Open a store for reading.

    The store of an unfinished run can be opened, too: its committed records are available, and an
    `IncompleteStoreWarning` is issued.

    Args:
        url: Folder or fsspec URL.
        device: Device for `decode`: `auto`, `cpu`, `cuda`, `cuda:1`.
        trust_model: Whether `decode` may import and run the model that the store specifies if it is
            not built in. Use it only for stores whose author you trust.
        model_options: Options of the model that change only decoding, e.g. `diffusion_steps`.

    Raises:
        StoreError: `url` is not a store, or the store is damaged.
    """
    store = LatentStore(url, device=device, trust_model=trust_model, model_options=model_options)
    warn_incomplete(store)
    return store


class LatentStore(StoreDecoder, Shown):
    """The records of a store, by key and in key order.

    Picklable and fork-safe: it keeps no open files. Threads can share it (docs/latents.md).

    Attributes:
        storage: Access to the store's files.
        sealed: Whether the store has a dataset.json.
        bases: The stores that have the records, if this is a view.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        device: str = "auto",
        trust_model: bool = False,
        model_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.storage = Storage(os.fspath(url))
        super().__init__(device, trust_model=trust_model, model_options=model_options)
        self._use_seal(read_seal(self.storage))
        self.sealed = self._info is not None
        if not self.sealed and not self.storage.exists(PLAN_PATH):
            hub = protocol_of(self.url) == "hf"
            login = ", and log in with `hf auth login` if it is private" if hub else ""
            raise StoreError(f"{url} is not a latentmill store: check the path{login}.")

    def _use_seal(self, info: DatasetInfo | None) -> None:
        own = Storage(self.url)
        self._info = info
        self.bases = Bases(own, info.bases) if info is not None and info.bases else None
        self.storage = own if self.bases is None else self.bases.storage
        self._shard_fields = ShardFields(self.storage)
        self.ranges = PrefetchedRanges(self.storage)

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, **self._opened_with}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def shown(self) -> Mapping[str, object]:
        """The values that `repr` and notebooks display, without reading files."""
        return described(self.url, self._info, sealed=self.sealed)

    @property
    def url(self) -> str:
        """The URL or path of the store."""
        return self.storage.root

    @cached_property
    def plan(self) -> Plan:
        """The plan; not needed for reading a sealed store. A view has none: see its bases."""
        plan = load(self.storage if self.bases is None else self.bases.first)
        if plan is None:
            raise StoreError(f"{self.url} has no {PLAN_PATH}: restore it from a copy of the store.")
        refuse_damaged(plan.fingerprint, f"{self.url}/{PLAN_PATH}", "model", "chunking")
        return plan

    @property
    def precision(self) -> Precision:
        """The numeric precision with which the latents were encoded."""
        refuse_damaged(self.plan.fingerprint, f"{self.url}/{PLAN_PATH}", "numeric")
        precision: Precision = self.plan.fingerprint["numeric"]["precision"]
        return precision

    @cached_property
    def commits(self) -> dict[str, Commit]:
        """The latest commit of every unit, by unit name; read on first access."""
        return read_commits(self.storage)

    @property
    def complete(self) -> bool:
        """Whether every unit is committed and the seal is up to date.

        Checks file names only; `verify` checks the contents.
        """
        return is_complete(self)

    @property
    def info(self) -> DatasetInfo:
        """The contents of dataset.json; for an unsealed store, computed from its commits."""
        if self._info is None:
            self._info = dataset_info(self.plan, self.commits.values())
        return self._info

    @property
    def measured_info(self) -> DatasetInfo:
        """`info` with the results measured on the current seal."""
        return with_measurements(self.storage, self.info)

    @property
    def chunking(self) -> Chunking:
        """The chunking with which the items were encoded."""
        return Chunking(**self.info.chunking)

    @cached_property
    def origin(self) -> Origin:
        """The latent of silence and the model properties that latent arithmetic needs."""
        model = self.info.model
        refuse_earlier_rows(model, self.url)
        # A result from an earlier seal is as valid: it is a property of the model.
        measured = read_measurement(self.storage, self.info, "linearity")
        card = None if measured is None else measured.linearity
        names = Linearity.__dataclass_fields__
        return Origin(
            read_origin(self.storage, model["latent_channels"]),
            self.chunking,
            deviations=deviations_of(model),
            codes=self.codes,
            linearity=None if card is None else Linearity(**{n: getattr(card, n) for n in names}),
        )

    @cached_property
    def annotations(self) -> Annotations | None:
        """Metadata that was added after encoding; None if there is none."""
        entry = self.info.annotation if self.sealed else None
        return None if entry is None else open_annotations(self.storage, entry)

    @property
    def fields(self) -> list[str]:
        """Names of the store's fields, or of those that all bases of a view have."""
        from latentmill.store.field_view import names_of_fields  # which imports this module

        return names_of_fields(self)

    def field(self, name: str) -> LatentStore:
        """Open a field of the store, which is a store too. StoreError if there is none."""
        from latentmill.store.field_view import open_field

        return open_field(self, name, self._device)

    @cached_property
    def index(self) -> Index:
        """The location of every record."""
        if not self.sealed:
            return Index.from_batches([to_batch(one) for one in self.commits.values()])
        index = read_index(self)
        return index if self.bases is None else self.bases.current(index)

    def reload(self) -> bool:
        """Read dataset.json again, for example after a file of the old seal was removed.

        Returns whether it has changed. If so, this object now represents the new seal.
        """
        with self._reloading:
            if not self.sealed or (found := read_seal(self.storage)) is None:
                return False
            check_fingerprint(self.url, found, self.info.fingerprint)
            if found != self._info:
                self._use_seal(found)
            elif self.bases is None or not self.bases.reload():
                return False
            for name in ("index", "plan", "commits", "origin", "annotations"):
                self.__dict__.pop(name, None)
            self._shard_fields.clear()
            return True

    def shard_sizes(self) -> dict[str, tuple[int, str]]:
        """Return the size in bytes and the hash of every shard, by path."""
        if self.bases is not None:
            return self.bases.shard_sizes
        if self.sealed:
            return {shard.path: (shard.bytes, shard.hash) for shard in self.info.shards}
        return {c.shard: (c.bytes, c.hash or "") for c in self.commits.values() if c.shard}

    def __len__(self) -> int:
        return len(self.index)

    def keys(self) -> Iterator[str]:
        """The keys of all records, sorted."""
        return self.index.all_keys()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.index.find(key) is not None

    def __iter__(self) -> Iterator[Record]:
        index = self.index
        return map(self.read, prefetched(self, map(index.entry, range(len(index)))))

    def __getitem__(self, key: str) -> Record:
        """Read the record with this key; KeyError if there is none."""
        return self.read(self.entry(key))

    def entry(self, key: str) -> IndexEntry:
        """Return the index entry of a key; KeyError if there is none."""
        if not isinstance(key, str):
            raise ConfigError(
                f"Records are read by key, not by {key!r}: use store[key] with a key from "
                "store.keys(), or LatentDataset to read by number."
            )
        position = self.index.find(key)
        if position is None:
            raise KeyError(key)
        return self.index.entry(position)

    def read(self, entry: IndexEntry) -> Record:
        """Read the record of an index entry, even if its shard has been replaced since.

        Raises:
            StorageError: The shard cannot be read or is damaged.
        """
        return self._read_current(entry, self._record)

    def without_latent(self, key: str) -> Record:
        """Read a record's fields only; its latent has no frames. KeyError if there is none."""
        return self._read_current(
            self.entry(key), lambda entry: self._with_fields(entry, b"", (entry.channels, 0))
        )

    def _record(self, entry: IndexEntry) -> Record:
        data = self._read(entry, entry.offset, entry.length)
        if xxhash.xxh3_64_intdigest(data) != entry.hash:
            raise self._damaged(entry, "the latent does not match its hash")
        record = self._with_fields(entry, data, entry.shape)
        start = partial(self.decode_start, record.latent, record.num_samples)
        object.__setattr__(record, "_decode_start", start)  # frozen
        return record

    def _with_fields(self, entry: IndexEntry, data: bytes, shape: tuple[int, ...]) -> Record:
        try:
            fields = self._fields(entry)
            if fields["key"] != entry.key:
                raise self._damaged(entry, f"the fields belong to {fields['key']}")
            if self.annotations is not None:
                merged = self.annotations.merged(entry.key, fields["metadata"])
                fields = {**fields, "metadata": merged}
            return record_from_fields(fields, latent_from_bytes(data, shape, fields["dtype"]))
        except (ValueError, TypeError, LookupError, pa.ArrowException) as error:
            raise self._damaged(entry, "its columns cannot be read") from error

    def crop(self, key: str, start: int, frames: int) -> Latent:
        """Read frames `start` to `start + frames` of a stitched latent, `[channels, frames]`.

        Reads only their bytes, so the latent's hash is not checked. The result is read-only.

        Raises:
            KeyError: There is no record with this key.
            IndexError: The frames are out of range.
            ConfigError: The store contains overlapping chunks (`stitch: none`).
        """
        return self._read_current(self.entry(key), lambda entry: self._crop(entry, start, frames))

    def _crop(self, entry: IndexEntry, start: int, frames: int) -> Latent:
        if entry.chunks:
            raise ConfigError(
                f"{self.url} contains overlapping chunks, which cannot be cropped in time: read "
                "whole records, or encode with stitch trim or crossfade."
            )
        if not 0 <= start < start + frames <= entry.frames:
            end = start + frames
            raise IndexError(f"{entry.key} has {entry.frames} frames, not {start} to {end}")
        width = entry.length // entry.frames  # bytes per frame
        data = self._read(entry, entry.offset + start * width, frames * width)
        return latent_from_bytes(data, (entry.channels, frames), self.info.dtype)

    def levels(self, key: str) -> bytes | None:
        """Read the stored loudness of each frame; decode it with `record.decibels`.

        None with `stitch: none`, and in stores of versions that did not measure it.
        """
        return levels_of(self._read_current(self.entry(key), self._fields))

    def source(self, key: str) -> LatentSource:
        """Open a latent for decoding or mixing in pieces; a long one is not read at once.

        Raises:
            KeyError: There is no record with this key.
            StorageError: The shard cannot be read or is damaged.
        """
        return self._read_current(self.entry(key), self._source)

    def _source(self, entry: IndexEntry) -> LatentSource:
        if entry.chunks or entry.length <= _WHOLE_BYTES:
            return LatentSource.of(self._record(entry).latent)
        digest, block = xxhash.xxh3_64(), _WHOLE_BYTES // (entry.length // entry.frames)
        for start in range(0, entry.frames, block):
            frames = min(block, entry.frames - start)
            digest.update(time_major_bytes(self._crop(entry, start, frames)))
        if digest.intdigest() != entry.hash:
            raise self._damaged(entry, "the latent does not match its hash")

        def read_piece(start: int, frames: int, now: IndexEntry) -> Latent:
            if now.hash != entry.hash:
                raise StoreError(
                    f"{self.url}: {entry.key} was encoded again while it was read: read it again."
                )
            return self._crop(now, start, frames)

        return LatentSource(
            entry.shape,
            lambda start, frames: self._read_current(entry, partial(read_piece, start, frames)),
        )

    def _read_current(self, entry: IndexEntry, read: Callable[[IndexEntry], T]) -> T:
        """Read a record; if its shard is gone, read it from where the current seal has it."""
        while True:
            try:
                return read(entry)
            except StorageError as error:
                if not was_removed(error.__cause__):
                    raise
                self.reload()
                position = self.index.find(entry.key)
                if position is None:
                    raise StoreError(
                        f"{self.url} was sealed again without {entry.key}: open it again."
                    ) from error
                now = self.index.entry(position)
                if now == entry:
                    raise
                entry = now

    def _read(self, entry: IndexEntry, offset: int, length: int) -> bytes:
        data = self.ranges.read(entry.shard, offset, length)
        if len(data) != length:
            raise self._damaged(entry, "the data is truncated")
        return data

    def _fields(self, entry: IndexEntry) -> dict[str, Any]:
        """Read a record's fields except the latent, from the tar's JSON or the Parquet columns."""
        if entry.fields_offset >= 0:
            data = self._read(entry, entry.fields_offset, entry.fields_length)
            return parse_member(self.storage, entry.shard, data)
        return self._shard_fields.row(entry.shard, entry.row)

    def _damaged(self, entry: IndexEntry, what: str) -> DamagedShardError:
        return DamagedShardError(
            f"{self.storage.named(entry.shard)} is damaged at record {entry.key}: {what}; "
            f"{restore_hint('the shard')}."
        )
