"""A whole run, from a source to a sealed store; called by `latentmill encode`."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from latentmill.config import RunConfig, load_config
from latentmill.encoding.fingerprint import fingerprint
from latentmill.engine.lock import Hold, only_run
from latentmill.engine.progress import LogProgress, Progress
from latentmill.errors import ITEMS_FAILED_EXIT_CODE, StoreError
from latentmill.plan import Plan, Unit, check_items
from latentmill.plan.presence import check_source
from latentmill.run.options import EncodeOptions
from latentmill.run.prepare import Extension, Setup, listed, planned, prepare
from latentmill.storage.storage import Storage
from latentmill.store.commit import (
    SealHash,
    Tally,
    iter_commits,
    next_revisions,
)
from latentmill.store.field_layout import first_revision
from latentmill.store.schema import ORIGIN_PATH, SHARDS, DatasetInfo
from latentmill.store.seal import (
    current_annotations,
    current_seal,
    dataset_info,
    read_seal,
    seal,
)
from latentmill.store.tidy import remove_unfinished, tidy
from latentmill.text.log import get_logger
from latentmill.text.printing import counted

if TYPE_CHECKING:  # some of these import pyarrow.compute or torch
    import pyarrow as pa

    from latentmill.curation.refresh import RefreshSummary
    from latentmill.engine.holder import RunProgress
    from latentmill.engine.joint import FieldInPass

_log = get_logger("run")

Compute = Callable[[Setup, Plan, dict[str, Tally], list[Unit], Progress, Hold], None]


@dataclass(frozen=True)
class RunSummary:
    """Result of a run.

    Attributes:
        store: Root of the store.
        info: The content of dataset.json.
        failures: (key, reason) of every failed item in the store.
        skipped: (key, filter) of every item that a filter excluded.
        kept: (key, reason) of every item that this run could not encode again, so that the store
            keeps its earlier latent.
        ignored: Number of files in the source that are not items, by extension.
        units: Number of units in the plan.
        resumed_units: Number of units that were committed before this run.
        seconds: Wall time of this run.
        encoded_seconds: Seconds of audio that this run encoded.
        stages: Seconds that this run's workers spent in each stage, summed over workers.
        extension: What `extend` found; None without `extend`, or if the plan was new.
        refreshed: What `refresh_metadata` changed; None without it.
        waiting: Number of units of a field that the store must encode first; the field has no seal.
        unknown: Number of keys in an imported file that are not items of the store.
        unknown_keys: The first few of them.
        fields: The summaries of the fields that were computed with the store, by name.
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
    kept: tuple[tuple[str, str], ...] = ()
    extension: Extension | None = None
    refreshed: RefreshSummary | None = None
    waiting: int = 0
    unknown: int = 0
    unknown_keys: tuple[str, ...] = ()
    fields: Mapping[str, RunSummary] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 if every item was encoded or skipped, 3 if items failed, also in a field."""
        failed = self.failures or any(one.failures for one in self.fields.values())
        return ITEMS_FAILED_EXIT_CODE if failed else 0


def encode(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    config: str | Path | None = None,
    trust_model: bool = False,
    **options: Unpack[EncodeOptions],
) -> RunSummary:
    """Encode a source into a store. Calling it again with the same arguments resumes.

    Args:
        source: Folder or fsspec URL of the audio.
        out: Folder or fsspec URL of the store.
        config: A YAML file of settings. `options` override it.
        trust_model: Whether a config file inside a store may name code to run.
        **options: Settings, see `EncodeOptions`: model="lin-cae", format="webdataset", ... They
            have the names of the command line's options; `RunConfig` describes them.

    Returns:
        The summary. It lists failed items by key and reason; they do not raise an exception.

    Raises:
        LatentmillError: The run could not start or finish; see `latentmill.errors`.
    """
    given: dict[str, Any] = {"source": os.fspath(source), "out": os.fspath(out), **options}
    return run(load_config(config, given, trust_model=trust_model))


def run(config: RunConfig, progress: Progress | None = None) -> RunSummary:
    """Run a configuration; see `encode`."""
    progress = progress or LogProgress()
    began = time.perf_counter()
    prepared = prepare(config, progress)
    fields = None
    if config.with_fields:
        from latentmill.run.with_fields import FieldsOfRun  # imports this module

        fields = FieldsOfRun(config)
    items = listed(prepared)
    with items or contextlib.nullcontext(), only_run(prepared.storage) as hold:
        prepared = replace(prepared, storage=hold.storage)
        plan, extension, found = planned(prepared, items)
        compute = None if fields is None else fields.compute
        summary = complete(prepared, plan, hold, progress, began, compute=compute)
        refreshed = None
        if config.refresh_metadata and found is not None:
            from latentmill.curation.refresh import refresh_metadata  # imports pyarrow.compute

            refreshed = refresh_metadata(hold.storage, plan, found)
            summary = replace(summary, info=read_seal(hold.storage) or summary.info)
    summary = replace(summary, extension=extension, refreshed=refreshed)
    return summary if fields is None else fields.added(summary, progress)


def _amended(
    storage: Storage, sealed: DatasetInfo, revisions: Mapping[str, int]
) -> pa.Table | None:
    """See `without_outdated`."""
    if sealed.annotation is None or not sealed.annotation.refreshed:
        return None
    from latentmill.curation.refresh import without_outdated  # imports pyarrow.compute

    return without_outdated(storage, sealed, revisions)


def complete(
    setup: Setup,
    plan: Plan,
    hold: Hold,
    progress: Progress,
    began: float,
    stale: Collection[str] = (),
    compute: Compute | None = None,
    waiting: Collection[str] = (),
) -> RunSummary:
    """Encode the units of a plan that are not committed, and seal the store.

    Args:
        setup: The settings of the run.
        plan: The plan.
        hold: The run's exclusive access to the store.
        progress: Receives the progress.
        began: When the run began, by `perf_counter`.
        stale: Names of units that are encoded again.
        compute: Computes the units that are not committed, and the origin if the store has none;
            the default encodes their audio.
        waiting: Names of units that cannot be computed yet. Without them the store is not sealed.
    """
    storage = setup.storage
    tidy(storage)
    tallies, sealable = finished_units(setup, plan, stale)
    revisions = next_revisions(storage)
    first = 0 if plan.field is None else first_revision(storage.root)
    todo = [
        replace(unit, revision=revisions.get(unit.name, first))
        for unit in plan.units
        if unit.name not in tallies and unit.name not in waiting
    ]
    resumed = len(tallies)
    _log.debug("%d of %s committed already", resumed, counted(len(plan.units), "unit"))
    storage.clear_scratch()
    if todo:
        current_annotations(storage, read_seal(storage))  # before hours of work: sealing needs them
    if todo or (tallies and not storage.exists(ORIGIN_PATH)):
        (compute or encode_todo)(setup, plan, tallies, todo, progress, hold)
        tallies, sealable = _trusted(storage, plan)
    lacking = {unit.name for unit in plan.units} - tallies.keys()
    assert lacking <= set(waiting), "a run that ends well has committed every other unit"
    info = dataset_info(plan, iter_commits(storage)) if lacking else None
    info = info or current_seal(storage, sealable)
    if info is None:
        info = seal(storage, plan, amended=_amended)
        remove_unfinished(storage)
        storage.clear_scratch()  # an empty folder
    seconds = time.perf_counter() - began
    summary = _summary(storage, plan, info, tallies, todo, resumed, seconds)
    return replace(summary, waiting=len(lacking))


def encode_todo(
    setup: Setup,
    plan: Plan,
    tallies: dict[str, Tally],
    todo: list[Unit],
    progress: Progress,
    hold: Hold,
    fields: Sequence[FieldInPass] = (),
) -> None:
    """Encode the audio of units, with `fields` in the same pass; write a missing origin."""
    from latentmill.engine.launch import encode_units  # imports ray, which readers must not
    from latentmill.engine.tracker import Tracker

    storage = setup.storage
    check_items(plan, storage)
    if todo:
        check_source(storage, plan, todo)
    holds = [hold, *(one.hold for one in fields)]

    def publish(now: RunProgress) -> None:
        for one in holds:
            one.publish(now)

    tracker = Tracker(plan, tallies, progress, publish)
    try:
        encode_units(setup.config, setup.handle, setup.chunking, plan, todo, tracker, hold, fields)
    finally:
        tracker.end()
        storage.clear_scratch()


def finished_units(
    setup: Setup, plan: Plan, stale: Collection[str] = ()
) -> tuple[dict[str, Tally], str]:
    """The commits of the units that a run does not encode again, by unit.

    Also returns the hash of the seal over all valid commits: those of the other units count until
    later revisions are committed.
    """
    retry_failed = setup.config.retry_failed
    tallies, sealable = _trusted(setup.storage, plan)
    finished = {
        name: one
        for name, one in tallies.items()
        if name not in stale and not (retry_failed and (one.failed or one.kept))
    }
    return finished, sealable


def _trusted(storage: Storage, plan: Plan) -> tuple[dict[str, Tally], str]:
    """The valid commits, by unit, and the hash of their seal.

    A commit is valid if its shard exists and its items are the planned ones; other units are
    encoded again. A shard's name is never used twice, so the file cannot be another shard. Its size
    shows whether it was truncated.
    """
    sizes = storage.list(SHARDS)
    wanted = fingerprint(plan.fingerprint)
    hashes = {unit.name: unit.hash for unit in plan.units}
    trusted, seal_hash = {}, SealHash()
    for commit in iter_commits(storage):
        if commit.unit not in hashes:
            continue
        if commit.fingerprint != wanted:
            raise StoreError(
                f"Commit {commit.unit} of {storage.root} has fingerprint {commit.fingerprint}, but "
                f"the plan has {wanted}, so the files come from two stores: encode into a new "
                "output folder."
            )
        whole = commit.shard is None or sizes.get(commit.shard.rpartition("/")[2]) == commit.bytes
        if whole and commit.items_hash in (None, hashes[commit.unit]):
            trusted[commit.unit] = Tally.of(commit)
            seal_hash.add(commit)
    return trusted, seal_hash.hexdigest()


def _summary(
    storage: Storage,
    plan: Plan,
    info: DatasetInfo,
    tallies: Mapping[str, Tally],
    todo: list[Unit],
    resumed: int,
    seconds: float,
) -> RunSummary:
    done = [tallies[unit.name] for unit in todo if unit.name in tallies]
    stages: Counter[str] = Counter()
    for tally in done:
        stages.update(tally.timings)
    kept_seconds = sum(tally.kept_samples for tally in done) / info.model["sample_rate"]
    return RunSummary(
        store=storage.root,
        info=info,
        failures=tuple(pair for tally in tallies.values() for pair in tally.failures),
        skipped=tuple(pair for tally in tallies.values() for pair in tally.skips),
        ignored=plan.ignored,
        units=len(plan.units),
        resumed_units=resumed,
        seconds=seconds,
        encoded_seconds=max(sum(tally.audio_seconds for tally in done) - kept_seconds, 0.0),
        stages=dict(stages),
        kept=tuple(pair for tally in done for pair in tally.kept),
    )
