"""From a configuration to the frozen plan of its store: what `plan` and `encode` have in common."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from latentmill.config import RunConfig, fingerprint_document, version_difference
from latentmill.encoding.chunks import Chunking
from latentmill.errors import ConfigError, StoreError
from latentmill.models import registry
from latentmill.models.base import ModelHandle
from latentmill.models.inference.device import pick_device
from latentmill.models.inference.precision import pick_precision
from latentmill.plan import (
    DEFAULT_SHARD_SIZE,
    ITEMS_PATH,
    PLAN_PATH,
    UNITS_PATH,
    Cutting,
    Draft,
    Plan,
    draft,
    extend,
    freeze,
    load,
)
from latentmill.plan.amend import amend
from latentmill.plan.compare import compare
from latentmill.plan.items import draft_table, to_items
from latentmill.plan.probe import cheap, probed
from latentmill.run.differences import differences, explain
from latentmill.sources.base import Item, Source
from latentmill.sources.open import open_source, source_settings
from latentmill.storage.storage import Storage
from latentmill.store.schema import (
    COMMITS,
    DATASET_PATH,
    INDEX_NAME,
    ORIGIN_PATH,
    SHARDS,
)
from latentmill.store.tidy import tidy_plan

_log = logging.getLogger(__name__)

LARGEST_FLOAT16_CODE = 2**11  # its significand has 11 bits
NUMBER_BYTES = {"float16": 2, "float32": 4}
PROBED_BY_DEFAULT = 100_000  # local files; reading a header takes about a millisecond
LONG_UNIT = 3  # times what a unit should have
RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of a job


class Listener(Protocol):
    """Who is told how far planning is."""

    def planning(self, items: int, headers: int) -> None:
        """So many items were listed, and headers read, so far."""


@dataclass(frozen=True)
class Extension:
    """What `--extend` found: items that the plan did not have, and others that it has.

    Attributes:
        new: Items that were added.
        changed: Items that are other files now than the plan says.
        vanished: Items that the source does not have any more.
        described: Items that are the same files, and whose sidecars or metadata changed.
        retried: Whether the changed items' units are encoded anew.
        new_keys: The first few keys of each kind.
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
class Preparation:
    """A configuration whose names are resolved: what a run needs before it has a plan."""

    config: RunConfig
    handle: ModelHandle
    chunking: Chunking
    storage: Storage
    source: Source
    listener: Listener | None = None

    @property
    def bytes_per_second(self) -> float:
        """Bytes of latents that a second of audio becomes."""
        return bytes_per_second(self.handle, self.chunking, self.config.dtype)

    @property
    def cutting(self) -> Cutting:
        """How large units may become."""
        size = self.config.shard_size or DEFAULT_SHARD_SIZE
        return Cutting(self.config.unit_seconds, size, self.bytes_per_second)


def bytes_per_second(handle: ModelHandle, chunking: Chunking, dtype: str) -> float:
    """Bytes of latents that a second of audio becomes."""
    spec = handle.spec
    repeated = chunking.samples / chunking.step if chunking.stitch == "none" else 1.0
    return spec.frame_rate * spec.latent_channels * NUMBER_BYTES[dtype] * repeated


def prepare(config: RunConfig, listener: Listener | None = None) -> Preparation:
    """Resolve a configuration; looks for device and model, before anything is written.

    Raises:
        ConfigError: Settings do not fit each other or this machine.
        ModelError: The model is not there.
        SourceError: The source cannot be opened.
        StoreError: The store cannot be opened.
    """
    if config.retry_changed and not config.extend:
        raise ConfigError(
            "--retry-changed needs --extend, which looks for changed files: give both."
        )
    config = with_precision(config)
    handle = registry.resolve(config.model, config.model_options, config.channels)
    chunking = Chunking.for_model(
        handle.spec,
        stitch=config.stitch,
        seconds=config.chunk_seconds,
        samples=config.chunk_samples,
        overlap=config.overlap,
    )
    _refuse_inexact_codes(config, handle.spec.codebook_size)
    _refuse_passing_folder(config.out)
    storage = Storage(config.out)
    storage.refuse_read_only()
    source = _source(config, storage)
    return Preparation(config, handle, chunking, storage, source, listener)


