"""Writing views: stores that refer to records in other stores and have no shards of their own."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from latentmill import __version__
from latentmill.curation.chosen import Chosen
from latentmill.curation.view_annotations import write_view_annotations
from latentmill.curation.view_metadata import write_view_metadata
from latentmill.engine.lock import LOCK_PATH, only_run
from latentmill.errors import ConfigError
from latentmill.storage import scratch
from latentmill.storage.remote import refuse_secrets
from latentmill.storage.storage import Storage
from latentmill.store.annotations import ANNOTATIONS
from latentmill.store.bases import BASES, Bases, fault_of_base, inside_base, renamed, split_path
from latentmill.store.entries import BaseEntry
from latentmill.store.field_view import warn_of_fields
from latentmill.store.index import Index
from latentmill.store.left_out import read_left_out
from latentmill.store.metadata import publish_metadata
from latentmill.store.schema import (
    DATASET_PATH,
    INDEX_NAME,
    LEFT_OUT_NAME,
    METADATA_NAME,
    ORIGIN_PATH,
    DatasetInfo,
)
from latentmill.store.seal import read_origin, read_seal, write_origin, write_seal
from latentmill.store.statistics import ChannelStatistics
from latentmill.store.store import LatentStore


@dataclass(frozen=True)
class Curated:
    """A store that was made from others.

    Attributes:
        dest: Its folder or URL.
        view: Whether it is a view, or has copies of the latents.
        records: Number of its records.
        hours: Hours of audio in them.
        left_out: Number of the other records, by reason.
    """

    dest: str
    view: bool
    records: int
    hours: float
    left_out: Mapping[str, int]


def check_sources(stores: Sequence[LatentStore], out: str, *, copy: bool) -> None:
    """Raise ConfigError or StoreError if stores cannot be used together, or not for `out`."""
    first, root = stores[0], Storage(out).root
    for store in stores:
        if not store.complete:
            raise ConfigError(
                f"{store.url} is not complete: finish the run that encodes it, then use it here."
            )
        refuse_secrets("The store", store.url, ConfigError)
        if is_inside(root, store.url) or is_inside(store.url, root):
            raise ConfigError(f"{out} and {store.url} overlap: use another output folder.")
        fault = None if copy else fault_of_base(Storage(out), store.storage.root)
        if fault is not None:
            raise ConfigError(
                f"{store.url} {fault}, so a view in {out} could not be read: copy it with `select "
                "--copy` or `merge --copy`, or write the view to this machine."
            )
        for name in ("fingerprint", "format"):
            if getattr(store.info, name) != getattr(first.info, name):
                what = "settings of encoding" if name == "fingerprint" else "shard formats"
                raise ConfigError(
                    f"{first.url} and {store.url} have different {what}: use stores that were "
                    "encoded in the same way."
                )
        if copy:
            warn_of_fields(store, "the copy")


def is_inside(path: str, folder: str) -> bool:
    """Whether a path is a folder or inside of it, also through links."""
    real = [os.path.realpath(one) if "://" not in one else one for one in (path, folder)]
    return f"{real[0]}/".startswith(f"{real[1]}/")


def write_view(out: str, chosen: Sequence[Chosen], *, overwrite: bool = False) -> Curated:
    """Write a view of some records to a new folder or URL, or in place of another view.

    A view that is replaced stays readable until dataset.json is replaced, in one step. Without
    `overwrite`, only a view of the same records is replaced, so that a call can be repeated.

    Raises:
        ConfigError: Two records have the same key, there is no record, or `out` has other files.
    """
    entries, index = _bases(chosen)
    data = index.to_bytes()
    digest = xxhash.xxh3_128_hexdigest(data)
    left_out = _left_out(chosen, index)
    counts = _counts(left_out)
    _replaced(Storage(out))  # checked before the lock, which writes a file
    with only_run(Storage(out)) as hold:
        storage = hold.storage
        before = _replaced(storage)
        equal = before is not None and before.index_hash == digest
        # Earlier versions did not count what the chosen views had left out.
        own = _counts(pa.concat_tables(one.left_out for one in chosen).unify_dictionaries())
        if before and not overwrite and not (equal and before.left_out in (counts, own)):
            raise ConfigError(
                f"{storage.root} is a view already: use --overwrite to replace it, or another name."
            )
        storage.clear_scratch()
        write_origin(storage, read_origin(chosen[0].store.storage))
        name = f"index.{digest[:16]}.arrow"
        storage.write(name, data)
        annotations, annotation = write_view_annotations(
            storage, chosen, before, keep=not overwrite
        )
        if annotations is None:
            metadata, metadata_hash = write_view_metadata(storage, chosen)
        else:  # the view's own values are not in the metadata of the bases
            view = Bases(Storage(storage.root), entries).over(storage)
            metadata, metadata_hash = publish_metadata(view, index, annotations)
        info = _info(chosen, index, len(left_out)).model_copy(
            update={
                "seal": digest,
                "index": name,
                "index_hash": digest,
                "metadata": metadata,
                "metadata_hash": metadata_hash,
                "bases": entries,
                "annotation": annotation,
                "left_out": counts,
                "left_out_file": _write_left_out(storage, left_out),
            }
        )
        write_seal(storage, info)
        _remove_superseded(storage, info)
    return Curated(storage.root, True, info.encoded, info.hours, info.left_out)


def _left_out(chosen: Sequence[Chosen], index: Index) -> pa.Table:
    """The records of the bases that are not in the view, also those that a chosen view left out."""
    own = pa.concat_tables(one.left_out for one in chosen)
    earlier = pa.concat_tables(_with_prefix(read_left_out(one.store), one.prefix) for one in chosen)
    known = pa.chunked_array([*own["key"].chunks, *index.table["key"].chunks], pa.string())
    earlier = earlier.filter(pc.invert(pc.is_in(earlier["key"], value_set=known)))
    first = pc.index_in(earlier["key"], value_set=earlier["key"])  # of those that two views list
    once = pc.equal(first, pa.array(np.arange(len(earlier), dtype=np.int32)))
    return pa.concat_tables([own, earlier.filter(once)]).unify_dictionaries()


def _with_prefix(left_out: pa.Table, prefix: str) -> pa.Table:
    """The table with a prefix before all keys."""
    for place in (0, 2) if prefix else ():
        keys = pc.binary_join_element_wise(prefix, left_out[place], "")
        left_out = left_out.set_column(place, left_out.schema.field(place), keys)
    return left_out


def _counts(left_out: pa.Table) -> dict[str, int]:
    """The number of records that are left out for each reason, the most frequent one first."""
    found = pc.value_counts(left_out["reason"]).to_pylist()
    return dict(Counter({one["values"]: one["counts"] for one in found}).most_common())


def _info(chosen: Sequence[Chosen], index: Index, left_out: int) -> DatasetInfo:
    """The dataset.json of a view without its files: its source, counts and statistics."""
    info, (mean, std) = chosen[0].store.info, _statistics(chosen)
    seconds = float(index.column("num_samples").sum() / info.model["sample_rate"])
    return info.model_copy(
        update={
            "latentmill_version": __version__,
            "source": ", ".join(one.store.url for one in chosen),
            "items": len(index) + left_out,
            "encoded": len(index),
            "skipped": left_out,
            "failed": 0,
            "hours": round(seconds / 3600, 6),
            "frames": int(index.column("frames").sum()),
            "mean": mean,
            "std": std,
            "origin": ORIGIN_PATH,
            "shards": [],
            "revisions": {},
        }
    )


def _bases(chosen: Sequence[Chosen]) -> tuple[list[BaseEntry], Index]:
    """The stores that have the records, without views between them, and the view's index."""
    entries: list[BaseEntry] = []
    tables = []

    def number(url: str, info: DatasetInfo, prefix: str) -> int:
        for place, entry in enumerate(entries):
            if (entry.url, entry.prefix) == (url, prefix):
                return place
        found = {"url": url, "fingerprint": info.fingerprint, "index_hash": info.index_hash}
        entries.append(BaseEntry(**found, prefix=prefix, records=0))
        return len(entries) - 1

    for one in chosen:
        store, table = one.store, one.index.table.take(pa.array(one.rows))
        if store.bases is None:
            tables.append(inside_base(table, number(store.url, store.info, one.prefix), one.prefix))
            continue
        numbers = [
            number(entry.url, info, one.prefix + entry.prefix)
            for entry, info in zip(store.bases.entries, store.bases.infos, strict=True)
        ]

        def moved(path: str, numbers: Sequence[int] = numbers) -> str:
            base, inside = split_path(path)
            return f"{BASES}/{numbers[base]}/{inside}"

        tables.append(renamed(table, one.prefix, moved))
    index = Index.from_tables(tables)
    if not len(index):
        raise no_records()
    refuse_repeated(index.table["key"])
    of_shard = np.array([split_path(path)[0] for path in index.shards], np.int64)
    counts = np.bincount(of_shard[index.column("shard")], minlength=len(entries))
    used = np.flatnonzero(counts)  # a base without records is not needed
    if len(used) == len(entries):
        pairs = zip(entries, counts.tolist(), strict=True)
        return [entry.model_copy(update={"records": count}) for entry, count in pairs], index
    place = {old: new for new, old in enumerate(used.tolist())}

    def renumbered(path: str) -> str:
        base, inside = split_path(path)
        return f"{BASES}/{place[base]}/{inside}"

    found = [entries[n].model_copy(update={"records": int(counts[n])}) for n in used.tolist()]
    return found, Index.from_tables([renamed(index.table, "", renumbered)])


