"""The models of diffusers, transformers and music2latent against their own code, and its traps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentmill.config import load_config
from latentmill.decoding.decoder import decode_latent
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.single import encode_chunked
from latentmill.errors import ConfigError, ModelError, SourceError
from latentmill.models.base import Autoencoder
from latentmill.models.families.codec import dac_encoder_context
from latentmill.models.families.same import encoder_context
from latentmill.models.families.transformers_codec import LENGTHS, move
from latentmill.models.registry import resolve
from latentmill.run.run import run
from latentmill.store.statistics import ChannelStatistics
from support.exact_attention import exact_attention


def noise(model: Autoencoder, frames: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, model.spec.channels, model.spec.samples(frames))
    return 0.1 * torch.randn(shape, generator=generator)


def load(name: str, **options: Any) -> Autoencoder:
    return resolve(name, options).load("cpu")


REPOS = ["dac-44k", "dac-24k", "encodec-24k", "encodec-48k", "mimi"]


@pytest.fixture(params=REPOS)
def repo(request: pytest.FixtureRequest, tiny_repos: Path) -> Path:
    return tiny_repos / request.param


def family(repo: Path) -> str:
    return f"{repo.name.partition('-')[0]}:{repo}"


def package_model(repo: Path) -> Any:
    import transformers

    return transformers.AutoModel.from_pretrained(repo).eval()


def codes_and_audio(theirs: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the package's own `encode` and `decode` give."""
    with torch.inference_mode():
        if theirs.config.model_type != "encodec":
            given = theirs.encode(x)
            return given.audio_codes, theirs.decode(audio_codes=given.audio_codes).audio_values
        given = theirs.encode(x, bandwidth=theirs.config.target_bandwidths[-1])
        decoded = theirs.decode(given.audio_codes, given.audio_scales)
        return given.audio_codes, decoded.audio_values


def test_quantised_latents_decode_to_what_the_package_decodes(repo: Path) -> None:
    """Its codes are those of our latents, and so is its audio."""
    theirs = package_model(repo)
    model = load(family(repo), scale_factor=3, quantise=True)
    x = noise(model, 148 if repo.name == "encodec-48k" else 20)  # one of its chunks
    z = model.encode(x)
    _, expected = codes_and_audio(theirs, x)
    expected = expected.reshape(x.shape[0], model.spec.channels, -1)
    ours = model.decode(z, x.shape[-1])
    short = x.shape[-1] - expected.shape[-1]
    assert short == {"dac-24k": 8}.get(repo.name, 0)
    assert torch.allclose(ours[..., : expected.shape[-1]], expected, atol=1e-5)
    assert not ours[..., expected.shape[-1] :].any()  # odd strides: the end is filled with zeros
    assert ours.std() > 1e-4
    continuous = load(family(repo), scale_factor=3)
    assert torch.equal(continuous.encode(x), z)
    assert continuous.spec.identity == model.spec.identity
    assert not torch.allclose(continuous.decode(z, x.shape[-1]), ours, atol=1e-6)