def _refuse_passing_folder(out: str) -> None:
    """Refuse a store in the folder that Ray unpacks for a job, and throws away after it."""
    relative = "://" not in out and not Path(out).expanduser().is_absolute()
    if relative and RAY_JOB_VARIABLE in os.environ:
        raise ConfigError(
            f"STORE {out} is a relative path, and the folder of a Ray job is deleted after it: "
            "give an absolute path or a URL."
        )


def with_precision(config: RunConfig) -> RunConfig:
    """Settle the numeric mode, which is part of the fingerprint.

    Its default depends on the device of the workers. On this machine that is known; a cluster that
    is named has GPUs or not whatever this machine has, and is asked.
    """
    if config.address is None and "RAY_ADDRESS" not in os.environ:
        device = pick_device(config.device)
    elif config.device == "auto" and config.precision in (None, "tf32"):
        from latentmill.engine.launch import cluster_device

        device = cluster_device(config)
    else:
        device = config.device
    return config.model_copy(update={"precision": pick_precision(config.precision, device)})


def _refuse_inexact_codes(config: RunConfig, codebook_size: int | None) -> None:
    largest = (codebook_size or 1) - 1
    if config.dtype == "float16" and largest > LARGEST_FLOAT16_CODE:
        raise ConfigError(
            f"{config.model} has codes up to {largest}, and float16 holds whole numbers exactly "
            f"up to {LARGEST_FLOAT16_CODE} only: use --dtype float32."
        )


def _source(config: RunConfig, storage: Storage) -> Source:
    """The source, if the store can lie where it is asked for; nothing is written yet."""
    source = open_source(config)
    if storage.root == source.uri or storage.root.startswith(source.uri.rstrip("/") + "/"):
        raise ConfigError(
            f"The output {storage.root} lies inside the source {source.uri}: choose a folder "
            "outside of it."
        )
    if storage.local and Path(storage.root).exists() and not Path(storage.root).is_dir():
        raise ConfigError(f"The output {storage.root} is a file: name a folder.")
    return source


def listed(prepared: Preparation) -> Draft | None:
    """The source's items, sorted and cut, if the store has no plan or is to be extended.

    Comes before anything is made for the store: a source that cannot be listed leaves no trace.

    Raises:
        SourceError: The source cannot be listed.
    """
    if not prepared.config.extend and load(prepared.storage) is not None:
        return None
    # Of a plan that is to be extended only the new items' headers are of interest, later.
    new = load(prepared.storage) is None
    return _drafted(prepared) if new else draft(_listed(prepared), prepared.cutting)


def _drafted(prepared: Preparation) -> Draft:
    """The items of a new plan, with the lengths that headers give."""
    probe = prepared.config.probe
    if probe:
        return draft(_with_lengths(prepared, prepared.source.items()), prepared.cutting)
    found = draft(_listed(prepared), prepared.cutting)
    if probe is False or not 0 < found.totals.estimated_items <= PROBED_BY_DEFAULT:
        return found
    with found:
        items = itertools.chain.from_iterable(map(to_items, found.tables()))
        return draft(_with_lengths(prepared, items, wanted=cheap), prepared.cutting)


def _listed(prepared: Preparation) -> Iterator[Item]:
    for number, item in enumerate(prepared.source.items(), 1):
        yield item
        if prepared.listener is not None and number % 256 == 0:
            prepared.listener.planning(number, 0)


def _with_lengths(
    prepared: Preparation, items: Iterator[Item], wanted: Callable[[Item], bool] = lambda _: True
) -> Iterator[Item]:
    headers = [0]
    found = probed(items, lambda count: headers.__setitem__(0, count), wanted=wanted)
    for number, item in enumerate(found, 1):
        yield item
        if prepared.listener is not None and number % 256 == 0:
            prepared.listener.planning(number, headers[0])


def planned(prepared: Preparation, items: Draft | None) -> tuple[Plan, Extension | None]:
    """The store's plan: a new one, frozen before anything is encoded; the one it has; or that
    one, extended. The caller holds the store.

    Raises:
        StoreError: The store is another run's, or not latentmill's.
    """
    storage, config = prepared.storage, prepared.config
    plan = load(storage)
    if plan is None:
        _refuse_foreign(storage)
        tidy_plan(storage, None)
        with items or _drafted(prepared) as drafted:
            plan = freeze(_new_plan(prepared), drafted, storage)
            _warn_of_long_groups(prepared, plan)
            return plan, None
    _refuse_other_run(prepared, plan)
    tidy_plan(storage, plan)
    if not config.extend or items is None:
        return plan, None
    with items:
        return _extended(prepared, plan, items)