def no_records() -> ConfigError:
    return ConfigError("No records match all conditions: relax one of them.")


def refuse_repeated(keys: pa.ChunkedArray) -> None:
    """Raise ConfigError if two of the sorted keys are equal."""
    ordered = keys.combine_chunks()
    same = np.asarray(pc.equal(ordered.slice(1), ordered.slice(0, max(0, len(ordered) - 1))))
    if same.any():
        raise ConfigError(
            f"{int(same.sum())} keys are in more than one store, such as "
            f"{ordered[int(np.argmax(same))]}: use --prefix, which puts the name of its store "
            "before each key."
        )


def _replaced(storage: Storage) -> DatasetInfo | None:
    """The view that is there already. Raises ConfigError if there is anything else."""
    info = read_seal(storage)
    if info is not None and info.bases:
        return info
    if storage.local:
        names = scratch.entries(Path(storage.root))
    else:
        names = set(storage.list("")) - {".lease"}
        names |= {"shards"} if storage.list("shards") or storage.list("commits") else set()
    if any(not _OWN.fullmatch(name) for name in names - {LOCK_PATH, ANNOTATIONS}):
        raise ConfigError(f"{storage.root} is not empty: use another output folder.")
    return None


_OWN = re.compile(f"{INDEX_NAME}|{METADATA_NAME}|{LEFT_OUT_NAME}|{re.escape(ORIGIN_PATH)}")


