"""Quality of decoding: records decoded by the store's model, compared with their source audio."""

from __future__ import annotations

import statistics
from collections import Counter

import numpy as np
import torch

from latentmill.decoding.files import fitted
from latentmill.encoding.loudness import loudest_part
from latentmill.errors import ConfigError, ItemError
from latentmill.evaluation.audio_metrics import measures_of
from latentmill.evaluation.tracks import audible
from latentmill.models.inference.precision import numeric_mode
from latentmill.record import Record
from latentmill.store.measurement import recording, write_measurement
from latentmill.store.results import ItemQuality, ReconstructionEntry, SummaryEntry
from latentmill.store.spread import spread_rows
from latentmill.store.store import LatentStore
from latentmill.store.verify import read_source
from latentmill.text.log import get_logger
from latentmill.text.printing import counted

WORST = 10
MARGIN = 16  # frames decoded before the part that is compared, at least

_log = get_logger("evaluation")


def measure_reconstruction(
    store: LatentStore, *, items: int = 32, max_seconds: float | None = None, record: bool = True
) -> ReconstructionEntry:
    """Decode some records and compare them with their sources.

    `items` records are spread evenly over the store. Of each, the loudest part of `max_seconds`
    in the first 10 minutes is used, by default a minute (the first one of overlapping chunks, which
    cannot be cut).
    Records whose source cannot be read, or that do not decode to finite values, are counted by
    reason. `record` writes the result into a
    sealed store's evaluation/reconstruction.json.
    """
    info = store.info  # after the index, which may load a later seal
    rate = info.model["sample_rate"]
    longest = round((60.0 if max_seconds is None else max_seconds) * rate)
    keys = [store.index.key(row) for row in spread_rows(len(store), items)]
    found: list[ItemQuality] = []
    missing: Counter[str] = Counter()
    silent = 0
    for number, key in enumerate(keys):
        _log.info("reconstruction: %d of %d", number + 1, len(keys))
        try:
            one = _quality(store, store[key], longest)
        except ItemError as error:
            missing[str(error)] += 1
            continue
        if one is None:
            silent += 1
        else:
            found.append(one)
    if not found and not missing:
        raise ConfigError(
            f"all of the {counted(len(keys), 'record')} tried of {store.url} are silent: "
            "raise --items."
        )
    if not found:
        reasons = "; ".join(f"{count}: {why}" for why, count in missing.most_common(3))
        silence = f"; {silent} silent" if silent else ""
        raise ConfigError(
            f"no record of {store.url} can be compared with its source ({reasons}{silence}): make "
            "the sources readable, or raise --items."
        )
    result = ReconstructionEntry(
        items=found,
        summary={name: _summary([getattr(i, name) for i in found]) for name in measures_of(rate)},
        worst=[i.key for i in sorted(found, key=lambda i: -i.mr_stft)[:WORST]],
        silent=silent,
        without_source=dict(missing.most_common()),
    )
    if record and store.sealed:
        with recording():
            write_measurement(store.storage, info, result, store.model_options)
    return result


def _quality(store: LatentStore, record: Record, longest: int) -> ItemQuality | None:
    """The quality of one record; None if its source is silent.

    Raises ItemError if its source cannot be read, or if it does not decode to finite values.
    """
    model, latent = store.model(), store.source(record.key)
    hop = model.spec.hop
    start = 0
    if len(latent.shape) == 2:
        rate = model.spec.sample_rate / hop
        start = loudest_part([record.levels], latent.shape[1], -(-longest // hop), rate)
    context = model.spec.context
    before = min(start, max(MARGIN, context.left if context else 0))
    if start:
        first = start - before
        latent = fitted(latent, latent.shape[1] - first, origin=None, offset=-first)
    audio = read_source(record, model.spec.channels, start * hop + longest)[:, start * hop :]
    target = torch.from_numpy(audio)
    if not audible(target):
        return None
    samples = min(target.shape[1], record.num_samples - start * hop)
    with numeric_mode(store.precision, store.device):
        audio = store.decode_latent(latent, samples + before * hop)[:, before * hop :]
    if not np.isfinite(audio).all():
        raise ItemError("it decodes to values that are not finite")
    decoded = torch.from_numpy(audio)
    target = target[:, :samples]
    measured = {n: of(decoded, target) for n, of in measures_of(record.sample_rate).items()}
    return ItemQuality(key=record.key, seconds=samples / record.sample_rate, **measured)


def _summary(values: list[float]) -> SummaryEntry:
    return SummaryEntry(
        mean=statistics.fmean(values),
        median=statistics.median(values),
        low=min(values),
        high=max(values),
    )
