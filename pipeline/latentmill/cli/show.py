"""The output of the commands: as text, and as plain values for --json."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from latentmill.cli.listing import MAX_LISTED, kept_latents, pairs_listed
from latentmill.cli.show_fields import field_line, show_field, unknown_keys, waiting_units
from latentmill.cli.show_metadata import refreshed_metadata
from latentmill.encoding.batches import LONG_BATCH_SECONDS
from latentmill.encoding.stored import deviations_of
from latentmill.encoding.timings import bound
from latentmill.models.embedder import EmbedderSpec
from latentmill.store.measurement import IN_INFO
from latentmill.store.seal import VIEW_FIELDS
from latentmill.text.printing import clock_time, counted, number_text, size_text

if TYPE_CHECKING:  # some of these import torch; `status` must start quickly
    from latentmill.curation.refresh import RefreshSummary
    from latentmill.curation.split import Side
    from latentmill.curation.views import Curated
    from latentmill.export.export import ExportSummary
    from latentmill.models.base import ModelSpec
    from latentmill.publishing.hub import PushSummary
    from latentmill.publishing.sync import SyncSummary
    from latentmill.reporting.report import ReportFile
    from latentmill.run.drop import Dropped
    from latentmill.run.forecast import Forecast
    from latentmill.run.prepare import Extension
    from latentmill.run.run import RunSummary
    from latentmill.store.schema import DatasetInfo
    from latentmill.store.verify import VerifyReport


def plain(value: Any) -> Any:
    """Convert dataclasses, models and tuples to the dicts and lists that JSON has."""
    if isinstance(value, BaseModel):
        optional = (*IN_INFO, "annotation", "field", "base_seal")
        unset: set[str] = {name for name in optional if getattr(value, name, 0) is None}
        if not getattr(value, "bases", True):  # not a view
            unset |= VIEW_FIELDS
        return value.model_dump(mode="json", exclude=unset)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if hasattr(value, "exit_code"):
            result["exit_code"] = value.exit_code
        return result
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def summary(run: RunSummary) -> str:
    """The text that `encode` prints at the end."""
    info = run.info
    lines = [
        f"{run.store}: {info.encoded} encoded, {info.skipped} skipped, {info.failed} failed of "
        f"{counted(info.items, 'item')}; {info.hours:.3f} h of audio, "
        f"{size_text(sum(shard.bytes for shard in info.shards))} in "
        f"{counted(len(info.shards), 'shard')}",
        pairs_listed("failed", run.failures),
        pairs_listed("skipped", run.skipped),
        ignored_files(run.ignored),
        kept_latents(run),
        _extension(run.extension, run.refreshed),
        refreshed_metadata(run.refreshed),
        unknown_keys(run),
        waiting_units(run),
        *(field_line(name, one) for name, one in run.fields.items()),
        *(pairs_listed(f"failed in {name}", one.failures) for name, one in run.fields.items()),
    ]
    # A field from texts, latents or a file is computed without workers, and has no audio.
    from_values = info.field is not None and info.field.source != "audio"
    if run.failures or any(one.failures for one in run.fields.values()):
        first = "" if from_values else "fix these files, then "
        lines.append(f"  {first}rerun with --retry-failed")
    todo = run.units - run.resumed_units - run.waiting
    if not todo and not run.waiting:
        hint = " (to add new files of the source, use --extend)"
        lines.append(
            "nothing to encode: every unit is committed already"
            f"{hint if run.extension is None and info.field is None else ''}"
        )
    elif from_values and todo:
        lines.append(f"this run: {todo} of {counted(run.units, 'unit')} in {run.seconds:.1f} s")
    elif todo:
        speed = run.encoded_seconds / run.seconds
        lines.append(
            f"this run: {todo} of {counted(run.units, 'unit')}, "
            f"{run.encoded_seconds / 3600:.3f} h in {run.seconds:.1f} s ({speed:.1f} x real time)"
        )
        model = run.stages.get("model_seconds", 0.0)
        if model + run.stages.get("wait_seconds", 0.0) < 0.25 * run.seconds:
            lines.append(
                "most of this time went into starting Ray and loading the model; encoding took "
                f"{model:.1f} s"
            )
        else:
            lines.append(bound(run.stages) or "")
    return "\n".join(line for line in lines if line)


def _extension(value: Extension | None, refreshed: RefreshSummary | None = None) -> str:
    """Lines about new, changed and missing files, and changed metadata."""
    if value is None:
        return ""
    lines = [
        f"  new items added to the plan: {value.new}"
        if value.new
        else "  no new files in the source"
    ]
    again = "encoded again" if value.retried else "--retry-changed encodes them again"
    for count, keys, what in (
        (value.changed, value.changed_keys, f"changed since planning ({again})"),
        (value.vanished, value.vanished_keys, "no longer in the source (their latents are kept)"),
        (
            value.described,
            value.described_keys,
            "with new or changed sidecars or metadata (--refresh-metadata updates the store)"
            if refreshed is None
            else "with new or changed sidecars or metadata",
        ),
    ):
        if count:
            more = "" if count == len(keys) else ", ..."
            lines.append(f"  {counted(count, 'item')} {what}: {', '.join(keys)}{more}")
    return "\n".join(lines)


def forecast(value: Forecast) -> str:
    """The text that `plan` prints."""
    known = "known"
    if value.estimated_items:
        known = (
            f"{value.estimated_hours:.3f} h of it estimated because the length of "
            f"{counted(value.estimated_items, 'item')} is unknown (--probe reads all headers)"
        )
    formats = ", ".join(f"{count} {name}" for name, count in value.formats.items())
    done = f", {value.committed} of them committed" if value.committed else ""
    rows = {
        "source": value.source,
        "items": f"{value.items} ({formats}), {size_text(value.source_bytes)}",
        "audio": f"{value.hours:.3f} h, {known}",
        "units": f"{value.units}{done}",
        "latents": f"about {size_text(value.latent_bytes)}",
        "batches": f"on a GPU {value.long_batches:.0%} of the audio in batches of "
        f"{LONG_BATCH_SECONDS:g} s or more, with {value.gpu_batch_size} chunks in a full batch",
    }
    if value.calibration is not None and value.run_seconds is not None:
        speed, workers = value.calibration.x_real_time, value.calibration.workers
        seconds = value.run_seconds
        least = "under a minute" if seconds < 60 else f"about {clock_time(seconds)}"
        rows["time"] = (
            f"{least} ({counted(workers, 'worker')}, "
            f"{value.calibration.device}, {speed:,.0f} x real time measured on a short sample)"
        )
    lines = [f"{name:<9} {text}" for name, text in rows.items()]
    todo = f"run `latentmill encode` with the same options to {'continue' if done else 'start'}"
    todo = "every unit is committed" if value.committed == value.units else todo
    last = f"plan saved to {value.store}; {todo}"
    return "\n".join(
        filter(None, [*lines, ignored_files(value.ignored), _extension(value.extension), last])
    )


def info(value: DatasetInfo, fields: Sequence[str] = ()) -> str:
    """The text that `info` prints."""
    model = value.model
    rate = model["sample_rate"] / model["hop"]
    deviations = deviations_of(model)
    means = len(value.mean) - deviations
    mean = sum(value.mean[:means]) / means
    std = (sum(s * s for s in value.std[:means]) / means) ** 0.5
    of = "means" if deviations else "channels"
    rows = {
        "model": f"{model['name']}, {model['sample_rate']} Hz, "
        f"{counted(model['channels'], 'channel')}, scale factor {model['scale_factor']:g}",
        "latents": f"{model['latent_channels']} channels at {rate:.3f} Hz, {value.dtype}, "
        f"{value.layout}",
        "chunking": f"{value.chunking['stitch']}, chunks of "
        f"{value.chunking['samples'] / model['sample_rate']:.2f} s",
        "format": f"view, with {value.format} shards in {counted(len(value.bases), 'store')}"
        if value.bases
        else f"{value.format}, {counted(len(value.shards), 'shard')}, "
        f"{size_text(sum(shard.bytes for shard in value.shards))}",
        "source": value.source,
        "items": f"{value.encoded} encoded, {value.skipped} skipped, {value.failed} failed of "
        f"{value.items}",
        "audio": f"{value.hours:.3f} h, {value.frames} latent frames",
        "statistics": f"mean {number_text(mean)}, std {number_text(std)} over all {of}",
        "fingerprint": value.fingerprint,
    }
    weights = ", ".join(f"{n} {v}" for n, v in model.get("provenance", {}).items() if v is not None)
    if weights:
        rows["weights"] = weights
    if value.field is not None:
        show_field(rows, value)
    if (entry := value.annotation) is not None:
        names = ", ".join(entry.names) or "none"
        rows["annotations"] = (
            f"version {entry.version}: {names} ({counted(entry.records, 'record')})"
        )
    if fields:
        rows["fields"] = ", ".join(fields)
    if value.seams is not None:
        rows["seams"] = (
            f"relative error: median {value.seams.median:.2g}, largest {value.seams.largest:.2g}"
        )
    if value.linearity is not None:
        scaling, adding = value.linearity.homogeneity, value.linearity.additivity
        errors = f"scaling {number_text(scaling)}, adding {number_text(adding)}"
        rows["linearity"] = f"relative error: {errors}"
    return "\n".join(f"{name:<11} {text}" for name, text in rows.items())


def verification(report: VerifyReport) -> str:
    """The text that `verify` prints."""
    units = f"{report.committed} of {counted(report.units, 'unit')}, " if report.units else ""
    lines = [
        f"{units}{counted(report.records, 'record')} of {counted(report.items, 'item')}: "
        f"{'FAULTS FOUND' if report.faults else 'no faults'}"
    ]
    lines += [
        f"field {name}: {counted(one.records, 'record')} of {counted(one.items, 'item')}"
        for name, one in report.fields.items()
    ]
    lines += [f"fault: {fault}" for fault in report.faults]
    for one in report.decoded:
        level = "silence" if one.level_db is None else f"level {one.level_db:+.2f} dB"
        snr = "" if one.snr_db is None else f", SNR {one.snr_db:.1f} dB against its source"
        lines.append(f"decoded {one.key}: {one.seconds:.2f} s, {level}{snr}")
    return "\n".join(lines)


def dropped(value: Dropped) -> str:
    """The text that `drop` prints."""
    lines = [
        f"{value.store}: removed field {value.field}, {counted(value.files, 'file')}, "
        f"{size_text(value.bytes)}"
    ]
    if value.kept:
        lines.append(f"kept, because latentmill did not write them: {', '.join(value.kept)}")
    return "\n".join(lines)


def files(value: Mapping[str, Sequence[str]]) -> str:
    """Paths of the written files, one per line."""
    return "\n".join(value["files"])


def models(entries: Sequence[Any]) -> str:
    """The text that `models` prints without a name."""
    width = max(len(entry.name) for entry in entries)
    kind = max(len(entry.kind) for entry in entries)
    rows = (
        f"{e.name:<{width}}  {e.kind:<{kind}}  {e.description}"
        + (f" [{e.requirement}]" if e.requirement else "")
        for e in entries
    )
    return "\n".join(rows)


def model(spec: ModelSpec | EmbedderSpec, decodes: bool = True) -> str:
    """The text that `models NAME` prints."""
    if isinstance(spec, EmbedderSpec):
        return _embedder(spec)
    chunk = spec.samples(spec.chunk_frames) / spec.sample_rate
    why = (
        "every frame depends on the whole chunk"
        if spec.context is None
        else f"the first {spec.context.left} and last {spec.context.right} frames of a chunk "
        "depend on its edges"
    )
    rows = {
        "model": f"{spec.name}, {spec.sample_rate} Hz, {counted(spec.channels, 'channel')}, "
        f"scale factor {spec.scale_factor:g}",
        "latents": f"{spec.latent_channels} channels at {spec.frame_rate:.3f} Hz "
        f"({spec.hop} samples per frame)",
        "lengths": f"frames(T) = max(1, ceil((T - {spec.overhang}) / {spec.hop})), T a multiple "
        f"of {spec.sample_multiple}, at least {spec.min_samples}",
        "chunking": f"state, chunks of {chunk:.2f} s that continue from the model's state"
        if spec.stitch == "state"
        else f"{spec.stitch}, chunks of {chunk:.2f} s that overlap by "
        f"{spec.overlap_frames} frames: {why}",
        "decoder": "none"
        if not decodes
        else "stochastic (set --seed)"
        if spec.stochastic_decoder
        else "deterministic",
        "weights": ", ".join(f"{n} {v}" for n, v in spec.provenance.items()) or "none",
    }
    lines = [f"{name:<9} {text}" for name, text in rows.items()]
    return "\n".join(lines + [f"          {n} {v}" for n, v in spec.identity.items()])


def _embedder(spec: EmbedderSpec) -> str:
    each = "one vector" if spec.kind == "vector" else f"{spec.kind}, each"
    rows = {
        "model": f"{spec.name}, embeds {'texts' if spec.input == 'text' else 'latents'}",
        "result": f"{each} of {spec.dimensions} numbers",
        "weights": ", ".join(f"{n} {v}" for n, v in spec.provenance.items()) or "none",
    }
    lines = [f"{name:<9} {text}" for name, text in rows.items()]
    return "\n".join(lines + [f"          {n} {v}" for n, v in spec.identity.items()])


def export(value: ExportSummary) -> str:
    """The text that `export` prints."""
    lines = [f"{value.dest}: {counted(value.records, 'record')} for {value.to}"]
    if value.escaped:
        lines.append(
            f"{counted(value.escaped, 'file name')} with escaped characters (%XX), because the "
            "reader would skip or misread them"
        )
    failed = pairs_listed("failed", value.failures, all_with="--json")
    return "\n".join(filter(None, [*lines, failed]))


def curated(value: Curated) -> str:
    """The text that `select` and `merge` print."""
    kind = "a view" if value.view else "copies"
    lines = [
        f"{value.dest}: {kind} of {counted(value.records, 'record')}, {value.hours:.2f} hours",
        *(f"left out {count:,}: {reason}" for reason, count in value.left_out.items()),
    ]
    return "\n".join(lines)


def split(sides: Sequence[Side]) -> str:
    """The text that `split` prints."""
    lines = []
    for side in sides:
        shares = f"{side.share:.2%} of the records ({side.wanted:.2%} wanted)"
        if side.store is None:
            lines.append(f"{side.name}: no records, {side.wanted:.2%} wanted")
        else:
            lines.append(f"{side.store.dest}: {counted(side.store.records, 'record')}, {shares}")
    return "\n".join(lines)


def sync(value: SyncSummary) -> str:
    """The text that `sync` prints."""
    copied, removed = len(value.copied), len(value.removed)
    would = "would copy" if value.dry_run else "copied"
    lines = [
        f"{value.dest}: {would} {counted(copied, 'file')} ({size_text(value.bytes)}); "
        f"{value.kept} {'is' if value.kept == 1 else 'are'} the same"
    ]
    if removed:
        lines[0] += f"; {'would remove' if value.dry_run else 'removed'} {removed} superseded"
    if value.dry_run:
        listed = [*value.copied, *(f"{path} (remove)" for path in value.removed)]
        lines += [f"  {path}" for path in listed[:MAX_LISTED]]
        if len(listed) > MAX_LISTED:
            lines.append(f"  ... and {len(listed) - MAX_LISTED} more; --json lists all")
    return "\n".join(lines)


def push(value: PushSummary) -> str:
    """The text that `push` prints."""
    kind = "private" if value.private else "public"
    line = (
        f"{value.url} ({kind}): uploaded {counted(len(value.uploaded), 'file')} "
        f"({size_text(value.bytes)}); {value.kept} {'is' if value.kept == 1 else 'are'} the same"
    )
    if value.removed:
        line += f"; removed {len(value.removed)} superseded"
    return f"{line}\n  commit {value.commit}"


def closest(word: str, words: Iterable[str]) -> str | None:
    """The most similar of the first 100,000 words."""
    near = difflib.get_close_matches(word, itertools.islice(words, 100_000), n=1)
    return near[0] if near else None


def ignored_files(ignored: Mapping[str, int]) -> str:
    """A line that counts the ignored files by extension or reason."""
    listed = ", ".join(f"{count} {extension}" for extension, count in sorted(ignored.items()))
    return f"  ignored (not audio): {listed}" if ignored else ""


def report(value: ReportFile) -> str:
    """The text that `report` prints."""
    players = counted(value.players, "sound")
    return f"{value.path}: {size_text(value.bytes)}, {players}; open it in a browser"
