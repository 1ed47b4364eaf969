"""Every architecture trains, and what it writes is a model with equal latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.distributions import Normal, kl_divergence

from latentmill.models.registry import resolve
from latentmill.training.architectures import build, crop_samples, drawn
from latentmill.training.linearity import LinearityAugmentation, LinearitySettings, plain_batch
from latentmill.training.loop import Trainer
from latentmill.training.losses import reconstruction_loss
from latentmill.training.metrics import read_metrics
from latentmill.training.settings import TrainSettings
from support import tiny_models
from support.linear_cae_weights import use_cache, write_cache
from support.stable_audio_open import OOBLECK, alone, open_audio_networks, write

Settings = Callable[..., TrainSettings]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny repositories of the real classes, and a cache with a tiny lin-cae."""
    root = tmp_path_factory.mktemp("models")
    tiny_models.write_oobleck(root / "oobleck")
    write(root / "published", alone(OOBLECK), open_audio_networks()[2], "model.safetensors")
    tiny_models.write_dac(root / "dac", downsampling_ratios=[2, 4, 5], sampling_rate=24000)
    write_cache(root / "hf", ("lin-cae",))
    return root


@pytest.fixture
def names(models: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    use_cache(monkeypatch, models / "hf")
    return {
        "oobleck": f"oobleck:{models}/oobleck",
        "as published": f"oobleck:{models}/published",
        "dac": f"dac:{models}/dac",
        "lin-cae": "lin-cae",
    }


@pytest.mark.parametrize(
    ("family", "scratch"),
    [
        ("oobleck", False),
        ("dac", True),
        ("lin-cae", False),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in (
                ("oobleck", True),
                ("as published", False),
                ("as published", True),
                ("dac", False),
                ("lin-cae", True),
            )
        ),
    ],
)
def test_it_trains_and_is_loaded_again(
    tiny: Settings, names: dict[str, str], corpus: Path, family: str, scratch: bool
) -> None:
    settings = tiny(
        f"model={names[family]}", "steps=2", "batch_size=2", f"from_scratch={scratch}", "seed=3"
    )
    trainer = Trainer(settings)
    before = resolve(names[family])
    trainer.train()
    assert all(np.isfinite(line["loss"]) for line in read_metrics(Path(settings.out)))
    handle = resolve(f"trained:{settings.out}")
    assert handle.spec.identity["run"] == settings.run
    assert (handle.spec.hop, handle.spec.context) == (before.spec.hop, before.spec.context)
    audio = 0.1 * torch.randn(1, handle.spec.channels, handle.spec.padded(20_000))
    old, new = before.load("cpu").encode(audio), handle.load("cpu").encode(audio)
    assert float((new - old).norm() / old.norm()) > 0
    if not scratch:
        assert float((new - old).norm() / old.norm()) < 0.5
    if family != "lin-cae":  # its own name loads the folder, too
        own = resolve(f"{names[family].partition(':')[0]}:{settings.out}/model").load("cpu")
        assert torch.equal(own.encode(audio), new)
    Trainer(settings)  # resumes


PLAIN = ("network.norm=false", "network.posterior=false")


@pytest.mark.parametrize(
    ("family", "changes"),
    [("conv", ()), ("conv", PLAIN), ("oobleck", ()), ("dac", ()), ("lin-cae", ())],
)
def test_gradients_reach_every_trained_parameter(
    tiny: Settings, names: dict[str, str], family: str, changes: tuple[str, ...]
) -> None:
    """DistributedDataParallel fails if one gets none."""
    network = build(tiny(f"model={names.get(family, family)}", *changes))
    samples = crop_samples(network.spec, 0.3)
    assert samples == network.spec.samples(network.spec.frames(samples))
    audio = 0.1 * torch.randn(3, network.spec.channels, samples)
    for batch in (
        plain_batch(audio),
        LinearityAugmentation(LinearitySettings(origin=True), steps=10)(audio, 0),
    ):
        network.zero_grad()
        network(batch).backward()
        missing = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        reached = sum(bool(gradient.abs().sum() > 0) for gradient in gradients)
        assert reached > 0.3 * len(list(network.parameters()))


