"""The training example: the loss falls, both ways of mixing agree, and samples are audio."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
import torch

from latentmill.errors import ConfigError
from latentmill.models.registry import resolve
from latentmill.store.store import LatentStore
from store.store_files import write_store
from support.field_stores import write_tokens

EXAMPLES = Path(__file__).parents[1] / "examples"
RATE, HOP = 8000, 32
MODEL = {"hop": HOP, "sample_rate": RATE}
SONGS = {"one": 0, "two": 1}
ROLES = ("bass", "drums", "keys")


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    import train_dit

    yield train_dit
    sys.path.remove(str(EXAMPLES))
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chords of three stems, each role in its own range; of unequal length."""
    folder = tmp_path_factory.mktemp("songs")
    random = np.random.default_rng(0)
    for song in SONGS:
        (folder / song).mkdir()
        for number, role in enumerate(ROLES):
            time = np.arange(RATE * 3 - number * 1000) / RATE
            notes = random.integers(100, 200, 3) * 4**number
            tones = sum(np.sin(2 * np.pi * note * time) for note in notes)
            soundfile.write(folder / song / f"{role}.wav", 0.08 * tones, RATE, subtype="FLOAT")
            tags = {"group": song, "role": role, "key": "A minor"}
            (folder / song / f"{role}.json").write_text(json.dumps(tags))
    return folder