def test_codes_are_the_package_s_and_decode_to_its_audio(repo: Path) -> None:
    theirs = package_model(repo)
    model = load(family(repo), output="codes")
    x = 50 * noise(model, 148 if repo.name == "encodec-48k" else 20)  # one of its chunks
    z = model.encode(x)
    given, expected = codes_and_audio(theirs, x)
    given = given[0] if theirs.config.model_type == "encodec" else given  # of the only chunk
    rows = given.shape[1]
    assert torch.equal(z[:, :rows], given.float())
    assert (given[..., 1:] != given[..., :-1]).float().mean() > 0.2
    assert z.shape[1] == model.spec.latent_channels == rows + (repo.name == "encodec-48k")
    assert model.spec.codebook_size == 16
    expected = expected.reshape(x.shape[0], model.spec.channels, -1)
    assert torch.equal(z[:, :rows].half().float(), z[:, :rows])
    ours = model.decode(z, x.shape[-1])[..., : expected.shape[-1]]
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_codes_are_neither_blended_nor_changed(
    repo: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    model = load(family(repo), output="codes")
    whole_chunk = repo.name == "encodec-48k"
    defaults = {"dac-44k": "trim", "dac-24k": "trim", "encodec-48k": "none"}
    assert model.spec.stitch == defaults.get(repo.name, "state")
    with pytest.raises(ConfigError) as refused:
        Chunking.for_model(model.spec, stitch="crossfade")
    advice = f"use --stitch {'none' if whole_chunk else 'trim'}."
    assert one_sentence(refused.value).endswith(advice)
    if whole_chunk:
        with pytest.raises(ConfigError, match=advice):
            Chunking.for_model(model.spec, stitch="trim")
    z = model.encode(noise(model, 20))
    for wrong in (0.5 * z + 0.3, -1 - z, z + 16):
        with pytest.raises(ModelError) as caught:
            model.decode(wrong, 100)
        assert "from 0 to 15" in one_sentence(caught.value)
    for options in ({"scale_factor": 2.0}, {"quantise": True}):
        with pytest.raises(ModelError, match=f"{next(iter(options))} has no meaning for codes"):
            load(family(repo), output="codes", **options)


@pytest.mark.parametrize(("size", "exact"), [(2049, True), (2050, False)])
def test_codes_that_float16_cannot_hold_are_refused(
    tiny_repos: Path, tmp_path: Path, size: int, exact: bool
) -> None:
    copy = Path(shutil.copytree(tiny_repos / "dac-44k", tmp_path / "dac"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "codebook_size": size}))
    values = np.arange(size, dtype=np.float16).astype(int)
    assert np.array_equal(values, np.arange(size)) == exact
    settings = {"source": str(tmp_path / "none"), "out": str(tmp_path / "out"), "device": "cpu"}
    settings |= {"model": f"dac:{copy}", "model_options": {"output": "codes"}}  # type: ignore[dict-item]
    refusal = SourceError if exact else ConfigError  # the source is looked for after that
    with pytest.raises(
        refusal, match="none" if exact else r"codes up to 2049.*use --dtype float32"
    ):
        run(load_config(None, settings))
    with pytest.raises(SourceError):
        run(load_config(None, {**settings, "dtype": "float32"}))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("dac-24k", "encodec-48k") else pytest.mark.slow)
        for name in REPOS
    ],
)
def test_long_items_of_codes_come_back(tiny_repos: Path, name: str) -> None:
    """Cut into chunks, stitched, and decoded window by window."""
    repo = tiny_repos / name
    model = load(family(repo), output="codes")
    spec = model.spec
    frames = 150 if repo.name == "encodec-48k" else 2 * spec.overlap_frames + 3
    chunking = Chunking.for_model(spec, samples=spec.samples(frames), overlap=None)
    x = 50 * noise(model, 2 * frames + 7, batch=1)[0]
    z = encode_chunked(model, x, chunking)
    audio = decode_latent(model, z.numpy(), x.shape[1], chunking)
    assert np.isfinite(audio).all()
    if chunking.stitch == "trim":
        whole = model.encode(x[None])
        assert (z == whole[0]).float().mean() > 0.99  # near a border a code may fall either way
        decoded = model.decode(whole, x.shape[1])[0].numpy()
        assert np.abs(audio - decoded).mean() < 0.1 * np.abs(decoded).mean()


def test_oobleck_is_the_package_s(tiny_repos: Path) -> None:
    from diffusers import AutoencoderOobleck

    theirs = AutoencoderOobleck.from_pretrained(tiny_repos / "oobleck", subfolder="vae").eval()
    model = load(f"oobleck:{tiny_repos / 'oobleck'}", scale_factor=0.5)
    x = noise(model, 20)
    with torch.inference_mode():
        mean = theirs.encode(x).latent_dist.mode()
        decoded = theirs.decode(mean).sample
    assert torch.equal(model.encode(x), mean * 0.5)
    assert torch.equal(model.decode(mean * 0.5, x.shape[-1]), decoded)


def test_same_is_the_package_s(tiny_repos: Path) -> None:
    from diffusers import AutoencoderSAME

    theirs = AutoencoderSAME.from_pretrained(tiny_repos / "same").eval()
    model = load(f"same:{tiny_repos / 'same'}", scale_factor=0.5)
    x = noise(model, 20)
    with torch.inference_mode():
        latents = theirs.encode(x).latents
        decoded = theirs.decode(latents).sample
    assert torch.equal(model.encode(x), latents * 0.5)
    assert torch.equal(model.decode(latents * 0.5, x.shape[-1]), decoded)
    assert decoded.std() > 1e-3
    with pytest.raises(ModelError, match=r"does not load \(it belongs to AutoencoderOobleck\)"):
        load(f"same:{tiny_repos / 'oobleck'}")


