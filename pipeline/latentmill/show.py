"""What the command line prints: for people, and as plain values for --json."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from latentmill.engine.progress import Progress, for_terminal
from latentmill.models.base import ModelSpec
from latentmill.run import RunSummary
from latentmill.seams import SeamReport
from latentmill.store.schema import DatasetInfo
from latentmill.store.store import LatentStore
from latentmill.store.verify import Report

MAX_LISTED = 20


def progress() -> Progress:
    """A progress bar on stderr, or lines if it is no terminal."""
    return for_terminal()


@dataclass(frozen=True)
class StoreStatus:
    """How far a store is."""

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

    @classmethod
    def of(cls, store: LatentStore) -> StoreStatus:
        """The status of an open store."""
        commits = store.commits.values()
        entries = [item for commit in commits for item in commit.items]
        return cls(
            store=store.url,
            complete=store.complete,
            units=len(store.plan.units),
            committed=len(store.commits),
            items=store.plan.num_items,
            encoded=sum(item.status == "encoded" for item in entries),
            skipped=sum(item.status == "skipped" for item in entries),
            failed=sum(item.status == "failed" for item in entries),
            hours=sum(commit.audio_seconds for commit in commits) / 3600,
            bytes=sum(commit.bytes for commit in commits),
            failures=tuple((i.key, i.reason or "") for i in entries if i.status == "failed"),
            skips=tuple((i.key, i.reason or "") for i in entries if i.status == "skipped"),
            ignored=store.plan.ignored,
        )


def plain(value: Any) -> Any:
    """A value as JSON knows it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, RunSummary):
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
    """What stands at the end of `encode`."""
    info = run.info
    lines = [
        f"{run.store}: {info.encoded} encoded, {info.skipped} skipped, {info.failed} failed of "
        f"{info.items} items; {info.hours:.3f} h of audio, "
        f"{_size(sum(shard.bytes for shard in info.shards))} in {len(info.shards)} shards",
        _listed("failed", run.failures),
        _listed("skipped", run.skipped),
        _left_alone(run.ignored),
    ]
    if run.failures:
        lines.append("  mend them and run again with --retry-failed to encode their units anew")
    if run.resumed_units == run.units:
        lines.append(
            "every unit was committed already: nothing to encode (the plan is frozen: files that "
            "came later need another OUT)"
        )
    else:
        speed = run.encoded_seconds / run.seconds
        lines.append(
            f"this run: {run.units - run.resumed_units} of {run.units} units, "
            f"{run.encoded_seconds / 3600:.3f} h in {run.seconds:.1f} s ({speed:.1f} x real time)"
        )
        lines.append(_bound(run.stages, run.seconds))
    return "\n".join(line for line in lines if line)


def _bound(stages: Mapping[str, float], seconds: float) -> str:
    """What the workers spent their time on."""
    model, wait = stages.get("model_seconds", 0.0), stages.get("wait_seconds", 0.0)
    if model + wait < 0.25 * seconds:
        return f"most of it was starting Ray and loading the model; the model worked {model:.1f} s"
    share = model / (model + wait)
    verdict = "bound by the model" if share >= 0.5 else "bound by reading and decoding"
    return f"{verdict}: model {model:.1f} s, waiting for audio {wait:.1f} s"


def status(value: StoreStatus) -> str:
    """What `status` prints."""
    state = "complete" if value.complete else "not complete: the same encode command resumes it"
    return "\n".join(
        line
        for line in (
            f"{value.store}: {state}",
            f"units     {value.committed} of {value.units} committed",
            f"items     {value.encoded} encoded, {value.skipped} skipped, {value.failed} failed "
            f"of {value.items}",
            f"audio     {value.hours:.3f} h, {_size(value.bytes)} of shards",
            _listed("failed", value.failures),
            _listed("skipped", value.skips),
            _left_alone(value.ignored),
        )
        if line
    )


