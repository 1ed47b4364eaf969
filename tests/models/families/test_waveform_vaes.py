"""KVAE-Audio, MiniMax-H3's audio VAE and LongCat's VAE against diffusers' own calls, and traps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from latentmill.encoding.chunks import Chunking
from latentmill.encoding.single import encode_chunked, encode_whole
from latentmill.errors import ConfigError, ModelError
from latentmill.models.base import Autoencoder
from latentmill.models.registry import resolve

CLASSES = {
    "kvae": ("AutoencoderKLKVAEAudio", "diffusers"),
    "minimax": ("AutoencoderKLMiniMaxH3Audio", "audio_vae"),
    "longcat": ("LongCatAudioDiTVae", "vae"),
}


@pytest.fixture(params=CLASSES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def load(repos: Path, family: str, **options: Any) -> Autoencoder:
    return resolve(f"{family}:{repos / family}", options).load("cpu")


def package_model(repos: Path, family: str) -> Any:
    import diffusers

    name, folder = CLASSES[family]
    return getattr(diffusers, name).from_pretrained(repos / family, subfolder=folder).eval()


def normalisation(theirs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline of MiniMax subtracts and divides by."""
    return tuple(
        torch.tensor(getattr(theirs.config, name)).view(1, -1, 1)
        for name in ("latents_mean", "latents_std")
    )


def package_encode(theirs: Any, family: str, x: torch.Tensor) -> torch.Tensor:
    """The latents that a diffusion model is trained on, by the package's own calls."""
    with torch.inference_mode():
        if family == "longcat":  # the class does not pad
            missing = -x.shape[-1] % 2048
            return theirs.encode(F.pad(x, (0, missing)), sample_posterior=False).latents
        mean = theirs.encode(x).latent_dist.mode()
        if family == "kvae":
            return mean
        shift, width = normalisation(theirs)
        return (mean - shift) / width


