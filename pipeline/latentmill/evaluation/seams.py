"""The error that chunking introduces: stitched latents compared with those of the whole item.

With `trim` it is zero for a model whose frames depend on a finite length of audio. If normalisation
or attention spans the whole chunk, stitched and whole latents differ. The difference depends on the
model and on the audio, so it is measured and recorded in evaluation/seams.json.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from latentmill.errors import ConfigError
from latentmill.evaluation.tracks import SPARES, UnreadSources
from latentmill.models.inference.batch import check_whole
from latentmill.models.inference.memory import BatchRunner
from latentmill.models.inference.precision import numeric_mode
from latentmill.record import Record
from latentmill.store.measurement import recording, write_measurement
from latentmill.store.results import SeamEntry
from latentmill.store.spread import spread_rows
from latentmill.store.store import LatentStore
from latentmill.store.verify import read_source


@dataclass(frozen=True)
class SeamError:
    """Difference between a record and the latent of its whole item.

    Attributes:
        key: The record's key.
        seconds: Length in seconds.
        error: ||stitched - whole|| / ||whole|| over all frames.
        worst: The largest error of a frame, over the RMS norm of the whole latent's frames.
    """

    key: str
    seconds: float
    error: float
    worst: float


@dataclass(frozen=True)
class SeamReport:
    """Result of `measure_seams`: the error of each item, their median and the largest."""

    items: tuple[SeamError, ...]
    median: float
    largest: float


def measure_seams(
    store: LatentStore, *, items: int = 8, max_seconds: float | None = None, record: bool = True
) -> SeamReport:
    """Encode some items whole and compare the latents with those in the store.

    `items` items are spread evenly over those between one chunk and `max_seconds`; the default is a
    minute, or five chunks if that is longer, because the memory that a model needs grows with the
    length. Items whose latents are all zero are skipped: digital silence with some models. The
    source must still be readable. `record` writes the result into a sealed store's
    evaluation/seams.json.
    """
    index, info = store.index, store.info  # in this order: the index may load a later seal
    fitting = _items_with_seams(store, max_seconds)
    candidates = fitting[spread_rows(len(fitting), items, SPARES)]
    measured: list[SeamError] = []
    unread = UnreadSources(store.url)
    for key in map(index.key, candidates.tolist()):
        if len(measured) == items:
            break
        with unread.noted(key):
            one = _measure(store, store[key])
            measured += [one] if one is not None else []
    unread.report(any_left=bool(measured))
    if not measured:
        raise ConfigError(
            f"{store.url} has only zeros in the latents that were measured: raise --items or "
            "--max-seconds."
        )
    errors = [one.error for one in measured]
    report = SeamReport(tuple(measured), statistics.median(errors), max(errors))
    if record and store.sealed:
        result = SeamEntry(items=len(errors), median=report.median, largest=report.largest)
        with recording():
            write_measurement(store.storage, info, result)
    return report


def _items_with_seams(store: LatentStore, max_seconds: float | None) -> npt.NDArray[np.int64]:
    """Positions of the items with several chunks that are short enough to be encoded whole."""
    chunking, rate = store.chunking, store.info.model["sample_rate"]
    field = store.info.field
    if field is not None and not field.follows_audio:
        raise ConfigError(
            f"The values in {store.url} are not frames of audio, so they have no seams: use a "
            "store of latents."
        )
    if chunking.stitch == "none":
        raise ConfigError(
            f"{store.url} stores overlapping chunks (stitch none), which have no seams: use a "
            "store with another stitch."
        )
    if store.model().spec.codebook_size is not None:
        raise ConfigError(
            f"{store.url} contains codes, for which no error is defined: use a store of latents."
        )
    chunk_seconds = chunking.samples / rate
    most = store.model().spec.max_batch_samples
    longest = max(60.0, 5 * chunk_seconds) if max_seconds is None else max_seconds
    if max_seconds is None and most is not None:
        longest = min(longest, most / rate)
    samples = store.index.column("num_samples")
    chunked = np.flatnonzero(samples > chunking.samples)
    if not len(chunked):
        raise ConfigError(
            f"{store.url} has no seams: every item fits in one chunk ({chunk_seconds:.1f} s)."
        )
    fitting: npt.NDArray[np.int64] = chunked[samples[chunked] <= longest * rate]
    if not len(fitting):
        shortest = math.ceil(samples[chunked].min() / rate)
        raise ConfigError(
            f"{store.url} has no items with seams of at most {longest:g} s, the length up to which "
            f"items are encoded in one piece: raise --max-seconds to {shortest} or more."
        )
    return fitting


def _measure(store: LatentStore, record: Record) -> SeamError | None:
    model = store.model()
    spec = model.spec
    audio = read_source(record, spec.channels)  # [C, T]
    samples = spec.padded(audio.shape[1])
    check_whole(spec, samples, store.device)
    padded = torch.from_numpy(np.pad(audio, ((0, 0), (0, samples - audio.shape[1]))))[None]
    with numeric_mode(store.precision, store.device):
        (whole,) = BatchRunner(spec, 1).run(
            1, samples, lambda _: model.encode(padded).double().cpu()
        )
    reference = whole.numpy()  # [D, Z]
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