def info(value: DatasetInfo) -> str:
    """What `info` prints."""
    model = value.model
    rate = model["sample_rate"] / model["hop"]
    mean = sum(value.mean) / len(value.mean)
    std = (sum(s * s for s in value.std) / len(value.std)) ** 0.5
    rows = {
        "model": f"{model['name']}, {model['sample_rate']} Hz, {model['channels']} channel(s), "
        f"scale factor {model['scale_factor']:g}",
        "latents": f"{model['latent_channels']} channels at {rate:.3f} Hz, {value.dtype}, "
        f"{value.layout}",
        "chunking": f"{value.chunking['stitch']}, chunks of "
        f"{value.chunking['samples'] / model['sample_rate']:.2f} s",
        "format": f"{value.format}, {len(value.shards)} shards, "
        f"{_size(sum(shard.bytes for shard in value.shards))}",
        "source": value.source,
        "items": f"{value.encoded} encoded, {value.skipped} skipped, {value.failed} failed of "
        f"{value.items}",
        "audio": f"{value.hours:.3f} h, {value.frames} latent frames",
        "numbers": f"mean {mean:.4g}, standard deviation {std:.4g} over all channels",
        "print": value.fingerprint,
    }
    return "\n".join(f"{name:<9} {text}" for name, text in rows.items())


def verification(report: Report) -> str:
    """What `verify` prints."""
    lines = [
        f"{report.committed} of {report.units} units, {report.records} records of "
        f"{report.items} items: {'whole' if not report.faults else 'NOT whole'}"
    ]
    lines += [f"fault: {fault}" for fault in report.faults]
    for one in report.decoded:
        level = "silence" if one.level_db is None else f"level {one.level_db:+.2f} dB"
        snr = "" if one.snr_db is None else f", SNR {one.snr_db:.1f} dB against its source"
        lines.append(f"decoded {one.key}: {one.seconds:.2f} s, {level}{snr}")
    return "\n".join(lines)


def files(value: Mapping[str, Sequence[str]]) -> str:
    """The files that were written."""
    return "\n".join(value["files"])


def models(entries: Sequence[Any]) -> str:
    """What `models` prints."""
    return "\n".join(f"{e.name:<12} {e.description} [{e.requirement}]" for e in entries)


def model(spec: ModelSpec) -> str:
    """What `models NAME` prints."""
    chunk = spec.samples(spec.chunk_frames) / spec.sample_rate
    why = (
        "no context makes a chunk's frames equal to the whole item's"
        if spec.context is None
        else f"a frame sees {spec.context} frames on each side, at most"
    )
    rows = {
        "model": f"{spec.name}, {spec.sample_rate} Hz, {spec.channels} channel(s), scale factor "
        f"{spec.scale_factor:g}",
        "latents": f"{spec.latent_channels} channels at {spec.frame_rate:.3f} Hz "
        f"({spec.hop} samples a frame)",
        "lengths": f"frames(T) = max(1, ceil((T - {spec.overhang}) / {spec.hop})), T a multiple "
        f"of {spec.sample_multiple}, at least {spec.min_samples}",
        "chunking": f"{spec.stitch}, chunks of {chunk:.2f} s that share {spec.overlap_frames} "
        f"frames: {why}",
        "decoder": "draws noise, takes a seed" if spec.stochastic_decoder else "deterministic",
        "weights": ", ".join(f"{n} {v}" for n, v in spec.provenance.items()) or "none",
    }
    lines = [f"{name:<9} {text}" for name, text in rows.items()]
    return "\n".join(lines + [f"          {n} {v}" for n, v in spec.identity.items()])


def seams(report: SeamReport) -> str:
    """What `seams` prints."""
    lines = [
        f"{one.key}: {one.seconds:.1f} s, relative error {one.error:.2g}, worst frame "
        f"{one.worst:.2g}"
        for one in report.items
    ]
    lines.append(
        f"stitched against whole: median {report.median:.2g}, largest {report.largest:.2g} of "
        f"{len(report.items)} items"
    )
    return "\n".join(lines)


def closest(word: str, words: Iterable[str]) -> str | None:
    """The most similar word among the first 100,000."""
    near = difflib.get_close_matches(word, itertools.islice(words, 100_000), n=1)
    return near[0] if near else None


def _left_alone(ignored: Mapping[str, int]) -> str:
    """The files that are no items, by extension."""
    if not ignored:
        return ""
    listed = ", ".join(f"{count} {extension}" for extension, count in sorted(ignored.items()))
    return f"  left alone, as their names are not audio's: {listed}"


def _listed(title: str, pairs: Sequence[tuple[str, str]]) -> str:
    lines = [f"  {title}: {key}: {reason}" for key, reason in pairs[:MAX_LISTED]]
    if len(pairs) > MAX_LISTED:
        lines.append(f"  ... and {len(pairs) - MAX_LISTED} more ({title}); status --json has all")
    return "\n".join(lines)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
