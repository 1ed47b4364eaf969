"""The training loop: what it learns, resuming after a kill, and bad input."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import latentmill as lm
from latentmill.errors import ConfigError, LatentmillError, ModelError, SourceError, TrainingError
from latentmill.models.registry import resolve
from latentmill.storage import scratch
from latentmill.training.loop import Ema, Trainer, TrainProcess, learning_rate
from latentmill.training.metrics import read_metrics
from latentmill.training.settings import TrainSettings
from store.store_files import write_store
from support.sources import put, tar_of

Settings = Callable[..., TrainSettings]


def curve(settings: TrainSettings) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(Path(settings.out))]


@pytest.mark.parametrize(
    "change", ["linearity.mixing=sum", pytest.param("linearity=null", marks=pytest.mark.slow)]
)
def test_the_loss_falls(tiny: Settings, change: str) -> None:
    settings = tiny(change, "steps=80", "linearity.annealing=none" if "mix" in change else change)
    Trainer(settings).train()
    losses = [loss for _, loss in curve(settings)]
    assert len(losses) == 80
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])


def test_the_result_is_a_model_that_encode_and_evaluate_use(
    tiny: Settings, tmp_path: Path, corpus: Path
) -> None:
    settings = tiny("steps=3")
    trainer = Trainer(settings)
    trainer.train()
    handle = resolve(f"trained:{settings.out}")
    assert handle.spec.identity["run"] == settings.run
    audio = 0.1 * torch.randn(1, 1, 320)
    with trainer.ema.swapped(trainer.network), torch.no_grad():
        expected = trainer.network.network.encode(audio)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(handle.load("cpu").encode(audio), expected)
    model = {"model": f"trained:{settings.out}", "model_options": {}}
    store = write_store(str(tmp_path / "latents"), corpus, min_seconds=0.5, **model)
    card = lm.evaluate(store, only=["linearity"], items=2, max_seconds=0.5).linearity
    assert card is not None
    assert any(score.metric == "encoder_additivity" for score in card.card.scores)


def test_the_same_run_twice_is_the_same(tiny: Settings) -> None:
    curves = []
    for name in ("a", "b"):
        settings = tiny("steps=6", f"out={tiny().out}-{name}", "checkpoint_every=2")
        Trainer(settings).train()
        curves.append(curve(settings))
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == list(range(6))
    other = tiny("steps=6", "seed=1")
    Trainer(other).train()
    assert curve(other) != curves[0]


def test_mixed_precision(tiny: Settings) -> None:
    curves = []
    for precision in ("float32", "bf16"):
        settings = tiny("steps=3", f"precision={precision}", f"out={tiny().out}-{precision}")
        Trainer(settings).train()
        curves.append([loss for _, loss in curve(settings)])
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], rel=0.1)


SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
from latentmill.training.loop import Trainer
from latentmill.training.settings import TrainSettings
Trainer(TrainSettings.model_validate(json.loads(sys.argv[1]))).train()
"""


