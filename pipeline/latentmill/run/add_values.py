"""Adding a field that is not computed from audio: `latentmill add ... --from SOURCE`."""

from __future__ import annotations

import difflib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from latentmill.config import RunConfig
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.fingerprint import fingerprint
from latentmill.encoding.stored import parse_json
from latentmill.engine.lock import Hold, only_run
from latentmill.engine.progress import LogProgress, Progress
from latentmill.errors import ConfigError, StoreError
from latentmill.fields.imported import ImportedValues, is_import
from latentmill.fields.inputs import Absent, InOrder, unit_states
from latentmill.fields.values import FILE, LATENTS, METADATA, MetadataValues, Values, values_of
from latentmill.models.base import ModelSpec
from latentmill.models.embedder import EmbedderHandle, EmbedderSpec
from latentmill.models.inference.device import pick_device
from latentmill.models.registry import resolve_embedder
from latentmill.plan import FieldEntry, Plan, Unit, iter_keys, load
from latentmill.run.follow import field_config, follow_plan, note_base
from latentmill.run.prepare import Setup, uses_cluster, with_precision
from latentmill.run.run import RunSummary, complete
from latentmill.storage.storage import Storage
from latentmill.store.commit import Tally, committed_revisions, iter_commits
from latentmill.store.field_layout import base_plan, base_state, field_storage
from latentmill.store.metadata import PREFIX
from latentmill.store.metadata_file import metadata_of
from latentmill.store.seal import read_origin, read_seal
from latentmill.store.store import LatentStore

MAX_LISTED = 20  # keys
NAMED_RECORDS = 1000  # whose metadata is read for names, if no record has the one that was given
AUDIO_ONLY = (
    "channels",
    "stitch",
    "chunk_seconds",
    "chunk_samples",
    "overlap",
    "compile",
    "load_threads",
    "load_tasks",
    "load_timeout",
    "stall_minutes",
    "workers",
    "threads",
)


@dataclass(frozen=True)
class _Described:
    """The handle of an embedder as that of a model of audio: for the plan of the field."""

    spec: ModelSpec

    def load(self, device: str) -> Any:
        raise AssertionError("the embedder is loaded instead")


def run_add_from(
    store: str,
    name: str,
    source: str,
    options: dict[str, Any],
    progress: Progress | None = None,
) -> RunSummary:
    """Add a field from texts in the metadata, from the latents or from a file; see `add`."""
    progress, began = progress or LogProgress(), time.perf_counter()
    refuse_audio_only(options)
    base = Storage(store)
    planned, folder = base_plan(base), field_storage(base, name)
    imported = ImportedValues(source, name) if is_import(source) else None
    if imported is None:
        handle, values = embedder_of(source, options), values_of(base, source)
    else:
        if options.get("model") is not None:
            raise ConfigError("--model is not used if --from is a file or a folder: leave it out.")
        handle, values, source = imported.model, imported, FILE + imported.name
        options = {**options, "model": "file"}
    config = field_config(planned, folder, options)
    if imported is None:
        config = _on_cpus_of_cluster(config)
    if not committed_revisions(base):
        raise StoreError(
            f"{base.root} has no encoded items yet: add the field once its run has encoded some."
        )
    opened = LatentStore(base.root)
    existing = load(folder)
    if existing is None:
        _check_any(base, planned, values, source, opened)
    elif imported is not None and existing.field is not None:
        had, has = existing.fingerprint["model"].get("latent_channels"), handle.spec.dimensions
        if existing.field.source == source and had != has:
            raise StoreError(
                f"{folder.root} has values of {had} numbers, but the first of {imported.name} has "
                f"{has}: use another name, or remove the field with `latentmill drop {base.root} "
                f"--field {name}`."
            )
    setup = _setup(config, opened, handle.spec, folder)
    entry = FieldEntry(name, handle.spec.kind, source)
    with only_run(folder) as hold:
        setup = replace(setup, storage=hold.storage)
        state = base_state(read_seal(base), source)  # before the plan, which may be newer
        planned = base_plan(base)  # it may have been extended while this run waited for the field
        if imported is None:
            values = values_of(base, source)
        plan = follow_plan(setup, planned, base, entry)
        commits = iter_commits(setup.storage)
        stale, waiting = set(), set()
        for one in unit_states(base, plan, setup.storage, source, commits, values):
            stale |= {one.unit.name} if one.stale else set()
            waiting |= {one.unit.name} if one.waiting else set()
        compute = _Compute(base.root, handle, imported)
        summary = complete(setup, plan, hold, progress, began, stale, compute, waiting)
        summary = note_base(summary, setup.storage, state)
    if imported is None:
        return summary
    unknown, keys = imported.unknown(iter_keys(base, planned), MAX_LISTED)
    return replace(summary, unknown=unknown, unknown_keys=tuple(keys))


def _check_any(
    base: Storage, planned: Plan, values: Values, source: str, opened: LatentStore
) -> None:
    """Raise `ConfigError` if no item of a store with records has a value."""
    commits, reason, records = InOrder(iter_commits(base)), "", 0
    for unit in planned.units:
        commit = commits.of(unit.name)
        records += 0 if commit is None else commit.rows
        for key, now in values.of(unit, commit, None).items():
            if not isinstance(now, Absent):
                return
            reason = reason or f"{key}: {now.reason}"
    if not records:
        return
    hint = "check the keys and values of the file"
    if isinstance(values, MetadataValues):
        name, names = source.removeprefix(METADATA), _metadata_names(opened)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"use {' or '.join(near or names[:10])}"
        hint = hint if names else "the items have no metadata"
    raise ConfigError(f"No item of {base.root} has a value in {source} ({reason}): {hint}.")


