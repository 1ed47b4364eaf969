"""Writing copies: stores of their own, with the latents of chosen records."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from latentmill.curation.chosen import Chosen
from latentmill.curation.views import Curated, no_records, refuse_repeated
from latentmill.engine.lock import only_run
from latentmill.errors import ConfigError
from latentmill.export.conversion import refuse_unless_empty
from latentmill.plan import Plan, freeze, iter_units, load
from latentmill.plan.drafting import UnitLimits, draft
from latentmill.reader.fields import FieldReader
from latentmill.record import Outcome, Record
from latentmill.sources.address import item_at
from latentmill.sources.base import Item
from latentmill.storage.storage import Storage
from latentmill.store.commit import (
    committed_revisions,
    next_revisions,
    read_commit,
    write_commit,
    write_unit,
)
from latentmill.store.prefetch import prefetched
from latentmill.store.schema import SHARDS, Commit
from latentmill.store.seal import read_origin, seal, write_origin
from latentmill.store.tidy import remove_unfinished, tidy, tidy_plan

SHARD_SIZE = 1 << 30
_BATCH = 4096  # records whose fields are read at once
_FIELDS = ("source_uri", "duration", "group", "role", "metadata")


def write_copy(out: str, chosen: Sequence[Chosen]) -> Curated:
    """Write a store with copies of the chosen records, or continue an interrupted copy.

    The plan lists all records; those that are left out are skipped, with their reasons.

    Raises:
        ConfigError: All records are left out, two have the same key, or `out` has something else.
    """
    keys = [pc.binary_join_element_wise(one.prefix, one.index.key_array(), "") for one in chosen]
    refuse_repeated(pa.chunked_array(keys).sort())
    storage, found = Storage(out), CopiedRecords(chosen)
    if found.left_out and not any(len(one.rows) for one in chosen):
        raise no_records()
    if load(storage) is None:  # checked before the lock, which writes a file
        refuse_unless_empty(storage)
    with only_run(storage) as hold:
        storage = hold.storage
        plan = _plan(storage, found)
        tidy_plan(storage, plan)
        tidy(storage)
        storage.clear_scratch()
        write_origin(storage, read_origin(chosen[0].store.storage))
        for _ in copy_units(storage, plan, found, storage.list(SHARDS)):
            pass
        sealed = seal(storage, plan)
        remove_unfinished(storage)
    return Curated(storage.root, False, sealed.encoded, sealed.hours, found.left_out)


@dataclass(frozen=True)
class CopiedRecords:
    """All records of the stores, by their keys in the copy."""

    chosen: Sequence[Chosen]

    @property
    def left_out(self) -> Mapping[str, int]:
        counts: Counter[str] = Counter()
        for one in self.chosen:
            counts.update(one.left_out["reason"].to_pylist())
        return dict(counts.most_common())

    @property
    def digest(self) -> str:
        """A hash of all keys, of the latents and the metadata, and of what is left out."""
        digest = xxhash.xxh3_128()
        for one in self.chosen:
            digest.update(f"{one.prefix}\0{one.index.items_hash}".encode())
            digest.update(np.ascontiguousarray(one.index.column("hash")).tobytes())
            digest.update(f"{one.rows.tolist()} {one.store.info.metadata_hash}".encode())
            digest.update(repr(one.left_out["reason"].to_pylist()).encode())
        return digest.hexdigest()

    @property
    def bytes_per_second(self) -> float:
        """Bytes of latents per second of audio: the values of texts and files have no rate."""
        rate = self.chosen[0].store.info.model["sample_rate"]
        size, samples = (
            sum(int(one.index.column(name).sum()) for one in self.chosen)
            for name in ("length", "num_samples")
        )
        return size * rate / samples if samples else 0.0

    def items(self) -> Iterator[Item]:
        """The records as items of a plan: their source files."""
        for one in self.chosen:
            fields = FieldReader(one.store, _FIELDS)
            for start in range(0, len(one.index), _BATCH):
                rows = np.arange(start, min(start + _BATCH, len(one.index)))
                keys = one.index.keys(rows)
                for key, row in zip(keys, fields.read(rows), strict=True):
                    yield replace(
                        item_at(row["source_uri"]),
                        key=one.prefix + key,
                        seconds=row["duration"],
                        group=row["group"] and one.prefix + row["group"],
                        role=row["role"],
                        metadata=row["metadata"],
                    )

    def reasons(self) -> dict[str, str]:
        """The reasons of the records that are left out, by key."""
        pairs: dict[str, str] = {}
        for one in self.chosen:
            keys, reasons = (one.left_out[name].to_pylist() for name in ("key", "reason"))
            pairs |= dict(zip(keys, reasons, strict=True))
        return pairs

    def outcomes(self, keys: Sequence[str], reasons: Mapping[str, str]) -> Iterator[Outcome]:
        """The outcomes of a unit's items; `reasons` are those of all that are left out."""
        wanted = [key for key in keys if key not in reasons]
        positions = [_positions(one, wanted) for one in self.chosen]
        of_key = {key: n for n in reversed(range(len(positions))) for key in positions[n]}
        records = [
            _records(one, [found[key] for key in wanted if of_key[key] == number])
            for number, (one, found) in enumerate(zip(self.chosen, positions, strict=True))
        ]
        for key in keys:
            if key in reasons:
                yield Outcome(key, "skipped", reasons[key])
            else:
                record, prefix = next(records[of_key[key]]), self.chosen[of_key[key]].prefix
                group = record.group and prefix + record.group
                yield Outcome(key, "encoded", None, replace(record, key=key, group=group))