@pytest.fixture(scope="module")
def stores(example: ModuleType, songs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The stems, and the stems with all their sub-mixes, encoded."""
    folder = tmp_path_factory.mktemp("stores")
    spec = resolve("mdct", MODEL).spec
    example.write_sub_mixes(songs, folder / "mixes", spec)
    options = {"model_options": MODEL, "dtype": "float32"}
    return {
        "latent": write_store(str(folder / "latent"), songs, **options),
        "waveform": write_store(str(folder / "waveform"), folder / "mixes", **options),
    }


def run(example: ModuleType, store: LatentStore, mixing: str, *more: str) -> Any:
    given = ["--mixing", mixing, "--steps", "50", "--crop", "16", "--batch", "4", "--width", "64"]
    args = example.arguments([*given, "--depth", "2", "--workers", "0", *more])
    return example.train(store, args), args


def test_the_example_is_short() -> None:
    """The network included: it imports no other file of the examples."""
    lines = (EXAMPLES / "train_dit.py").read_text().splitlines()
    assert len(lines) < 300
    others = {path.stem for path in EXAMPLES.glob("*.py")}
    imported = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert not others & imported


def test_latents_mixed_are_waveforms_mixed(example: ModuleType, stores: Any) -> None:
    """Equal steps, draws and noise: with an exactly linear model the losses are equal."""
    (_, latent, _, _), _ = run(example, stores["latent"], "latent")
    (_, waveform, _, _), _ = run(example, stores["waveform"], "waveform")
    assert latent["records"] == 6
    assert waveform["records"] == latent["sub_mixes"] == waveform["sub_mixes"] == 2 * (2**3 - 1)
    assert latent["encoded_hours"] < 0.5 * waveform["encoded_hours"]
    assert latent["loss_after"] < 0.95 * latent["loss_before"]
    assert latent["losses"] == pytest.approx(waveform["losses"], rel=0.01)
    assert 0 < latent["reader_wait_share"] < 1
    assert latent["steps_per_second"] > 0


def test_text_from_a_field_is_a_condition(example: ModuleType, songs: Path, tmp_path: Path) -> None:
    """Ragged tokens, dropped for guidance: they change the flow, and padding does not."""
    store = write_store(str(tmp_path / "store"), songs, model_options=MODEL, dtype="float32")
    random = np.random.default_rng(0)
    tokens = {
        key: random.standard_normal((6, 2 + n)).astype(np.float16)
        for n, key in enumerate(store.keys())
    }
    write_tokens(store, "text", tokens)
    (model, result, batch, _), _ = run(example, store, "latent", "--text", "text", "--steps", "3")
    assert len(result["losses"]) == 3
    assert batch["text"].shape[::2] == (4, 6)
    assert not batch["seen"].all()
    assert any(
        torch.equal(
            batch["text"][0, : tokens[key].shape[1]], torch.from_numpy(tokens[key].T).float()
        )
        for key in tokens
    )
    times = torch.full((4,), 0.5)
    flow = model(batch["target"], times, batch)
    padded = batch["text"] + 5 * ~batch["seen"][..., None]
    assert torch.allclose(model(batch["target"], times, batch | {"text": padded}), flow, atol=1e-6)
    other = batch | {"text": batch["text"] + batch["seen"][..., None]}
    assert not torch.allclose(model(batch["target"], times, other), flow, atol=1e-6)
    audio = example.sample(model, batch, steps=2, guidance=2.0)
    assert audio.shape == batch["target"].shape


def test_tags_are_read_without_latents(
    example: ModuleType, stores: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LatentStore, "read", None)
    names, tags = example.vocabulary(stores["waveform"], ["role", "key"])
    assert names == ["key=A minor", *(f"role={role}" for role in ROLES)]
    assert len(tags) == len(SONGS) * len(ROLES)
    assert list(tags.values()) == 2 * [[1, *row] for row in np.eye(3).tolist()]


def test_each_process_draws_other_noise(
    example: ModuleType, stores: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    run(example, stores["latent"], "latent", "--steps", "1", "--seed", "5")
    assert torch.initial_seed() == 8


def test_a_song_of_one_stem(example: ModuleType, tmp_path: Path) -> None:
    """Its context is silence, with both ways of mixing."""
    (tmp_path / "songs" / "solo").mkdir(parents=True)
    noise = 0.1 * np.random.default_rng(0).standard_normal(RATE)
    soundfile.write(tmp_path / "songs" / "solo" / "keys.wav", noise, RATE)
    example.write_sub_mixes(tmp_path / "songs", tmp_path / "mixes", resolve("mdct", MODEL).spec)
    store = write_store(str(tmp_path / "store"), tmp_path / "mixes", model_options=MODEL)
    losses = [
        run(example, store, mixing, "--steps", "1")[0][1]["losses"]
        for mixing in ("latent", "waveform")
    ]
    assert losses[0] == losses[1]


def test_too_many_stems_for_all_sub_mixes(example: ModuleType, tmp_path: Path) -> None:
    for number in range(9):
        soundfile.write(tmp_path / f"{number}.wav", np.zeros(100), RATE)
    with pytest.raises(ConfigError, match=r"more than 8 stems: use --mixing latent"):
        example.write_sub_mixes(tmp_path, tmp_path / "mixes", resolve("mdct", MODEL).spec)
    assert not (tmp_path / "mixes").exists()


@pytest.mark.slow
def test_samples_have_the_spectrum_of_the_corpus(
    example: ModuleType, stores: Any, tmp_path: Path
) -> None:
    """Not silent, and within 6 dB of the targets on average over octaves."""
    store = stores["latent"]
    more = ["--steps", "400", "--folder", str(tmp_path), "--guidance", "1.5"]
    trained, args = run(example, store, "latent", *more)
    assert trained[1]["loss_after"] < 0.7 * trained[1]["loss_before"]
    example.write_results(trained, store, args)
    found = {}
    for name in ("stem", "target"):
        files = sorted((tmp_path / "samples").glob(f"*-{name}.wav"))
        assert len(files) == 4
        audio = np.concatenate([soundfile.read(path)[0] for path in files])
        assert np.sqrt(np.mean(audio**2)) > 0.01
        power = np.abs(np.fft.rfft(audio)) ** 2
        edges = (np.array([100, 200, 400, 800, 1600, 3200]) * len(audio) / RATE).astype(int)
        found[name] = [10 * np.log10(part.mean()) for part in np.split(power, edges)[1:-1]]
    difference = np.abs(np.subtract(found["stem"], found["target"]))
    assert difference.mean() < 6, difference


def test_guidance_and_sampling(example: ModuleType) -> None:
    """With a flow that is e - x for a known x, Euler steps arrive at x, whatever the guidance."""
    wanted = torch.linspace(-1, 1, 8).reshape(1, 2, 4)

    def model(x: torch.Tensor, times: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return (x - wanted) / times[:, None, None]  # x = (1 - t) wanted + t e

    batch = {"context": torch.zeros(1, 2, 4), "tags": torch.zeros(1, 1), "mask": torch.ones(1, 4)}
    batch["text"] = torch.zeros(1, 0, 1)  # no text
    for guidance in (0.0, 1.0, 3.0):
        drawn = example.sample(model, batch, steps=5, guidance=guidance)
        torch.testing.assert_close(drawn, wanted)


def test_the_comparison_by_hand(example: ModuleType) -> None:
    """Two seeds, three sounds: ratios of medians 2 and 8, whose geometric mean is 4."""
    import train_demo

    def values(*numbers: float) -> dict[str, list[float]]:
        return {measure: list(numbers) for measure in train_demo.MEASURES}

    runs = [(values(2, 4, 9), values(1, 2, 3)), (values(8, 8, 8), values(1, 1, 1))]
    for one in train_demo.compare(runs).values():
        assert one["ratio"] == pytest.approx(4)
        assert one["low"] <= one["ratio"] <= one["high"]
    found = train_demo.medians([runs[0][0], runs[1][0]])["mr_stft"]
    assert found == pytest.approx({"value": 32**0.5, "low": 4, "high": 8})
    card = {name: train_demo.medians([values(0.1, 0.2)]) for name in ("baseline", "linear")}
    assert ElementTree.fromstring(train_demo.picture(card)).tag.endswith("svg")


def test_no_recording_is_trained_on_and_judged(example: ModuleType, tmp_path: Path) -> None:
    import train_demo

    (tmp_path / "audio").mkdir()
    for number in range(8):
        soundfile.write(tmp_path / "audio" / f"{number}.wav", np.zeros(3 * RATE), RATE)
    found = {}
    for validate in (False, True):
        manifest, judged = train_demo.manifests(tmp_path / "demo", tmp_path / "audio", validate)
        trained = {json.loads(line)["path"] for line in manifest.read_text().splitlines()}
        found[validate] = {f"{path.parent.name}/{path.stem}" for path in judged}
        assert not trained & {str(path.absolute()) for path in judged}
        assert not any("night-drive" in path for path in trained)
    roles = ("bass", "drums", "keys", "lead")
    for validate, song, numbers in ((False, "night-drive", "37"), (True, "harbour", "15")):
        expected = {f"{song}/{role}" for role in roles} | {f"audio/{n}" for n in numbers}
        assert found[validate] == expected


POOL = """
import sys, time
sys.path.insert(0, sys.argv[1])
import train_demo
if __name__ == "__main__":
    pool = train_demo.processes(1)
    print(pool.submit(train_demo.os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600).result()
"""


def test_processes_of_the_demo_end_with_it(tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    command = [sys.executable, str(tmp_path / "pool.py"), str(EXAMPLES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    stat, until = Path(f"/proc/{worker}/stat"), time.monotonic() + 60
    # Without an init process that reaps it, an ended process remains as a zombie.
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        if time.monotonic() > until:
            os.kill(worker, signal.SIGKILL)
            pytest.fail("the worker still runs")
        time.sleep(0.1)


def test_decoder_additivity_of_an_exact_model(example: ModuleType) -> None:
    import train_demo

    model = resolve("mdct", MODEL).load("cpu")
    x, y = 0.1 * torch.randn(2, 1, 3200)
    assert train_demo.decoder_additivity(model, x, y) < 1e-6
