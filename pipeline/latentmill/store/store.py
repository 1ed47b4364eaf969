"""A store, opened for reading: records by key, its origin and statistics, decoding."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from latentmill.decoding.decoder import LatentSource
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.stored import parse_json, refuse_damaged
from latentmill.errors import ConfigError, StorageError, StoreError
from latentmill.models.inference.precision import Precision
from latentmill.ops import Linearity, Origin
from latentmill.plan import PLAN_PATH, Plan, load
from latentmill.record import FloatArray, Latent, Record, latent_from_bytes, time_major_bytes
from latentmill.storage.storage import Storage
from latentmill.store.commit import read_commits
from latentmill.store.decoder import StoreDecoder
from latentmill.store.describe import described, is_complete, warn_incomplete
from latentmill.store.fields import ShardFields
from latentmill.store.index import Index, IndexEntry, damaged_index, open_index
from latentmill.store.measurement import read_measurement, with_measurements
from latentmill.store.schema import (
    Commit,
    DatasetInfo,
    levels_of,
    record_from_fields,
)
from latentmill.store.seal import dataset_info, read_origin, read_seal
from latentmill.text.shown import Shown

T = TypeVar("T")

_CACHED_SHARDS = 8
# A larger latent is decoded from the disk, window by window.
_WHOLE_BYTES = 64 << 20


def open_store(
    url: str | os.PathLike[str], *, device: str = "auto", trust_model: bool = False
) -> LatentStore:
    """Open a store for reading. Committed records only; an unfinished run's store opens too.

    Warns with `IncompleteStoreWarning` if the run that writes the store is not complete.

    Args:
        url: Folder or fsspec URL.
        device: Where `decode` runs: `auto`, `cpu`, `cuda`, `cuda:1`.
        trust_model: Whether `decode` may import and call a model that is not built in, because the
            store names it. Only for stores whose writer you trust.

    Raises:
        StoreError: There is no store at this place.
    """
    store = LatentStore(url, device=device, trust_model=trust_model)
    warn_incomplete(store)
    return store


class LatentStore(StoreDecoder, Shown):
    """The records of a store by key, in the order of the keys.

    Picklable, and as safe to use after a fork as its storage is: it holds no open files. Not
    thread-safe.

    Attributes:
        storage: The place of its files.
        sealed: Whether it has a dataset.json.
    """

    def __init__(
        self, url: str | os.PathLike[str], *, device: str = "auto", trust_model: bool = False
    ) -> None:
        self.storage = Storage(os.fspath(url))
        super().__init__(device, trust_model=trust_model)
        self._shard_fields: OrderedDict[str, ShardFields] = OrderedDict()
        self._info = read_seal(self.storage)
        self.sealed = self._info is not None
        if not self.sealed and not self.storage.exists(PLAN_PATH):
            raise StoreError(f"{url} holds no latentmill store: check the path.")

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "device": self._device, "trust_model": self._trust_model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def shown(self) -> Mapping[str, object]:
        """What `repr` and a notebook show; of an unsealed store, only what is known already."""
        return described(self.url, self._info, sealed=self.sealed)

    @property
    def url(self) -> str:
        """Where the store is."""
        return self.storage.root

    @cached_property
    def plan(self) -> Plan:
        """The plan with all its items; reading a sealed store does without it."""
        plan = load(self.storage)
        if plan is None:
            raise StoreError(f"{self.url} has no {PLAN_PATH}: restore it from a copy of the store.")
        refuse_damaged(plan.fingerprint, f"{self.url}/{PLAN_PATH}", "model", "chunking")
        return plan

    @property
    def precision(self) -> Precision:
        """The numeric mode in which the latents were encoded."""
        refuse_damaged(self.plan.fingerprint, f"{self.url}/{PLAN_PATH}", "numeric")
        precision: Precision = self.plan.fingerprint["numeric"]["precision"]
        return precision

    @cached_property
    def commits(self) -> dict[str, Commit]:
        """Every commit by unit name, as they were when first asked for."""
        return read_commits(self.storage)

    @property
    def complete(self) -> bool:
        """Whether every unit is committed, and sealed as it is committed now.

        Looks at names only: `verify` checks the files themselves.
        """
        return is_complete(self)

    @property
    def info(self) -> DatasetInfo:
        """What dataset.json says; of an unsealed store, what it would say now."""
        if self._info is None:
            self._info = dataset_info(self.plan, self.commits.values())
        return self._info

    @property
    def measured_info(self) -> DatasetInfo:
        """`info` with what was measured on the store as it is now."""
        return with_measurements(self.storage, self.info)

    @property
    def chunking(self) -> Chunking:
        """How the items were chunked."""
        return Chunking(**self.info.chunking)

    @property
    def codes(self) -> bool:
        """Whether the latents are codes, which cannot be blended."""
        model = self.info.model
        return model.get("output") == "codes" or model.get("codebook_size") is not None

    @cached_property
    def origin(self) -> Origin:
        """The latent of silence, which latent arithmetic needs, and what else it must know."""
        model = self.info.model
        # One of an earlier seal tells as much about the model.
        measured = read_measurement(self.storage, self.info, "linearity")
        card = None if measured is None else measured.linearity
        names = Linearity.__dataclass_fields__
        with_std = model.get("posterior") == "mean+std"
        return Origin(
            read_origin(self.storage),
            self.chunking,
            deviations=model["latent_channels"] // 2 if with_std else 0,
            codes=self.codes,
            linearity=None if card is None else Linearity(**{n: getattr(card, n) for n in names}),
        )

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean of every latent channel over the store, `[channels]`."""
        return np.array(self.info.mean)

    @property
    def std(self) -> npt.NDArray[np.float64]:
        """Standard deviation of every latent channel over the store, `[channels]`."""
        return np.array(self.info.std)

    @cached_property
    def index(self) -> Index:
        """Where every record lies."""
        if not self.sealed:
            return Index.from_commits(self.commits.values())
        where = f"{self.url}/{self.info.index}"
        try:
            index = open_index(self.storage, self.info.index, self.info.index_hash)
            if self.info.encoded and not len(index):
                raise ValueError("an empty index")
        except (FileNotFoundError, StorageError, ValueError) as error:
            missing = isinstance(error.__cause__ or error, FileNotFoundError)
            if missing and self.reload():
                return self.index
            if isinstance(error, StorageError) and not missing:
                raise
            raise damaged_index(where) from error
        return index

    def reload(self) -> bool:
        """Read the seal again, after a file of the one that was read is gone.

        Returns:
            Whether there is another one now, which this store then shows.
        """
        found = read_seal(self.storage)
        if not self.sealed or found is None or found == self._info:
            return False
        self._info = found
        for name in ("index", "plan", "commits", "origin"):
            self.__dict__.pop(name, None)
        self._shard_fields.clear()
        return True

    def shard_sizes(self) -> dict[str, tuple[int, str]]:
        """Bytes and hash of every shard by path."""
        if self.sealed:
            return {shard.path: (shard.bytes, shard.hash) for shard in self.info.shards}
        commits = self.commits.values()
        return {c.shard: (c.bytes, c.hash or "") for c in commits if c.shard is not None}

    def __len__(self) -> int:
        return len(self.index)

    def keys(self) -> Iterator[str]:
        """The keys of all records, sorted."""
        index = self.index
        return (index.key(position) for position in range(len(index)))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.index.find(key) is not None

    def __iter__(self) -> Iterator[Record]:
        index = self.index
        return (self.read(index.entry(position)) for position in range(len(index)))

    def __getitem__(self, key: str) -> Record:
        """The record of a key; KeyError if there is none."""
        return self.read(self.entry(key))

    def entry(self, key: str) -> IndexEntry:
        """Where the record of a key lies; KeyError if there is none."""
        if not isinstance(key, str):
            raise ConfigError(
                f"Records are read by key, not by {key!r}: store[key] with one of store.keys(), or "
                "LatentDataset for samples by number."
            )
        position = self.index.find(key)
        if position is None:
            raise KeyError(key)
        return self.index.entry(position)

    def read(self, entry: IndexEntry) -> Record:
        """The record at a place; where it is now, if that shard was superseded and removed.

        Raises:
            StorageError: The shard cannot be read, or holds other bytes than were written.
        """
        return self._at_its_place(entry, self._record)

    def _record(self, entry: IndexEntry) -> Record:
        data = self._read(entry, entry.offset, entry.length)
        if xxhash.xxh3_64_intdigest(data) != entry.hash:
            raise self._damaged(entry, "the latent does not match its hash")
        try:
            fields = self._fields(entry)
            if fields["key"] != entry.key:
                raise self._damaged(entry, f"its fields are those of {fields['key']}")
            latent = latent_from_bytes(data, entry.shape, fields["dtype"])
            return record_from_fields(fields, latent)
        except (ValueError, TypeError, LookupError, pa.ArrowException) as error:
            raise self._damaged(entry, "its fields cannot be read") from error

    def crop(self, key: str, start: int, frames: int) -> Latent:
        """Frames `start` to `start + frames` of a stitched latent, `[channels, frames]`.

        Reads the bytes of these frames only, so that the latent's hash cannot be checked.

        Raises:
            KeyError: There is no such record.
            IndexError: There are no such frames.
            ConfigError: The store holds overlapping chunks (`stitch: none`).
        """
        return self._at_its_place(self.entry(key), lambda entry: self._crop(entry, start, frames))

    def _crop(self, entry: IndexEntry, start: int, frames: int) -> Latent:
        if entry.chunks:
            raise ConfigError(
                f"{self.url} holds overlapping chunks, which have no one time line to crop: read "
                "whole records, or encode with stitch trim or crossfade."
            )
        if not 0 <= start < start + frames <= entry.frames:
            raise IndexError(
                f"{entry.key} has {entry.frames} frames: no {start} to {start + frames}"
            )
        width = entry.length // entry.frames  # bytes of a frame
        data = self._read(entry, entry.offset + start * width, frames * width)
        return latent_from_bytes(data, (entry.channels, frames), self.info.dtype)

    def levels(self, key: str) -> bytes | None:
        """How loud each frame of a record is, as `latentmill.encoding.loudness.decibels` reads it.

        None with `stitch: none`, and in stores of a version that did not measure it.
        """
        return levels_of(self._at_its_place(self.entry(key), self._fields))

    def source(self, key: str) -> LatentSource:
        """A record's latent, to be decoded or mixed piece by piece; a long one stays on the disk.

        Raises:
            KeyError: There is no such record.
            StorageError: The shard cannot be read, or holds other bytes than were written.
        """
        return self._at_its_place(self.entry(key), self._source)

    def _source(self, entry: IndexEntry) -> LatentSource:
        if entry.chunks or entry.length <= _WHOLE_BYTES:
            return LatentSource.of(self._record(entry).latent)
        digest, block = xxhash.xxh3_64(), _WHOLE_BYTES // (entry.length // entry.frames)
        for start in range(0, entry.frames, block):
            frames = min(block, entry.frames - start)
            digest.update(time_major_bytes(self._crop(entry, start, frames)))
        if digest.intdigest() != entry.hash:
            raise self._damaged(entry, "the latent does not match its hash")

        def piece(start: int, frames: int, now: IndexEntry) -> Latent:
            if now.hash != entry.hash:
                raise StoreError(
                    f"{self.url}: {entry.key} was encoded again while it was read: read it again."
                )
            return self._crop(now, start, frames)

        return LatentSource(
            entry.shape,
            lambda start, frames: self._at_its_place(entry, partial(piece, start, frames)),
        )

    def decode(self, key: str, *, seed: int = 0, batch_size: int | None = None) -> FloatArray:
        """Decode a record to audio `[channels, samples]`, float32, at the model's rate.

        Args:
            key: The record's key.
            seed: Noise of a stochastic decoder: equal seeds give a moment of every item the same.
            batch_size: Windows per forward pass; default 1 on a CPU, 4 on a GPU.
        """
        source = self.source(key)  # may read a new seal, so the length is looked up after it
        samples = self.entry(key).num_samples
        return self.decode_latent(source, samples, seed=seed, batch_size=batch_size)

    def _at_its_place(self, entry: IndexEntry, read: Callable[[IndexEntry], T]) -> T:
        """Read a record; if its shard is gone, where the present seal has it."""
        while True:
            try:
                return read(entry)
            except StorageError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
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
        data = self.storage.read_range(entry.shard, offset, length)
        if len(data) != length:
            raise self._damaged(entry, "it is cut short")
        return data

    def _fields(self, entry: IndexEntry) -> dict[str, Any]:
        """A record's fields beside the latent, from the tar's JSON or the Parquet columns."""
        if entry.fields_offset >= 0:
            data = self._read(entry, entry.fields_offset, entry.fields_length)
            fields: dict[str, Any] = parse_json(data)
            return fields
        shard = self._shard_fields.pop(entry.shard, None)
        if shard is None:
            shard = ShardFields(self.storage, entry.shard)
        self._shard_fields[entry.shard] = shard  # the last one is the most recently used
        if len(self._shard_fields) > _CACHED_SHARDS:
            self._shard_fields.popitem(last=False)
        return shard.row(entry.row)

    def _damaged(self, entry: IndexEntry, what: str) -> StorageError:
        return StorageError(
            f"{self.url}/{entry.shard} is damaged at record {entry.key}: {what}. Restore the "
            "shard, or delete it and run again."
        )
