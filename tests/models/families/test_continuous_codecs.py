"""`pockettts` and `vibevoice` against transformers' own code, and their traps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentmill.encoding.single import encode_whole
from latentmill.errors import ModelError
from latentmill.models.base import Autoencoder
from latentmill.models.families import pockettts, vibevoice
from latentmill.models.registry import resolve

FAMILIES = ["pockettts", "vibevoice"]


@pytest.fixture(params=FAMILIES)
def repo(request: pytest.FixtureRequest, tiny_repos: Path) -> Path:
    return tiny_repos / request.param


def load(repo: Path, **options: Any) -> Autoencoder:
    return resolve(f"{repo.name}:{repo}", options).load("cpu")


def package_model(repo: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(repo).eval()


def package_latents(theirs: Any, audio: torch.Tensor) -> torch.Tensor:
    """What the package's own feature extractor and `encode` give for one item `[T]`, `[D, Z]`."""
    from transformers import PocketTTSFeatureExtractor, VibeVoiceAcousticTokenizerFeatureExtractor

    if theirs.config.model_type == "pocket_tts_audio_tokenizer":
        extractor: Any = PocketTTSFeatureExtractor(end_on_pause=False)  # which is for voice prompts
        values = extractor(audio.numpy(), sampling_rate=24000)["input_values"]
        return theirs.encode(values).latents[0].T
    extractor = VibeVoiceAcousticTokenizerFeatureExtractor(
        normalize_audio=False, pad_to_multiple_of=theirs.config.hop_length
    )
    values = extractor(audio.numpy(), sampling_rate=24000)["input_values"]
    return theirs.encode(values, sample=False).latents[0].T


def noise(samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(1, samples, generator=torch.Generator().manual_seed(samples))


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_latents_are_the_package_s_at_many_lengths(repo: Path, count: int) -> None:
    model, theirs = load(repo, scale_factor=0.5), package_model(repo)
    hop = model.spec.hop
    spread = count - 6
    lengths = [1 + 17 * hop * n // spread for n in range(1, spread + 1)]
    for samples in [1, 2, hop - 1, hop, hop + 1, *lengths, 60 * hop + 5]:
        audio = noise(samples)
        with torch.inference_mode():
            expected = 0.5 * package_latents(theirs, audio[0])
        ours = encode_whole(model, audio)
        assert ours.shape == expected.shape
        assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))
        assert ours.std() > 1e-3


def test_audio_is_what_the_package_decodes(repo: Path) -> None:
    model, theirs = load(repo), package_model(repo)
    latents = model.encode(noise(20 * model.spec.hop)[None])
    with torch.inference_mode():
        decoded = theirs.decode(latents.transpose(1, 2))
    expected = decoded.audio if repo.name == "vibevoice" else decoded.audio_values
    audio = model.decode(latents, 20 * model.spec.hop)
    assert torch.equal(audio, expected)
    assert audio.std() > 1e-4


def test_vibevoice_encodes_without_noise(tiny_repos: Path) -> None:
    """The package's default adds noise, with the global generator."""
    model, theirs = load(tiny_repos / "vibevoice"), package_model(tiny_repos / "vibevoice")
    audio = noise(10 * model.spec.hop)[None]
    state = torch.get_rng_state()
    first = model.encode(audio)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.encode(audio), first)
    with torch.inference_mode():
        noisy = theirs.encode(audio).latents.transpose(1, 2)
    assert not torch.allclose(noisy, first, atol=1e-3)


def test_vibevoice_keeps_the_loudness(tiny_repos: Path) -> None:
    """The package's feature extractor scales each item to -25 dB; latentmill does not."""
    from transformers import VibeVoiceAcousticTokenizerFeatureExtractor

    model, theirs = load(tiny_repos / "vibevoice"), package_model(tiny_repos / "vibevoice")
    audio = noise(10 * model.spec.hop)
    extractor = VibeVoiceAcousticTokenizerFeatureExtractor(pad_to_multiple_of=model.spec.hop)
    scaled = extractor(audio[0].numpy(), sampling_rate=24000)["input_values"]
    assert not torch.allclose(scaled[0], audio, atol=1e-3)
    with torch.inference_mode():
        theirs_scaled = theirs.encode(scaled, sample=False).latents.transpose(1, 2)
    assert torch.equal(model.encode(scaled), theirs_scaled)
    assert not torch.allclose(model.encode(audio[None]), theirs_scaled, atol=1e-3)


def changed(repo: Path, copy: Path, **config: Any) -> Path:
    """A copy of a repository with a changed configuration."""
    shutil.copytree(repo, copy)
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return copy


def test_pockettts_ignores_that_a_configuration_streams(tiny_repos: Path, tmp_path: Path) -> None:
    repo = tiny_repos / "pockettts"
    streaming = changed(repo, tmp_path / "pockettts", use_streaming=True, use_cache=True)
    audio = noise(10 * 1920)[None]
    model = load(streaming)
    expected = load(repo).encode(audio)
    for _ in range(2):  # no state is left behind
        assert torch.equal(model.encode(audio), expected)


def test_halves_of_pockettts(
    tiny_repos: Path, tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    """Weights without the encoder are refused; those without the decoder can encode."""
    repo = tiny_repos / "pockettts"
    with pytest.raises(ModelError) as refused:
        load(changed(repo, tmp_path / "none" / "pockettts", encoder_config=None))
    assert "no encoder" in one_sentence(refused.value)
    half = changed(repo, tmp_path / "half" / "pockettts", decoder_config=None)
    state = load_file(half / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith("decoder.")}
    save_file(kept, half / "model.safetensors", {"format": "pt"})
    model = load(half)
    audio = noise(10 * 1920)[None]
    latents = model.encode(audio)
    assert torch.equal(latents, load(repo).encode(audio))
    with pytest.raises(ModelError) as refused:
        model.decode(latents, 100)
    assert "no decoder" in one_sentence(refused.value)


def test_a_model_of_another_type_is_refused(tiny_repos: Path) -> None:
    """A complete Pocket TTS or VibeVoice has another `model_type` than its tokenizer."""
    with pytest.raises(ModelError, match="it belongs to mimi"):
        resolve(f"pockettts:{tiny_repos / 'mimi'}")
    with pytest.raises(ModelError, match="it belongs to pocket_tts_audio_tokenizer"):
        resolve(f"vibevoice:{tiny_repos / 'pockettts'}")


def test_the_context_is_the_receptive_field(repo: Path) -> None:
    """The earliest sample with a gradient is in the first frame of the context."""
    model, theirs = load(repo), package_model(repo)
    context = model.spec.context
    assert context is not None
    reach = context.left
    hop, frames = model.spec.hop, reach + 3
    audio = noise(frames * hop)[None].requires_grad_()
    kwargs = {"sample": False} if repo.name == "vibevoice" else {}
    last = theirs.encode(audio, **kwargs).latents[0, -1]
    (gradient,) = torch.autograd.grad(last.square().sum(), audio)
    first = int(gradient[0, 0].nonzero().min())
    assert first // hop == frames - 1 - reach


def test_contexts_of_the_published_models() -> None:
    from transformers import PocketTTSAudioTokenizerConfig, VibeVoiceAcousticTokenizerConfig

    assert pockettts.encoder_context(PocketTTSAudioTokenizerConfig()) == 33
    assert vibevoice.encoder_context(VibeVoiceAcousticTokenizerConfig()) == 58
