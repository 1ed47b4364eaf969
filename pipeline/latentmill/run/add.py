"""Adding a field to a store: another model over the same items; called by `latentmill add`."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any, Unpack

from latentmill.engine.lock import only_run
from latentmill.engine.progress import LogProgress, Progress
from latentmill.errors import ConfigError
from latentmill.fields.inputs import unit_states
from latentmill.models.base import ModelHandle
from latentmill.plan import FieldEntry, Plan
from latentmill.run.add_values import run_add_from
from latentmill.run.follow import field_config, follow_plan, note_base
from latentmill.run.options import AddOptions
from latentmill.run.prepare import Setup, set_up
from latentmill.run.run import RunSummary, complete
from latentmill.storage.storage import Storage
from latentmill.store.commit import iter_commits
from latentmill.store.field_layout import base_plan, base_state, field_storage
from latentmill.store.seal import read_seal
from latentmill.text.log import get_logger
from latentmill.text.printing import size_text

_log = get_logger("run")

LARGE_SHARD = 8 << 30  # bytes


def add(
    store: str | os.PathLike[str],
    *,
    field: str,
    model: str | None = None,
    source: str = "audio",
    per_window: bool = False,
    **options: Unpack[AddOptions],
) -> RunSummary:
    """Add a field to a store: the values of another model for the same items.

    The field is a store in `STORE/fields/FIELD`; the files of the store itself do not change.
    Calling it again with the same arguments resumes, and brings the field up to date after the
    store was extended or items of it were encoded again.

    Args:
        store: Folder or fsspec URL of the store, finished or not.
        field: Name of the field: letters, digits, - and _.
        model: The model that computes the values; not for an imported file.
        source: What the values are computed from: `audio`; `metadata:NAME`, a text in the metadata
            of the items; `latents`, those of the store; or a Parquet or JSONL file with keys, or a
            folder of .npy files, whose values are imported.
        per_window: Store a vector for each window of an item instead of their mean.
        **options: Settings, see `AddOptions`; they have the names of the command line's options.

    Returns:
        The summary of the field. It lists failed items by key and reason.

    Raises:
        LatentmillError: The run could not start or finish; see `latentmill.errors`.
    """
    given: dict[str, Any] = {"model": model, **options}
    return run_add(os.fspath(store), field, given, source=source, per_window=per_window)


def run_add(
    store: str,
    name: str,
    options: dict[str, Any],
    progress: Progress | None = None,
    *,
    source: str = "audio",
    per_window: bool = False,
) -> RunSummary:
    """Add a field to a store; see `add`."""
    if source != "audio":
        if per_window:
            raise ConfigError("--per-window is only for fields from audio: leave it out.")
        return run_add_from(store, name, source, options, progress)
    if options.get("model") is None:
        raise ConfigError("--model is missing: `latentmill models` lists the models.")
    progress = progress or LogProgress()
    began = time.perf_counter()
    base = Storage(store)
    planned, folder = base_plan(base), field_storage(base, name)
    setup = set_up(field_config(planned, folder, options))
    entry = field_entry(name, setup.handle, setup.chunking.stitch, per_window=per_window)
    with only_run(folder) as hold:
        setup = replace(setup, storage=hold.storage)
        state = base_state(read_seal(base), entry.source)  # before the plan, which may be newer
        planned = base_plan(base)  # the store may have been extended since
        plan = follow_plan(setup, planned, base, entry)
        commits = iter_commits(setup.storage)
        states = unit_states(base, plan, setup.storage, entry.source, commits)
        stale = {state.unit.name for state in states if state.stale}
        _warn_of_large_shards(setup, plan, entry)
        summary = complete(setup, plan, hold, progress, began, stale)
        behind = bool(summary.kept)  # readers must warn of the values of earlier files
        return note_base(summary, setup.storage, "" if behind else state)


def _warn_of_large_shards(setup: Setup, plan: Plan, entry: FieldEntry) -> None:
    """Warn if the values need much more space than the latents that the units were planned for."""
    largest = max(unit.seconds for unit in plan.units) * setup.bytes_per_second
    if largest > LARGE_SHARD and not entry.is_pooled:
        _log.warning(
            "the largest shard of field %s will have about %s, because it has the items of one "
            "shard of the store: encode the store with a smaller --unit-seconds to avoid this",
            entry.name,
            size_text(round(largest)),
        )


def field_entry(name: str, handle: ModelHandle, stitch: str, *, per_window: bool) -> FieldEntry:
    """What the field is that a model of audio computes: by the model's `kind`, if it has one."""
    spec = handle.spec
    kind: Any = getattr(handle, "kind", "frames" if spec.codebook_size is None else "codes")
    if per_window and kind != "vector":
        raise ConfigError(
            f"--per-window has no effect with model {spec.name}, which does not compute vectors: "
            "leave it out."
        )
    if kind == "vector" and stitch == "none":
        raise ConfigError(
            f"--stitch none keeps overlapping chunks, but the values of model {spec.name} are "
            "vectors: leave it out."
        )
    return FieldEntry(name, kind, "audio", spec.hop / spec.sample_rate if per_window else None)
