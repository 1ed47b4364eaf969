"""The families of diffusers with a front end of their own, or with traps, against diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file

from latentmill.encoding.single import encode_whole
from latentmill.errors import ModelError
from latentmill.models.base import Autoencoder
from latentmill.models.families.cosmos import encoder_context
from latentmill.models.families.ltx2 import encoder_context as ltx2_context
from latentmill.models.families.mel import LogMel
from latentmill.models.registry import resolve
from support.tiny_diffusers import write_ltx2_with_bandwidth_extension

CPU = torch.device("cpu")

REPOS = {  # name of the family and where its autoencoder is
    "ace-step": ("oobleck", "vae"),
    "cosmos": ("cosmos", "sound_tokenizer"),
    "mmaudio": ("mmaudio", "audio_vae"),
    "ltx2": ("ltx2", "audio_vae"),
    "audioldm2": ("audioldm2", "vae"),
}
SCALES = {"mmaudio": 0.417, "audioldm2": 0.4110932946205139}  # of the configurations


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


def posterior(model: Any, audio: torch.Tensor, repo: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of diffusers' own classes, unscaled, in the shape of our latents."""
    if repo == "cosmos":  # `encode` without its division by the maximum of the batch
        from diffusers.models.autoencoders import autoencoder_cosmos3_audio as module

        found = module.OobleckDiagonalGaussianDistribution(model._encode(audio))
    elif repo == "mmaudio":
        found = model.encode(audio[:, 0]).latent_dist
    elif repo == "ltx2":
        mel = LogMel(16000, 16, n_fft=1024, hop=160, pad=512, device=CPU)(audio)
        found = model.encode(mel).latent_dist
    elif repo == "audioldm2":
        mel = LogMel(16000, 16, n_fft=1024, hop=160, pad=432, device=CPU)(audio)
        found = model.encode(mel).latent_dist
    else:
        found = model.encode(audio).latent_dist
    mean, std = found.mode(), found.std
    if mean.ndim == 4:  # [B, C, Z, M] to [B, C * M, Z]
        mean, std = (one.transpose(1, 2).flatten(2, 3).transpose(1, 2) for one in (mean, std))
    if repo == "ltx2":
        mean, std = mean - model.latents_mean[:, None], std / model.latents_std[:, None]
        mean = mean / model.latents_std[:, None]
    return mean, std


def decoded(repos: Path, model: Any, latents: torch.Tensor, repo: str) -> torch.Tensor:
    """Audio of diffusers' own classes, at the rate of the vocoder."""
    if repo == "ltx2":
        latents = latents * model.latents_std[:, None] + model.latents_mean[:, None]
    if repo in ("ltx2", "audioldm2"):
        latents = latents.transpose(1, 2).unflatten(2, (2, 4)).transpose(1, 2)
    audio = model.decode(latents)
    audio = getattr(audio, "sample", audio)
    if repo == "audioldm2":
        audio = audio[:, 0]
    if (repos / repo / "vocoder").exists():
        audio = load_vocoder(repos / repo / "vocoder")(audio)
    return getattr(audio, "sample", audio)


def load_vocoder(folder: Path) -> Any:
    import diffusers
    from diffusers.pipelines.ltx2 import vocoder as ltx2
    from transformers import SpeechT5HifiGan

    name = json.loads((folder / "config.json").read_text()).get("_class_name")
    package = SpeechT5HifiGan if name is None else getattr(diffusers, name, None)
    return (package or getattr(ltx2, name)).from_pretrained(folder).eval()


@pytest.mark.parametrize("repo", REPOS)
def test_latents_and_audio_are_those_of_diffusers(tiny_repos: Path, repo: str) -> None:
    model, package = load(tiny_repos, repo), theirs(tiny_repos, repo)
    scale = SCALES.get(repo, 1)
    assert model.spec.scale_factor == scale
    x = music(model, model.spec.samples(20), batch=2)
    z = model.encode(x)
    with torch.inference_mode():
        mean, std = posterior(package, x, repo)
        audio = decoded(tiny_repos, package, mean, repo).reshape(2, model.spec.channels, -1)
    assert torch.allclose(z, mean * scale, rtol=1e-5, atol=1e-6)
    assert z.std() > 1e-3
    ours = model.decode(z, x.shape[-1])
    assert audio.std() > 1e-3
    if repo == "ltx2":
        assert audio.shape[-1] == 24000 * (20 * 640 - 480) // 16000
        expected = low_band(audio, 20 * 640 - 480)[..., 300:11800]  # without the ends
        assert relative(low_band(ours, ours.shape[-1])[..., 300:11800], expected) < 0.01
    else:
        assert torch.allclose(ours, audio[..., : x.shape[-1]], rtol=1e-4, atol=1e-5)
    both = load(tiny_repos, repo, scale_factor=0.5, posterior="mean+std")
    rows = both.encode(x)
    assert torch.allclose(rows, 0.5 * torch.cat((mean, std), dim=1), rtol=1e-5, atol=1e-6)
    assert torch.allclose(both.decode(rows, x.shape[-1]), ours, rtol=1e-4, atol=1e-5)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def low_band(audio: torch.Tensor, samples: int) -> torch.Tensor:
    """Resample to a number of samples and keep 70 % of its band, by cutting the spectrum.

    This is another method than the library's, which has a filter with a slope.
    """
    spectrum = torch.fft.rfft(audio.double())[..., : int(0.7 * samples / 2)]
    return (torch.fft.irfft(spectrum, n=samples) * samples / audio.shape[-1]).float()


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
            expected = posterior(package, x, repo)[0] * SCALES.get(repo, 1)
        assert relative(model.encode(x), expected) < 1e-6
        assert relative(encode_whole(model, x[-1]), expected[-1]) < 1e-5


