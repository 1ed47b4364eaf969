"""Resolves a configuration and makes, loads or extends its plan, for both `plan` and `encode`."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from latentmill.config import RunConfig, fingerprint_document, item_settings
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.fingerprint import version_difference
from latentmill.encoding.lanes import PACKING
from latentmill.errors import ConfigError, StoreError
from latentmill.models import registry
from latentmill.models.base import ModelHandle
from latentmill.models.inference.device import pick_device
from latentmill.models.inference.precision import pick_precision
from latentmill.plan import (
    DEFAULT_SHARD_SIZE,
    Draft,
    Plan,
    UnitLimits,
    draft,
    extend,
    freeze,
    load,
)
from latentmill.plan.amend import amend
from latentmill.plan.compare import Comparison, compare
from latentmill.plan.drafting import SORT_ITEMS
from latentmill.plan.items import draft_table, to_items
from latentmill.plan.probe import cheap, probed
from latentmill.run.differences import default_stitch, differences, explain, with_planned
from latentmill.sources.base import Item, Source, ignored_by
from latentmill.sources.open import open_source
from latentmill.storage import hub
from latentmill.storage.job_folder import refuse_job_folder
from latentmill.storage.scratch import has_only_temporary
from latentmill.storage.storage import Storage
from latentmill.store.field_layout import base_url
from latentmill.store.schema import (
    COMMITS,
    DATASET_PATH,
    INDEX_NAME,
    METADATA_NAME,
    ORIGIN_PATH,
    SHARDS,
)
from latentmill.store.tidy import tidy_plan
from latentmill.text.log import get_logger

_log = get_logger("run")

LARGEST_FLOAT16_CODE = 2**11  # its significand has 11 bits
NUMBER_BYTES = {"float16": 2, "float32": 4}
PROBED_BY_DEFAULT = 100_000  # local files; reading a header takes about a millisecond
LONG_UNIT = 3  # multiple of the maximum unit length above which a warning is shown


class PlanningObserver(Protocol):
    """Receives the progress of planning."""

    def planning(self, items: int, headers: int) -> None:
        """Called with the number of items listed and headers read so far."""


@dataclass(frozen=True)
class Extension:
    """Differences between the source and the plan that `--extend` found.

    Attributes:
        new: Number of items that were added.
        changed: Number of items whose file differs from the planned one.
        vanished: Number of items that are no longer in the source.
        described: Number of items with an unchanged file but changed sidecars or metadata.
        retried: Whether the units of changed items are encoded again.
        new_keys: The first few keys of the new items; likewise for the other kinds.
    """

    new: int
    changed: int
    vanished: int
    retried: bool
    new_keys: tuple[str, ...] = ()
    changed_keys: tuple[str, ...] = ()
    vanished_keys: tuple[str, ...] = ()
    described: int = 0
    described_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setup:
    """A configuration with its model, chunking and store resolved."""

    config: RunConfig
    handle: ModelHandle
    chunking: Chunking
    storage: Storage

    @property
    def bytes_per_second(self) -> float:
        """Bytes of latents per second of audio."""
        return bytes_per_second(self.handle, self.chunking, self.config.dtype)

    @property
    def limits(self) -> UnitLimits:
        """Maximum size of a unit."""
        size = self.config.shard_size or DEFAULT_SHARD_SIZE
        chunk = self.chunking.samples / self.handle.spec.sample_rate
        return UnitLimits(self.config.unit_seconds, size, self.bytes_per_second, chunk)


@dataclass(frozen=True)
class Preparation(Setup):
    """A setup with its source."""

    source: Source
    observer: PlanningObserver | None = None


def bytes_per_second(handle: ModelHandle, chunking: Chunking, dtype: str) -> float:
    """Bytes of latents per second of audio."""
    spec = handle.spec
    repeated = chunking.samples / chunking.step if chunking.stitch == "none" else 1.0
    return spec.frame_rate * spec.latent_channels * NUMBER_BYTES[dtype] * repeated


def prepare(config: RunConfig, observer: PlanningObserver | None = None) -> Preparation:
    """Resolve a configuration and check device, model, source and store. Writes nothing."""
    if config.retry_changed and not config.extend:
        raise ConfigError(
            "--retry-changed needs --extend, which finds the changed files: set both."
        )
    if config.refresh_metadata and not config.extend:
        raise ConfigError(
            "--refresh-metadata needs --extend, which finds the changed metadata: set both."
        )
    setup = set_up(config)
    setup = replace(setup, config=with_planned(setup.config, load(setup.storage)))
    source = _source(setup.config, setup.storage)
    return Preparation(**vars(setup), source=source, observer=observer)


def set_up(config: RunConfig) -> Setup:
    """Resolve a configuration without its source, and check device, model and store."""
    config = with_precision(config)
    refuse_job_folder("STORE", config.out, "an absolute path or a URL")
    storage = Storage(config.out)
    storage.refuse_read_only()
    hub.refuse_store(storage.root)
    if storage.local and Path(storage.root).exists() and not Path(storage.root).is_dir():
        raise ConfigError(f"The output {storage.root} is a file: choose a folder.")
    plan = load(storage)
    stored = None if plan is None else plan.fingerprint.get("model")
    handle = registry.resolve(config.model, config.model_options, config.channels, stored=stored)
    stitch = config.stitch or default_stitch(plan, handle.spec)
    chunking = Chunking.for_model(
        handle.spec,
        stitch=stitch,
        seconds=config.chunk_seconds,
        samples=config.chunk_samples,
        overlap=config.overlap,
    )
    largest = (handle.spec.codebook_size or 1) - 1
    if config.dtype == "float16" and largest > LARGEST_FLOAT16_CODE:
        raise ConfigError(
            f"{config.model} has codes up to {largest}, but float16 is exact only for integers up "
            f"to {LARGEST_FLOAT16_CODE}: use --dtype float32."
        )
    if config.compile and chunking.stitch == "state":
        raise ConfigError(
            "--compile does not work with --stitch state, which is the default of "
            f"{handle.spec.name}: use --stitch trim, or leave out --compile."
        )
    return Setup(config, handle, chunking, storage)


def uses_cluster(config: RunConfig) -> bool:
    """Whether a run connects to a Ray cluster instead of starting Ray on this machine."""
    return config.address is not None or "RAY_ADDRESS" in os.environ


def with_precision(config: RunConfig) -> RunConfig:
    """Set the numeric mode, which is part of the fingerprint.

    Its default depends on the device of the workers. Without an address this is the device of this
    machine; otherwise the cluster is checked for GPUs.
    """
    if not uses_cluster(config):
        device = pick_device(config.device)
    elif config.device == "auto" and config.precision in (None, "tf32"):
        from latentmill.engine.launch import cluster_device

        device = cluster_device(config)
    else:
        device = config.device
    return config.model_copy(update={"precision": pick_precision(config.precision, device)})


def _source(config: RunConfig, storage: Storage) -> Source:
    """Open the source, and check that the store is outside of it. Writes nothing."""
    source = open_source(config)
    if storage.root == source.uri or storage.root.startswith(source.uri.rstrip("/") + "/"):
        raise ConfigError(
            f"The output {storage.root} is inside the source {source.uri}: choose a folder outside "
            "of it."
        )
    return source


def listed(prepared: Preparation) -> Draft | None:
    """List the source's items and split them into units, if the store has no plan or is extended.

    This happens before anything is written to the store, so that a source that cannot be listed
    leaves no trace.
    """
    if not prepared.config.extend and load(prepared.storage) is not None:
        return None
    # When a plan is extended, only the headers of new items are read, in `_extended`.
    new = load(prepared.storage) is None
    return _drafted(prepared) if new else draft(_listed(prepared), prepared.limits)


def _drafted(prepared: Preparation) -> Draft:
    """The items of a new plan, with lengths read from headers."""
    probe = prepared.config.probe
    if probe:
        return draft(_with_lengths(prepared, prepared.source.items()), prepared.limits)
    found = draft(_listed(prepared), prepared.limits)
    if probe is False or not 0 < found.totals.estimated_items <= PROBED_BY_DEFAULT:
        return found
    with found:
        items = itertools.chain.from_iterable(map(to_items, found.tables()))
        return draft(_with_lengths(prepared, items, wanted=cheap), prepared.limits)


def _listed(prepared: Preparation) -> Iterator[Item]:
    for number, item in enumerate(prepared.source.items(), 1):
        yield item
        if prepared.observer is not None and number % 256 == 0:
            prepared.observer.planning(number, 0)


def _with_lengths(
    prepared: Preparation, items: Iterator[Item], wanted: Callable[[Item], bool] = lambda _: True
) -> Iterator[Item]:
    headers = [0]
    found = probed(items, lambda count: headers.__setitem__(0, count), wanted=wanted)
    for number, item in enumerate(found, 1):
        yield item
        if prepared.observer is not None and number % 256 == 0:
            prepared.observer.planning(number, headers[0])


def planned(
    prepared: Preparation, items: Draft | None
) -> tuple[Plan, Extension | None, Comparison | None]:
    """Create, load or extend the store's plan. The caller must hold the store.

    Also returns what an extension found, with the rows that `refresh_metadata` needs.
    """
    storage, config = prepared.storage, prepared.config
    plan = load(storage)
    if plan is None:
        refuse_foreign(storage)
        tidy_plan(storage, None)
        with items or _drafted(prepared) as drafted:
            plan = freeze(_new_plan(prepared), drafted, storage)
            _warn_of_long_groups(prepared, plan)
            return plan, None, None
    if plan.field is not None:
        command = f"latentmill add {base_url(storage.root)} --field {plan.field.name}"
        raise StoreError(f"{storage.root} is a field of another store: use `{command}`.")
    if reason := version_difference(plan.fingerprint):
        raise StoreError(f"Store {storage.root} {reason}")
    spec, uri = prepared.handle.spec, prepared.source.uri
    if found := differences(plan, config, spec, prepared.chunking, uri):
        raise StoreError(
            f"{explain(found)}. Use the same values to resume {storage.root}, or a new output "
            "folder."
        )
    tidy_plan(storage, plan)
    if not config.extend or items is None:
        return plan, None, None
    with items:
        return _extended(prepared, plan, items)


def _warn_of_long_groups(prepared: Preparation, plan: Plan) -> None:
    """Warn if a unit is much too long, which happens because a group is never split."""
    limit = prepared.limits.micros(round(1e6 * plan.seconds)) / 1e6
    longest = max(plan.units, key=lambda unit: unit.seconds)
    if longest.items > 1 and longest.seconds > LONG_UNIT * limit:
        _log.warning(
            "the longest group makes a unit of %.2f h (%d items), and an "
            "interrupted unit is encoded again from its start; use a --group-by with smaller "
            "groups to get shorter units",
            longest.seconds / 3600,
            longest.items,
        )


def _new_plan(prepared: Preparation) -> Plan:
    config, handle = prepared.config, prepared.handle
    return Plan(
        source=prepared.source.uri,
        fingerprint=fingerprint_document(config, handle.spec, prepared.chunking),
        model=config.model,
        model_options=dict(config.model_options),
        channels=config.channels,
        format=config.format,
        ignored=ignored_by(prepared.source),
        provenance=dict(handle.spec.provenance),
        unit_seconds=config.unit_seconds,
        shard_size=config.shard_size,
        extensions=config.extensions,
        source_settings=item_settings(config),
        packing=PACKING,
    )


def _extended(
    prepared: Preparation, plan: Plan, items: Draft
) -> tuple[Plan, Extension, Comparison]:
    storage, config = prepared.storage, prepared.config
    refine = _refiner(config.probe)
    found, fresh = compare(
        plan,
        storage,
        items,
        prepared.limits,
        refine,
        described_rows=config.refresh_metadata,
    )
    plan = replace(plan, ignored=ignored_by(prepared.source))
    with fresh:
        if config.retry_changed and len(found.changed):
            plan = amend(plan, refine(found.changed), found.units, storage)
        if found.new:
            plan = extend(plan, fresh, storage)
    extension = Extension(
        new=found.new,
        changed=len(found.changed),
        vanished=found.vanished,
        retried=config.retry_changed,
        described=found.described,
        new_keys=tuple(found.new_keys),
        changed_keys=tuple(found.changed_keys),
        vanished_keys=tuple(found.vanished_keys),
        described_keys=tuple(found.described_keys),
    )
    return plan, extension, found


def _refiner(probe: bool | None) -> Callable[[pa.Table], pa.Table]:
    """A function that reads the headers of new and changed items by the rules of `_drafted`."""
    left = 0 if probe is False else PROBED_BY_DEFAULT

    def refine(table: pa.Table) -> pa.Table:
        nonlocal left
        left -= len(table)
        if not probe and left < 0:
            return table
        wanted = (lambda _: True) if probe else cheap
        slices = (table.slice(first, SORT_ITEMS) for first in range(0, len(table), SORT_ITEMS))
        return pa.concat_tables(
            draft_table(list(probed(to_items(some), wanted=wanted))) for some in slices
        )

    return refine


def refuse_foreign(storage: Storage) -> None:
    """Refuse a folder without a plan that has files which a run would overwrite or delete."""
    for folder in (SHARDS, COMMITS):
        if storage.list(folder):
            raise StoreError(
                f"{storage.root} has {folder}/ but no plan: choose another output folder, or "
                "restore its plan/ folder."
            )
    for path in sorted(storage.list("")):
        if path in (DATASET_PATH, ORIGIN_PATH) or re.fullmatch(
            f"{INDEX_NAME}|{METADATA_NAME}", path
        ):
            raise StoreError(
                f"{storage.root} has a file {path} but no plan: choose another output folder, or "
                "delete the file."
            )
    # A run that was killed while it wrote its plan leaves temporary files.
    if storage.local and not has_only_temporary(storage.scratch_folder):
        raise StoreError(
            f"{storage.scratch_folder} has files that latentmill did not write, or is a link: "
            "choose another output folder."
        )
