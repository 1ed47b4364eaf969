"""The output of `status`: the state of a store and of its current run."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentmill.cli.listing import pairs_listed
from latentmill.cli.show import ignored_files
from latentmill.encoding.timings import bound
from latentmill.engine.running import CurrentRun, current_run
from latentmill.errors import StoreError
from latentmill.fields.status import FieldStatus, field_states
from latentmill.plan import PLAN_PATH
from latentmill.storage.storage import Storage
from latentmill.store.commit import Tally, iter_commits
from latentmill.store.field_layout import field_storage
from latentmill.text.printing import counted, size_text

if TYPE_CHECKING:
    from latentmill.store.schema import DatasetInfo
    from latentmill.store.store import LatentStore


@dataclass(frozen=True)
class StoreStatus:
    """State of a store: counts over its commits of the planned files, and its current run."""

    store: str
    complete: bool
    units: int
    committed: int
    items: int
    encoded: int
    skipped: int
    failed: int
    hours: float
    bytes: int
    failures: tuple[tuple[str, str], ...]
    skips: tuple[tuple[str, str], ...]
    ignored: Mapping[str, int]
    kept: tuple[tuple[str, str], ...] = ()  # items that could not be encoded again
    stages: Mapping[str, float] = dataclasses.field(default_factory=dict)
    run: CurrentRun | None = None  # the current run, or one that was killed
    bases: tuple[str, ...] = ()  # of a view
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fields: tuple[FieldStatus, ...] = ()
    # Runs that are writing to a field, or that were killed, by the name of the field.
    field_runs: Mapping[str, CurrentRun] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, store: LatentStore) -> StoreStatus:
        """Collect the status of an open store."""
        if store.bases is not None:
            return cls._of_view(store, store.info)
        run = current_run(store.storage)
        fields = tuple(field_states(store.storage, store.plan))
        runs = {f.name: current_run(field_storage(store.storage, f.name)) for f in fields}
        hashes = {unit.name: unit.hash for unit in store.plan.units}
        tallies = [
            Tally.of(commit)
            for commit in iter_commits(store.storage)
            if commit.unit in hashes and commit.items_hash in (None, hashes[commit.unit])
        ]
        stages: Counter[str] = Counter()
        for tally in tallies:
            stages.update(tally.timings)
        return cls(
            store=store.url,
            complete=store.complete and len(tallies) == len(hashes),
            units=len(store.plan.units),
            committed=len(tallies),
            items=store.plan.num_items,
            encoded=sum(tally.encoded for tally in tallies),
            skipped=sum(tally.skipped for tally in tallies),
            failed=sum(tally.failed for tally in tallies),
            hours=sum(tally.audio_seconds for tally in tallies) / 3600,
            bytes=sum(tally.bytes for tally in tallies),
            failures=tuple(pair for tally in tallies for pair in tally.failures),
            skips=tuple(pair for tally in tallies for pair in tally.skips),
            kept=tuple(pair for tally in tallies for pair in tally.kept),
            ignored=store.plan.ignored,
            stages=dict(stages),
            run=run,
            fields=fields,
            field_runs={name: found for name, found in runs.items() if found is not None},
        )

    @classmethod
    def _of_view(cls, store: LatentStore, info: DatasetInfo) -> StoreStatus:
        len(store)  # raises an error if a base has changed
        return cls(
            store=store.url,
            complete=True,
            units=0,
            committed=0,
            items=info.items,
            encoded=info.encoded,
            skipped=info.skipped,
            failed=info.failed,
            hours=info.hours,
            bytes=0,
            failures=(),
            skips=(),
            ignored={},
            bases=tuple(entry.url for entry in info.bases),
            left_out=info.left_out,
        )


def status(value: StoreStatus) -> str:
    """The text that `status` prints."""
    if value.bases:
        return "\n".join(
            [
                f"{value.store}: a view of {', '.join(value.bases)}",
                f"records   {value.encoded} of {value.items}, {value.hours:.3f} h",
                *(f"left out  {count:,}: {reason}" for reason, count in value.left_out.items()),
            ]
        )
    speed = bound(value.stages)
    return "\n".join(
        line
        for line in (
            f"{value.store}: {_state(value)}",
            _progress(value.run),
            f"units     {value.committed} of {value.units} committed",
            f"items     {value.encoded} encoded, {value.skipped} skipped, {value.failed} failed "
            f"of {value.items}",
            f"audio     {value.hours:.3f} h, {size_text(value.bytes)} of shards",
            f"speed     {speed}" if speed else "",
            pairs_listed("failed", value.failures),
            pairs_listed("skipped", value.skips),
            pairs_listed("kept", value.kept),
            ignored_files(value.ignored),
            *(_field(one, value.field_runs.get(one.name)) for one in value.fields),
        )
        if line
    )


def _field(one: FieldStatus, run: CurrentRun | None) -> str:
    """The lines about a field."""
    start = f"field     {one.name}: "
    if one.problem is not None and run is not None and run.state == "running":
        return f"{start}the run of {run.by} is planning it"
    if one.problem is not None:
        return f"{start}{one.problem}"
    lines = [
        f"{start}{one.kind} from {one.source} by {one.model}, {one.encoded} encoded, "
        f"{one.skipped} skipped, {one.failed} failed of {one.items}, {size_text(one.bytes)}"
    ]
    if run is not None and run.state == "running":
        lines.append(f"  running: by {run.by}; {_progress(run).removeprefix('progress  ')}")
    elif run is not None and run.state == "silent":
        again = "rerun the `latentmill add` command of this field"
        lines.append(f"  unknown: {_unknown(run)}; if it was killed, {again}")
    elif not one.complete:
        lines.append(f"  {_what_lacks(one)}: rerun the `latentmill add` command of this field")
    lines += [
        pairs_listed(f"{title} in {one.name}", pairs)
        for title, pairs in (("failed", one.failures), ("kept", one.kept))
        if pairs
    ]
    return "\n".join(lines)


def _what_lacks(one: FieldStatus) -> str:
    parts = [f"behind by {counted(one.behind, 'item')}"] if one.behind else []
    if one.waiting:
        parts.append(f"{counted(one.waiting, 'item')} not encoded in the store yet")
    return ", ".join(parts) or "not sealed"


def planning_error(url: str) -> StoreError | None:
    """The error for a store whose first run is still planning; None if there is no such run."""
    storage = Storage(url)
    run = None if storage.exists(PLAN_PATH) else current_run(storage)
    if run is None or run.state != "running":
        return None
    return StoreError(
        f"{url} has no plan yet: the run of {run.by} is planning it; try again later."
    )


def _state(value: StoreStatus) -> str:
    """Whether a store is complete; if not, who is encoding it or how to resume."""
    run = value.run
    if run is None or (run.state == "stopped" and value.complete):
        hint = "not complete; to resume, run the same encode command again"
        return "complete" if value.complete else hint
    if run.state == "running":
        since = _moment(run.since)
        return f"running: by {run.by}{since and f', since {since}'}"
    if run.state == "stopped":
        return f"stopped: the run of {run.by} was killed; to resume, run the same command again"
    return f"unknown: {_unknown(run)}; if it was killed, run the same command again to resume"


def _unknown(run: CurrentRun) -> str:
    """What is known of a run that may be alive or not."""
    since = _moment(run.since)
    who = f"the run of {run.by}{since and f', since {since}'}"
    if run.heartbeat is None:  # on a disk
        return f"{who}, did not end normally, and this machine cannot see whether it is running"
    last = _moment(run.heartbeat)
    when = last and f" (last heartbeat: {last}, by its own clock)"
    return f"{who}, sent no heartbeat while `status` waited{when}"


def _progress(run: CurrentRun | None) -> str:
    """Progress of a run that was not killed."""
    if run is None or run.state == "stopped":
        return ""
    now = run.progress
    if now is None:
        return "progress  listing the source"
    speed = "" if now.x_real_time is None else f", {now.x_real_time:.1f}x real time"
    left = "" if now.seconds_left is None else f", {_rough(now.seconds_left)} left"
    flight = f", {now.units_in_flight} in flight" if now.units_in_flight else ""
    if not flight and now.units_done < now.units:
        flight = ", starting the workers"
    return (
        f"progress  {now.units_done} of {counted(now.units, 'unit')} committed{flight}, "
        f"{now.audio_seconds / 3600:.3f} of {now.total_seconds / 3600:.3f} h{speed}{left}"
    )


def _moment(iso: str) -> str:
    """Format an ISO time as UTC, to the second."""
    return f"{iso[:19].replace('T', ' ')} UTC" if iso else ""


def _rough(seconds: float) -> str:
    """Format a duration to the minute."""
    hours, minute = divmod(round(seconds / 60), 60)
    if hours:
        return f"about {hours} h {minute} min"
    return f"about {counted(minute, 'minute')}" if minute else "less than a minute"