@pytest.mark.parametrize(
    ("rate", "bins", "n_fft", "hop", "pad"),
    [(16000, 64, 1024, 160, 512), (16000, 64, 1024, 160, 432), (44100, 128, 2048, 512, 768)],
)
def test_log_mel_spectrograms_are_those_of_two_other_packages(
    rate: int, bins: int, n_fft: int, hop: int, pad: int
) -> None:
    """LTX-2's and AudioLDM 2's front ends, which diffusers lacks, and MMAudio's, which it has."""
    from diffusers.models.autoencoders.autoencoder_mmaudio import MMAudioMelSpectrogram
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    sound = 0.1 * torch.randn(2, 12 * hop + 2000, generator=torch.Generator().manual_seed(0))
    log_mel = LogMel(rate, bins, n_fft=n_fft, hop=hop, pad=pad, device=CPU)
    ours = log_mel(sound[None])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # front ends stay in float32
        assert torch.equal(log_mel(sound[None])[0], ours)
    for channel in (0, 1):
        expected = spectrogram(
            np.pad(sound[channel].numpy().astype(np.float64), pad, mode="reflect"),
            window_function(n_fft, "hann"),
            frame_length=n_fft,
            hop_length=hop,
            center=False,
            power=1.0,
            mel_filters=mel_filter_bank(
                n_fft // 2 + 1, bins, 0, rate / 2, rate, norm="slaney", mel_scale="slaney"
            ),
            mel_floor=1e-5,
            log_mel="log",
        )
        assert np.allclose(ours[channel].T.numpy(), expected, atol=1e-4)
    if pad == (n_fft - hop) // 2:
        other = MMAudioMelSpectrogram(rate, n_fft, bins, hop)(sound)
        assert torch.allclose(ours.transpose(1, 2), other, atol=1e-3)
    assert ours.std() > 0.1
    assert (
        (LogMel(rate, bins, n_fft=n_fft, hop=hop, pad=pad, device=CPU)(0 * sound[None]))
        .eq(np.log(np.float32(1e-5)).item())
        .all()
    )


@pytest.mark.slow  # importing the pipeline takes long
def test_latents_of_ltx2_are_packed_and_normalised_as_its_pipeline_does(tiny_repos: Path) -> None:
    from diffusers.pipelines.ltx2.pipeline_ltx2 import LTX2Pipeline

    model, package = load(tiny_repos, "ltx2"), theirs(tiny_repos, "ltx2")
    x = music(model, 6400)
    mel = LogMel(16000, 16, n_fft=1024, hop=160, pad=512, device=CPU)(x)
    statistics = package.latents_mean, package.latents_std
    with torch.inference_mode():
        latents = package.encode(mel).latent_dist.mode()
        packed = LTX2Pipeline._pack_audio_latents(latents)
        expected = LTX2Pipeline._normalize_audio_latents(packed, *statistics)  # [B, L, C * M]
    assert torch.equal(model.encode(x), expected.transpose(1, 2))
    back = LTX2Pipeline._denormalize_audio_latents(expected, *statistics)
    again = LTX2Pipeline._unpack_audio_latents(back, latents.shape[2], latents.shape[3])
    assert torch.allclose(again, latents, atol=1e-5)


def test_ltx2_has_a_frame_more_than_hops(tiny_repos: Path) -> None:
    """4 n + 1 frames of the spectrogram are n + 1 latents, which decode to 4 n + 1 frames."""
    spec = load(tiny_repos, "ltx2").spec
    assert (spec.hop, spec.sample_rate, spec.frame_rate, spec.channels) == (640, 16000, 25, 2)
    assert [spec.frames(samples) for samples in (640, 16000, 16001)] == [2, 26, 27]
    assert spec.samples(26) == 16000
    assert ltx2_context(2, 160) == (27, 1) == spec.context


def test_context_of_ltx2_is_as_short_as_it_can_be(tiny_repos: Path) -> None:
    """Audio near the time of frame 20 changes frames 20 to 46; audio of half a window before it
    is mirrored at the start of a chunk, so that a 27th frame is wrong there."""
    model = load(tiny_repos, "ltx2")
    x = music(model, 640 * 60)
    changed = x.clone()
    changed[..., 640 * 20 : 640 * 20 + 510] += 1
    moved = (model.encode(x) != model.encode(changed)).any(dim=1)[0].nonzero().flatten()
    assert int(moved.min()) == 20
    assert 45 <= int(moved.max()) <= 47
    end = model.encode(x[..., : 640 * 20])[0] != model.encode(x)[0, :, :21]
    assert end.any(dim=0)[-1]
    assert relative(model.encode(x[..., : 640 * 20])[0, :, :20], model.encode(x)[0, :, :20]) < 1e-6


