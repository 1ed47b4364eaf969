"""The families of diffusers with a front end of their own, or with traps, against diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from latentmill.errors import ModelError
from latentmill.models.base import Autoencoder
from latentmill.models.families.cosmos import encoder_context
from latentmill.models.registry import resolve
from support.chunked import encode_whole

REPOS = {  # name of the family and where its autoencoder is
    "ace-step": ("oobleck", "vae"),
    "cosmos": ("cosmos", "sound_tokenizer"),
}


def load(repos: Path, repo: str, **options: Any) -> Autoencoder:
    return resolve(f"{REPOS[repo][0]}:{repos / repo}", options).load("cpu")


def theirs(repos: Path, repo: str) -> Any:
    import diffusers

    folder = repos / repo / REPOS[repo][1]
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder).eval()


def music(model: Autoencoder, samples: int, batch: int = 1) -> torch.Tensor:
    """Notes with harmonics that fade, and a little noise, `[B, C, T]`."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(samples) / model.spec.sample_rate
    sound = 0.01 * torch.randn(batch, model.spec.channels, samples, generator=generator)
    for start in range(0, samples, 2000):
        pitch = 110 * 2 ** (torch.rand(batch, model.spec.channels, 1, generator=generator) * 3)
        note = sum(torch.sin(6.2832 * n * pitch * time) / n for n in range(1, 6))
        sound += 0.1 * note * torch.exp(-20 * (time - time[start])) * (time >= time[start])
    return sound


def posterior(model: Any, audio: torch.Tensor, repo: str) -> Any:
    """The posterior of diffusers' own classes."""
    if repo == "cosmos":  # `encode` without its division by the maximum of the batch
        from diffusers.models.autoencoders import autoencoder_cosmos3_audio as module

        return module.OobleckDiagonalGaussianDistribution(model._encode(audio))
    return model.encode(audio).latent_dist


@pytest.mark.parametrize("repo", REPOS)
def test_latents_are_those_of_diffusers(tiny_repos: Path, repo: str) -> None:
    model, package = load(tiny_repos, repo), theirs(tiny_repos, repo)
    x = music(model, 20 * model.spec.hop)
    z = model.encode(x)
    with torch.inference_mode():
        expected = posterior(package, x, repo)
        audio = package.decode(expected.mode())
    audio = getattr(audio, "sample", audio)
    assert torch.equal(z, expected.mode())
    assert z.std() > 1e-4
    assert torch.equal(model.decode(z, audio.shape[-1]), audio)
    scaled = load(tiny_repos, repo, scale_factor=0.5, posterior="mean+std")
    rows = scaled.encode(x)
    assert torch.allclose(rows, 0.5 * torch.cat((expected.mean, expected.std), dim=1))
    assert torch.equal(scaled.decode(rows, audio.shape[-1]), audio)


@pytest.mark.parametrize("repo", REPOS)
def test_items_of_200_lengths_have_the_latents_of_diffusers(tiny_repos: Path, repo: str) -> None:
    """Items end with a whole frame, which zeros fill; those of one number of frames in a batch."""
    model, package = load(tiny_repos, repo), theirs(tiny_repos, repo)
    longest = max(3, 1000 // model.spec.hop) * model.spec.hop
    whole = music(model, longest)[0]
    batches: dict[int, list[torch.Tensor]] = {}
    for samples in torch.linspace(1, longest - 1, 200).long().tolist():
        padded = model.spec.padded(samples)
        batches.setdefault(padded, []).append(F.pad(whole[:, :samples], (0, padded - samples)))
    for items in batches.values():
        x = torch.stack(items)
        with torch.inference_mode():
            expected = posterior(package, x, repo).mode()
        assert torch.allclose(model.encode(x), expected, rtol=1e-5, atol=1e-6)
        assert torch.allclose(encode_whole(model, x[-1]), expected[-1], rtol=1e-4, atol=1e-5)


def test_context_of_cosmos(tiny_repos: Path) -> None:
    """That of the published configuration; for the tiny one it is as short as it can be."""
    assert encoder_context(64, 16, (4, 5, 6), 2) == 2
    model = load(tiny_repos, "cosmos")
    assert model.spec.context is not None
    (context, right), hop = model.spec.context, model.spec.hop
    assert context == right
    x = music(model, 12 * hop)
    changed = x.clone()
    changed[..., 6 * hop : 7 * hop] += 0.1
    moved = (model.encode(x) != model.encode(changed)).any(dim=1)[0].nonzero().flatten()
    assert (6 - int(moved.min()), int(moved.max()) - 6) == (context, context)


def test_neighbours_in_a_batch_do_not_change_latents_of_cosmos(tiny_repos: Path) -> None:
    """They do in diffusers, which divides a batch by its maximum: the trap."""
    model, package = load(tiny_repos, "cosmos"), theirs(tiny_repos, "cosmos")
    quiet = 0.1 * music(model, 10 * model.spec.hop)
    loud = torch.cat((quiet, 9 * quiet))
    with torch.inference_mode():
        alone = package.encode(quiet).latent_dist.mode()
        beside = package.encode(loud).latent_dist.mode()[:1]
    assert (alone - beside).norm() > 0.01 * alone.norm()
    assert torch.allclose(model.encode(loud)[:1], model.encode(quiet), atol=1e-6)
    # What diffusers encodes is audio with a peak of 0.95; latents of such audio are the same.
    peak = quiet / (quiet.abs().max() + 1e-5) * 0.95
    assert torch.allclose(model.encode(peak), alone, atol=1e-5)


def test_cosmos_without_an_encoder_is_refused(
    tiny_repos: Path, tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    copy = Path(shutil.copytree(tiny_repos / "cosmos" / "sound_tokenizer", tmp_path / "cosmos"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"encoder_enabled": False}))
    with pytest.raises(ModelError, match="this checkpoint has no encoder") as caught:
        resolve(f"cosmos:{copy}")
    one_sentence(caught.value)
    (copy / "config.json").write_text(json.dumps(config | {"enc_strides": [2, 3]}))
    with pytest.raises(ModelError, match="the strides of its encoder and its decoder differ"):
        resolve(f"cosmos:{copy}")


def test_ace_step_is_an_oobleck(tiny_repos: Path, tmp_path: Path) -> None:
    """The values of its published configuration; the weights are not read here."""
    copy = Path(shutil.copytree(tiny_repos / "ace-step", tmp_path / "ace-step"))
    config = json.loads((copy / "vae" / "config.json").read_text())
    config |= {"encoder_hidden_size": 128, "decoder_input_channels": 64, "decoder_channels": 128}
    (copy / "vae" / "config.json").write_text(json.dumps(config))
    spec = resolve(f"oobleck:{copy}").spec
    assert (spec.sample_rate, spec.channels, spec.hop) == (48000, 2, 1920)
    assert (spec.latent_channels, spec.frame_rate) == (64, 25)
    assert spec.context == (7, 7)
