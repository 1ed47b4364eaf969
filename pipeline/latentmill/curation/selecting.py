"""Choosing records of a store: by metadata, keys, loudness, repeated or unusual sounds, chance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from latentmill.curation.chosen import Chosen, Ints
from latentmill.curation.columns import values_of
from latentmill.encoding.loudness import SILENT_DB
from latentmill.errors import ConfigError
from latentmill.evaluation.similarity import (
    Groups,
    connect_near,
    find_repeats,
    near_groups,
    outliers,
)
from latentmill.reader.fields import Where, gather, select
from latentmill.sources.address import item_at
from latentmill.store.describe import changed_meanwhile
from latentmill.store.left_out import LEFT_OUT_SCHEMA
from latentmill.store.store import LatentStore

if TYPE_CHECKING:
    from latentmill.evaluation.shard_pass import RecordTable

Duplicates = Literal["exact", "near"]

LARGEST_EXPONENT = 38  # of a power of ten in float32


class Selector:
    """The records of a store that are still chosen; each step leaves out some, with a reason."""

    def __init__(self, store: LatentStore) -> None:
        self.store, self.index = store, store.index
        self._reasons: list[str] = []
        self._reason_of = np.full(len(store), -1, np.int16)  # -1: chosen
        self._details: dict[int, str] = {}
        self._survey: RecordTable | None = None

    @property
    def rows(self) -> Ints:
        """The positions of the chosen records in the store's index."""
        return np.flatnonzero(self._reason_of < 0)

    def copy(self) -> Selector:
        """The same choice, to be continued separately."""
        other = Selector(self.store)
        other._reasons, other._reason_of = [*self._reasons], self._reason_of.copy()
        other._details, other._survey = {**self._details}, self._survey
        return other

    def chosen(self, prefix: str = "") -> Chosen:
        """The chosen records, and the others with their reasons."""
        out = np.flatnonzero(self._reason_of >= 0)
        keys = self.index.key_array().take(pa.array(out))
        if prefix:
            keys = pc.binary_join_element_wise(prefix, keys, "")
        reasons = pa.array(self._reasons, pa.string())
        numbers = pa.array(self._reason_of[out].astype(np.int32))
        details = pa.nulls(len(out), pa.string())
        if self._details:
            details = pa.array([self._details.get(row) for row in out.tolist()], pa.string())
        columns = [keys, pa.DictionaryArray.from_arrays(numbers, reasons), details]
        table = pa.Table.from_arrays(columns, schema=LEFT_OUT_SCHEMA)
        self.check_unchanged()
        return Chosen(self.store, self.index, self.rows, table, prefix)

    def check_unchanged(self) -> None:
        """Raise StoreError if the store has another index now, which other rows may belong to."""
        if self.store.index is not self.index:
            raise changed_meanwhile(self.store)

    def leave_out(self, rows: Iterable[int], reason: str) -> None:
        """Leave out those of some records that are still chosen."""
        self.check_unchanged()
        some = np.fromiter(rows, np.int64)
        some = some[self._reason_of[some] < 0]
        if not len(some):
            return
        if reason not in self._reasons:
            self._reasons.append(reason)
        self._reason_of[some] = self._reasons.index(reason)

    def _keep(self, rows: Ints, reason: str) -> None:
        self.check_unchanged()
        other = np.ones(len(self._reason_of), np.bool_)
        other[rows] = False
        self.leave_out(np.flatnonzero(other), reason)

    def where(self, condition: Where) -> None:
        """Keep the records for which a condition holds; see `LatentDataset`."""
        text = condition if isinstance(condition, str) else "its function"
        self._keep(select([self.store], condition)[0], f"where: not {text}")

    def keys(self, keys: Sequence[str]) -> None:
        """Keep the records with these keys.

        Raises:
            ConfigError: The store does not have one of the keys.
        """
        for key in (keys := list(keys)):
            if not isinstance(key, str):
                raise ConfigError(
                    f"{key!r} is not a key: the keys of records are strings, such as "
                    f"{self.index.key(0)!r}."
                )
        rows = {key: self.index.find(key) for key in keys}
        missing = [key for key, row in rows.items() if row is None]
        if missing:
            raise ConfigError(
                f"{self.store.url} has no records with {len(missing)} of the {len(rows)} keys, "
                f"such as {missing[0]!r}: remove them from the list."
            )
        self._keep(np.array(list(rows.values()), np.int64), "not in the list of keys")

    def min_loudness(self, decibels: float) -> None:
        """Leave out records with a lower RMS, in dB relative to full scale."""
        rms = np.asarray(gather(self.store, ["rms"])["rms"])
        quiet = ~(rms >= 10 ** min(decibels / 20, LARGEST_EXPONENT))
        self.leave_out(np.flatnonzero(quiet), f"quieter than {decibels:g} dB")

    def drop_duplicates(self, kind: Duplicates) -> None:
        """Keep the first record, by key, of those with equal files or latents.

        With `near`, also of those with almost equal latents: the same sound in another encoding
        or at another level. Silent records stay.
        """
        for group in self._equal(self._sounding()):
            self._keep_first(group, "duplicate")
        if kind == "near":
            use = self._sounding()
            for group, _ in near_groups(self._surveyed().positions, self._frames, use):
                self._keep_first(group, "near duplicate")

    def drop_outliers(self) -> None:
        """Leave out records whose latents are unlike those of the others, and their duplicates.

        As in `evaluate`, duplicates count once and silent records are not compared.
        """
        table = self._surveyed()
        repeats = find_repeats(table, self._frames, self._sounding())
        found = {row for row, _ in outliers(table.shapes, repeats.others)}
        near = (group for group, _ in repeats.near)
        for group in (*near, *repeats.same_audio, *repeats.same_file):
            if group[0] in found:
                found.update(group)
        self.leave_out(found, "outlier")

    def sample(self, size: float, stratify: str | None, seed: int) -> None:
        """Keep a number of records (1 or more), or a share of them (below 1).

        The records with the lowest hashes of seed and key are kept. With `stratify`, each value of
        that field keeps its share of the records.
        """
        rows, key = self.rows, self.index.keys(self.rows)
        hashes = np.array([hash_of(seed, one) for one in key], np.uint64)
        values: Sequence[Hashable] = [None] * len(rows)
        if stratify is not None:
            every = values_of(self.store, stratify, "--stratify")
            self.check_unchanged()
            values = [_hashable(every[row]) for row in rows.tolist()]
        strata = defaultdict(list)
        for place, value in enumerate(values):
            strata[value].append(place)
        share = size if size < 1 else min(1.0, size / max(1, len(rows)))
        total = round(share * len(rows))
        counts = _apportioned({value: share * len(some) for value, some in strata.items()}, total)
        kept = []
        for value, places in strata.items():
            some = np.array(places)
            kept.append(some[np.argsort(hashes[some], kind="stable")[: counts[value]]])
        self._keep(rows[np.concatenate(kept)] if kept else rows, "not in the sample")

    def groups_of_duplicates(self) -> list[list[int]]:
        """Groups of chosen records that are duplicates of each other, exact or near.

        Silent records are in none: they would connect all songs with a silent stem or segment.
        """
        use = self._sounding()
        groups = Groups(len(self.store))
        connect_near(groups, self._surveyed().positions, self._frames, use)
        for group in self._equal(use):
            groups.connect(np.array(group[:1] * (len(group) - 1)), np.array(group[1:]))
        return [group for group, _ in groups.found()]

    @property
    def _frames(self) -> Ints:
        return self.index.column("frames")

    def _keep_first(self, group: Sequence[int], reason: str) -> None:
        kept = self.index.key(min(group))
        others = [row for row in group if row != min(group) and self._reason_of[row] < 0]
        self.leave_out(others, reason)
        self._details |= dict.fromkeys(others, kept)

    def _sounding(self) -> npt.NDArray[np.bool_]:
        """Which of the chosen records are not silent, by the definition of `evaluate`."""
        table = self.store.table(["silence", "rms"])
        self.check_unchanged()
        share, rms = (table[name].to_numpy() for name in table.column_names)
        # Overlapping chunks have no levels, of which `silence` is the share.
        silent = np.where(np.isnan(share), rms < 10 ** (SILENT_DB / 20), share == 1)
        return (self._reason_of < 0) & ~silent

    def _equal(self, use: npt.NDArray[np.bool_]) -> list[list[int]]:
        """Groups of those records to `use` that have equal files or latents."""
        table = gather(self.store, ["content_hash", "source_uri"])
        self.check_unchanged()
        seen: dict[object, int] = {}
        first, second = [], []
        hashes, samples = self.index.column("hash"), self.index.column("num_samples")
        digests, uris = (table[name].to_pylist() for name in table.column_names)
        for row in np.flatnonzero(use).tolist():
            uri = uris[row]
            part = item_at(uri).segment if "#" in uri else None
            for same in ((digests[row], part), (int(hashes[row]), int(samples[row]))):
                earlier = seen.setdefault(same, row)
                if earlier != row:
                    first.append(earlier)
                    second.append(row)
        groups = Groups(len(self.store))
        groups.connect(np.array(first, np.int64), np.array(second, np.int64))
        return [group for group, _ in groups.found()]

    def _surveyed(self) -> RecordTable:
        """Pooled latents of all records; reads all latents once."""
        if self._survey is None:
            from latentmill.evaluation.shard_pass import RecordTable, ShardPass  # loads torch

            shard_pass = ShardPass(self.store)
            table = RecordTable.of(len(self.store), shard_pass.pooling)
            for shard in range(len(shard_pass.rows.paths)):
                found = shard_pass(shard)
                table.fill(found.at, found.records)
            self._survey = table
        return self._survey


def hash_of(seed: int, text: str) -> int:
    """A number below 2^64 that depends only on a seed and a text."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{text}".encode())


def _hashable(value: object) -> Hashable:
    return value if isinstance(value, Hashable) else repr(value)


def _apportioned(quotas: dict[Hashable, float], total: int) -> dict[Hashable, int]:
    """Whole numbers with the sum `total`, by the method of the largest remainders."""
    counts = {value: int(quota) for value, quota in quotas.items()}
    by_remainder: Callable[[Hashable], tuple[float, str]]
    by_remainder = lambda value: (counts[value] - quotas[value], repr(value))  # noqa: E731
    for value in sorted(quotas, key=by_remainder)[: max(0, total - sum(counts.values()))]:
        counts[value] += 1
    return counts