def test_bandwidth_extension_of_ltx2_is_resampled(tiny_repos: Path, tmp_path: Path) -> None:
    repo = Path(shutil.copytree(tiny_repos / "ltx2", tmp_path / "ltx2"))
    shutil.rmtree(repo / "vocoder")
    write_ltx2_with_bandwidth_extension(repo / "vocoder")
    model, package = load(tmp_path, "ltx2"), theirs(tmp_path, "ltx2")
    z = model.encode(music(model, 16000))
    with torch.inference_mode():
        audio = decoded(tmp_path, package, z, "ltx2")
    assert audio.shape[-1] == 3 * (16000 + 160)
    expected = low_band(audio, 16000 + 160)[..., 300:15700]
    ours = low_band(model.decode(z, 16000), 16000)[..., 300:15700]
    assert relative(ours, expected) < 0.01


@pytest.mark.parametrize("repo", ["mmaudio", "ltx2", "audioldm2"])
def test_encoding_needs_no_vocoder_and_decoding_says_that_it_does(
    tiny_repos: Path, tmp_path: Path, one_sentence: Callable[[BaseException], str], repo: str
) -> None:
    """`audioldm2` needs its configuration, which has the sample rate."""
    copy = Path(shutil.copytree(tiny_repos / repo, tmp_path / repo))
    for weights in (copy / "vocoder").glob("*.safetensors"):
        weights.unlink()
    model, whole = load(tmp_path, repo), load(tiny_repos, repo)
    x = music(model, 10 * model.spec.hop)
    assert torch.equal(model.encode(x), whole.encode(x))
    assert model.spec.identity == whole.spec.identity
    with pytest.raises(ModelError, match="decoding needs the vocoder") as caught:
        model.decode(model.encode(x), 100)
    assert one_sentence(caught.value).startswith(f"Model {repo}:")


@pytest.mark.parametrize("repo", ["mmaudio", "ltx2", "audioldm2"])
def test_the_vocoder_is_found_beside_the_autoencoder_s_own_folder(
    tiny_repos: Path, repo: str
) -> None:
    family, folder = REPOS[repo]
    inner = resolve(f"{family}:{tiny_repos / repo / folder}").load("cpu")
    model = load(tiny_repos, repo)
    assert inner.spec.identity == model.spec.identity
    z = model.encode(music(model, 4 * model.spec.hop))
    assert torch.equal(inner.decode(z, 100), model.decode(z, 100))


@pytest.mark.parametrize(
    ("repo", "setting", "value"),
    [("mmaudio", "upsample_rates", [16, 2]), ("ltx2", "upsample_factors", [16, 10])],
)
def test_a_vocoder_that_does_not_fit_is_refused(
    tiny_repos: Path, tmp_path: Path, repo: str, setting: str, value: list[int]
) -> None:
    copy = Path(shutil.copytree(tiny_repos / repo, tmp_path / repo))
    path = copy / "vocoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    model = load(tmp_path, repo)
    z = model.encode(music(model, 4 * model.spec.hop))
    with pytest.raises(ModelError, match="samples for a frame, but the autoencoder has"):
        model.decode(z, 100)


@pytest.mark.parametrize(
    ("repo", "change", "reason"),
    [
        ("ltx2", {"causality_axis": "width"}, "causality_axis is 'width'"),
        ("ltx2", {"attn_resolutions": [16]}, "attn_resolutions is set"),
        ("ltx2", {"ch_mult": [1, 2]}, "ch_mult has 2 levels"),
        ("ltx2", {"base_channels": 16}, "base_channels is not"),
        ("mmaudio", {"n_fft": 4096}, "windows are too long"),
        ("audioldm2", {"in_channels": 3}, "it has 3 channels"),
        ("cosmos", {"enc_strides": [2, 3]}, "strides of its encoder and its decoder differ"),
    ],
)
def test_configurations_that_are_not_supported_are_refused(
    tiny_repos: Path, tmp_path: Path, repo: str, change: dict[str, Any], reason: str
) -> None:
    copy = Path(shutil.copytree(tiny_repos / repo, tmp_path / repo))
    path = copy / REPOS[repo][1] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=reason):
        load(tmp_path, repo)


def test_checkpoints_of_audioldm_load_under_the_old_names(tiny_repos: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_repos / "audioldm2", tmp_path / "audioldm2"))
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    state = {name.replace("to_out.0", "proj_attn"): tensor for name, tensor in state.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in state
    save_file(state, path)
    model, present = load(tmp_path, "audioldm2"), load(tiny_repos, "audioldm2")
    x = music(model, 6400)
    assert torch.equal(model.encode(x), present.encode(x))


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
