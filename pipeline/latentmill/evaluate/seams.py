"""The error at the seams: stitched latents against those of the whole item, on the user's audio.

`trim` makes it vanish for a model whose frames see a finite stretch of audio. Where normalisation
or attention reaches over the whole chunk, chunks and whole items differ; how much depends on the
model and on the audio, so it is measured, and recorded in evaluation/seams.json.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np
import torch

from latentmill.errors import ConfigError, ItemError
from latentmill.models.inference.precision import numeric_mode
from latentmill.record import Record
from latentmill.store.measurement import write_measurement
from latentmill.store.schema import SeamEntry
from latentmill.store.store import LatentStore
from latentmill.store.verify import read_source


@dataclass(frozen=True)
class SeamError:
    """How far one record is from the latent of its whole item.

    Attributes:
        key: The record's key.
        seconds: Its length.
        error: ||stitched - whole|| / ||whole|| over all frames.
        worst: The same for the worst single frame, against the whole's mean frame.
    """

    key: str
    seconds: float
    error: float
    worst: float


@dataclass(frozen=True)
class SeamReport:
    """What was measured on a store's own audio; see `SeamError`."""

    items: tuple[SeamError, ...]
    median: float
    largest: float


def measure_seams(
    store: LatentStore, *, items: int = 8, max_seconds: float | None = None, record: bool = True
) -> SeamReport:
    """Encode some items whole and compare with what the store has.

    Args:
        store: A store whose source can still be read.
        items: How many items, spread evenly over those that are longer than one chunk; those whose
            latent is zero throughout (digital silence, with some models) say nothing.
        max_seconds: Longest item to encode whole: a model needs memory in proportion. Default: a
            minute, or five chunks where that is longer.
        record: Whether to write the result into a sealed store's evaluation/seams.json.

    Raises:
        ConfigError: The store keeps its chunks apart or holds codes, or no item fits.
    """
    chunking, rate = store.chunking, store.info.model["sample_rate"]
    if chunking.stitch == "none":
        raise ConfigError(f"{store.url} keeps its chunks apart (stitch none): it has no seams.")
    if store.model().spec.codebook_size is not None:
        raise ConfigError(
            f"{store.url} holds codes, between which there is no distance to measure."
        )
    chunk_seconds = chunking.samples / rate
    longest = max(60.0, 5 * chunk_seconds) if max_seconds is None else max_seconds
    fitting = [
        key
        for key in store.keys()  # noqa: SIM118  iterating the store gives records
        if chunking.samples < store.entry(key).num_samples <= longest * rate
    ]
    if not fitting:
        raise ConfigError(
            f"{store.url} has no items between one chunk ({chunk_seconds:.1f} s) and "
            f"{longest:g} s: ask for more with --max-seconds."
        )
    step = max(1, len(fitting) // items)
    measured: list[SeamError] = []
    for key in fitting[::step]:
        if len(measured) == items:
            break
        try:
            one = _measure(store, store[key])
        except ItemError as error:
            raise ConfigError(f"The source of {key} cannot be compared: {error}.") from error
        if one is not None:
            measured.append(one)
    if not measured:
        raise ConfigError(
            f"{store.url} has only zeros in the latents that were tried: ask for more --items, or "
            "for longer ones with --max-seconds."
        )
    errors = [one.error for one in measured]
    report = SeamReport(tuple(measured), statistics.median(errors), max(errors))
    if record and store.sealed:
        result = SeamEntry(items=len(errors), median=report.median, largest=report.largest)
        write_measurement(store.storage, store.info, result)
    return report


def _measure(store: LatentStore, record: Record) -> SeamError | None:
    model = store.model()
    audio = read_source(record, model.spec.channels)  # [C, T]
    padding = model.spec.padded(audio.shape[1]) - audio.shape[1]
    with numeric_mode(store.precision, store.device):
        whole = model.encode(torch.from_numpy(np.pad(audio, ((0, 0), (0, padding))))[None])
    reference = whole[0].double().cpu().numpy()  # [D, Z]
    if not reference.any():
        return None
    difference = record.latent.astype(np.float64) - reference
    frames = np.linalg.norm(difference, axis=0)
    typical = np.sqrt(np.mean(np.square(np.linalg.norm(reference, axis=0))))
    return SeamError(
        key=record.key,
        seconds=record.duration,
        error=float(np.linalg.norm(difference) / np.linalg.norm(reference)),
        worst=float(frames.max() / typical),
    )
