"""Adding a field to a store: another model over the same items; called by `latentmill add`."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any, Unpack

from latentmill.config import RunConfig, fingerprint_document, load_config
from latentmill.encoding.fingerprint import version_difference
from latentmill.encoding.lanes import PACKING
from latentmill.engine.lock import only_run
from latentmill.engine.progress import LogProgress, Progress
from latentmill.errors import ConfigError, StoreError
from latentmill.fields.inputs import stale_units
from latentmill.models.base import ModelHandle
from latentmill.plan import FieldEntry, Plan, copy, load
from latentmill.run.differences import differences, explain
from latentmill.run.options import AddOptions
from latentmill.run.prepare import Setup, refuse_foreign, set_up
from latentmill.run.run import RunSummary, complete
from latentmill.storage.storage import Storage
from latentmill.store.commit import iter_commits
from latentmill.store.field_layout import base_plan, field_storage
from latentmill.store.tidy import tidy_plan


def add(
    store: str | os.PathLike[str],
    *,
    field: str,
    model: str,
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
        model: The model that computes the values from the audio of the items.
        per_window: Store a vector for each window of an item instead of their mean.
        **options: Settings, see `AddOptions`; they have the names of the command line's options.

    Returns:
        The summary of the field. It lists failed items by key and reason.

    Raises:
        LatentmillError: The run could not start or finish; see `latentmill.errors`.
    """
    given: dict[str, Any] = {"model": model, **options}
    return run_add(os.fspath(store), field, given, per_window=per_window)


def run_add(
    store: str,
    name: str,
    options: dict[str, Any],
    progress: Progress | None = None,
    *,
    per_window: bool = False,
) -> RunSummary:
    """Add a field that is computed from the audio of a store; see `add`."""
    progress = progress or LogProgress()
    began = time.perf_counter()
    base = Storage(store)
    planned, folder = base_plan(base), field_storage(base, name)
    setup = set_up(_config(planned, folder, options))
    entry = _entry(name, setup.handle, per_window=per_window)
    with only_run(folder) as hold:
        setup = replace(setup, storage=hold.storage)
        plan = follow_plan(setup, planned, base, entry)
        commits = iter_commits(setup.storage)
        pairs = stale_units(base, plan, setup.storage, entry.source, commits)
        stale = {unit.name for unit, _, keys in pairs if keys}
        return complete(setup, plan, hold, progress, began, stale)


def _entry(name: str, handle: ModelHandle, *, per_window: bool) -> FieldEntry:
    """What the field is that a model of audio computes: by the model's `kind`, if it has one."""
    spec = handle.spec
    kind: Any = getattr(handle, "kind", "frames" if spec.codebook_size is None else "codes")
    if per_window and kind != "vector":
        raise ConfigError(
            f"--per-window has no effect with model {spec.name}, which does not compute vectors: "
            "leave it out."
        )
    return FieldEntry(name, kind, "audio", spec.hop / spec.sample_rate if per_window else None)


def _config(planned: Plan, folder: Storage, options: dict[str, Any]) -> RunConfig:
    """The settings of a run that computes a field.

    How audio is loaded is as in the store itself. Its filters are not applied again: what they
    skipped is skipped in the field.
    """
    settings = planned.fingerprint.get("settings", {})
    fixed = {
        "source": planned.source,
        "out": folder.root,
        "format": planned.format,
        "allow_truncated": settings.get("allow_truncated", False),
    }
    return load_config(None, {**options, **fixed})


def follow_plan(setup: Setup, planned: Plan, base: Storage, entry: FieldEntry) -> Plan:
    """Copy the plan of the base store into a field. The caller must hold the field.

    The items and units are those of the base store, also after it was extended.
    """
    storage, config = setup.storage, setup.config
    existing = load(storage)
    if existing is None:
        try:
            refuse_foreign(storage)
        except StoreError as error:
            raise StoreError(
                f"{storage.root} has files but no plan, for example because `drop` was "
                f"interrupted: run `latentmill drop {base.root} --field {entry.name}` first."
            ) from error
        tidy_plan(storage, None)
        plan = replace(
            planned,
            fingerprint=fingerprint_document(config, setup.handle.spec, setup.chunking),
            model=config.model,
            model_options=dict(config.model_options),
            channels=config.channels,
            provenance=dict(setup.handle.spec.provenance),
            packing=PACKING,
            field=entry,
        )
        copy(plan, base, storage)
        return plan
    if existing.field is None:
        raise StoreError(f"{storage.root} is not a field: use another name, or move it away.")
    was, now = (
        (f"kind {one.kind}, from {one.source}", f"{one.window_seconds or 'no'} windows")
        for one in (existing.field, entry)
    )
    if was != now:
        raise StoreError(
            f"{storage.root} is a field of {', '.join(was)}, but would be of {', '.join(now)}: use "
            f"another name, or remove it with `latentmill drop {base.root} --field {entry.name}`."
        )
    if reason := version_difference(existing.fingerprint):
        raise StoreError(f"Field {storage.root} {reason}")
    found = differences(existing, config, setup.handle.spec, setup.chunking, existing.source)
    if found:
        raise StoreError(
            f"{explain(found)}. Use the same values, or another name, or remove the field with "
            f"`latentmill drop {base.root} --field {entry.name}`."
        )
    plan = replace(existing, ignored=planned.ignored, units=planned.units, parts=planned.parts)
    if plan != existing:
        copy(plan, base, storage)
    tidy_plan(storage, plan)
    return plan
