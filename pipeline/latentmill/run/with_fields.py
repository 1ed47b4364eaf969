"""Fields that `encode` computes with the store: `--with NAME=MODEL`.

Those from audio are computed in the same pass, unit by unit. Then the ordinary `add` of each field
completes it, so the result is that of `encode` and `add`, and so is the way to resume.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from latentmill.config import FIELD_SETTINGS, RunConfig, load_config, setting
from latentmill.encoding.lanes import PACKING
from latentmill.engine.joint import FieldInPass
from latentmill.engine.lock import Hold, only_run
from latentmill.engine.progress import Progress
from latentmill.errors import ConfigError, HeadGoneError, ItemError, LatentmillError
from latentmill.fields.values import METADATA
from latentmill.plan import FieldEntry, Plan, Unit, read_items
from latentmill.run.add import field_entry, run_add
from latentmill.run.add_values import AUDIO_ONLY, embedder_of, refuse_audio_only
from latentmill.run.follow import follow_plan
from latentmill.run.prepare import Setup, set_up, uses_cluster
from latentmill.run.run import RunSummary, encode_todo
from latentmill.sources.base import Item
from latentmill.sources.metadata import read_metadata
from latentmill.storage.storage import Storage
from latentmill.store.commit import Tally, committed_revisions, next_revisions
from latentmill.store.field_layout import field_storage, first_revision
from latentmill.text.log import get_logger

_log = get_logger("run")

# The settings that each field has of its own; it shares the others with the store.
OWN = tuple(
    name for name in FIELD_SETTINGS if setting(name).group == "Model" or name == "batch_size"
)
_SHARED = tuple(name for name in FIELD_SETTINGS if name not in OWN and name != "load_tasks")


LOOKED_AT = 8  # items whose metadata is read before the run
_NOT_AUDIO = re.compile(r"(.+?)@(latents|metadata[.:].+)")


@dataclass(frozen=True)
class Wanted:
    """A field as the user wrote it.

    Attributes:
        name: Its name.
        source: What it is computed from, as `add --from` has it.
        per_window: As `add --per-window`.
        options: The settings of `add`.
    """

    name: str
    source: str
    per_window: bool
    options: dict[str, Any]


def wanted_fields(config: RunConfig) -> list[Wanted]:
    """The fields in the setting `with_fields`. ConfigError if one is not valid."""
    return [_wanted(name, value, config) for name, value in config.with_fields.items()]


def _wanted(name: str, value: str | dict[str, Any], config: RunConfig) -> Wanted:
    given = {"model": value} if isinstance(value, str) else dict(value)
    if unknown := sorted(given.keys() - {*OWN, "per_window"}):
        raise ConfigError(
            f"Field {name} of --with: {unknown[0]} is not a setting of a field: use "
            f"{', '.join((*OWN, 'per_window'))}."
        )
    text = str(given.get("model") or "")
    found = _NOT_AUDIO.fullmatch(text)
    model, source = (text, "audio") if found is None else (found[1], found[2])
    source = source.replace("metadata.", METADATA, 1)
    if not model:
        raise ConfigError(
            f"Field {name} of --with has no model: write {name}=MODEL, or from a text of the "
            f"metadata {name}=MODEL@metadata.NAME."
        )
    shared = {one: getattr(config, one) for one in _SHARED}
    per_window = bool(given.pop("per_window", False))
    if source != "audio":
        shared = {one: kept for one, kept in shared.items() if one not in AUDIO_ONLY}
        if uses_cluster(config):
            shared["device"] = "cpu"  # of its tasks, also if the store is encoded on GPUs
    return Wanted(name, source, per_window, {**shared, **given, "model": model})


@dataclass(frozen=True)
class _FromAudio:
    """A field from audio, with its model and chunks."""

    setup: Setup
    entry: FieldEntry


class FieldsOfRun:
    """The fields that a run of `encode` computes. Checks them; writes nothing before `compute`."""

    def __init__(self, config: RunConfig) -> None:
        """Resolve the fields of a configuration.

        Raises LatentmillError if a field, its model or a setting is not valid.
        """
        self._wanted = wanted_fields(config)
        self._from_audio: list[_FromAudio] = []
        self._before: dict[str, int] = {}  # units that a field had before the pass
        for one in self._wanted:
            folder = field_storage(Storage(config.out), one.name)
            own = {name: getattr(config, name) for name in ("source", "format", "allow_truncated")}
            valid = load_config(None, {**one.options, **own, "out": folder.root})
            if one.source != "audio":
                if one.per_window:
                    raise ConfigError("--per-window is only for fields from audio: leave it out.")
                refuse_audio_only(one.options)
                embedder_of(one.source, one.options)
                continue
            if config.load_tasks:
                raise ConfigError(
                    "--load-tasks does not load audio for several models: leave it out, or add "
                    f"field {one.name} later with `latentmill add`."
                )
            setup = set_up(valid)
            stitch = setup.chunking.stitch
            entry = field_entry(one.name, setup.handle, stitch, per_window=one.per_window)
            self._from_audio.append(_FromAudio(setup, entry))

    def compute(
        self,
        setup: Setup,
        plan: Plan,
        tallies: dict[str, Tally],
        todo: list[Unit],
        progress: Progress,
        hold: Hold,
    ) -> None:
        """Encode units of the store, and of the fields from audio that lack them, in one pass."""
        if todo:  # else only the origin is missing
            self._warn_of_names(read_items(setup.storage, todo[0]))
        fields = self._from_audio
        if fields and plan.packing != PACKING:
            _log.info("the plan is of an earlier version: fields are computed after the store")
            fields = []
        with contextlib.ExitStack() as stack:
            found = [self._taken(one, plan, setup.storage, todo, stack) for one in fields]
            taken = [one for one in found if one.revisions]  # others need no model
            if taken:
                names = [one.plan.field.name for one in taken if one.plan.field is not None]
                _log.info("in the same pass: %s", ", ".join(names))
            encode_todo(setup, plan, tallies, todo, progress, hold, taken)

    @staticmethod
    def _has_all(summary: RunSummary, name: str) -> bool:
        """Whether a field has a commit of every unit of its store."""
        committed = committed_revisions(field_storage(Storage(summary.store), name))
        return len(committed) == summary.units

    def _warn_of_names(self, items: Sequence[Item]) -> None:
        """Warn of texts that none of the first items has."""
        wanted = {one.name: one.source.removeprefix(METADATA) for one in self._wanted}
        texts = [one.name for one in self._wanted if wanted[one.name] != one.source]
        found: set[str] = set()
        for item in items[:LOOKED_AT] if texts else ():
            with contextlib.suppress(ItemError):  # the run reports it
                found.update(read_metadata(item))
        for name in texts:
            if wanted[name] not in found:
                _log.warning(
                    "field %s: none of the first items has metadata %s (they have: %s)",
                    name,
                    wanted[name],
                    ", ".join(sorted(found)[:10]) or "none at all",
                )

    def _taken(
        self,
        one: _FromAudio,
        plan: Plan,
        base: Storage,
        todo: Sequence[Unit],
        stack: contextlib.ExitStack,
    ) -> FieldInPass:
        """Lock a field, make its plan, and find the units that it lacks."""
        hold = stack.enter_context(only_run(one.setup.storage))
        setup = replace(one.setup, storage=hold.storage)
        own_plan = follow_plan(setup, plan, base, one.entry)
        hold.storage.clear_scratch()
        stack.callback(hold.storage.clear_scratch)
        committed, free = committed_revisions(hold.storage), next_revisions(hold.storage)
        self._before[one.entry.name] = len(committed)
        first = first_revision(hold.storage.root)
        revisions = {
            unit.name: free.get(unit.name, first) for unit in todo if unit.name not in committed
        }
        return FieldInPass(setup.config, setup.handle, setup.chunking, own_plan, hold, revisions)

    def added(self, summary: RunSummary, progress: Progress) -> RunSummary:
        """Complete the fields of a store that is sealed, those from audio first, as `add` does.

        Returns the summary of the store with those of the fields. Errors are logged; the first one
        is raised after all fields were tried.
        """
        fields: dict[str, RunSummary] = {}
        errors: list[LatentmillError] = []
        for one in sorted(self._wanted, key=lambda one: one.source != "audio"):
            _log.info("completing field %s", one.name)
            options = one.options
            if self._before.get(one.name) == 0 and self._has_all(summary, one.name):
                options = {**options, "retry_failed": False}  # what failed has failed in this run
            try:
                found = run_add(
                    summary.store,
                    one.name,
                    options,
                    progress,
                    source=one.source,
                    per_window=one.per_window,
                )
            except HeadGoneError:  # the process must end now
                raise
            except LatentmillError as error:
                _log.error("field %s: %s", one.name, error)
                errors.append(error)
                continue
            before = min(self._before.get(one.name, found.units), found.resumed_units)
            fields[one.name] = replace(found, resumed_units=before)
        if errors:
            missing = ", ".join(one.name for one in self._wanted if one.name not in fields)
            _log.warning("%s is complete, but not its fields: %s", summary.store, missing)
            raise errors[0]
        return replace(summary, fields={one.name: fields[one.name] for one in self._wanted})
