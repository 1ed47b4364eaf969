"""A run, from a source to a sealed store: what `latentmill encode` and `jobs/encode.py` call."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentmill.chunks import Chunking
from latentmill.config import RunConfig, differences, fingerprint, fingerprint_document, load_config
from latentmill.device import pick_device
from latentmill.engine.lock import only_run
from latentmill.engine.progress import Progress, QuietProgress
from latentmill.errors import ITEMS_FAILED_EXIT_CODE, ConfigError, SourceError, StoreError
from latentmill.models import registry
from latentmill.models.base import ModelHandle
from latentmill.models.precision import pick_precision
from latentmill.plan import ITEMS_PATH, PLAN_PATH, Plan, Unit, cut_units, freeze, load
from latentmill.sources.base import Listing
from latentmill.sources.folder import FolderSource
from latentmill.storage import Storage
from latentmill.store.commit import read_commits
from latentmill.store.schema import (
    COMMITS,
    DATASET_PATH,
    INDEX_PATH,
    ORIGIN_PATH,
    SHARDS,
    Commit,
    DatasetInfo,
)
from latentmill.store.seal import seal
from latentmill.store.store import open_store

LARGEST_FLOAT16_CODE = 2**11  # its significand has 11 bits


@dataclass(frozen=True)
class RunSummary:
    """How a run ended.

    Attributes:
        store: Where the store is.
        info: What dataset.json says.
        failures: (key, reason) of every failed item of the store.
        skipped: (key, filter) of every item that a filter left out.
        ignored: Files of the source that are no items, counted by extension.
        units: Units of the plan.
        resumed_units: Units that were committed before this run.
        seconds: Wall time of this run.
        encoded_seconds: Audio that this run encoded.
        stages: Seconds that this run's workers spent, by stage, summed over workers.
    """

    store: str
    info: DatasetInfo
    failures: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...]
    ignored: Mapping[str, int]
    units: int
    resumed_units: int
    seconds: float
    encoded_seconds: float
    stages: Mapping[str, float] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 if every item was encoded or skipped, 3 if items failed."""
        return ITEMS_FAILED_EXIT_CODE if self.failures else 0


def encode(source: str, out: str, *, config: str | None = None, **options: Any) -> RunSummary:
    """Encode a source into a store; called again with the same arguments it resumes.

    Args:
        source: Folder or fsspec URL of the audio.
        out: Folder or fsspec URL of the store.
        config: A YAML file of settings; `options` win over it.
        **options: Settings by the names of `RunConfig`: model, format, dtype, ...

    Returns:
        The summary. Failed items are in it, by key and reason; they raise nothing.

    Raises:
        LatentmillError: The run could not be made or completed; see `latentmill.errors`.
    """
    return run(load_config(config, {"source": str(source), "out": str(out), **options}))


def run(config: RunConfig, progress: Progress | None = None) -> RunSummary:
    """Run a configuration; see `encode`."""
    progress = progress or QuietProgress()
    began = time.perf_counter()
    config = _with_precision(config)  # looks for the device, before anything is written
    handle = registry.resolve(config.model, config.model_options, config.channels)
    chunking = Chunking.for_model(
        handle.spec,
        stitch=config.stitch,
        seconds=config.chunk_seconds,
        samples=config.chunk_samples,
        overlap=config.overlap,
    )
    _refuse_inexact_codes(config, handle.spec.codebook_size)
    storage = Storage(config.out)
    source = _source(config, storage)
    # A new store's source is listed before anything is made for the store.
    listing = source.list() if load(storage) is None else None
    with only_run(storage):
        plan = _planned(config, listing, storage, handle, chunking)
        commits = _trusted(storage, plan)
        if config.retry_failed:  # what is committed stays until it is replaced
            commits = {name: one for name, one in commits.items() if not one.count("failed")}
        todo = [unit for unit in plan.units if unit.name not in commits]
        resumed = len(commits)
        storage.clear_scratch()
        if todo:
            _encode_todo(config, handle, chunking, plan, commits, todo, progress)
            commits = _trusted(storage, plan)
            assert len(commits) == len(plan.units), "a run that ends well has committed every unit"
        if todo or not (storage.exists(DATASET_PATH) and storage.exists(INDEX_PATH)):
            info = seal(storage, plan, commits)
            storage.clear_scratch()  # an empty folder
        else:
            info = open_store(storage.root).info
    return _summary(storage, plan, info, commits, todo, resumed, time.perf_counter() - began)


def _refuse_inexact_codes(config: RunConfig, codebook_size: int | None) -> None:
    largest = (codebook_size or 1) - 1
    if config.dtype == "float16" and largest > LARGEST_FLOAT16_CODE:
        raise ConfigError(
            f"{config.model} has codes up to {largest}, and float16 holds whole numbers exactly "
            f"up to {LARGEST_FLOAT16_CODE} only: use dtype float32."
        )


def _with_precision(config: RunConfig) -> RunConfig:
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


