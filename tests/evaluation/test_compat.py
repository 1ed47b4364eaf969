"""Linearity by the protocol of the linear-cae authors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from formulas import mr_stft

import latentmill as lm
from latentmill.errors import ConfigError
from latentmill.evaluation import compat
from latentmill.store.store import LatentStore
from support import runs
from support.stem_files import RATE, write_stem_store

CHUNK = 1500


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LatentStore:
    """Nine chunks in two items, in batches of four."""
    monkeypatch.setattr(compat, "CHUNK", CHUNK)
    monkeypatch.setattr(compat, "BATCH", 4)
    (tmp_path / "in").mkdir()
    for number, chunks in enumerate((5.5, 4.2)):
        audio = np.random.default_rng(number).uniform(-0.3, 0.3, int(chunks * CHUNK))
        soundfile.write(tmp_path / "in" / f"{number}.wav", audio, RATE, subtype="FLOAT")
    return write_stem_store(tmp_path / "store", tmp_path / "in")


def test_only_the_first_minutes_of_readable_recordings_are_used(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "LOADED_SECONDS", 4.2 * CHUNK / RATE)
    assert compat.measure_linear_cae(store, items=2).card.pairs == 4  # of 4 + 4 chunks
    (Path(store.info.source) / "0.wav").unlink()
    assert compat.measure_linear_cae(store, items=2).card.pairs == 2
    assert "1 source cannot be read" in caplog.text


def test_batches_of_adjacent_pairs(store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder adds noise of its seed to what it decodes: each decoding has its own."""
    model, seeds = store.model(), []

    class Noisy:
        spec, encode = model.spec, staticmethod(model.encode)

        def decode(self, latents: torch.Tensor, samples: int, *, seed: int) -> torch.Tensor:
            seeds.append(seed)
            noise = torch.randn(1, 1, samples, generator=torch.Generator().manual_seed(seed))
            return model.decode(latents, samples) + 0.01 * noise

    monkeypatch.setattr(store, "model", Noisy)
    card = compat.measure_linear_cae(store, items=2).card
    assert len(seeds) == len(set(seeds))
    chunks = [
        soundfile.read(Path(store.info.source) / f"{n}.wav")[0][k * CHUNK :][:CHUNK]
        for n, count in ((0, 5), (1, 4))
        for k in range(count)
    ]
    assert (card.protocol, card.items, card.pairs) == ("linear-cae", 8, 4)  # one chunk is left over
    assert card.additivity < 1e-5
    scores = {(e.metric, e.measure, e.against, e.gain): e for e in card.scores}
    assert {e.form for e in card.scores} == {"raw"}
    found = scores["decoder_additivity", "mr_stft", "audio", None].values
    sums = np.array([[chunks[b] + chunks[b + 1], chunks[b + 2] + chunks[b + 3]] for b in (0, 4)])
    decodings = 4 + 4 * 4  # of a batch: its chunks, and four gains of each
    for batch, wanted in enumerate(sums):
        noise = [
            torch.randn(
                CHUNK, generator=torch.Generator().manual_seed(1000 * batch + decodings + n)
            )
            for n in range(2)
        ]
        given = wanted + 0.01 * np.stack(noise)
        assert found[batch] == pytest.approx(mr_stft(given, wanted), rel=1e-3)
    # SNR of g x + n1 against g (x + n2), with noise of 0.01.
    for gain in (0.25, 1.1):
        values = scores["decoder_homogeneity", "snr", "decoded", gain].values
        power = gain**2 * (0.03 + 1e-4) / (1e-4 * (1 + gain**2))  # of uniform noise: 0.3^2 / 3
        assert np.mean(values) == pytest.approx(10 * np.log10(power), abs=0.3)


def test_it_is_recorded_beside_the_card(
    store: LatentStore, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("evaluate", store.url, "--only", "linearity", "--gain", 0.1)
    done = runs.call(capsys, *args, "--compat", "linear-cae")
    assert done.code == 0
    assert "protocol of linear-cae: 8 chunks of 0.4688 s from 2 items, 4 pairs" in done.out
    assert "good" not in done.out  # the protocol has no limits
    folder = Path(store.url, "evaluation")
    written = json.loads((folder / "linearity-linear-cae.json").read_text())["linearity"]
    assert written["protocol"] == "linear-cae"
    assert set(written["by_gain"]) == {"0.25", "0.5", "0.75", "1.1", "0.1"}
    assert [path.name for path in folder.iterdir()] == ["linearity-linear-cae.json"]
    assert LatentStore(store.url).origin.linearity is None


def test_what_cannot_be_measured(
    store: LatentStore,
    monkeypatch: pytest.MonkeyPatch,
    one_sentence: Callable[[BaseException], str],
) -> None:
    monkeypatch.setattr(compat, "CHUNK", 10**6)
    with pytest.raises(ConfigError) as caught:
        lm.evaluate(store, only=["linearity"], compat="linear-cae")
    assert "fewer than two chunks of 1000000 samples" in one_sentence(caught.value)
    with pytest.raises(ConfigError, match="invalid compat 'x': use linear-cae"):
        lm.evaluate(store, compat="x")
