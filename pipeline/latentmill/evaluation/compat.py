"""Linearity by the protocol of the linear-cae authors, for comparison with their figures.

Items are cut into chunks of 132,608 samples, and 20 consecutive chunks are a batch. Neighbouring
chunks of a batch are added: the first to the second, the third to the fourth. Latent arithmetic has
no origin, errors are divided by the norm of the whole latent, every decoding has fresh noise, and
MR-STFT divides by the norm over the batch, as auraloss does. Silent chunks are not left out.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from latentmill.errors import ConfigError
from latentmill.evaluation.audio_metrics import mr_stft, snr
from latentmill.evaluation.linearity import LinearityReport, StoreCodec, refuse_codes
from latentmill.evaluation.metrics import GAINS, combination, relative_l2
from latentmill.evaluation.scores import Key, Scores
from latentmill.evaluation.tracks import LOADED_SECONDS, UnreadSources, spread_keys
from latentmill.models.inference.precision import numeric_mode
from latentmill.ops.origin import POOR, POOR_DB
from latentmill.store.measurement import recording, write_measurement
from latentmill.store.results import LinearityEntry
from latentmill.store.store import LatentStore
from latentmill.store.verify import read_source

PROTOCOL: Literal["linear-cae"] = "linear-cae"
CHUNK, BATCH = 132_608, 20


def measure_linear_cae(
    store: LatentStore,
    *,
    items: int = 8,
    max_seconds: float | None = None,
    gains: Sequence[float] = (),
    record: bool = True,
) -> LinearityReport:
    """Measure linearity by the authors' protocol on `items` items.

    Of each, the first `max_seconds` are used, by default 10 minutes. Items whose source cannot be
    read are left out.

    `record` writes the card into a sealed store's evaluation/linearity-linear-cae.json.
    """
    refuse_codes(store)
    keys = spread_keys(store, items)[:items]
    info = store.info  # after the index, which may load a later seal
    codec, scores = StoreCodec(store), Scores()
    most = int((LOADED_SECONDS if max_seconds is None else max_seconds) * codec.spec.sample_rate)
    unread = UnreadSources(store.url)
    chunks = _chunks(store, keys, most, unread)
    count = 0
    with numeric_mode(store.precision, store.device):
        while len(batch := list(itertools.islice(chunks, BATCH))) > 1:
            _Batch(codec, scores, count, batch).measure(sorted({*GAINS, *gains}))
            count += 1
    unread.report(any_left=count > 0)
    if not count:
        raise ConfigError(
            f"{store.url} has fewer than two chunks of {CHUNK} samples in {len(keys)} items: "
            "raise --items or --max-seconds."
        )
    card = _card(scores).model_copy(
        update={"seconds": CHUNK / codec.spec.sample_rate, "tracks": keys}
    )
    if record and store.sealed:
        with recording():
            write_measurement(store.storage, info, card, store.model_options)
    return LinearityReport(card, POOR, POOR_DB, ())


def _card(scores: Scores) -> LinearityEntry:
    """The card; its main errors are without the origin, because the protocol has none."""
    entries = scores.entries()
    scaled = {e.gain: e for e in entries if e.metric == "encoder_homogeneity"}
    (added,) = (e for e in entries if e.metric == "encoder_additivity")
    usual = [value for gain in GAINS for value in scaled[gain].values]
    homogeneity = statistics.median(usual)
    return LinearityEntry(
        items=len(usual) // len(GAINS),
        pairs=len(added.values),
        homogeneity=homogeneity,
        homogeneity_raw=homogeneity,
        additivity=added.median,
        additivity_raw=added.median,
        by_gain={f"{gain:g}": entry.median for gain, entry in scaled.items()},
        homogeneity_mean=statistics.fmean(usual),
        additivity_mean=added.mean,
        protocol=PROTOCOL,
        scores=entries,
    )


def _chunks(
    store: LatentStore, keys: Sequence[str], most: int, unread: UnreadSources
) -> Iterator[Tensor]:
    for key in keys:
        with unread.noted(key):
            audio = read_source(store[key], store.model().spec.channels, most)
            for start in range(0, audio.shape[1] - CHUNK + 1, CHUNK):
                yield torch.from_numpy(audio[:, start : start + CHUNK].copy())


class _Batch:
    """Measures one batch of chunks."""

    def __init__(
        self, codec: StoreCodec, scores: Scores, number: int, sounds: list[Tensor]
    ) -> None:
        self._codec, self._scores, self._number, self._sounds = codec, scores, number, sounds
        self._seeds = itertools.count(1000 * number)

    def measure(self, gains: Sequence[float]) -> None:
        latents = self._codec.encode(self._sounds)
        decoded = self._decode(latents)
        for gain in gains:
            louder = self._codec.encode([gain * sound for sound in self._sounds])
            given = [combination([latent], [gain], None) for latent in latents]
            key = Key("encoder_homogeneity", "relative_l2", "encoded", "raw", gain=gain)
            for one, target in zip(louder, given, strict=True):
                self._scores.add(self._number, key, relative_l2(one, target))
            key = Key("decoder_homogeneity", "snr", "decoded", "raw", "independent", gain)
            for sound, whole in zip(self._decode(given), decoded, strict=True):
                self._scores.add(self._number, key, snr(sound, gain * whole))
        pairs = list(zip(range(0, len(latents) - 1, 2), range(1, len(latents), 2), strict=True))
        added = [self._sounds[a] + self._sounds[b] for a, b in pairs]
        encoded = self._codec.encode(added)
        given = [combination([latents[a], latents[b]], [1.0, 1.0], None) for a, b in pairs]
        key = Key("encoder_additivity", "relative_l2", "encoded", "raw")
        for one, target in zip(given, encoded, strict=True):
            self._scores.add(self._number, key, relative_l2(one, target))
        sounds = torch.cat(self._decode(given))
        targets = {
            "decoded": torch.cat(self._decode(encoded)),
            "sum": torch.cat([decoded[a] + decoded[b] for a, b in pairs]),
            "audio": torch.cat(added),
        }
        for against, target in targets.items():  # the batch as the channels of one sound
            key = Key("decoder_additivity", "mr_stft", against, "raw", "independent")
            self._scores.add(self._number, key, mr_stft(sounds, target))

    def _decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        return [self._codec.decode([one], CHUNK, next(self._seeds))[0] for one in latents]