def _encode_todo(
    config: RunConfig,
    handle: ModelHandle,
    chunking: Chunking,
    plan: Plan,
    commits: dict[str, Commit],
    todo: list[Unit],
    progress: Progress,
) -> None:
    """Encode the units that have no commit yet."""
    from latentmill.engine.launch import encode_units  # imports ray, which readers do without

    storage = Storage(config.out)
    if not Storage(plan.source).exists(""):
        raise SourceError(
            f"Source {plan.source} is gone, and {len(todo)} units of {storage.root} still need it: "
            "mount or restore it."
        )
    storage.delete(DATASET_PATH)  # not complete while units are missing
    progress.begin(plan, commits)
    try:
        encode_units(config, handle, chunking, plan, todo, progress)
    finally:
        progress.end()
        storage.clear_scratch()


def _source(config: RunConfig, storage: Storage) -> FolderSource:
    """The source, if the store can lie where it is asked for; nothing is written yet."""
    source = FolderSource(config.source, config.extensions)
    if storage.root == source.uri or storage.root.startswith(source.uri.rstrip("/") + "/"):
        raise ConfigError(
            f"The output {storage.root} lies inside the source {source.uri}: choose a folder "
            "outside of it."
        )
    if storage.local and Path(storage.root).exists() and not Path(storage.root).is_dir():
        raise ConfigError(f"The output {storage.root} is a file: name a folder.")
    return source


def _planned(
    config: RunConfig,
    listing: Listing | None,
    storage: Storage,
    handle: ModelHandle,
    chunking: Chunking,
) -> Plan:
    """The store's plan; if it has none, a new one, frozen before anything is encoded."""
    document = fingerprint_document(config, handle.spec, chunking)
    source = FolderSource(config.source, config.extensions)
    plan = load(storage)
    if plan is None:
        listing = listing or source.list()
        plan = Plan(
            source=source.uri,
            units=cut_units(listing.items, config.unit_seconds),
            fingerprint=document,
            model=config.model,
            model_options=dict(config.model_options),
            channels=config.channels,
            format=config.format,
            ignored=listing.ignored,
            provenance=dict(handle.spec.provenance),
            unit_seconds=config.unit_seconds,
            extensions=config.extensions,
        )
        _refuse_foreign(storage)
        freeze(plan, storage)
        return plan
    lines = differences(plan.fingerprint, document)
    if plan.source != source.uri:
        lines.append(f"source is {plan.source!r} in the store, {source.uri!r} now")
    if plan.format != config.format:
        lines.append(f"format is {plan.format!r} in the store, {config.format!r} now")
    if config.unit_seconds not in (None, plan.unit_seconds):
        lines.append(f"unit_seconds is {plan.unit_seconds} in the store, {config.unit_seconds} now")
    if "extensions" in config.model_fields_set and config.extensions != plan.extensions:
        was, now = " ".join(plan.extensions), " ".join(config.extensions)
        lines.append(f"extensions is {was!r} in the store, {now!r} now")
    if lines:
        raise StoreError(
            f"Store {storage.root} belongs to another run: {'; '.join(lines)}. "
            "Use the same settings to resume it, or another output folder."
        )
    return plan


def _refuse_foreign(storage: Storage) -> None:
    """A folder without a plan must hold nothing that a run would overwrite or clear away."""
    for folder in (SHARDS, COMMITS):
        if storage.list(folder):
            raise StoreError(
                f"{storage.root} holds {folder} but no plan: choose another output folder, or "
                "restore its plan/ folder."
            )
    for path in (DATASET_PATH, INDEX_PATH, ORIGIN_PATH):
        if storage.exists(path):
            raise StoreError(
                f"{storage.root} holds a {path} that no plan belongs to: choose another output "
                "folder, or remove the file."
            )
    # A run that was killed while it froze its plan leaves one such file.
    leftovers = tuple(f".{path.replace('/', '.')}" for path in (ITEMS_PATH, PLAN_PATH))
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


def _trusted(storage: Storage, plan: Plan) -> dict[str, Commit]:
    """The commits whose shards are there in full; the others' units are encoded anew."""
    sizes = storage.list(SHARDS)
    wanted = fingerprint(plan.fingerprint)
    trusted = {}
    for name, commit in read_commits(storage).items():
        if commit.fingerprint != wanted:
            raise StoreError(
                f"Commit {name} of {storage.root} has fingerprint {commit.fingerprint}, the plan "
                f"{wanted}: the store was put together from two; encode into a new one."
            )
        if commit.shard is None or sizes.get(commit.shard.rsplit("/", 1)[-1]) == commit.bytes:
            trusted[name] = commit
    return trusted


def _summary(
    storage: Storage,
    plan: Plan,
    info: DatasetInfo,
    commits: Mapping[str, Commit],
    todo: list[Unit],
    resumed: int,
    seconds: float,
) -> RunSummary:
    entries = [item for commit in commits.values() for item in commit.items]
    done = [commits[unit.name] for unit in todo if unit.name in commits]
    stages: dict[str, float] = {}
    for commit in done:
        for name, value in commit.timings.items():
            stages[name] = stages.get(name, 0.0) + value
    return RunSummary(
        store=storage.root,
        info=info,
        failures=tuple((i.key, i.reason or "") for i in entries if i.status == "failed"),
        skipped=tuple((i.key, i.reason or "") for i in entries if i.status == "skipped"),
        ignored=plan.ignored,
        units=len(plan.units),
        resumed_units=resumed,
        seconds=seconds,
        encoded_seconds=sum(commit.audio_seconds for commit in done),
        stages=stages,
    )
