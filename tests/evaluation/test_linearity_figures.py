"""Every figure of the linearity card against the formulas, written here in numpy.

The models are the real classes with random weights: lin-cae (with noise in its decoder), oobleck,
and mdct.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from formulas import METRICS, relative_l2

from latentmill.evaluation.linearity import measure_linearity
from latentmill.models.base import Autoencoder
from latentmill.store.store import LatentStore
from store.store_files import write_store
from support.linear_cae_weights import use_cache, write_cache
from support.tiny_models import write_oobleck

RATE, SECONDS = 44100, 0.2
GAINS = (0.25, 0.5, 0.75, 1.1, 2.0)
ADDED = ("mr_stft", "log_mel", "si_sdr", "level")
Values = dict[tuple[object, ...], list[float]]


def write_sounds(folder: Path, *, grouped: bool) -> Path:
    """Three sounds of the same length: harmonics, a decaying noise, a sweep."""
    folder.mkdir()
    time = np.arange(round(SECONDS * RATE)) / RATE
    random = np.random.default_rng(2)
    sounds = {
        "bass": sum(np.sin(2 * np.pi * 110 * k * time) / k for k in range(1, 9)),
        "drums": random.standard_normal(len(time)) * np.exp(-12 * (time % 0.1)),
        "keys": np.sin(2 * np.pi * (300 * time + 2000 * time**2)),
    }
    for name, sound in sounds.items():
        audio = (0.1 * sound).astype(np.float32)
        audio[0] = 0.1  # leading silence would be left out
        soundfile.write(folder / f"{name}.wav", audio, RATE, subtype="FLOAT")
        if grouped:
            (folder / f"{name}.json").write_text(f'{{"group": "song", "role": "{name}"}}')
    return folder


class Reference:
    """The formulas for one track, with the model as a black box."""

    def __init__(self, model: Autoencoder, values: Values) -> None:
        self._model, self.values, spec = model, values, model.spec
        self._decoded: dict[tuple[bytes, int], np.ndarray] = {}  # to save time
        self.noises = {"shared": 0, "independent": 1} if spec.stochastic_decoder else {None: 0}

    def enc(self, x: np.ndarray) -> np.ndarray:
        padded = np.pad(x, ((0, 0), (0, self._model.spec.padded(x.shape[1]) - x.shape[1])))
        return self._model.encode(torch.from_numpy(padded[None].astype(np.float32)))[0].numpy()

    def dec(self, z: np.ndarray, samples: int, seed: int = 0) -> np.ndarray:
        key = z.astype(np.float32).tobytes(), seed
        if key not in self._decoded:
            latent = torch.from_numpy(z[None].astype(np.float32))
            decoded = self._model.decode(latent, samples, seed=seed)[0]
            self._decoded[key] = decoded.numpy().astype(np.float64)
        return self._decoded[key]

    def put(self, value: float, *key: object) -> None:
        self.values[key].append(value)

    def compare(self, p: np.ndarray, t: np.ndarray, names: tuple[str, ...], *key: object) -> None:
        metric, against, form, noise, gain = key
        for name in names:
            self.put(METRICS[name](p, t, RATE), metric, name, against, form, noise, gain)

    def track(self, stems: list[np.ndarray], x: np.ndarray, y: np.ndarray, targets: list) -> None:
        n = x.shape[1]
        c = self.enc(np.zeros_like(x))
        zx, zy = self.enc(x), self.enc(y)
        for a in GAINS:
            z_op = a * zx + (1 - a) * c
            forms = {"origin": z_op, "raw": a * zx, "unchanged": zx}
            for form, z in forms.items():
                error = relative_l2(z, self.enc(np.float32(a) * x), z_op - c)
                self.put(error, "encoder_homogeneity", "relative_l2", "encoded", form, None, a)
                for noise, seed in self.noises.items():
                    key = ("decoder_homogeneity", "decoded", form, noise, a)
                    wanted = a * self.dec(zx, n)
                    self.compare(self.dec(z, n, seed), wanted, ("snr", "mr_stft", "level"), *key)
            whole = relative_l2(self.enc(np.float32(a) * x), z_op, z_op)
            self.put(
                whole, "encoder_homogeneity", "relative_l2_whole", "encoded", "origin", None, a
            )
        if None not in self.noises:  # without noise, two decodings are equal
            key = ("decoder_homogeneity", "decoded", "twice", None, None)
            self.compare(self.dec(zx, n, 1), self.dec(zx, n), ("snr", "mr_stft", "level"), *key)
        self.sums("additivity", [x, y], c)
        if len(targets) > 1:
            self.sums("composition", stems, c)
        mix = np.sum(stems, axis=0)
        for s, rest in targets:
            for metric, wanted, other in (("separation", s, rest), ("removal", rest, s)):
                z = self.enc(mix) - self.enc(other)
                self.results(metric, {"origin": z + c, "raw": z}, wanted, mix, {})
        half = (x + y) / 2
        for noise, seed in self.noises.items():
            mixed = METRICS["mr_stft"](self.dec(zx / 2 + zy / 2, n, seed), half)
            rate = mixed / METRICS["mr_stft"](self.dec(self.enc(half), n), half)
            self.put(rate, "mix_rate", "mix_rate", "audio", "mix", noise, None)
        key = ("reconstruction", "audio", "reconstruction", None, None)
        self.compare(self.dec(zx, n), x, ("snr", *ADDED), *key)

    def sums(self, metric: str, stems: list[np.ndarray], c: np.ndarray) -> None:
        mix, latents = np.sum(stems, axis=0), [self.enc(stem) for stem in stems]
        raw, whole = np.sum(latents, axis=0), self.enc(mix)
        forms = {"origin": raw + (1 - len(stems)) * c, "raw": raw}
        key = (f"encoder_{metric}", "relative_l2", "encoded")
        for form, z in {**forms, "unchanged": latents[0]}.items():
            self.put(relative_l2(z, whole, whole - c), *key, form, None, None)
        error = relative_l2(forms["origin"], whole, whole)
        self.put(error, key[0], "relative_l2_whole", "encoded", "origin", None, None)
        added = np.sum([self.dec(z, mix.shape[1]) for z in latents], axis=0)
        self.results(f"decoder_{metric}", forms, mix, stems[0], {"sum": added})

    def results(
        self,
        metric: str,
        forms: Mapping[str, np.ndarray],
        wanted: np.ndarray,
        before: np.ndarray,
        others: Mapping[str, np.ndarray],
    ) -> None:
        n, latent = wanted.shape[1], self.enc(wanted)
        for noise, seed in self.noises.items():
            given = {form: self.dec(z, n, seed) for form, z in forms.items()}
            given["unchanged"] = self.dec(self.enc(before), n, seed)
            for against, target in {"decoded": self.dec(latent, n), **others}.items():
                for form, sound in given.items():
                    self.compare(sound, target, ADDED, metric, against, form, noise, None)
        given = {form: self.dec(z, n) for form, z in forms.items()} | {"unchanged": before}
        given["reconstruction"] = self.dec(latent, n)
        for form, sound in given.items():
            self.compare(sound, wanted, ADDED, metric, "audio", form, None, None)
        if None not in self.noises:
            twice = self.dec(latent, n, 1), self.dec(latent, n)
            self.compare(*twice, ADDED, metric, "decoded", "twice", None, None)


def reference(store: LatentStore, source: Path, *, grouped: bool) -> Values:
    """The figures of the sounds in `source`, one group or three pairs."""
    channels = store.model().spec.channels
    sounds = [
        np.repeat(soundfile.read(path, dtype="float32")[0][None], channels, axis=0)
        for path in sorted(source.glob("*.wav"))
    ]
    values: Values = defaultdict(list)
    formulas = Reference(store.model(), values)
    if grouped:
        targets = [(s, np.sum([o for o in sounds if o is not s], axis=0)) for s in sounds]
        formulas.track(sounds, sounds[0], sounds[1], targets)
    else:
        for x, y in zip(sounds, [*sounds[1:], sounds[0]], strict=True):
            formulas.track([x, y], x, y, [(x, y)])
    return values


def assert_equal(card_scores: list, wanted: Values) -> None:
    found = {
        (e.metric, e.measure, e.against, e.form, e.noise, e.gain): e.values for e in card_scores
    }
    exact = {key for key in found if key[3] == "twice"} - set(wanted)
    for key in exact:  # a decoder without noise
        assert set(found[key]) <= {200.0, 0.0}
    assert set(found) - exact == set(wanted)
    for key, values in wanted.items():
        assert found[key] == pytest.approx(values, rel=2e-3, abs=2e-3), key


@pytest.mark.parametrize(
    ("name", "grouped"),
    [
        ("lin-cae", True),
        pytest.param("lin-cae", False, marks=pytest.mark.slow),
        pytest.param("oobleck", True, marks=pytest.mark.slow),
        pytest.param("oobleck", False, marks=pytest.mark.slow),
        ("mdct", True),
        ("mdct", False),
    ],
)
def test_every_figure_is_its_formula(
    name: str, grouped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = name, {}
    if name == "lin-cae":
        pytest.importorskip("linear_cae")
        write_cache(tmp_path / "hf_home")
        use_cache(monkeypatch, tmp_path / "hf_home")
    elif name == "oobleck":
        pytest.importorskip("diffusers")
        write_oobleck(tmp_path / "oobleck")
        model = f"oobleck:{tmp_path / 'oobleck'}"
    source = write_sounds(tmp_path / "sounds", grouped=grouped)
    store = write_store(
        str(tmp_path / "store"), source, model=model, model_options=options, dtype="float32"
    )
    card = measure_linearity(store, items=3, gains=(2.0,)).card
    wanted = reference(store, source, grouped=grouped)
    if name == "mdct":  # errors at rounding level: their size is not defined
        inexact = {"snr", "si_sdr", "level", "mr_stft", "log_mel", "relative_l2"}
        bounds = [e for e in card.scores if e.form in ("unchanged", "mix")]
        assert_equal(
            [e for e in bounds if (e.metric, e.gain) != ("encoder_homogeneity", 1.0)],
            {key: v for key, v in wanted.items() if key[3] in ("unchanged", "mix")},
        )
        for score in card.scores:
            if score.form in ("origin", "raw") and score.measure in inexact:
                bad = score.measure in ("snr", "si_sdr") and score.low < 100
                assert not bad, score
                assert bad or score.measure in ("snr", "si_sdr") or abs(score.high) < 1e-3, score
        return
    assert_equal(card.scores, wanted)
    assert card.grouped == grouped
    removal = wanted["removal", "si_sdr", "decoded", "origin", store_noise(store), None]
    assert card.removal == pytest.approx(np.median(removal), rel=2e-3, abs=2e-3)
    scaled = [
        value
        for gain in GAINS[:4]
        for value in wanted["encoder_homogeneity", "relative_l2", "encoded", "origin", None, gain]
    ]
    assert card.homogeneity == pytest.approx(np.median(scaled), rel=2e-3)
    assert card.homogeneity_mean == pytest.approx(np.mean(scaled), rel=2e-3)


def store_noise(store: LatentStore) -> str | None:
    return "shared" if store.model().spec.stochastic_decoder else None