def _positions(one: Chosen, keys: Sequence[str]) -> dict[str, int]:
    """Positions in a store's index of those keys that it has, by key in the copy.

    The keys of a unit are mostly neighbours in the index, so few of them are searched for.
    """
    own = {key.removeprefix(one.prefix): key for key in keys if key.startswith(one.prefix)}
    count = len(one.index)
    first = bisect.bisect_left(range(count), min(own), key=one.index.key) if own else count
    if first == count:
        return {}
    rows = np.arange(first, min(first + len(own), count))
    neighbours = one.index.keys(rows)
    near = dict(zip(neighbours, rows.tolist(), strict=True))
    found = {}
    for key, whole in own.items():
        position = near.get(key)
        if key > neighbours[-1] and rows[-1] + 1 < count:
            position = one.index.find(key)
        if position is not None:
            found[whole] = position
    return found


def _records(one: Chosen, positions: Sequence[int]) -> Iterator[Record]:
    return map(one.store.read, prefetched(one.store, map(one.index.entry, positions)))


def _plan(storage: Storage, records: CopiedRecords) -> Plan:
    """The plan of the copy: that of an earlier call, or a new one."""
    selection, existing = {"copy_of": records.digest}, load(storage)
    if existing is None:
        tidy_plan(storage, None)
        source = ", ".join(one.store.url for one in records.chosen)
        return plan_copy(storage, records, source, selection)
    if existing.source_settings != selection:
        raise ConfigError(
            f"{storage.root} is another store, or a copy with other options or of a store that has "
            "changed since: use an empty folder, or the same options as the copy that was "
            "interrupted."
        )
    return existing


def plan_copy(
    storage: Storage, records: CopiedRecords, source: str, selection: Mapping[str, str]
) -> Plan:
    """Write the plan of a copy. `source` and `selection` tell users and us what it is a copy of."""
    first = records.chosen[0].store
    info, base = first.info, first.plan
    plan = Plan(
        source=source,
        fingerprint=base.fingerprint,
        model=base.model,
        model_options=base.model_options,
        format=info.format,
        ignored={},
        channels=base.channels,
        provenance=base.provenance,
        source_settings=dict(selection),
        packing=base.packing,
        field=base.field,
    )
    limits = UnitLimits(shard_size=SHARD_SIZE, bytes_per_second=records.bytes_per_second)
    with draft(records.items(), limits) as drafted:
        return freeze(plan, drafted, storage)


def copy_units(
    storage: Storage, plan: Plan, records: CopiedRecords, sizes: Mapping[str, int]
) -> Iterator[Commit]:
    """Write the units that have no commit yet, and yield the commit of each.

    `sizes` are those of the shards that the copy has already, by file name.
    """
    first = records.chosen[0].store
    info = {
        "model": plan.fingerprint["model"],
        "dtype": first.info.dtype,
        "layout": first.info.layout,
        "fingerprint": first.info.fingerprint,
    }
    done, revisions = committed_revisions(storage), next_revisions(storage)
    reasons = records.reasons()
    for unit, table in iter_units(storage, plan, ["key"]):
        if unit.name in done:
            known = read_commit(storage, unit.name, done[unit.name])
            name = (known.shard or "").rpartition("/")[2]
            if known.items_hash == unit.hash and sizes.get(name, 0) == known.bytes:
                continue
        commit = write_unit(
            storage,
            unit.name,
            records.outcomes(table["key"].to_pylist(), reasons),
            format_name=plan.format,
            fingerprint=first.info.fingerprint,
            info=info,
            revision=revisions.get(unit.name, 0),
        )
        yield write_commit(storage, commit.model_copy(update={"items_hash": unit.hash}), {})
