"""Quality of decoding, against formulas in numpy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from formulas import METRICS

import latentmill as lm
from latentmill.errors import ConfigError
from latentmill.evaluation.reconstruction import measure_reconstruction
from latentmill.store.measurement import read_measurement
from latentmill.store.store import LatentStore
from support import runs
from support.stem_files import RATE, waveform, write_stem_store, write_stems


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_stems(tmp_path / "songs")
    soundfile.write(folder / "silence.wav", np.zeros(3200), RATE)
    return folder


@pytest.fixture
def store(source: Path, tmp_path: Path) -> LatentStore:
    """float16: the rounding of the latents is the error."""
    return write_stem_store(tmp_path / "store", source, dtype="float16")


def test_every_item_is_measured(store: LatentStore, source: Path) -> None:
    found = measure_reconstruction(store)
    assert [item.key for item in found.items] == [key for key in store.keys() if key != "silence"]  # noqa: SIM118
    assert (found.silent, found.without_source) == (1, {})
    for item in found.items:
        samples = store.entry(item.key).num_samples
        decoded, target = store.decode(item.key), waveform(source, item.key, samples)
        assert item.seconds == samples / RATE
        for name, formula in METRICS.items():
            wanted = formula(decoded.astype(np.float64), target.astype(np.float64), RATE)
            assert getattr(item, name) == pytest.approx(wanted, rel=1e-3, abs=1e-6), name
    for name in METRICS:
        values = [getattr(item, name) for item in found.items]
        summary = found.summary[name]
        assert (summary.low, summary.high) == (min(values), max(values))
        assert summary.median == pytest.approx(np.median(values))
        assert summary.mean == pytest.approx(np.mean(values))
    order = sorted(found.items, key=lambda item: item.mr_stft, reverse=True)
    assert found.worst == [item.key for item in order]


def test_a_part_of_each_item(store: LatentStore, source: Path) -> None:
    found = measure_reconstruction(store, items=4, max_seconds=0.7)
    assert (len(found.items), found.silent) == (4, 0)  # also a bass that begins after a second
    hop = store.info.model["hop"]
    for item in found.items:
        whole = store.entry(item.key).num_samples
        decoded = store.decode(item.key).astype(np.float64)
        target = waveform(source, item.key, whole).astype(np.float64)
        length = round(0.7 * RATE)
        energy = [
            np.square(target[:, start : start + -(-length // hop) * hop]).sum()
            for start in range(0, max(1, whole - length), hop)
        ]
        start = int(np.argmax(energy)) * hop
        decoded, target = (audio[:, start : start + length] for audio in (decoded, target))
        assert item.seconds == decoded.shape[1] / RATE
        assert item.snr == pytest.approx(METRICS["snr"](decoded, target, RATE), rel=1e-3)


def test_a_record_that_decodes_to_no_finite_values_is_counted(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result can be read again; its summary is that of the others."""
    _, *others = store.keys()
    decoded: list[int] = []

    def decode(*args: object) -> np.ndarray:
        audio = LatentStore.decode_latent(store, *args)
        if not decoded:
            audio[0, -7] = np.nan
        decoded.append(audio.shape[1])
        return audio

    monkeypatch.setattr(store, "decode_latent", decode)
    found = measure_reconstruction(store)
    assert found.without_source == {"it decodes to values that are not finite": 1}
    assert [item.key for item in found.items] == [key for key in others if key != "silence"]
    assert all(np.isfinite(value.high) for value in found.summary.values())
    read = read_measurement(store.storage, store.info, "reconstruction")
    assert read is not None
    assert read.reconstruction == found


def test_items_without_a_source_are_counted(
    store: LatentStore,
    source: Path,
    one_sentence: Callable[[BaseException], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (source / "north/bass.wav").unlink()
    (source / "south/keys.wav").write_bytes((source / "south/drums.wav").read_bytes())
    result = runs.call(capsys, "evaluate", store.url, "--only", "reconstruction")
    assert result.code == 0
    assert "1 without source: the source has changed since it was encoded" in result.out
    written = json.loads(Path(store.url, "evaluation/reconstruction.json").read_text())
    assert sum(written["reconstruction"]["without_source"].values()) == 2
    assert len(written["reconstruction"]["items"]) == len(store) - 3
    for path in source.rglob("*.wav"):
        path.unlink()
    with pytest.raises(ConfigError) as caught:
        lm.evaluate(store, only=["reconstruction"])
    assert "can be compared with its source (" in one_sentence(caught.value)


def test_a_store_of_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inline: None
) -> None:
    """A store of silence has no scale and no quality."""
    source = tmp_path / "source"
    source.mkdir()
    soundfile.write(source / "a.wav", np.zeros(RATE), RATE)
    lm.encode(str(source), str(tmp_path / "out"), threads=1)
    result = runs.call(capsys, "evaluate", tmp_path / "out")
    assert result.code == 0
    assert "are silent: raise --items" in result.out
    assert "has no seams: every item fits in one chunk" in result.out
    assert "standard deviation" not in result.out