@pytest.mark.parametrize(
    ("strides", "depths", "context"), [([16], [6], 6), ([16], [12], 12), ([4, 4], [3, 2], 3)]
)
def test_context_of_same(strides: list[int], depths: list[int], context: int) -> None:
    assert encoder_context(strides, depths, window=1) == context


def test_the_posterior_s_standard_deviation_is_the_package_s(tiny_repos: Path) -> None:
    from diffusers import AutoencoderOobleck

    theirs = AutoencoderOobleck.from_pretrained(tiny_repos / "oobleck", subfolder="vae").eval()
    name = f"oobleck:{tiny_repos / 'oobleck'}"
    model, mean = load(name, scale_factor=0.5, posterior="mean+std"), load(name, scale_factor=0.5)
    x = noise(model, 20)
    z = model.encode(x)
    with torch.inference_mode():
        posterior = theirs.encode(x).latent_dist
    assert torch.equal(z, 0.5 * torch.cat((posterior.mean, posterior.std), dim=1))
    assert torch.equal(model.decode(z, x.shape[-1]), mean.decode(mean.encode(x), x.shape[-1]))
    assert model.spec.identity["posterior"] == "mean+std"
    assert (model.spec.latent_channels, mean.spec.latent_channels) == (8, 4)
    with pytest.raises(ModelError, match="posterior must be"):
        load(name, posterior="sample")


def test_oobleck_takes_the_vae_folder_where_there_is_one(tiny_repos: Path, tmp_path: Path) -> None:
    inside = tiny_repos / "oobleck"
    expected = resolve(f"oobleck:{inside}").spec.identity
    assert resolve(f"oobleck:{inside / 'vae'}").spec.identity == expected
    shutil.copytree(inside / "vae", tmp_path / "repo" / "first" / "stage")
    options = {"subfolder": "first/stage"}
    assert resolve(f"oobleck:{tmp_path / 'repo'}", options).spec.identity == expected
    with pytest.raises(ModelError, match=r"does not contain vae/config\.json or config\.json"):
        resolve(f"oobleck:{tmp_path / 'repo'}")


def test_another_model_s_repository_is_refused(tiny_repos: Path, tmp_path: Path) -> None:
    for asked in ("dac", "encodec"):
        with pytest.raises(ModelError, match=r"config\.json does not load \(it belongs to mimi\)"):
            resolve(f"{asked}:{tiny_repos / 'mimi'}")
    copy = Path(shutil.copytree(tiny_repos / "oobleck" / "vae", tmp_path / "vae"))
    (copy / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ModelError, match=r"does not load \(it belongs to AutoencoderKL\)"):
        resolve(f"oobleck:{copy}")


def test_missing_and_misshapen_weights_are_refused(repo: Path, tmp_path: Path) -> None:
    """`from_pretrained` would go on with random numbers."""
    copy = Path(shutil.copytree(repo, tmp_path / repo.name))
    state = load_file(copy / "model.safetensors")
    name = next(n for n in sorted(state) if n.startswith("encoder") and "bias" in n)
    for wrong in ({}, {name: torch.zeros(77)}):
        spoilt = {n: t for n, t in state.items() if n != name} | wrong
        save_file(spoilt, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match="does not load"):
            load(family(copy))


