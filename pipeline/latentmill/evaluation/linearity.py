"""The linearity card: the error of latent arithmetic, measured on the store's own audio.

With E the encoder, D the decoder, c = E(silence of the same length) and z_op = sum(a_i E(x_i)) +
(1 - sum(a_i)) c (raw form: without c), after B. Torres and others, "Learning Linearity in Audio
Consistency Autoencoders via Implicit Regularization", arXiv 2510.23530:

    encoder homogeneity   ||E(a x) - z_op|| / ||z_op - c||
    decoder homogeneity   D(z_op) against a D(E(x))
    encoder additivity    ||z_op - E(x1 + x2)|| / ||E(x1 + x2) - c||
    decoder additivity    D(z_op) against D(E(x1 + x2)), D(E(x1)) + D(E(x2)), and x1 + x2
    composition           the same for all stems of a group
    separation            D(E(mix) - E(mix - s) + c) against D(E(s)) and s
    removal               D(E(mix) - E(s) + c) against D(E(mix - s)) and mix - s
    mix rate              MR-STFT of D(E(x1) / 2 + E(x2) / 2) over that of D(E(x1 / 2 + x2 / 2)),
                          both against x1 / 2 + x2 / 2; under 1 is better

Norms are taken without the origin, because a constant in every latent would make every error
small. The card is evaluation/linearity.json; `ops` warns about an operation whose error is large.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from latentmill.errors import ConfigError
from latentmill.evaluation.audio_metrics import magnitude, measures_of, mr_stft
from latentmill.evaluation.metrics import GAINS, combination, relative_l2
from latentmill.evaluation.scores import Key, Scores
from latentmill.evaluation.tracks import Track, UnreadSources, audible, pair_tracks, stem_tracks
from latentmill.models.base import Autoencoder
from latentmill.models.inference.batch import check_whole, most_chunks
from latentmill.models.inference.memory import BatchRunner
from latentmill.models.inference.precision import numeric_mode
from latentmill.ops.origin import POOR, POOR_DB
from latentmill.store.measurement import recording, write_measurement
from latentmill.store.results import Form, LinearityEntry, Metric, Noise
from latentmill.store.store import LatentStore
from latentmill.text.log import get_logger

DECODE_BATCH = 4
KEPT_SPECTRA = 15  # of five sounds: both results, the unchanged mix, and two targets
LONGEST_KEPT = 1 << 20  # samples: 12 s of stereo, whose kept spectra take 300 MB
SEEDS: dict[Noise | None, int] = {None: 0, "shared": 0, "independent": 1}
ADDED = ("mr_stft", "log_mel", "si_sdr", "level")  # measures of sums and differences
FORMS: tuple[Form, ...] = ("origin", "raw", "unchanged")
SCALED = ("snr", "mr_stft", "level")

_log = get_logger("evaluation")


@dataclass(frozen=True)
class LinearityReport:
    """Result of `measure_linearity`.

    Attributes:
        card: The errors, as they are recorded.
        limit: The relative error above which an operation is called poor.
        limit_db: The SI-SDR in dB under which removing a stem is called poor.
        poor: The operations beyond their limit, with the origin.
    """

    card: LinearityEntry
    limit: float
    limit_db: float
    poor: tuple[str, ...]


def measure_linearity(
    store: LatentStore,
    *,
    items: int = 8,
    max_seconds: float | None = None,
    gains: Sequence[float] = (),
    record: bool = True,
) -> LinearityReport:
    """Scale, add and subtract sounds of a store, and compare with the arithmetic on their latents.

    `items` stem groups, spread over the store, are measured, or as many pairs of items if it has no
    groups. One chunk of each is used, or `max_seconds`. `gains` are measured beside the usual ones.
    The source must still be readable. `record` writes the card into a sealed store's
    evaluation/linearity.json.
    """
    refuse_codes(store)
    longest = samples_of(store, max_seconds)
    unread = UnreadSources(store.url)
    tracks, silent = stem_tracks(store, items, longest, unread)
    info, codec = store.info, StoreCodec(store)  # after the index, which may load a later seal
    grouped = bool(tracks)
    if not tracks:
        tracks, silent = pair_tracks(store, items, longest, unread), 0
    unread.report(any_left=bool(tracks))
    if not tracks:
        raise ConfigError(
            f"{store.url} has fewer than two items that are not silent: use a larger store."
        )
    scores = Scores()
    with numeric_mode(store.precision, store.device):
        for number, track in enumerate(tracks):
            _log.info("linearity: %d of %d", number + 1, len(tracks))
            measurer = _TrackMeasurer(codec, scores, number, track, grouped=grouped)
            measurer.measure(sorted({*GAINS, *gains}))
            silent += measurer.silent
    card = _card(scores).model_copy(
        update={
            "grouped": grouped,
            "seconds": longest / codec.spec.sample_rate,
            "tracks": [track.name for track in tracks],
            "silent": silent,
        }
    )
    if record and store.sealed:
        with recording():
            write_measurement(store.storage, info, card, store.model_options)
    return LinearityReport(card, POOR, POOR_DB, _poor(card))


def refuse_codes(store: LatentStore) -> None:
    """Raise ConfigError if there is no arithmetic for the latents of a store."""
    if store.origin.codes:
        raise ConfigError(
            f"{store.url} contains codes, which cannot be scaled or added: encode without "
            "output=codes."
        )


def samples_of(store: LatentStore, max_seconds: float | None) -> int:
    """The length that is used of each item: one chunk by default."""
    spec = store.model().spec
    if max_seconds is None:
        return store.chunking.model_samples(spec)
    return round(max_seconds * spec.sample_rate)


class StoreCodec:
    """Encodes and decodes sounds of any length in one piece, in small batches.

    Of a posterior only the means are encoded and decoded.
    """

    def __init__(self, store: LatentStore) -> None:
        self._model: Autoencoder = store.model()
        self.spec = self._model.spec
        self._means = self.spec.latent_channels - store.origin.deviations
        self._device = store.device
        self._batch = DECODE_BATCH if store.device.startswith("cuda") else 1

    def encode(self, sounds: Sequence[Tensor]) -> list[Tensor]:
        """The latents `[D, Z]`, in float64, of sounds `[C, T]` of one length."""
        length = sounds[0].shape[-1]
        samples = self.spec.padded(length)

        def step(part: slice) -> Tensor:
            audio = F.pad(torch.stack(list(sounds[part])), (0, samples - length))
            return self._model.encode(audio)[:, : self._means].double().cpu()

        return self._run(len(sounds), samples, step)

    def decode(self, latents: Sequence[Tensor], samples: int, seed: int) -> list[Tensor]:
        """The sounds `[C, samples]` of latents of one length."""
        missing = self.spec.latent_channels - self._means

        def step(part: slice) -> Tensor:
            padded = F.pad(torch.stack(list(latents[part])).float(), (0, 0, 0, missing))
            return self._model.decode(padded, samples, seed=seed).float().cpu()

        return self._run(len(latents), samples, step)

    def _run(self, count: int, samples: int, step: Callable[[slice], Tensor]) -> list[Tensor]:
        check_whole(self.spec, samples, self._device)
        size = min(self._batch, most_chunks(self.spec, samples))
        return list(BatchRunner(self.spec, size).run(count, samples, step))


class _TrackMeasurer:
    """Measures one track. Sounds, and their latents, have names: x, y, x+y, mix, stem 0, ..."""

    def __init__(
        self, codec: StoreCodec, scores: Scores, number: int, track: Track, *, grouped: bool
    ) -> None:
        self._codec, self._scores, self._number = codec, scores, number
        self._grouped = grouped
        self.silent = 0
        stems = track.stems
        x, y = (stems[(number + n) % len(stems)] for n in range(2)) if grouped else stems
        self._sounds = {"silence": torch.zeros_like(x), "x": x, "y": y, "x+y": x + y}
        self._sounds["half"] = (x + y) / 2
        self._stems = [f"stem {n}" for n in range(len(stems))]
        mix = torch.stack(stems).sum(dim=0)
        self._sounds |= {"mix": mix} | dict(zip(self._stems, stems, strict=True))
        for n in range(len(stems) if grouped else 1):
            rest = torch.stack([*stems[:n], *stems[n + 1 :]]).sum(dim=0)
            self._sounds[f"rest {n}"] = rest
        self._same = {  # equal sounds are encoded and decoded once
            name: next(first for first in self._sounds if torch.equal(self._sounds[first], sound))
            for name, sound in self._sounds.items()
        }
        self._samples = x.shape[1]
        self._latents: dict[str, Tensor] = {}
        self._decoded: dict[tuple[str, int], Tensor] = {}
        # Each sound is compared with several others. Only identical tensors are equal keys.
        spectrum = lru_cache(KEPT_SPECTRA)(magnitude) if x.numel() <= LONGEST_KEPT else None
        self._measures = measures_of(codec.spec.sample_rate, spectrum)
        stochastic = codec.spec.stochastic_decoder
        self._noises: tuple[Noise | None, ...] = (
            ("shared", "independent") if stochastic else (None,)
        )

    def measure(self, gains: Sequence[float]) -> None:
        first = sorted(set(self._same.values()))
        encoded = self._codec.encode([self._sounds[name] for name in first])
        latents = dict(zip(first, encoded, strict=True))
        self._latents = {name: latents[same] for name, same in self._same.items()}
        self._homogeneity(gains)
        self._sum("encoder_additivity", "decoder_additivity", "x+y", ["x", "y"])
        if self._grouped:
            self._sum("encoder_composition", "decoder_composition", "mix", self._stems)
        for n in range(len(self._stems) if self._grouped else 1):
            self._difference("separation", f"stem {n}", f"rest {n}")
            self._difference("removal", f"rest {n}", f"stem {n}")
        self._mix_rate()
        for measure in ("snr", *ADDED):
            self._add(
                Key("reconstruction", measure, "audio", "reconstruction"),
                self._measures[measure](self._of("x"), self._sounds["x"]),
            )

    def _homogeneity(self, gains: Sequence[float]) -> None:
        x, origin = self._latents["x"], self._latents["silence"]
        louder = self._codec.encode([gain * self._sounds["x"] for gain in gains])
        for gain, encoded in zip(gains, louder, strict=True):
            target = combination([x], [gain], origin)
            raw = combination([x], [gain], None)
            norm = target - origin
            metric: Metric = "encoder_homogeneity"
            for form, given in self._forms(target, raw, x):
                key = Key(metric, "relative_l2", "encoded", form, gain=gain)
                self._add(key, relative_l2(given, encoded, norm))
            whole = Key(metric, "relative_l2_whole", "encoded", "origin", gain=gain)
            self._add(whole, relative_l2(encoded, target))
            for noise in self._noises:
                wanted = gain * self._of("x")
                pair = self._decode([target, raw], SEEDS[noise])
                for form, sound in self._forms(*pair, self._of("x", SEEDS[noise])):
                    key = Key("decoder_homogeneity", "", "decoded", form, noise, gain)
                    self._compare(key, sound, wanted, SCALED)
        self._twice(Key("decoder_homogeneity", "", "decoded", "twice"), "x", SCALED)

    def _sum(self, encoder: Metric, decoder: Metric, whole: str, parts: Sequence[str]) -> None:
        """Additivity or composition."""
        origin, target = self._latents["silence"], self._latents[whole]
        latents, ones = [self._latents[part] for part in parts], [1.0] * len(parts)
        with_origin, raw = combination(latents, ones, origin), combination(latents, ones, None)
        for form, given in self._forms(with_origin, raw, latents[0]):
            key = Key(encoder, "relative_l2", "encoded", form)
            self._add(key, relative_l2(given, target, target - origin))
        key = Key(encoder, "relative_l2_whole", "encoded", "origin")
        self._add(key, relative_l2(with_origin, target))
        added = torch.stack([self._of(part) for part in parts]).sum(dim=0)
        self._results(decoder, with_origin, raw, whole, parts[0], {"sum": added})

    def _difference(self, metric: Metric, wanted: str, other: str) -> None:
        """Separation or removal: the mix without one of its two parts."""
        if not audible(self._sounds[wanted], self._sounds["mix"]):
            self.silent += 1
            return
        pair, signs = [self._latents["mix"], self._latents[other]], [1.0, -1.0]
        with_origin = combination(pair, signs, self._latents["silence"])
        raw = combination(pair, signs, None)
        self._results(metric, with_origin, raw, wanted, "mix", {})

    def _results(
        self,
        metric: Metric,
        with_origin: Tensor,
        raw: Tensor,
        wanted: str,
        unchanged: str,
        others: Mapping[str, Tensor],
    ) -> None:
        """Decode both forms and compare with the target, decoded and as audio, and its bounds."""
        targets = {"decoded": self._of(wanted), **others, "audio": self._sounds[wanted]}
        for noise in self._noises:
            given = self._decode([with_origin, raw], SEEDS[noise])
            before = self._of(unchanged, SEEDS[noise])
            for against, target in targets.items():
                if against == "audio":
                    if SEEDS[noise]:
                        continue
                    before = self._sounds[unchanged]
                noisy = None if against == "audio" else noise
                for form, sound in self._forms(*given, before):
                    self._compare(Key(metric, "", against, form, noisy), sound, target, ADDED)
        self._twice(Key(metric, "", "decoded", "twice"), wanted, ADDED)
        key = Key(metric, "", "audio", "reconstruction")
        self._compare(key, self._of(wanted), self._sounds[wanted], ADDED)

    def _mix_rate(self) -> None:
        half = combination([self._latents["x"], self._latents["y"]], [0.5, 0.5], None)
        # Both distances can be rounding errors, whose ratio needs more digits.
        distance, target = partial(mr_stft, dtype=torch.float64), self._sounds["half"]
        whole = distance(self._of("half"), target)
        if whole == 0:  # no rate: the half mix is decoded without any error
            return
        for noise in self._noises:
            (mixed,) = self._decode([half], SEEDS[noise])
            key = Key("mix_rate", "mix_rate", "audio", "mix", noise)
            self._add(key, distance(mixed, target) / whole)

    def _twice(self, key: Key, name: str, measures: Iterable[str]) -> None:
        """Compare two decodings of one latent with different noise."""
        self._compare(key, self._of(name, SEEDS["independent"]), self._of(name), measures)

    def _compare(self, key: Key, sound: Tensor, target: Tensor, measures: Iterable[str]) -> None:
        for measure in measures:
            self._add(key._replace(measure=measure), self._measures[measure](sound, target))

    def _add(self, key: Key, value: float) -> None:
        self._scores.add(self._number, key, value)

    @staticmethod
    def _forms(*values: Tensor) -> Iterable[tuple[Form, Tensor]]:
        """Name results with the origin, without it, and without any arithmetic."""
        return zip(FORMS, values, strict=True)

    def _of(self, name: str, seed: int = 0) -> Tensor:
        """The decoded latent of a sound."""
        if not self._codec.spec.stochastic_decoder:
            seed = 0
        name = self._same[name]
        if (name, seed) not in self._decoded:
            (self._decoded[name, seed],) = self._decode([self._latents[name]], seed)
        return self._decoded[name, seed]

    def _decode(self, latents: Sequence[Tensor], seed: int) -> list[Tensor]:
        if len(latents) == 2 and torch.equal(*latents):  # the latent of silence is zero
            return self._decode(latents[:1], seed) * 2
        return self._codec.decode(latents, self._samples, seed)


def _card(scores: Scores) -> LinearityEntry:
    """The main errors, as medians and means over all tracks, and all scores."""

    def of(metric: Metric, form: Form, **fields: object) -> list[float]:
        fields = {"measure": "relative_l2", **fields}
        if metric == "encoder_homogeneity" and "gain" not in fields:
            return [value for gain in GAINS for value in of(metric, form, gain=gain, **fields)]
        return scores.values(metric=metric, form=form, **fields)

    scaled, added = of("encoder_homogeneity", "origin"), of("encoder_additivity", "origin")
    entries = scores.entries()
    gains = sorted({e.gain for e in entries if e.gain is not None})
    median = statistics.median
    whole = {"measure": "relative_l2_whole"}

    def removal(form: Form) -> float | None:
        fields = {"measure": "si_sdr", "against": "decoded", "form": form}
        found = [
            value
            for noise in (None, "shared")
            for value in scores.values(metric="removal", noise=noise, **fields)
        ]
        return median(found) if found else None

    return LinearityEntry(
        items=len(scaled) // len(GAINS),
        pairs=len(added),
        homogeneity=median(scaled),
        homogeneity_raw=median(of("encoder_homogeneity", "raw")),
        additivity=median(added),
        additivity_raw=median(of("encoder_additivity", "raw")),
        by_gain={f"{g:g}": median(of("encoder_homogeneity", "origin", gain=g)) for g in gains},
        homogeneity_mean=statistics.fmean(scaled),
        additivity_mean=statistics.fmean(added),
        homogeneity_raw_norm=median(of("encoder_homogeneity", "origin", **whole)),
        additivity_raw_norm=median(of("encoder_additivity", "origin", **whole)),
        removal=removal("origin"),
        removal_raw=removal("raw"),
        scores=entries,
    )


def _poor(card: LinearityEntry) -> tuple[str, ...]:
    subtracts = card.removal is not None and card.removal < POOR_DB
    poor = {
        "scaling": card.homogeneity > POOR,
        "adding": card.additivity > POOR,
        "subtracting": subtracts,
    }
    return tuple(name for name, is_poor in poor.items() if is_poor)
