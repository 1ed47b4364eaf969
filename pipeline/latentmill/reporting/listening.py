"""The parts of the report to see and hear: items, a stem group, duplicates and outliers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from latentmill.ops import mix
from latentmill.pictures.drawing import heat_map, spectrogram, waveform
from latentmill.record import FloatArray, Record
from latentmill.reporting.excerpts import Excerpts
from latentmill.reporting.media import Budget, Image
from latentmill.store.results import ReconstructionEntry, StoreStatistics

SECONDS, SHORT_SECONDS = 10.0, 6.0
KBPS, SHORT_KBPS = 96, 48
MAX_STEMS = 8
MAX_GROUPS, MAX_SHOWN = 6, 3  # of duplicates, and of the records of each that have players


@dataclass(frozen=True)
class PreviewedRecord:
    """A record with what can be seen and heard of it.

    Attributes:
        start: Seconds from the start of the record.
        seconds: Length of the excerpt.
        pictures: By name: waveform, spectrogram, reconstruction (its spectrogram), latent.
        players: Addresses by name: original, reconstruction.
        snr: SNR in dB of the record as `evaluate` measured it, not of the excerpt.
        worst: Whether it is among the worst reconstructions.
    """

    record: Record
    start: float
    seconds: float
    pictures: dict[str, Image]
    players: dict[str, str]
    snr: float | None = None
    worst: bool = False


@dataclass(frozen=True)
class PlayableRecord:
    """A record with one short player."""

    key: str
    note: str
    player: str | None


@dataclass(frozen=True)
class Repeats:
    """Records that are the same sound; `more` keys are not listed."""

    kind: str
    records: tuple[PlayableRecord, ...]
    more: int


@dataclass(frozen=True)
class StemMix:
    """A group whose waveforms and whose latents are mixed.

    Attributes:
        sources: Whether the waveforms are the originals; otherwise decoded stems.
        stems: Key, role and waveform of each stem.
        pictures: By name: waveforms, latents (spectrograms of the two mixes).
        players: Addresses by the same names.
        snr: SNR in dB of the decoded latent mix against the mixed waveforms.
    """

    group: str
    sources: bool
    stems: tuple[tuple[str, str | None, Image | None], ...]
    start: float
    seconds: float
    pictures: dict[str, Image]
    players: dict[str, str]
    snr: float | None


def items(
    excerpts: Excerpts, budget: Budget, count: int, quality: ReconstructionEntry | None
) -> list[PreviewedRecord]:
    """Excerpts of `count` records from all parts of the store, with the worst reconstructions."""
    store = excerpts.store
    worst = quality.worst[: min(2, count // 4)] if quality is not None else []
    worst = [key for key in worst if key in store]
    measured = {} if quality is None else {one.key: one.snr for one in quality.items}
    samples = store.index.column("num_samples")
    enough = round(SECONDS * store.info.model["sample_rate"])
    parts = np.array_split(np.arange(len(store)), max(1, count - len(worst)))
    # The first of each part that fills an excerpt, or else the longest.
    longest = [part[np.minimum(samples[part], enough).argmax()] for part in parts if len(part)]
    keys = dict.fromkeys([*(store.index.key(int(at)) for at in longest), *worst])
    return [
        _item(excerpts, budget, key, measured.get(key), key in worst)
        for key in itertools.islice(keys, count)
    ]


def _item(
    excerpts: Excerpts, budget: Budget, key: str, snr: float | None, worst: bool
) -> PreviewedRecord:
    one = excerpts.of(key, SECONDS)
    store, info = excerpts.store, excerpts.store.info
    pictures: dict[str, Image | None] = {}
    if one.best is not None:
        pictures["waveform"] = budget.image(waveform(one.best))
        pictures["spectrogram"] = budget.image(spectrogram(one.best, one.rate))
    if one.original is not None and one.reconstruction is not None:
        pictures["reconstruction"] = budget.image(spectrogram(one.reconstruction, one.rate))
    if one.latent is not None:
        scales = (None, None) if store.codes else (np.array(info.mean), np.array(info.std))
        latent = heat_map(one.latent, mean=scales[0], deviation=scales[1])
        pictures["latent"] = budget.image(latent)
    players = {
        "original": budget.player(one.original, one.rate, KBPS),
        "reconstruction": budget.player(one.reconstruction, one.rate, KBPS),
    }
    return PreviewedRecord(
        one.record,
        one.start,
        one.seconds,
        {name: image for name, image in pictures.items() if image is not None},
        {name: uri for name, uri in players.items() if uri is not None},
        snr,
        worst,
    )


def stem_mix(excerpts: Excerpts, budget: Budget, group: str, keys: Sequence[str]) -> StemMix | None:
    """Mix the stems of a group as waveforms and as latents; None if they cannot be decoded."""
    store, rate = excerpts.store, excerpts.store.info.model["sample_rate"]
    if store.chunking.stitch == "none" or store.codes or not excerpts.can_decode():
        return None
    keys = keys[:MAX_STEMS]
    frames = min(store.entry(key).frames for key in keys)
    records = [excerpts.record(key) for key in keys]
    part = excerpts.common_part(records, frames, SECONDS)
    if not part.samples:
        return None
    begin, end = excerpts.with_context(part, frames)
    latents = [store.crop(key, begin, end - begin) for key in keys]
    origin = store.origin.at(frames, begin)
    mixed = excerpts.cut(mix(latents, origin=origin), begin, part)
    originals = [excerpts.original(record, part) for record in records]
    stems: list[FloatArray] = [one for one in originals if one is not None]
    sources = len(stems) == len(keys)
    if not sources:
        stems = [excerpts.cut(latent, begin, part) for latent in latents]
    length = min(mixed.shape[1], *(stem.shape[1] for stem in stems))
    mixed, whole = mixed[:, :length], np.sum([stem[:, :length] for stem in stems], axis=0)
    peak = max(float(abs(stem).max(initial=0.0)) for stem in stems)
    sounds = {"waveforms": whole, "latents": mixed}
    pictures = {name: budget.image(spectrogram(sound, rate)) for name, sound in sounds.items()}
    players = {name: budget.player(_quieter(s), rate, KBPS) for name, s in sounds.items()}
    waves = [budget.image(waveform(stem, height=48, peak=peak)) for stem in stems]
    return StemMix(
        group,
        sources,
        tuple(zip(keys, (record.role for record in records), waves, strict=True)),
        part.first_sample / rate,
        length / rate,
        {name: image for name, image in pictures.items() if image is not None},
        {name: uri for name, uri in players.items() if uri is not None},
        _snr(mixed, whole),
    )


def _quieter(sound: FloatArray) -> FloatArray:
    """A sound that does not clip, because a mix may be louder than full scale."""
    return sound / max(1.0, float(abs(sound).max(initial=0.0)))


def _snr(sound: FloatArray, target: FloatArray) -> float | None:
    noise = float(np.square(sound - target, dtype=np.float64).sum())
    signal = float(np.square(target, dtype=np.float64).sum())
    return 10 * float(np.log10(signal / noise)) if noise > 0 and signal > 0 else None


def repeats(excerpts: Excerpts, budget: Budget, found: StoreStatistics) -> list[Repeats]:
    """Groups of duplicates, the first of each kind with players."""
    kinds: dict[str, Iterable[Sequence[str]]] = {
        "same file": found.same_file,
        "same audio in another file": found.same_audio,
        "almost the same": [one.keys for one in found.near_duplicates],
    }
    return [
        Repeats(
            kind,
            tuple(_playable(excerpts, budget, key, "") for key in keys[:MAX_SHOWN]),
            max(0, len(keys) - MAX_SHOWN),
        )
        for kind, groups in kinds.items()
        for keys in itertools.islice(groups, MAX_GROUPS)
    ]


def outliers(excerpts: Excerpts, budget: Budget, found: StoreStatistics) -> list[PlayableRecord]:
    """The records that are most unlike the others."""
    return [
        _playable(excerpts, budget, one.key, f"{one.distance:.2g} times the usual distance")
        for one in found.outliers[: MAX_GROUPS + 2]
    ]


def _playable(excerpts: Excerpts, budget: Budget, key: str, note: str) -> PlayableRecord:
    if key not in excerpts.store:  # measured on an earlier seal
        return PlayableRecord(key, note, None)
    one = excerpts.of(key, SHORT_SECONDS, reconstructed=False)
    return PlayableRecord(key, note, budget.player(one.best, one.rate, SHORT_KBPS))