@pytest.mark.parametrize("origin", [False, True])
def test_latents_drawn_from_posteriors(origin: bool) -> None:
    """The divergence is twice PyTorch's, summed over channels; the origin is not drawn."""
    sounds = 0.1 * torch.randn(2, 1, 8)  # gains are capped for louder ones
    linearity = LinearityAugmentation(
        LinearitySettings(origin=origin, mixing="sum", gain_probability=0), steps=1
    )
    batch = linearity(sounds, 0)
    mean, scale = torch.randn(2, len(batch.inputs), 3, 5)
    torch.manual_seed(1)
    latents, divergence = drawn(batch, torch.cat((mean, scale), dim=1))
    torch.manual_seed(1)
    deviation = scale.exp().add(1).log() + 1e-4
    values = mean + deviation * torch.randn(mean.shape)
    silence = mean[2] if origin else torch.zeros(3, 5)
    mixed = values[0] + values[1] - silence
    torch.testing.assert_close(latents, torch.stack((values[0], values[1], mixed, mixed)))
    posterior, prior = Normal(mean[:2], deviation[:2]), Normal(0.0, 1.0)
    expected = 2 * kl_divergence(posterior, prior).sum(dim=1).mean()
    torch.testing.assert_close(divergence, expected)


def test_a_conv_is_linear_before_it_is_trained(tiny: Settings) -> None:
    """Its units start as the identity, and nothing else in it is nonlinear."""
    for changes in ((), PLAIN):
        network = build(tiny(*changes)).network
        x, y = 0.1 * torch.randn(2, 1, 1, 320)
        encode, silence = network.encode, network.encode(torch.zeros_like(x))
        combined = 0.5 * encode(x) - 2 * encode(y) + 2.5 * silence
        torch.testing.assert_close(encode(0.5 * x - 2 * y), combined)


def test_the_loss_of_equal_and_of_silent_sounds() -> None:
    sounds = (0.1 * torch.randn(2, 1, 4000)).requires_grad_()
    assert float(reconstruction_loss(sounds, sounds)) == 0
    silence = torch.zeros(2, 1, 4000)
    assert float(reconstruction_loss(silence, silence)) == 0
    loss = reconstruction_loss(sounds, silence)
    loss.backward()
    assert loss.isfinite()
    assert sounds.grad is not None
    assert sounds.grad.isfinite().all()
    assert float(reconstruction_loss(torch.ones(1, 2, 100), torch.ones(1, 2, 100))) == 0


def test_the_loss_by_hand() -> None:
    """A constant: the samples differ by 0.5; only magnitudes of low bins differ, by a factor 2."""
    one = torch.ones(1, 1, 8192)
    found = float(reconstruction_loss(0.5 * one, one))
    convergence = 0.5
    louder = [
        float(
            torch.stft(one[0], w, h, window=torch.hann_window(w), return_complex=True)
            .abs()
            .clamp(min=1e-3)
            .log()
            .sub(
                torch.stft(0.5 * one[0], w, h, window=torch.hann_window(w), return_complex=True)
                .abs()
                .clamp(min=1e-3)
                .log()
            )
            .abs()
            .mean()
        )
        for w, h in ((1024, 256), (512, 128), (256, 64))
    ]
    assert found == pytest.approx(0.5 + convergence + sum(louder) / 3, rel=1e-3)


def test_stems_of_unequal_length_are_padded(tiny: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "song"
    folder.mkdir()
    for name, samples in (("drums", 9000), ("bass", 3000), ("voice", 40)):
        soundfile.write(folder / f"{name}.wav", 0.3 * np.ones(samples), 8000)
    settings = tiny(
        "steps=3", "crop_seconds=0.5", r"group_by=(?P<group>.*)/(?P<role>.*)", source=tmp_path
    )
    Trainer(settings).train()
    assert len(read_metrics(Path(settings.out))) == 3
