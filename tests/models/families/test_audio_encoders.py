"""`clap:` and `audio:` of audio: equal to the package's own calls, alone and in a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import latentmill as lm
from latentmill.errors import ModelError
from latentmill.models.families.audio_encoder import can_decode
from latentmill.models.registry import available, resolve
from latentmill.store.store import open_store
from support import runs
from support.in_process import in_process

CLAP_RATE, WINDOW = 48_000, 480_000


def noise(samples: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    envelope = np.linspace(0.02, 0.4, samples)
    return (rng.standard_normal(samples) * envelope).clip(-1, 1).astype(np.float32)


def own_clap(folder: Path, wave: Any) -> Any:
    """The vector of one recording of at most 10 s by transformers alone."""
    import transformers

    inputs = transformers.AutoFeatureExtractor.from_pretrained(folder)(
        wave, sampling_rate=CLAP_RATE, return_tensors="pt"
    )
    inputs["input_features"] = inputs["input_features"].float()
    with torch.inference_mode():
        model = transformers.ClapModel.from_pretrained(folder).eval()
        return model.get_audio_features(**inputs).pooler_output[0].numpy()


def own_audio(folder: Path, wave: Any, layer: int | None = None) -> Any:
    import transformers

    inputs = transformers.AutoFeatureExtractor.from_pretrained(folder)(
        wave, sampling_rate=16_000, return_tensors="pt"
    )
    with torch.inference_mode():
        found = transformers.AutoModel.from_pretrained(folder).eval()(
            inputs["input_values"], output_hidden_states=True
        )
    states = found.last_hidden_state if layer is None else found.hidden_states[layer]
    return states[0].T.numpy()


def distance(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("repo", ["clap", "clap-fused"])
def test_clap_is_equal_to_the_package(encoders: Path, repo: str) -> None:
    handle = resolve(f"clap:{encoders / repo}")
    assert handle.kind == "vector"  # type: ignore[attr-defined]
    assert (handle.spec.hop, handle.spec.sample_rate) == (WINDOW, CLAP_RATE)
    model = handle.load("cpu")
    vectors = []
    for seed, samples in enumerate((WINDOW, 200_000, 70_001, 999)):
        wave = noise(samples, seed)
        (vector,) = model.encode(torch.from_numpy(wave)[None, None])
        assert vector.shape == (10, 1)
        assert distance(vector[:, 0].numpy(), own_clap(encoders / repo, wave)) < 1e-4
        assert vector.norm() == pytest.approx(1, abs=1e-5)
        vectors.append(vector)
    assert distance(vectors[0].numpy(), vectors[1].numpy()) > 1e-3
    pair = torch.from_numpy(np.stack([noise(WINDOW, 1), noise(WINDOW, 2)]))[:, None]
    together = model.encode(pair)
    for number in range(2):
        alone = model.encode(pair[number : number + 1])[0]
        assert distance(together[number].numpy(), alone.numpy()) < 1e-4
    assert model.encode(torch.zeros(1, 1, WINDOW)).isfinite().all()
    with pytest.raises(ModelError, match="cannot decode"):
        model.decode(together, 100)


def test_the_vectors_of_a_store(encoders: Path, tmp_path: Path) -> None:
    """Mean of the windows, of which the last one is as short as the audio; or one for each."""
    folder = encoders / "clap"
    lengths = {"a": 1_000_000, "b": 100_000, "c": 2 * WINDOW}
    (tmp_path / "songs").mkdir()
    for seed, (name, samples) in enumerate(lengths.items()):
        file = tmp_path / f"songs/{name}.wav"
        soundfile.write(file, noise(samples, seed), CLAP_RATE, "FLOAT")
    store = tmp_path / "store"
    with in_process():
        lm.encode(tmp_path / "songs", store, device="cpu")
        options: dict[str, Any] = {"model": f"clap:{folder}", "dtype": "float32", "device": "cpu"}
        lm.add(store, field="mean", **options)
        lm.add(store, field="each", per_window=True, **options)
        lm.add(store, field="pairs", per_window=True, chunk_seconds=20, **options)
    fields = ("mean", "each", "pairs")
    mean, each, pairs = (open_store(str(store / "fields" / name)) for name in fields)
    for seed, (name, samples) in enumerate(lengths.items()):
        wave = noise(samples, seed)
        windows = [
            own_clap(folder, wave[start : start + WINDOW]) for start in range(0, samples, WINDOW)
        ]
        expected = np.stack(windows, 1)
        assert each[name].latent.shape == expected.shape
        assert distance(each[name].latent, expected) < 1e-4
        assert distance(pairs[name].latent, expected) < 1e-4  # chunks of two windows
        weights = [min(WINDOW, samples - start) for start in range(0, samples, WINDOW)]
        weighted = np.average(expected, axis=1, weights=weights)[:, None]
        assert distance(mean[name].latent, weighted) < 1e-4


def test_vectors_of_both_channels(encoders: Path, tmp_path: Path) -> None:
    """`--channels split` changes nothing about the kind: a vector for each item or window."""
    sound = np.stack([noise(600_000, 1), noise(600_000, 2)], axis=1)
    (tmp_path / "songs").mkdir()
    soundfile.write(tmp_path / "songs" / "a.wav", sound, CLAP_RATE, "FLOAT")
    options: dict[str, Any] = {"model": f"clap:{encoders / 'clap'}", "channels": "split"}
    with in_process():
        lm.encode(tmp_path / "songs", tmp_path / "store", device="cpu")
        for name, per_window in (("mean", False), ("each", True)):
            field = {"field": name, "per_window": per_window, **options}
            lm.add(tmp_path / "store", device="cpu", dtype="float32", **field)
    mean, each = (open_store(str(tmp_path / "store/fields" / name)) for name in ("mean", "each"))
    assert [one.info.field.kind for one in (mean, each)] == ["vector", "vector"]
    windows = [
        np.concatenate([own_clap(encoders / "clap", channel[part]) for channel in sound.T])
        for part in (slice(WINDOW), slice(WINDOW, None))
    ]
    assert distance(each["a"].latent, np.stack(windows, axis=1)) < 1e-4
    weighted = np.average(windows, axis=0, weights=[WINDOW, 600_000 - WINDOW])
    assert distance(mean["a"].latent[:, 0], weighted) < 1e-4


@pytest.mark.parametrize("repo", ["wav2vec2", "hubert", "wavlm"])
@pytest.mark.parametrize("layer", [None, 0, 1])
def test_frames_are_equal_to_the_package(encoders: Path, repo: str, layer: int | None) -> None:
    handle = resolve(f"audio:{encoders / repo}", {} if layer is None else {"layer": layer})
    spec, model = handle.spec, handle.load("cpu")
    assert (spec.hop, spec.sample_rate, spec.min_samples) == (320, 16_000, 400)
    for samples in (400, 719, 720, 16_000, 50_001):
        wave = noise(samples)
        (found,) = model.encode(torch.from_numpy(wave)[None, None])
        expected = own_audio(encoders / repo, wave, layer)
        assert found.shape == expected.shape == (12, spec.frames(samples))
        assert distance(found.numpy(), expected) < 1e-4
    pair = torch.from_numpy(np.stack([noise(9000, 1), noise(9000, 2)]))[:, None]
    together = model.encode(pair)
    for number in range(2):
        alone = model.encode(pair[number : number + 1])[0]
        assert distance(together[number].numpy(), alone.numpy()) < 1e-4


def test_frames_of_a_store(encoders: Path, tmp_path: Path) -> None:
    (tmp_path / "songs").mkdir()
    for name, samples in (("short", 16_000), ("long", 400_000)):
        soundfile.write(tmp_path / f"songs/{name}.wav", noise(samples), 16_000, "FLOAT")
    model = f"audio:{encoders / 'hubert'}"
    with in_process():
        lm.encode(tmp_path / "songs", tmp_path / "s", model=model, dtype="float32", device="cpu")
    store = open_store(str(tmp_path / "s"))
    whole = own_audio(encoders / "hubert", noise(16_000))
    assert distance(store["short"].latent, whole) < 1e-4
    expected = own_audio(encoders / "hubert", noise(400_000))
    assert store["long"].latent.shape == expected.shape


def test_an_encoder_has_no_decoder(encoders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "decoder   none" in runs.call(capsys, "models", f"clap:{encoders / 'clap'}").out
    split = resolve(f"audio:{encoders / 'hubert'}", channels="split")
    assert not can_decode(split)


def test_clap_encodes_audio_of_any_length_window_by_window(encoders: Path) -> None:
    model = resolve(f"clap:{encoders / 'clap'}").load("cpu")
    sound = torch.from_numpy(noise(WINDOW + 100))[None, None]
    both = model.encode(sound)
    assert both.shape[-1] == 2
    assert torch.equal(both[..., 1:], model.encode(sound[..., WINDOW:]))


@pytest.mark.slow  # windows of 10 s
def test_probe_finds_no_failed_check_of_clap(encoders: Path) -> None:
    for channels in (None, "split"):
        assert lm.probe(f"clap:{encoders / 'clap'}", channels=channels).failed == ()


def test_wrong_repositories_and_options(encoders: Path, tmp_path: Path) -> None:
    kinds = {each.name: each.kind for each in available() if each.kind == "audio encoder"}
    assert kinds.keys() == {"clap:REPO", "audio:REPO"}
    with pytest.raises(ModelError, match="it belongs to clap"):
        resolve(f"audio:{encoders / 'clap'}")
    with pytest.raises(ModelError, match="it belongs to hubert"):
        resolve(f"clap:{encoders / 'hubert'}")
    with pytest.raises(ModelError, match=r"layer must be 0 to 2, not 3"):
        resolve(f"audio:{encoders / 'hubert'}", {"layer": 3})
    with pytest.raises(ModelError, match=r"does not contain preprocessor_config\.json"):
        resolve(f"clap:{encoders / 't5'}")
    assert resolve(f"audio:{encoders / 'hubert'}").spec.identity["sha256_preprocessor"]