def run_and_kill(settings: TrainSettings, after: int) -> None:
    """Train in a process, and kill it once it has logged `after` steps."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, settings.model_dump_json()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    until = time.monotonic() + 120
    while len(curve(settings)) < after and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()


def killed(tiny: Settings, kills: int, steps: int, seed: int) -> None:
    straight = tiny(f"steps={steps}", f"out={tiny().out}-straight")
    Trainer(straight).train()
    settings = tiny(f"steps={steps}")
    for after in sorted(random.Random(seed).sample(range(5, steps - 5), kills)):
        run_and_kill(settings, after)
    trainer = Trainer(settings)
    assert 0 < trainer.step < steps or kills > 2
    trainer.train()
    assert curve(settings) == curve(straight)
    weights = [
        (Path(one.out) / "model" / "model.safetensors").read_bytes() for one in (settings, straight)
    ]
    assert weights[0] == weights[1]


def test_a_killed_run_continues_as_if_it_had_not_been_killed(tiny: Settings) -> None:
    killed(tiny, kills=1, steps=30, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_ten_kills(tiny: Settings, seed: int) -> None:
    killed(tiny, kills=10, steps=80, seed=seed)


PROCESS = """
import json, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
torch.set_num_threads(1)
from latentmill.training.loop import TrainProcess, Trainer
from latentmill.training.settings import TrainSettings
rank = int(sys.argv[3])
dist.init_process_group("gloo", f"file://{sys.argv[2]}", rank=rank, world_size=2)
trainer = Trainer(
    TrainSettings.model_validate(json.loads(sys.argv[1])),
    TrainProcess(rank=rank, wrap=DistributedDataParallel),
)
trainer.train()
print(float(sum(p.double().sum() for p in trainer.network.parameters())))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_equal_weights_and_different_crops(
    tiny: Settings, tmp_path: Path
) -> None:
    settings = tiny("workers=2", "steps=5")
    given = [settings.model_dump_json(), str(tmp_path / "rendezvous")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *given, str(rank)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    sums = [float(process.communicate()[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sums[0] == sums[1]
    assert [step for step, _ in curve(settings)] == list(range(5))
    alone = tiny("steps=5", f"out={tmp_path / 'alone'}")
    Trainer(alone).train()
    assert curve(alone)[0][1] != curve(settings)[0][1]  # the mean of both processes' losses


def test_a_checkpoint_of_another_architecture_is_refused(tiny: Settings) -> None:
    Trainer(tiny("steps=4")).train()
    with pytest.raises(ConfigError, match=r"checkpoints of another architecture \(network was"):
        Trainer(tiny("steps=4", "network.width=16"))
    with pytest.raises(ConfigError, match=r"other settings \(learning_rate was 0\.01, is now 0\.1"):
        Trainer(tiny("steps=4", "learning_rate=0.1"))
    Trainer(tiny("steps=4", "log_every=7", "keep_checkpoints=1"))  # these change no weights


@pytest.mark.parametrize("lost", ["model", "model and checkpoint"])
def test_a_model_that_was_not_written_is_written_on_resuming(tiny: Settings, lost: str) -> None:
    settings = tiny("steps=8")
    Trainer(settings).train()
    out = Path(settings.out)
    weights = (out / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "model")
    if lost == "model and checkpoint":
        (out / "checkpoints" / "step-000000008.pt").unlink()
    Trainer(settings).train()
    assert (out / "model" / "model.safetensors").read_bytes() == weights


def test_a_checkpoint_is_written_after_its_model(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a run that is interrupted between them exports again when it is resumed."""
    settings = tiny("steps=4")
    trainer = Trainer(settings)
    monkeypatch.setattr("latentmill.training.loop.write_model", lambda *_: sys.exit("interrupted"))
    with pytest.raises(SystemExit):
        trainer.train()
    monkeypatch.undo()
    Trainer(settings).train()
    document = json.loads((Path(settings.out) / "model" / "trained.json").read_text())
    assert document["step"] == 4


def test_what_a_killed_run_left_is_removed(tiny: Settings) -> None:
    """A run that is killed while it writes a file leaves a temporary one."""
    settings = tiny("steps=4")
    out = Path(settings.out)
    for folder, name in ((out, "metrics.jsonl"), (out / "checkpoints", "step-000000004.pt")):
        with scratch.temporary_file(folder / "tmp", name) as temporary:
            left = temporary.rename(temporary.parent / f"{'0' * 32}.{name}")
        assert left.exists()
    (out / "tmp" / "notes.txt").touch()
    Trainer(settings, TrainProcess(rank=1))  # only the first process removes them
    assert left.exists()
    Trainer(settings).train()
    assert not (out / "checkpoints" / "tmp").exists()
    assert [path.name for path in (out / "tmp").iterdir()] == ["notes.txt"]


def test_relative_paths_are_those_of_this_folder(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train gives its processes another working directory."""
    monkeypatch.chdir(tmp_path)
    settings = tiny("out=runs/linear", "model=oobleck:./vae", source=Path("music"))
    assert settings.out == str(tmp_path / "runs" / "linear")
    assert settings.source == str(tmp_path / "music")
    assert settings.model == f"oobleck:{tmp_path / 'vae'}"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tiny("source=~/music/").source == f"{tmp_path}/music/"
    kept = ["s3://bucket/music/", "/data/music-{0..3}.tar", "/data/music.parquet/"]
    assert [tiny(f"source='{source}'").source for source in kept] == kept
    assert tiny("model=oobleck:owner/name").model == "oobleck:owner/name"


def test_a_ray_job_needs_an_absolute_folder(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match=r"^out runs/linear is a relative path.* path\.$"):
        tiny("out=runs/linear")
    tiny()


def test_a_damaged_checkpoint(tiny: Settings) -> None:
    settings = tiny("steps=8")
    Trainer(settings).train()
    folder = Path(settings.out) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-000000004.pt",
        "step-000000008.pt",
    ]
    (folder / "step-000000008.pt").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="delete it to resume from the one before"):
        Trainer(settings)
    (folder / "step-000000008.pt").unlink()
    assert Trainer(settings).step == 4


def change(state: dict[str, Any], entry: str, value: object) -> object:
    return {**state, entry: value}


@pytest.mark.parametrize(
    "damage",
    {
        "a list": lambda state: [1],
        "nothing": lambda state: {},
        "no step": lambda state: {n: v for n, v in state.items() if n != "step"},
        "step is text": lambda state: change(state, "step", "4"),
        "step is another": lambda state: change(state, "step", 9),
        "settings are text": lambda state: change(state, "settings", "conv"),
        "no weights": lambda state: change(state, "network", {}),
        "weights are a number": lambda state: change(state, "network", 1),
        "other weights": lambda state: change(state, "network", doubled(state["network"])),
        "no averages": lambda state: change(state, "ema", {}),
        "other averages": lambda state: change(state, "ema", doubled(state["ema"])),
        "averages are no tensors": lambda state: change(
            state, "ema", dict.fromkeys(state["ema"], 1)
        ),
        "no optimizer": lambda state: change(state, "optimizer", {}),
        "an optimizer without state": lambda state: change(
            state, "optimizer", change(state["optimizer"], "state", {})
        ),
        "an optimizer of other weights": lambda state: change(
            state,
            "optimizer",
            change(
                state["optimizer"],
                "state",
                {n: doubled(one) for n, one in state["optimizer"]["state"].items()},
            ),
        ),
    }.items(),
    ids=lambda damage: damage[0],
)
def test_a_checkpoint_with_other_contents(
    tiny: Settings, damage: tuple[str, Callable[[dict[str, Any]], object]]
) -> None:
    settings = tiny("steps=4")
    Trainer(settings).train()
    path = Path(settings.out) / "checkpoints" / "step-000000004.pt"
    torch.save(damage[1](torch.load(path, weights_only=True)), path)
    with pytest.raises(ConfigError, match=r"does not load \(.*\): delete it to resume") as caught:
        Trainer(settings)
    assert "\n" not in str(caught.value)


def doubled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.cat((one[None], one[None])) for name, one in tensors.items()}


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(tiny: Settings) -> None:
    settings = tiny("learning_rate=1e30", "clip_norm=1e30")
    with pytest.raises(TrainingError, match=r"of step \d+ is (nan|inf).*\d at \d\.\d\d s"):
        Trainer(settings).train()
    assert not (Path(settings.out) / "checkpoints").exists()


def wav(path: Path, samples: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, samples, 8000, subtype="FLOAT")


def test_one_item_only(tiny: Settings, tmp_path: Path) -> None:
    wav(tmp_path / "one" / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(8000))
    with pytest.raises(ConfigError, match=r"only one item, a, and mixtures need at least two"):
        Trainer(tiny(source=tmp_path / "one"))
    Trainer(tiny("linearity=null", "steps=1", source=tmp_path / "one")).train()


def test_silence_only(tiny: Settings, tmp_path: Path) -> None:
    for name in "ab":
        wav(tmp_path / "quiet" / f"{name}.wav", np.zeros(8000))
    with pytest.raises(SourceError, match="all crops of step 0 are silent"):
        Trainer(tiny(source=tmp_path / "quiet")).train()


def test_some_silence_and_files_that_cannot_be_loaded(
    tiny: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal(8000)
    wav(tmp_path / "mixed" / "noise.wav", noise)
    wav(tmp_path / "mixed" / "silence.wav", 0 * noise)
    wav(tmp_path / "mixed" / "nan.wav", np.where(noise > 0.2, np.nan, noise))
    (tmp_path / "mixed" / "empty.wav").write_bytes(b"")
    settings = tiny("steps=4", source=tmp_path / "mixed")
    with caplog.at_level(logging.WARNING, "latentmill.training"):
        Trainer(settings).train()
    assert all(np.isfinite(loss) for _, loss in curve(settings))
    assert sorted(message.split(" (")[0] for message in caplog.messages) == [
        "cannot load empty",
        "cannot load nan",
    ]


def test_nothing_can_be_loaded(tiny: Settings, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    for name in "ab":
        (tmp_path / "broken" / f"{name}.wav").write_bytes(b"nothing")
    with pytest.raises(SourceError, match="16 items in a row cannot be loaded, the last"):
        Trainer(tiny(source=tmp_path / "broken")).train()


def test_crops_are_not_read_from_a_tar_that_was_rewritten(
    tiny: Settings, tmp_path: Path, corpus: Path
) -> None:
    members = [(f"{name}.wav", (corpus / f"{name}.wav").read_bytes()) for name in "012"]
    tar = put(f"{tmp_path}/x.tar", tar_of(members))
    crops = Trainer(tiny(source=Path(tar)))._crops
    put(tar, tar_of(members[::-1]))
    with pytest.raises(SourceError, match="its tar has changed since it was listed"):
        crops.batch(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("batch_size=1", "mixtures need at least 2 sounds"),
        ("out=s3://bucket/run", "is a URL: use a folder"),
        ("learning_rat=1", "unknown setting learning_rat: did you mean learning_rate"),
        ("linearity.mixing=most", "invalid linearity.mixing 'most'"),
        ("network.strides=[3]", r"invalid network.strides \[3\]: strides must be even"),
        ("network.strides=[]", r"invalid network.strides \[\]: it must have at least 1 item"),
        ("network.strides=[2,2,2,2,2,2,2,2,2]", "it must have at most 8 items"),
        ("network.strides=[512,512]", "the product of strides must be at most 65536"),
        ("network.strides=8", "invalid network.strides 8: expected a list"),
        ("network.width=2000000", "it must be less than or equal to 2048"),
        ("network.sample_rate=10", "it must be greater than or equal to 1000"),
        ("network.sample_rate=1000000", "it must be less than or equal to 768000"),
        ("network.max_width=1000000000", "it must be less than or equal to 2048"),
        ("network.latent_channels=1000000", "it must be less than or equal to 2048"),
        ("network.strides=[2,32768] network.width=2048 network.max_width=2048", "lower width"),
        ("network=small", "invalid network 'small': expected a mapping"),
        ("seed=-1", "invalid seed -1: it must be greater than or equal to 0"),
        ("seed=9223372036854775808", "it must be less than or equal to 9223372036854775807"),
        ("crop_seconds=601", "it must be less than or equal to 600"),
        ("from_scratch=perhaps", "invalid from_scratch 'perhaps': expected true or false"),
        ("linearity.bogus=1", "unknown setting linearity.bogus: jobs/train_linear.yaml lists"),
        ("linearity.maxgain=1", "unknown setting linearity.maxgain: did you mean linearity.max_g"),
        ("steps=0", "invalid steps 0"),
        ("steps", "expected NAME=VALUE"),
        ("linearity=null linearity.max_gain=2", "linearity.max_gain=2 contradicts linearity=None"),
        ("model=encodec:a/b", "cannot be trained: use conv, oobleck:REPO"),
        ("model=conv:a/b", "conv has no repository"),
    ],
)
def test_wrong_settings(tiny: Settings, change: str, message: str) -> None:
    with pytest.raises(LatentmillError, match=message) as caught:
        Trainer(tiny(*change.split()))
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_an_error_before_training(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModelError, match=r"run `pip install 'latentmill\[training\]'`"):
        Trainer(tiny())


def test_the_rate_and_the_average() -> None:
    settings = TrainSettings(
        source="a", out="b", steps=110, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.2
    )
    rates = [learning_rate(settings, step) for step in (0, 4, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 0.6, 0.2])
    layer = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    layer.weight.data.fill_(1.0)
    average = Ema(layer, decay=0.5)
    for value in (3.0, 5.0):
        layer.weight.data.fill_(value)
        average.update(layer)
    # Decays 1/10 and 2/11: 0.1 + 0.9 * 3 = 2.8; then 2.8 * 2/11 + 5 * 9/11.
    assert float(average.values["weight"]) == pytest.approx(2.8 * 2 / 11 + 5 * 9 / 11)
    with average.swapped(layer):
        assert float(layer.weight) == pytest.approx(4.6)
    assert float(layer.weight) == 5.0


@pytest.mark.parametrize("damage", [b'{"step": 9, "lo', b"\n", b"garbage\n", b"\xff\0\n", b"[1]\n"])
def test_lines_of_the_metrics_that_are_damaged(
    tiny: Settings, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    settings = tiny("steps=4")
    Trainer(settings).train()
    before = curve(settings)
    path = Path(settings.out) / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], damage.strip() + b"\n", lines[3], damage]))
    with caplog.at_level(logging.WARNING, "latentmill.training"):
        Trainer(settings).train()  # is at its end
    assert curve(settings) == before
    assert caplog.messages == [f"{path}: skipped 2 damaged lines"]


def test_tensorboard(tiny: Settings) -> None:
    pytest.importorskip("tensorboard", reason="needs pip install 'latentmill[training]'")
    settings = tiny("steps=2", "tensorboard=true")
    Trainer(settings).train()
    assert list((Path(settings.out) / "tensorboard").iterdir())
