"""Export of a store to the files of another tool, or to the other shard format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from latentmill.errors import ConfigError, StoreError
from latentmill.export.ace_step import ACEStep
from latentmill.export.conversion import convert
from latentmill.export.files import write_files
from latentmill.export.layout import Layout, Role
from latentmill.export.ltx2 import LTX2
from latentmill.export.stable_audio import StableAudio
from latentmill.fields.status import field_states
from latentmill.reader.field_crops import form_of
from latentmill.record import ShardFormat
from latentmill.storage.storage import Storage
from latentmill.store.bases import needs_copy
from latentmill.store.field_view import warn_of_fields, warn_of_state
from latentmill.store.store import LatentStore
from latentmill.text.log import get_logger
from latentmill.text.printing import counted

_log = get_logger("export")


class Target(StrEnum):
    """Formats that a store can be exported to."""

    STABLE_AUDIO_TOOLS = "stable-audio-tools"
    LTX2 = "ltx2"
    ACE_STEP = "ace-step"
    WEBDATASET = "webdataset"
    PARQUET = "parquet"


LAYOUTS: Mapping[Target, type[Layout]] = {
    Target.STABLE_AUDIO_TOOLS: StableAudio,
    Target.LTX2: LTX2,
    Target.ACE_STEP: ACEStep,
}
FORMATS: Mapping[Target, ShardFormat] = {
    Target.WEBDATASET: "webdataset",
    Target.PARQUET: "parquet",
}


@dataclass(frozen=True)
class ExportSummary:
    """Result of an export.

    Attributes:
        dest: Where the export is.
        to: Its format.
        records: Number of records written.
        escaped: Number of file names that differ from the keys of their items.
        failures: Keys of the records that the format cannot contain, with the reasons.
    """

    dest: str
    to: str
    records: int
    escaped: int = 0
    failures: tuple[tuple[str, str], ...] = ()


def export_store(
    store: LatentStore,
    dest: str,
    to: Target,
    *,
    frames: int | None = None,
    fields: Sequence[str] = (),
) -> ExportSummary:
    """Write a complete store's records for another tool, or as a store of another format.

    Args:
        store: The store, or for another tool also a view.
        dest: A new folder or fsspec URL, or an earlier export of the same store, finished or
            interrupted, which is then updated.
        to: The format.
        frames: For stable-audio-tools, whose batches need latents of one length: shorter latents
            are extended with silence to this many frames, and stable-audio-tools crops longer ones.
        fields: Fields of the store that the tool reads, `NAME` or `ROLE=NAME`; docs/latents.md
            lists the roles.
    """
    layout = LAYOUTS.get(to)
    if store.bases is not None and layout is None:
        raise needs_copy(store.url)
    if not store.complete:
        raise StoreError(
            f"{store.url} is not complete: finish the run that encodes it, then export it."
        )
    storage = Storage(dest)
    if f"{storage.real_root}/".startswith(f"{store.storage.real_root}/"):
        raise ConfigError(
            f"{dest} is inside the store, or the store itself: use another destination."
        )
    if frames is not None and not (layout and layout.takes_frames):
        raise ConfigError(f"--frames has no effect with --to {to}: leave it out.")
    if fields and not (layout and layout.roles):
        raise ConfigError(f"--to {to} cannot contain fields: leave --fields out.")
    if not fields:
        warn_of_fields(store, "the export")
    if layout is None:
        records, failures = convert(store, storage, FORMATS[to])
        return ExportSummary(storage.root, to, records, failures=tuple(failures))
    chosen = chosen_fields(store, to, layout.roles, fields)
    written = write_files(layout(store, storage.root, chosen, frames), storage)
    return ExportSummary(
        storage.root, to, len(written.names), written.escaped, tuple(written.failures)
    )


def chosen_fields(
    store: LatentStore, to: Target, roles: Mapping[str, Role], names: Sequence[str]
) -> dict[str, LatentStore]:
    """Open fields, by their roles.

    Raises:
        ConfigError: A field cannot have its role, or a required role has no field.
        StoreError: There is no such field, or it is not complete.
    """
    found: dict[str, LatentStore] = {}
    for text in names:
        role, equals, name = text.rpartition("=")
        field = store.field(name)
        if not field.complete:
            raise StoreError(
                f"{field.url} is not complete: run the same `latentmill add` again, then export."
            )
        kind = form_of(field).kind
        takes = [one for one, role in roles.items() if kind in role.kinds]
        if not equals:
            role = next((one for one in takes if one not in found), "")
        if role in found:
            raise ConfigError(f"--fields gives {role} twice: leave one out.")
        if role not in takes:
            listed = ", ".join(f"{one} ({' or '.join(roles[one].kinds)})" for one in roles)
            raise ConfigError(
                f"invalid --fields {text!r}: the field has {kind}, and --to {to} takes {listed}."
            )
        found[role] = field
    for role, needs in roles.items():
        if needs.required and role not in found:
            raise ConfigError(
                f"--to {to} needs a field with {' or '.join(needs.kinds)} for {role}: give its "
                "name with --fields NAME."
            )
    if store.bases is None:
        _warn_of_old_values(store, [one.rpartition("=")[2] for one in names])
    else:
        for field in found.values():
            warn_of_state(store, field)
    return found


def _warn_of_old_values(store: LatentStore, names: Sequence[str]) -> None:
    if not names:
        return
    for state in field_states(store.storage, store.plan):
        if state.name in names and state.behind:
            _log.warning(
                "%s: field %s is out of date for %s, whose old values are exported: run the same "
                "`latentmill add` first",
                store.url,
                state.name,
                counted(state.behind, "item"),
            )