def _remove_superseded(storage: Storage, info: DatasetInfo) -> None:
    current = {info.index, info.metadata, info.left_out_file, info.origin, DATASET_PATH}
    for name in storage.list(""):
        if name not in current and _OWN.fullmatch(name):
            storage.delete(name)


def _statistics(chosen: Sequence[Chosen]) -> tuple[list[float], list[float]]:
    """Mean and deviation over all latents of the base stores, also those that are left out.

    Each base store counts once, so all parts of one split, or of several, have the same. A part of
    one view has those of the view, whatever has become of its bases.
    """
    if len(chosen) == 1:
        return chosen[0].store.info.mean, chosen[0].store.info.std
    infos: dict[str, DatasetInfo] = {}
    for one in chosen:
        if one.store.bases is None:
            infos[one.store.url] = one.store.info
        else:
            bases = one.store.bases
            infos |= {e.url: info for e, info in zip(bases.entries, bases.infos, strict=True)}
    total = ChannelStatistics.empty(len(chosen[0].store.mean))
    for info in infos.values():
        mean, std = (np.array(one, np.float64) for one in (info.mean, info.std))
        total = total.merge(ChannelStatistics(info.frames, mean, std**2 * info.frames))
    return total.mean.tolist(), total.std.tolist()


def _write_left_out(storage: Storage, table: pa.Table) -> str | None:
    if not len(table):
        return None
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    name = f"left_out.{xxhash.xxh3_128_hexdigest(data)[:16]}.parquet"
    storage.write(name, data)
    return name
