"""`trained:PATH`: known architectures only, and an identity that names the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from latentmill.errors import ModelError
from latentmill.models.families.conv import ConvAutoencoder, ConvSettings, encoder_context
from latentmill.models.registry import resolve
from support.tiny_models import write_dac, write_oobleck, write_trained


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_trained(tmp_path / "run")
    return tmp_path / "run"


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "model" / "trained.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_run_or_its_model_is_given(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    model = run / "model"
    paths = (run, "run", "./run", model, model / "trained.json", model / "model.safetensors")
    specs = [resolve(f"trained:{path}").spec for path in paths]
    assert all(spec == specs[0] for spec in specs)
    assert specs[0].identity["run"] == "tiny"
    assert specs[0].hop == 16
    rewrite(run, run="another")
    assert resolve(f"trained:{run}").spec.identity["run"] == "another"


def test_scale_factor(run: Path) -> None:
    audio = 0.1 * torch.randn(1, 1, 64)
    once, twice = (
        resolve(f"trained:{run}", {"scale_factor": scale}).load("cpu") for scale in (1.0, 2.0)
    )
    assert torch.equal(2 * once.encode(audio), twice.encode(audio))
    torch.testing.assert_close(
        once.decode(once.encode(audio), 64), twice.decode(twice.encode(audio), 64)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "unet"}, "architecture: .*known architectures are conv, oobleck, dac"),
        ({"version": 2}, "version: .*1"),
        ({"code": "os:system"}, r"is not valid \(code: unknown name\); known"),
        ({"step": -1}, r"\(step: it must be greater than or equal to 0\)"),
        ({"run": 1}, r"\(run: expected text\)"),
        (
            {"network": {"strides": [3]}},
            r"does not load \(network: strides: strides must be even and at least 2\); replace it",
        ),
        ({"network": {"bogus": 1}}, r"\(network: bogus: unknown name\)"),
        ({"network": {"width": 10**9}}, r"\(network: width: it must be less than or equal to 2048"),
        # Of another shape:
        ({"network": {"width": 16, "strides": [4, 4]}}, r"does not load \(.*\); replace it with"),
    ],
)
def test_what_does_not_load(run: Path, changes: dict[str, object], message: str) -> None:
    rewrite(run, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        resolve(f"trained:{run}").load("cpu")
    assert str(caught.value).startswith(f"Model trained:{run}")
    assert "pydantic" not in str(caught.value)


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere does not exist; give the folder of a run"):
        resolve(f"trained:{tmp_path / 'nowhere'}")
    with pytest.raises(ModelError, match=r"has no trained\.json"):
        resolve(f"trained:{tmp_path}")


@pytest.mark.parametrize("path", ["checkpoints", "checkpoints/step-000000004.pt", "metrics.jsonl"])
def test_another_path_of_a_run(run: Path, path: str) -> None:
    (run / "checkpoints").mkdir()
    for file in ("checkpoints/step-000000004.pt", "metrics.jsonl"):
        (run / file).touch()
    with pytest.raises(ModelError) as caught:
        resolve(f"trained:{run / path}")
    assert f"{run / path} is not a model; use trained:{run}, which" in str(caught.value)


@pytest.mark.parametrize("family", ["oobleck", "dac"])
def test_other_families_keep_their_own_files(tmp_path: Path, family: str) -> None:
    """A fine-tuned model is loaded by its own family's name, too, with equal latents."""
    if family == "oobleck":
        write_oobleck(tmp_path)
    else:
        write_dac(tmp_path, downsampling_ratios=[2, 4], sampling_rate=8000)
    document = {"architecture": family, "run": "tuned", "step": 5}
    (tmp_path / "trained.json").write_text(json.dumps(document))
    trained, own = (resolve(f"{name}:{tmp_path}") for name in ("trained", family))
    added = {"run": "tuned", "sha256_trained": trained.spec.identity["sha256_trained"]}
    assert trained.spec.identity == {**own.spec.identity, **added}
    audio = 0.1 * torch.randn(1, own.spec.channels, 4 * own.spec.hop)
    assert torch.equal(trained.load("cpu").encode(audio), own.load("cpu").encode(audio))


def test_the_context_of_conv_is_as_small_as_it_can_be() -> None:
    """One sample changes the frames up to the context, and none beyond."""
    for strides in ((4, 4), (16, 2), (8,)):
        torch.manual_seed(0)
        settings = ConvSettings(sample_rate=8000, strides=strides, width=8, latent_channels=4)
        network, hop = ConvAutoencoder(settings), settings.hop
        for parameter in network.parameters():  # units start as the identity
            torch.nn.init.normal_(parameter, std=0.3)
        reach, middle = encoder_context(strides), 32
        reached = set()
        for sample in (middle * hop, (middle + 1) * hop - 1):
            audio = torch.zeros(1, 1, 64 * hop)
            quiet = network.encode(audio)
            changed = torch.zeros_like(audio)
            changed[0, 0, sample] = 1
            moved = (network.encode(changed) - quiet).abs().amax(dim=(0, 1)).nonzero()
            reached |= {int(frame) - middle for frame in moved}
        assert (min(reached), max(reached)) == (-reach, reach)
