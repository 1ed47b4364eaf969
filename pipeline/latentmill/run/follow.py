"""The settings and the plan of a field, which follow those of its base store."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from latentmill.config import FIELD_SETTINGS, RunConfig, fingerprint_document, load_config
from latentmill.encoding.fingerprint import version_difference
from latentmill.encoding.lanes import PACKING
from latentmill.errors import ConfigError, StoreError
from latentmill.plan import FieldEntry, Plan, copy, load
from latentmill.run.differences import differences, explain
from latentmill.run.prepare import Setup, refuse_foreign
from latentmill.run.run import RunSummary
from latentmill.sources.settings import option
from latentmill.storage.storage import Storage
from latentmill.store.seal import write_seal
from latentmill.store.tidy import tidy_plan


def field_config(planned: Plan, folder: Storage, options: dict[str, Any]) -> RunConfig:
    """The settings of a run that computes a field.

    How audio is loaded is as in the store itself. Its filters are not applied again: what they
    skipped is skipped in the field.
    """
    given = {name for name, value in options.items() if value is not None}
    if unknown := sorted(given & {*RunConfig.model_fields} - {*FIELD_SETTINGS}):
        raise ConfigError(
            f"{option(unknown[0])} is not a setting of a field, which has the items and the shard "
            "format of its store: leave it out."
        )
    settings = planned.fingerprint.get("settings", {})
    fixed = {
        "source": planned.source,
        "out": folder.root,
        "format": planned.format,
        "allow_truncated": settings.get("allow_truncated", False),
    }
    return load_config(None, {**options, **fixed})


def note_base(summary: RunSummary, storage: Storage, state: str) -> RunSummary:
    """Write into the seal of a field which state of the base store its inputs were compared with.

    Readers warn if the store has another one; see `base_state`. A field without it, because the
    run was killed before, is not compared.
    """
    if summary.waiting or summary.info.base_seal == state:
        return summary
    info = summary.info.model_copy(update={"base_seal": state})
    write_seal(storage, info)
    return replace(summary, info=info)


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
                f"interrupted: run `latentmill drop {base.root} --field {entry.name}` first, "
                "and move away the files that it keeps."
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
        (
            f"kind {one.kind}, from {one.source}",
            f"windows of {one.window_seconds} s" if one.window_seconds else "no windows",
        )
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