@pytest.mark.parametrize(
    ("repo", "settings"),
    [
        ("encodec-24k", {"sampling_rate": "many"}),
        ("encodec-24k", {"upsampling_ratios": None}),
        ("encodec-24k", {"sampling_rate": 0}),
        ("dac-44k", {"downsampling_ratios": [0, 4, 8, 8]}),
        ("oobleck", {"downsampling_ratios": [0, 4]}),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tiny_repos: Path, tmp_path: Path, repo: str, settings: dict[str, Any]
) -> None:
    copy = Path(shutil.copytree(tiny_repos / repo, tmp_path / repo))
    (path,) = copy.rglob("config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(ModelError, match="does not load"):
        load(family(copy))


def test_the_hop_of_dac_is_that_of_its_strides(tiny_repos: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_repos / "dac-44k", tmp_path / "dac"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hop_length": 77}))
    assert resolve(f"dac:{copy}").spec.hop == 512


@pytest.mark.parametrize("strides", [(2, 4, 8, 8), (2, 4, 4, 8, 8), (2, 4, 5, 8)])
def test_context_of_the_published_dac_strides(strides: tuple[int, ...]) -> None:
    assert dac_encoder_context(strides) == 8


def test_context_is_as_short_as_it_can_be(tiny_repos: Path) -> None:
    """Probing: the frame right after the context does not see a changed sample, the one before
    may; all frames further away are the same to the bit."""
    for name in ("oobleck:REPOS/oobleck", "dac:REPOS/dac-44k", "same:REPOS/same"):
        model = load(name.replace("REPOS", str(tiny_repos)))
        assert model.spec.context is not None
        (context, right), hop = model.spec.context, model.spec.hop
        assert context == right
        x = noise(model, 6 * context, batch=1)
        changed = x.clone()
        middle = 3 * context
        changed[..., middle * hop : (middle + 1) * hop] += 1
        moved = (model.encode(x) != model.encode(changed)).any(dim=1)[0].nonzero().flatten()
        assert middle - context <= int(moved.min()) <= middle - context + 2
        assert middle + context - 2 <= int(moved.max()) <= middle + context


def test_encodec_24k_and_mimi_are_causal(tiny_repos: Path) -> None:
    for name in ("encodec:REPOS/encodec-24k", "mimi:REPOS/mimi"):
        model = load(name.replace("REPOS", str(tiny_repos)))
        x = noise(model, 40, batch=1)
        half = model.encode(x[..., : 20 * model.spec.hop])
        assert torch.allclose(model.encode(x)[..., :20], half, atol=1e-5)


def test_encodec_48k_keeps_the_loudness(tiny_repos: Path) -> None:
    model = load(f"encodec:{tiny_repos / 'encodec-48k'}")
    assert model.spec.latent_channels == 9
    x = noise(model, 150)
    z, quiet = model.encode(x), model.encode(0.01 * x)
    assert torch.allclose(quiet[:, :-1], z[:, :-1], atol=1e-4)
    assert torch.allclose(quiet[:, -1], 0.01 * z[:, -1])
    assert z[0, -1].unique().item() == pytest.approx(float(x[0].mean(0).square().mean() ** 0.5))
    loud = model.decode(z, x.shape[-1])
    assert torch.allclose(model.decode(quiet, x.shape[-1]), 0.01 * loud, atol=1e-6)
    assert not model.decode(model.encode(0 * x), x.shape[-1]).abs().max() > 1e-6


def test_encodec_48k_has_native_chunks(tiny_repos: Path) -> None:
    """With `stitch: none` and the model's overlap, chunks and audio are the package's."""
    repo = tiny_repos / "encodec-48k"
    theirs = package_model(repo)
    model = load(f"encodec:{repo}", quantise=True)
    assert model.spec.samples(model.spec.chunk_frames) == theirs.config.chunk_length
    chunking = Chunking.for_model(model.spec, stitch="none", overlap=0.01)
    assert chunking.step == theirs.config.chunk_stride
    samples = chunking.samples + 2 * chunking.step
    x = noise(model, 500, batch=1)[..., :samples]
    chunks = encode_chunked(model, x[0], chunking)
    assert chunks.shape == (3, 9, 150)
    with torch.inference_mode():
        given = theirs.encode(x, bandwidth=1.2)
    codes = [theirs.quantizer.encode(chunk[None, :-1], 1.2) for chunk in chunks]
    assert torch.equal(torch.stack(codes).transpose(1, 2), given.audio_codes[:3])
    assert torch.allclose(chunks[:, -1, 0], torch.stack(given.audio_scales[:3]).flatten())
    audio = decode_latent(model, chunks.numpy(), samples, chunking)
    with torch.inference_mode():
        expected = theirs.decode(given.audio_codes[:3], given.audio_scales[:3]).audio_values[0]
    error = np.abs(audio - expected[:, :samples].numpy())
    faded = np.zeros(samples, bool)
    for index in (1, 2):
        faded[index * chunking.step : index * chunking.step + 480] = True
    assert error[:, ~faded].max() < 1e-5 < 1e-3 < audio.std()
    # Its fade goes from 1 / 481 to 480 / 481, ours from 0 to 1.
    assert error[:, faded].max() < 0.01 * np.abs(audio).max()


@pytest.mark.parametrize("rest", [19_999, 320])
def test_the_last_native_chunk_of_encodec_48k_is_as_short_as_it_is(
    tiny_repos: Path, rest: int
) -> None:
    """Loudness over its own samples, and frames that zeros behind it have not touched."""
    repo = tiny_repos / "encodec-48k"
    theirs = package_model(repo)
    model = load(f"encodec:{repo}")
    chunking = Chunking.for_model(model.spec, stitch="none", overlap=0.01)
    samples = chunking.samples + rest
    x = noise(model, 500, batch=1)[..., :samples]
    chunks = encode_chunked(model, x[0], chunking)
    assert chunks.shape == (2, 9, 150)
    last = x[..., chunking.step :]
    scale = last.mean(dim=1).square().mean() ** 0.5 + 1e-8
    with torch.inference_mode():
        expected = theirs.encoder(last / scale)[0]
    frames = expected.shape[1]
    assert frames == -(-last.shape[-1] // model.spec.hop)
    assert torch.allclose(chunks[1, :-1, :frames], expected, atol=1e-5)
    assert torch.allclose(chunks[1, -1, :frames], scale)
    assert not chunks[1, :, frames:].any()
    statistics = ChannelStatistics.of(chunks.numpy())
    true = np.concatenate([chunks[0].numpy(), chunks[1, :, :frames].numpy()], axis=1).astype(float)
    assert statistics.frames == true.shape[1] == 150 + frames
    assert np.allclose(statistics.mean, true.mean(axis=1), rtol=1e-9)
    assert np.allclose(statistics.std, true.std(axis=1), rtol=1e-9)
    with torch.inference_mode():
        decoded = theirs.decoder(expected[None])[0, :, : last.shape[-1]] * scale
    for batch_size in (1, 4):
        audio = decode_latent(model, chunks.numpy(), samples, chunking, batch_size=batch_size)
        assert audio.shape == (2, samples)
        end = rest  # what no other chunk has
        assert np.allclose(audio[:, -end:], decoded[:, -end:].numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["encodec-24k", "mimi"])
def test_padding_lengths_stay_on_the_cpu(tiny_repos: Path, name: str) -> None:
    """On a GPU each would be waited for in every call; here the meta device stands for one."""
    theirs = package_model(tiny_repos / name)
    before = {n: b for n, b in theirs.named_buffers() if n.rpartition(".")[2] in LENGTHS}
    assert len(before) > 30
    move(theirs, torch.device("meta"))
    assert next(theirs.parameters()).is_meta
    after = dict(theirs.named_buffers())
    assert all(torch.equal(after[n], b) for n, b in before.items())


def test_music2latent_is_the_package_s(tiny_repos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from music2latent import inference

    monkeypatch.setattr(inference, "download_model", lambda: None)
    file = tiny_repos / "music2latent" / "music2latent.pt"
    theirs = inference.EncoderDecoder(str(file), device=torch.device("cpu"))
    model = load("music2latent", repo=str(file))
    assert model.spec.scale_factor == pytest.approx(1 / 0.06)
    x = noise(model, 12)
    with exact_attention():  # the package leaves torch's inference path on, which rounds otherwise
        expected = theirs.encode(x[:, 0], max_batch_size=2)
    assert (model.encode(x) - expected).norm() < 1e-5 * expected.norm()
    longer = torch.cat((x, x[..., :2048]), dim=-1)
    assert theirs.encode(longer[:, 0], max_batch_size=2).shape[-1] == 12  # cut to whole frames
    assert model.encode(longer).shape[-1] == 13

    z = model.encode(x)
    drawn = model._noise(12, 5, [0, 3])[:, 0]  # type: ignore[attr-defined]
    monkeypatch.setattr(torch, "randn", lambda *_: drawn)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    expected = theirs.decode(z, max_batch_size=2)
    ours = model.decode(z, x.shape[-1], seed=5, positions=[0, 3])
    assert torch.allclose(ours[:, 0], expected, atol=1e-4)
    assert ours.std() > 1e-3


def test_a_checkpoint_of_another_music2latent_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "music2latent.pt"
    for content in ({"gen_state_dict": {"x": torch.zeros(2)}}, {"state": {}}):
        torch.save(content, path)
        with pytest.raises(ModelError, match="does not load"):
            load("music2latent", repo=str(path))