def package_decode(theirs: Any, family: str, latents: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        if family == "minimax":
            shift, width = normalisation(theirs)
            latents = latents * width + shift
        return theirs.decode(latents).sample


def sound(samples: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """A decaying harmonic tone in noise."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(samples) / 30_000
    tones = torch.stack([torch.sin(2 * torch.pi * 220 * n * time) / n for n in (1, 2, 3, 5)]).sum(0)
    noise = torch.randn(batch, 1, samples, generator=generator)
    return 0.2 * tones * torch.exp(-time) + 0.05 * noise


def test_encoding_and_decoding_are_the_package_s(tiny_repos: Path, family: str) -> None:
    theirs, model = package_model(tiny_repos, family), load(tiny_repos, family, scale_factor=0.5)
    x = sound(30 * model.spec.hop, batch=2)
    expected = package_encode(theirs, family, x)
    assert torch.equal(model.encode(x), 0.5 * expected)
    assert expected.std() > 0.01
    decoded = package_decode(theirs, family, expected)
    assert torch.equal(model.decode(0.5 * expected, x.shape[-1]), decoded)
    assert decoded.std() > 1e-4


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_items_of_many_lengths_are_the_package_s(tiny_repos: Path, family: str, count: int) -> None:
    theirs, model = package_model(tiny_repos, family), load(tiny_repos, family)
    hop = model.spec.hop
    x = sound(3 * hop)[0]
    lengths = torch.randint(1, 3 * hop, (count - 7,), generator=torch.Generator().manual_seed(1))
    around = [n * hop + offset for n in (1, 2) for offset in (-1, 0, 1)]
    for samples in [1, *around, *lengths.tolist()]:
        expected = package_encode(theirs, family, x[None, :, :samples])
        ours = encode_whole(model, x[:, :samples])
        assert ours.shape == expected[0].shape
        assert (ours - expected[0]).norm() <= 1e-6 * expected.norm()


def test_the_posterior_is_the_package_s(tiny_repos: Path, family: str) -> None:
    theirs = package_model(tiny_repos, family)
    model, mean = (load(tiny_repos, family, posterior=rows) for rows in ("mean+std", "mean"))
    x = sound(8 * model.spec.hop, batch=2)
    z = model.encode(x)
    rows = mean.spec.latent_channels
    assert model.spec.latent_channels == 2 * rows
    assert torch.equal(z[:, :rows], mean.encode(x))
    assert torch.equal(model.decode(z, 100), mean.decode(z[:, :rows], 100))
    with torch.inference_mode():
        if family == "longcat":  # what a sample adds to the mean is the deviation times the noise
            sample = theirs.encode(x, generator=torch.Generator().manual_seed(3)).latents
            noise = torch.randn(z[:, :rows].shape, generator=torch.Generator().manual_seed(3))
            assert torch.allclose(z[:, :rows] + z[:, rows:] * noise, sample, atol=1e-6)
            return
        std = theirs.encode(x).latent_dist.std
    width = normalisation(theirs)[1] if family == "minimax" else 1.0
    assert torch.equal(z[:, rows:], std / width)


def test_longcat_stores_the_mean_and_draws_no_sample(tiny_repos: Path) -> None:
    theirs, model = package_model(tiny_repos, "longcat"), load(tiny_repos, "longcat")
    x = sound(4 * model.spec.hop)
    z = model.encode(x)
    assert torch.equal(model.encode(x), z)
    with torch.inference_mode():
        assert not torch.allclose(theirs.encode(x).latents, z, atol=1e-3)  # its default
        raw = theirs.encoder(x).chunk(2, dim=1)[0]
    assert torch.allclose(z, raw / 0.71)


def test_the_hop_of_longcat_is_that_of_its_strides(tiny_repos: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_repos / "longcat", tmp_path / "longcat"))
    path = copy / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "downsampling_ratio": 77}))
    assert resolve(f"longcat:{copy}").spec.hop == 2048
    path.write_text(json.dumps({**config, "strides": [2, 4, 4, 8]}))  # the last one is repeated
    assert resolve(f"longcat:{copy}").spec.hop == 2048
    del config["in_channels"]  # a default of the class
    path.write_text(json.dumps(config))
    assert resolve(f"longcat:{copy}").spec.channels == 1


@pytest.mark.parametrize(("family", "last_sees_first", "first_sees_last"), [
    ("kvae", True, True),
    ("minimax", True, False),
])  # fmt: skip
def test_attention_has_no_limit_and_cannot_be_trimmed(
    tiny_repos: Path,
    one_sentence: Callable[[BaseException], str],
    family: str,
    last_sees_first: bool,
    first_sees_last: bool,
) -> None:
    """A changed frame changes frames that no convolution reaches."""
    model = load(tiny_repos, family)
    hop, frames = model.spec.hop, 120
    x = sound(frames * hop)
    whole = model.encode(x)[0]
    for changed, seen, depends in (
        (slice(0, hop), slice(frames - 20, frames), last_sees_first),
        (slice((frames - 1) * hop, None), slice(0, 20), first_sees_last),
    ):
        other = x.clone()
        other[..., changed] = 0
        difference = (model.encode(other)[0] - whole)[:, seen].abs().max()
        assert (difference > 1e-6 * whole.std()) == depends
    assert model.spec.context is None
    with pytest.raises(ConfigError) as refused:
        Chunking.for_model(model.spec, stitch="trim")
    assert one_sentence(refused.value).endswith("use --stitch crossfade.")


def test_longcat_s_context_is_as_short_as_it_can_be(tiny_repos: Path) -> None:
    model = load(tiny_repos, "longcat")
    assert model.spec.context is not None
    (context, right), hop = model.spec.context, model.spec.hop
    assert (context, right) == (8, 8)
    x = sound(48 * hop)
    changed = x.clone()
    changed[..., 24 * hop : 25 * hop] += 1
    moved = (model.encode(x) != model.encode(changed)).any(dim=1)[0].nonzero().flatten()
    assert 24 - context <= int(moved.min()) <= 24 - context + 2
    assert 24 + context - 2 <= int(moved.max()) <= 24 + context
    x = sound(300 * hop)[0]
    chunked = encode_chunked(model, x, Chunking.for_model(model.spec))
    assert (chunked - encode_whole(model, x)).norm() < 1e-6 * chunked.norm()


def test_a_minimax_without_measured_channels_is_not_normalised(
    tiny_repos: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_repos / "minimax", tmp_path / "minimax"))
    path = copy / "audio_vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "latents_mean": None, "latents_std": None}))
    theirs = package_model(tiny_repos, "minimax")
    model = resolve(f"minimax:{copy}").load("cpu")
    x = sound(4 * model.spec.hop)
    with torch.inference_mode():
        assert torch.equal(model.encode(x), theirs.encode(x).latent_dist.mode())
    for wrong in ({"latents_std": None}, {"latents_mean": [0.0]}):
        path.write_text(json.dumps({**config, **wrong}))
        with pytest.raises(ModelError, match="need one number per latent channel"):
            resolve(f"minimax:{copy}")


def test_channels_of_a_stereo_item_are_encoded_as_minimax_s_pipeline_does(tiny_repos: Path) -> None:
    """It encodes the two channels as two batch items."""
    model = resolve(f"minimax:{tiny_repos / 'minimax'}", channels="split").load("cpu")
    theirs = package_model(tiny_repos, "minimax")
    x = sound(6 * model.spec.hop, batch=2).transpose(0, 1)  # one item of two channels
    expected = package_encode(theirs, "minimax", x.transpose(0, 1))
    assert torch.equal(model.encode(x)[0], expected.flatten(0, 1))


def test_the_folder_of_a_vae_is_found_and_another_class_is_an_error(
    tiny_repos: Path, family: str
) -> None:
    inside = tiny_repos / family / CLASSES[family][1]
    whole = resolve(f"{family}:{tiny_repos / family}").spec
    assert resolve(f"{family}:{inside}").spec.identity == whole.identity
    for other in CLASSES.keys() - {family}:
        wrong = tiny_repos / other / CLASSES[other][1]
        with pytest.raises(ModelError, match=f"it belongs to {CLASSES[other][0]}"):
            resolve(f"{family}:{wrong}")