def _warn_of_long_groups(prepared: Preparation, plan: Plan) -> None:
    """A group is never split, so that it may be much longer than a unit should be."""
    limit = prepared.cutting.micros(round(1e6 * plan.seconds)) / 1e6
    longest = max(plan.units, key=lambda unit: unit.seconds)
    if longest.items > 1 and longest.seconds > LONG_UNIT * limit:
        _log.warning(
            "latentmill: warning: the longest group makes a unit of %.2f h (%d items), and a unit "
            "that is interrupted starts again from its beginning; a --group-by with smaller groups "
            "makes shorter units",
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
        ignored=dict(sorted(prepared.source.ignored.items())),
        provenance=dict(handle.spec.provenance),
        unit_seconds=config.unit_seconds,
        shard_size=config.shard_size,
        extensions=config.extensions,
        source_settings=source_settings(config),
    )


def _extended(prepared: Preparation, plan: Plan, items: Draft) -> tuple[Plan, Extension]:
    storage, retried = prepared.storage, prepared.config.retry_changed
    found, fresh = compare(plan, storage, items, prepared.cutting, _refiner(prepared.config.probe))
    with fresh:
        if retried and len(found.changed):
            plan = amend(plan, found, storage)
        if found.new:
            plan = replace(plan, ignored=dict(sorted(prepared.source.ignored.items())))
            plan = extend(plan, fresh, storage)
    return plan, Extension(
        new=found.new,
        changed=len(found.changed),
        vanished=found.vanished,
        retried=retried,
        described=found.described,
        new_keys=tuple(found.new_keys),
        changed_keys=tuple(found.changed_keys),
        vanished_keys=tuple(found.vanished_keys),
        described_keys=tuple(found.described_keys),
    )


def _refiner(probe: bool | None) -> Callable[[pa.Table], pa.Table]:
    """What reads the headers of new items, as `_drafted` does."""
    left = 0 if probe is False else PROBED_BY_DEFAULT

    def refine(table: pa.Table) -> pa.Table:
        nonlocal left
        left -= len(table)
        if not probe and left < 0:
            return table
        wanted = (lambda _: True) if probe else cheap
        return draft_table(list(probed(to_items(table), wanted=wanted)))

    return refine


def _refuse_other_run(prepared: Preparation, plan: Plan) -> None:
    root = prepared.storage.root
    if reason := version_difference(plan.fingerprint):
        raise StoreError(f"Store {root} {reason}")
    spec, uri = prepared.handle.spec, prepared.source.uri
    if found := differences(plan, prepared.config, spec, prepared.chunking, uri):
        raise StoreError(
            f"{explain(found)}. Use the same values to resume {root}, or a new output folder."
        )


def _refuse_foreign(storage: Storage) -> None:
    """A folder without a plan must hold nothing that a run would overwrite or clear away."""
    for folder in (SHARDS, COMMITS):
        if storage.list(folder):
            raise StoreError(
                f"{storage.root} holds {folder} but no plan: choose another output folder, or "
                "restore its plan/ folder."
            )
    for path in sorted(storage.list("")):
        if path in (DATASET_PATH, ORIGIN_PATH) or re.fullmatch(INDEX_NAME, path):
            raise StoreError(
                f"{storage.root} holds a {path} that no plan belongs to: choose another output "
                "folder, or remove the file."
            )
    # A run that was killed while it froze its plan leaves such files.
    paths = (ITEMS_PATH, UNITS_PATH, PLAN_PATH)
    leftovers = tuple(f".{path.replace('/', '.')}" for path in paths)
    scratch = storage.scratch_folder
    if (
        storage.local
        and scratch.is_dir()
        and not all(entry.name.endswith(leftovers) for entry in scratch.iterdir())
    ):
        raise StoreError(
            f"{scratch} would be cleared by a run, but holds files that are not "
            "latentmill's: choose another output folder."
        )
