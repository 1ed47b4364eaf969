"""What notebooks display: records and mixes with pictures, and players once the model is loaded."""

from __future__ import annotations

import base64
import copy
import dataclasses
import io
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import latentmill as lm
from latentmill.errors import ConfigError
from latentmill.store.store import LatentStore
from support.field_stores import write_fields
from support.latent_store import write_latents
from support.stem_files import RATE, write_stem_store, write_stems


@pytest.fixture(scope="module")
def stems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebook")
    write_stem_store(folder / "store", write_stems(folder / "source"))
    return folder / "store"


@pytest.fixture
def store(stems: Path) -> LatentStore:
    return LatentStore(stems, device="cpu")


def images(html: str) -> list[tuple[int, int]]:
    image = pytest.importorskip("PIL.Image")
    found = re.findall(r"src='data:image/png;base64,([^']+)'", html)
    return [image.open(io.BytesIO(base64.b64decode(one))).size for one in found]


def sounds(html: str) -> list[np.ndarray]:
    found = re.findall(r"src='data:audio/ogg;base64,([^']+)'", html)
    return [soundfile.read(io.BytesIO(base64.b64decode(one)), always_2d=True)[0] for one in found]


def test_a_record_has_pictures_and_a_player_once_the_model_is_loaded(store: LatentStore) -> None:
    html = store["north/drums"]._repr_html_()
    assert html.startswith("<table>")
    assert images(html) == [(640, 48), (640, 128)]
    assert not sounds(html)
    record = store["north/drums"]
    store.model()
    (sound,) = sounds(record._repr_html_())
    assert len(sound) == pytest.approx(2 * 48_000, abs=960)
    wanted = np.interp(
        np.arange(96_000) / 48_000, np.arange(2 * RATE) / RATE, store.decode("north/drums")[0]
    )
    assert np.corrcoef(sound[5000:90_000, 0], wanted[5000:90_000])[0, 1] > 0.8


def test_ipython_displays_it(store: LatentStore) -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    html = formatters.HTMLFormatter()(store["north/drums"])
    assert "<img" in html
    assert "<table>" in formatters.HTMLFormatter()(store)


def test_pickles_and_copies_have_no_store(store: LatentStore) -> None:
    record = store["north/drums"]
    data = pickle.dumps(record)
    assert len(data) < record.latent.nbytes + 3000
    for other in (pickle.loads(data), copy.copy(record)):
        assert other._decode_start is None
        np.testing.assert_array_equal(other.latent, record.latent)
        assert "<img" in other._repr_html_()


def test_a_mix_is_that_of_lm_mix_and_can_be_heard(store: LatentStore) -> None:
    gains = {"south/drums": 1.0, "south/bass": 0.5}
    mixed = store.mix(gains)
    latents = [store[key].latent for key in gains]
    wanted = lm.mix(latents, list(gains.values()), origin=store.origin)
    np.testing.assert_array_equal(mixed.latent, wanted)
    audio = store.decode("south/drums") + 0.5 * store.decode("south/bass")
    np.testing.assert_allclose(mixed.audio(), audio, atol=1e-5)
    assert "'south/drums' x 1, 'south/bass' x 0.5" in repr(mixed)
    html = mixed._repr_html_()
    assert len(images(html)) == 1
    assert len(sounds(html)) == 1


def test_a_mix_is_decoded_with_a_seed_and_a_batch_size(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = store.mix(["south/drums"])
    model, seen = store.model(), []
    decode, frames = model.decode, store.model().spec.frames(store.chunking.samples)

    def seeing(latents: torch.Tensor, num_samples: int, **options: Any) -> torch.Tensor:
        seen.append((len(latents), options["seed"]))
        return decode(latents, num_samples, **options)

    monkeypatch.setattr(model, "decode", seeing)
    long = dataclasses.replace(
        mixed,
        latent=np.tile(mixed.latent, (1, 3 * frames))[:, : 3 * frames],
        num_samples=model.spec.samples(3 * frames),
    )
    audio = long.audio()
    assert {one for one, _ in seen} == {1}
    assert {seed for _, seed in seen} == {0}
    seen.clear()
    np.testing.assert_allclose(long.audio(seed=7, batch_size=2), audio, atol=1e-5)
    assert max(one for one, _ in seen) == 2
    assert {seed for _, seed in seen} == {7}


def test_shorter_records_of_a_mix_are_continued_with_silence(store: LatentStore) -> None:
    twice = store.mix(["north/keys", "north/keys"])
    np.testing.assert_array_equal(twice.latent, store.mix({"north/keys": 2.0}).latent)
    mixed = store.mix(["north/drums", "north/keys"])
    short, long = store.decode("north/keys"), store.decode("north/drums")
    assert mixed.num_samples == long.shape[1]
    wanted = long.copy()
    wanted[:, : short.shape[1]] += short
    difference = abs(mixed.audio() - wanted)
    difference[:, short.shape[1] - 64 : short.shape[1] + 64] = 0  # its last frame ends with a fade
    assert difference.max() < 1e-5


def test_records_that_cannot_be_mixed(store: LatentStore) -> None:
    with pytest.raises(KeyError):
        store.mix(["north/drums", "nothing"])
    with pytest.raises(ConfigError):
        store.mix([])
    with pytest.raises(ConfigError, match=r"list of keys"):
        store.mix("north/drums")


def test_names_are_text(tmp_path: Path) -> None:
    store = write_latents(str(tmp_path / "store"), [30, 40], prefix="<script>alert(1)<")
    for shown in (store[next(store.keys())], store.mix(list(store.keys()))):
        html = shown._repr_html_()
        assert "<script" not in html
        assert "&lt;script&gt;" in html


def test_a_record_can_be_plotted(store: LatentStore) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    figure = store["north/bass"].plot()
    level, latent, _ = figure.axes
    seconds = store["north/bass"].duration
    assert latent.get_xlim() == pytest.approx((0, seconds))
    times, decibels = level.lines[0].get_data()
    assert decibels[times < 0.9].max() == -90  # silent for its first second
    assert decibels[times > 1.1].min() > -30
    np.testing.assert_array_equal(latent.images[0].get_array(), store["north/bass"].latent)
    figure.savefig(io.BytesIO(), format="png")


def test_plots_need_matplotlib(store: LatentStore, monkeypatch, one_sentence) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        store["north/bass"].plot()
    assert "pip install 'latentmill[plots]'" in one_sentence(error.value)


def test_a_view_names_its_bases(store: LatentStore, tmp_path: Path) -> None:
    keys = list(store.keys())[1:]
    lm.select(store, tmp_path / "view", keys=keys)
    shown = lm.open(tmp_path / "view")._repr_html_()
    assert f"bases</th><td style='text-align:left'>&#x27;{store.url}&#x27;</td>" in shown
    assert "left_out</th><td style='text-align:left'>1</td>" in shown


def test_a_field_without_a_rate(tmp_path: Path) -> None:
    store = write_latents(str(tmp_path / "store"), [7, 40])
    write_fields(store, [7, 40])
    assert "latents=float16, 4 channels, 10.77 frames/s" in repr(store)  # 44100 / 4096
    assert "latents=float16, tokens of 5 numbers" in repr(store.field("text"))
    assert "latents=float16, vectors of 6 numbers" in repr(store.field("clap"))