def _metadata_names(opened: LatentStore) -> list[str]:
    """Names in the metadata: the columns of the metadata file, and those of its first records."""
    with metadata_of(opened) as file:
        columns = [name for name in file.schema_arrow.names if name.startswith(PREFIX)]
        names = {name.removeprefix(PREFIX) for name in columns}
        for batch in itertools.islice(file.iter_batches(NAMED_RECORDS, columns=["metadata"]), 1):
            names.update(*(parse_json(text) for text in batch["metadata"].to_pylist() if text))
    return sorted(names)


def refuse_audio_only(options: dict[str, Any]) -> None:
    """Raise `ConfigError` if there is a setting that only fields from audio have."""
    wrong = [one.replace("_", "-") for one in AUDIO_ONLY if options.get(one) not in (None, False)]
    if wrong:
        raise ConfigError(f"--{wrong[0]} is only for fields from audio: leave it out with --from.")


def embedder_of(source: str, options: dict[str, Any]) -> EmbedderHandle:
    """The model of a field from texts or latents. ConfigError if it takes something else."""
    if options.get("model") is None:
        raise ConfigError("--model is missing: `latentmill models` lists the models.")
    handle = resolve_embedder(options["model"], options.get("model_options"))
    wanted = "latents" if source == LATENTS else "text"
    if handle.spec.input != wanted:
        raise ConfigError(
            f"Model {options['model']} takes {handle.spec.input}: use --from "
            f"{'latents' if handle.spec.input == 'latents' else 'metadata:NAME'}."
        )
    return handle


def _on_cpus_of_cluster(config: RunConfig) -> RunConfig:
    """With a cluster, set the device of its tasks, which decides on the default precision."""
    if not uses_cluster(config):
        return config
    if config.device not in ("auto", "cpu"):
        raise ConfigError(
            f"--device {config.device} is not available with --address or RAY_ADDRESS, because "
            "fields from texts and latents are computed on the CPUs of a cluster: leave it out, or "
            "run the command without a cluster on a machine with a GPU."
        )
    return config.model_copy(update={"device": "cpu"})


def _setup(config: RunConfig, base: LatentStore, spec: EmbedderSpec, folder: Storage) -> Setup:
    """The setup of a field, with the rate of the base store for frames."""
    model = base.info.model
    timed = spec.kind in ("frames", "codes")
    hop = model["hop"] * spec.stride if timed else 1
    frames = 1
    if timed:
        frames = -(-read_origin(base.storage).shape[-1] // spec.stride)
    described = ModelSpec(
        name=spec.name,
        sample_rate=model["sample_rate"],
        channels=model["channels"],
        latent_channels=spec.dimensions,
        hop=hop,
        overhang=0,
        sample_multiple=1,
        min_samples=1,
        context=None,
        stitch="trim",
        chunk_frames=frames,
        overlap_frames=0,
        batch_size=spec.batch_size,
        scale_factor=1.0,
        stochastic_decoder=False,
        identity={**spec.identity, "kind": spec.kind},
        provenance=spec.provenance,
    )
    chunking = Chunking("trim", frames * hop, frames * hop, 0)
    return Setup(with_precision(config), _Described(described), chunking, folder)


def default_batch_size(spec: EmbedderSpec, device: str) -> int:
    """The spec's batch size for a device; the smallest that it has if it has none for it."""
    kind = "cuda" if device.startswith("cuda") else "cpu"
    return spec.batch_size.get(kind) or min(spec.batch_size.values(), default=1)


@dataclass(frozen=True)
class _Compute:
    """Computes the units of a field, in this process or in tasks of a Ray cluster.

    Without units, only the origin is computed.
    """

    base: str
    handle: EmbedderHandle
    values: Values | None  # of a file; other values are read by each worker

    def __call__(
        self,
        setup: Setup,
        plan: Plan,
        tallies: dict[str, Tally],
        todo: list[Unit],
        progress: Progress,
        hold: Hold,
    ) -> None:
        from latentmill.engine.tracker import Tracker

        tracker = Tracker(plan, tallies, progress, hold.publish)
        try:
            for result in self._results(setup, plan, todo, hold):
                hold.check()
                tracker.unit_done(result)
        finally:
            tracker.end()
            setup.storage.clear_scratch()

    def _results(self, setup: Setup, plan: Plan, todo: Sequence[Unit], hold: Hold) -> Iterator[Any]:
        from latentmill.engine.values_worker import UnitTask, ValuesJob, ValuesWorker

        config = setup.config
        in_tasks = uses_cluster(config) and self.values is None
        device = pick_device(config.device)
        assert plan.field is not None
        job = ValuesJob(
            base=self.base,
            store=Storage(config.out).root,
            owner=hold.owner,
            source=plan.field.source,
            model=self.handle,
            device=device,
            precision=plan.fingerprint["numeric"]["precision"],
            batch_size=config.batch_size or default_batch_size(self.handle.spec, device),
            dtype=config.dtype,
            format=plan.format,
            fingerprint=fingerprint(plan.fingerprint),
            info={
                "model": plan.fingerprint["model"],
                "dtype": config.dtype,
                "layout": "time-major",
                "fingerprint": fingerprint(plan.fingerprint),
            },
            retry_failed=config.retry_failed,
        )
        if not todo:
            ValuesWorker(job, self.values).write_origin()
            return iter(())
        if not in_tasks:
            return map(ValuesWorker(job, self.values), todo)
        from latentmill.engine.tasks import map_in_tasks

        return map_in_tasks(UnitTask(job), todo, config.address)
