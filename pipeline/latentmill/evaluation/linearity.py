"""The linearity card: the error of latent arithmetic, measured on the store's own audio.

The formulas are in `metrics.py`. The card is evaluation/linearity.json; `ops` warns about an
operation whose error in the card is large.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentmill.errors import ConfigError, ItemError
from latentmill.evaluation.metrics import GAINS, additivity, homogeneity
from latentmill.models.base import Autoencoder
from latentmill.models.inference.precision import numeric_mode
from latentmill.ops.origin import POOR
from latentmill.store.measurement import write_measurement
from latentmill.store.schema import LinearityEntry
from latentmill.store.store import LatentStore
from latentmill.store.verify import read_source

SPARE = 4  # candidates for each item, because some may be silent
QUIET = 1e-4  # audio with an RMS below this is too quiet to be scaled


@dataclass(frozen=True)
class LinearityReport:
    """Result of `measure_linearity`.

    Attributes:
        card: The errors, as they are recorded.
        limit: The error above which an operation is called poor.
        poor: The operations above the limit, with the origin.
    """

    card: LinearityEntry
    limit: float
    poor: tuple[str, ...]


def measure_linearity(
    store: LatentStore, *, items: int = 8, max_seconds: float | None = None, record: bool = True
) -> LinearityReport:
    """Scale and add some sounds of a store and compare with the arithmetic on their latents.

    `items` items are spread evenly over those that are not silent. The first chunk of each, or
    `max_seconds`, without leading silence, is scaled and added to that of the next item. The source
    must still be readable. `record` writes the card into a sealed store's
    evaluation/linearity.json.
    """
    origin = store.origin
    if origin.codes:
        raise ConfigError(
            f"{store.url} contains codes, which cannot be scaled or added: encode without "
            "output=codes."
        )
    model: Autoencoder = store.model()
    if origin.deviations:
        model = _Means(model, origin.deviations)
    longest = store.chunking.model_samples(model.spec)
    if max_seconds is not None:
        longest = round(max_seconds * model.spec.sample_rate)
    sounds = _sounds(store, items, longest)
    if len(sounds) < 2:
        raise ConfigError(
            f"{store.url} has fewer than two items that are not silent: use a larger store."
        )
    with numeric_mode(store.precision, store.device):
        card = _card(model, sounds)
    if record and store.sealed:
        write_measurement(store.storage, store.info, card)
    errors = {"scaling": card.homogeneity, "adding": card.additivity}
    return LinearityReport(card, POOR, tuple(n for n, error in errors.items() if error > POOR))


def _sounds(store: LatentStore, items: int, longest: int) -> list[Tensor]:
    """The first `longest` samples of some items, `[C, T]`, without leading silence."""
    channels = store.model().spec.channels
    chosen: list[Tensor] = []
    step = max(1, len(store) // (SPARE * items))
    keys = list(itertools.islice(store.keys(), 0, None, step))
    first = keys[::SPARE]
    for key in [*first, *(key for key in keys if key not in first)]:
        if len(chosen) == items:
            break
        item = store[key]
        if item.rms < QUIET:
            continue
        try:
            audio = read_source(item, channels)
        except ItemError as error:
            raise ConfigError(f"The source of {item.key} cannot be read: {error}.") from error
        start = int(np.argmax(np.abs(audio).max(axis=0) >= QUIET))
        audio = audio[:, start : start + longest]
        if np.sqrt(np.mean(np.square(audio, dtype=np.float64))) >= QUIET:
            chosen.append(torch.from_numpy(np.ascontiguousarray(audio)))
    return chosen


def _card(model: Autoencoder, sounds: Sequence[Tensor]) -> LinearityEntry:
    scaled = [homogeneity(model, sound) for sound in sounds]
    added = []
    for sound, other in zip(sounds, [*sounds[1:], sounds[0]], strict=True):
        length = min(sound.shape[1], other.shape[1])
        added.append(additivity(model, [sound[:, :length], other[:, :length]]))
    each = [deviation for one in scaled for deviation in one.values()]
    return LinearityEntry(
        items=len(sounds),
        pairs=len(added),
        homogeneity=statistics.median(one.with_origin for one in each),
        homogeneity_raw=statistics.median(one.raw for one in each),
        additivity=statistics.median(one.with_origin for one in added),
        additivity_raw=statistics.median(one.raw for one in added),
        by_gain={
            f"{gain:g}": statistics.median(one[gain].with_origin for one in scaled)
            for gain in GAINS
        },
        homogeneity_mean=statistics.fmean(one.with_origin for one in each),
        additivity_mean=statistics.fmean(one.with_origin for one in added),
        homogeneity_raw_norm=statistics.median(one.raw_norm for one in each),
        additivity_raw_norm=statistics.median(one.raw_norm for one in added),
    )


class _Means:
    """A model that encodes to a posterior's means and standard deviations, without the latter."""

    def __init__(self, model: Autoencoder, deviations: int) -> None:
        self._model, self.spec, self.decode = model, model.spec, model.decode
        self._means = model.spec.latent_channels - deviations

    def encode(self, audio: Tensor) -> Tensor:
        return self._model.encode(audio)[:, : self._means]
