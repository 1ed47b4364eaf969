"""Causal models that continue from a state: equal to encoding the whole item, whatever the chunks.

The reference is the package's own encoder on the whole item.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from latentmill.decoding.decoder import decode_latent
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.single import encode_chunked, encode_whole
from latentmill.errors import ConfigError, ModelError
from latentmill.models.base import Channels, StatefulAutoencoder
from latentmill.models.inference.precision import numeric_mode
from latentmill.models.registry import resolve
from support.tiny_models import write_encodec, write_mimi, write_pockettts, write_vibevoice

# Small hops and windows, so that items of many chunks are short. In a published model the layers of
# the transformer are scaled down; here they count.
SMALL: dict[str, Any] = {
    "upsampling_ratios": [3, 2],
    "sliding_window": 11,
    "layer_scale_initial_scale": 0.7,
}
MIMI = {**SMALL, "frame_rate": 1000}  # a stride of 4 after the transformer
ENCODEC = {"upsampling_ratios": [3, 2, 2], "target_bandwidths": [24.0]}
MODELS: dict[str, dict[str, Any]] = {
    "mimi": MIMI,
    "mimi-shortcut": {**MIMI, "use_conv_shortcut": True, "pad_mode": "replicate"},
    "pockettts": {**SMALL, "latent_stride": 4},
    "vibevoice": {},
    "encodec": ENCODEC,
    "encodec-zeros": {**ENCODEC, "pad_mode": "constant"},
}
WRITE = {
    "mimi": write_mimi,
    "pockettts": write_pockettts,
    "vibevoice": write_vibevoice,
    "encodec": write_encodec,
}


@pytest.fixture(scope="module", params=MODELS)
def repo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streaming") / request.param
    WRITE[request.param.partition("-")[0]](folder, **MODELS[request.param])
    return folder


def load(repo: Path, channels: Channels | None = None, **options: Any) -> StatefulAutoencoder:
    name = f"{repo.name.partition('-')[0]}:{repo}"
    return cast(StatefulAutoencoder, resolve(name, options, channels).load("cpu"))


@pytest.fixture(scope="module")
def model(repo: Path) -> StatefulAutoencoder:
    return load(repo)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@settings(max_examples=8)
@given(st.data())
def test_any_batches_of_next_chunks_are_the_whole_items(
    model: StatefulAutoencoder, data: st.DataObject
) -> None:
    """Items of any lengths in chunks of one length; each batch has the next chunks of any items."""
    hop, least = model.spec.hop, model.spec.step_frames
    size = data.draw(st.integers(least, 20), label="frames of a chunk")
    frames = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=3), label="frames")
    items = [noise(1, hop * count, seed=seed) for seed, count in enumerate(frames)]
    latents: list[list[torch.Tensor]] = [[] for _ in items]
    states: list[Any] = [None] * len(items)
    taken = [0] * len(items)
    while left := [n for n, count in enumerate(frames) if taken[n] < count]:
        lengths = {n: min(size, frames[n] - taken[n]) for n in left}
        length = data.draw(st.sampled_from(sorted(set(lengths.values()))), label="length")
        ready = [n for n in left if lengths[n] == length]
        batch = data.draw(st.permutations(ready).map(lambda a: a[: 1 + len(a) // 2]), label="batch")
        audio = [items[n][:, hop * taken[n] : hop * (taken[n] + length)] for n in batch]
        encoded, after = model.encode_step(torch.stack(audio), [states[n] for n in batch])
        for n, latent, state in zip(batch, encoded, after, strict=True):
            latents[n].append(latent)
            states[n], taken[n] = state, taken[n] + length
    for item, chunks in zip(items, latents, strict=True):
        assert error(torch.cat(chunks, dim=1), model.encode(item[None])[0]) < 1e-5


def test_the_package_streams_to_the_same_latents(repo: Path, model: StatefulAutoencoder) -> None:
    """Its own caches, for one item; EnCodec has none."""
    from transformers import AutoModel

    if repo.name.startswith("encodec"):
        pytest.skip("transformers has no streaming for EnCodec")
    if repo.name == "mimi-shortcut":
        pytest.skip("transformers cannot stream with use_conv_shortcut")
    theirs = AutoModel.from_pretrained(repo).eval()
    hop, state, cache = model.spec.hop, None, {}
    audio = noise(1, 1, 30 * hop)
    for chunk in audio.split(7 * hop, dim=-1):
        with torch.inference_mode():
            if repo.name == "vibevoice":
                given = theirs.encode(chunk, sample=False, use_cache=True, **cache)
                expected, cache = given.latents, {"padding_cache": given.padding_cache}
            else:
                given = theirs.encoder(chunk, use_streaming=True, **cache)
                expected = given.latents.transpose(1, 2)
                cache = {"padding_cache": given.padding_cache, "cache": given.cache}
        ours, (state,) = model.encode_step(chunk, [state])
        assert error(ours, expected.transpose(1, 2)) < 1e-5


def test_a_state_is_small_and_its_own(model: StatefulAutoencoder) -> None:
    """A row's state holds no memory of its batch, nor of the audio, and has a bounded size."""
    audio = noise(3, 1, 40 * model.spec.hop)
    _, states = model.encode_step(audio, [None] * 3)
    for _ in range(3):
        before = [tuple(value.clone() for value in state) for state in states]
        _, after = model.encode_step(audio, states)
        for old, state, new in zip(before, states, after, strict=True):
            assert [value.shape for value in new] == [value.shape for value in state]
            assert all(map(torch.equal, old, state))  # the states given stay as they are
            assert all(value.untyped_storage().nbytes() == value.nbytes for value in new)
            assert not any(value.requires_grad for value in new)
        states = after


def test_both_channels_of_split_have_a_state(repo: Path, model: StatefulAutoencoder) -> None:
    split = load(repo, "split")
    audio = noise(2, 2, 30 * model.spec.hop)
    first, states = split.encode_step(audio[..., : 20 * model.spec.hop], [None, None])
    second, _ = split.encode_step(audio[:1, :, 20 * model.spec.hop :], states[:1])
    whole = split.encode(audio)
    assert error(first, whole[..., :20]) < 1e-5
    assert error(second, whole[:1, :, 20:]) < 1e-5


@pytest.mark.parametrize("precision", ["bf16"])
def test_states_in_low_precision(model: StatefulAutoencoder, precision: Any) -> None:
    """Under autocast, and float32 may continue from such a state."""
    hop = model.spec.hop
    audio = noise(2, 1, 30 * hop)
    with numeric_mode(precision, "cpu"):
        whole = model.encode(audio)
        first, states = model.encode_step(audio[..., : 20 * hop], [None, None])
        second, _ = model.encode_step(audio[..., 20 * hop :], states)
    chunked = torch.cat((first, second), dim=-1)
    exact = model.encode(audio)
    assert (chunked - exact).norm() < 2 * (whole - exact).norm() + 1e-6
    assert all(value.dtype in (torch.float32, torch.int64) for state in states for value in state)
    continued, _ = model.encode_step(audio[..., 20 * hop :], states)
    assert (continued - exact[..., 20:]).norm() < 2 * (whole - exact).norm() + 1e-6


def test_codes_are_those_of_the_whole(repo: Path) -> None:
    if repo.name.partition("-")[0] not in ("mimi", "encodec"):
        pytest.skip("no quantiser")
    codes = load(repo, output="codes")
    audio = 50 * noise(1, 1, 40 * codes.spec.hop)
    chunks, state = [], None
    for chunk in audio.split(15 * codes.spec.hop, dim=-1):
        latent, (state,) = codes.encode_step(chunk, [state])
        chunks.append(latent)
    found, whole = torch.cat(chunks, dim=-1), codes.encode(audio)
    assert (found == whole).float().mean() > 0.99  # near a border a code may fall either way
    assert len(whole.unique()) > 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_kind_of_attention_gets_its_mask(tmp_path: Path, attention: str) -> None:
    write_mimi(tmp_path / "mimi", **MIMI)
    model: Any = load(tmp_path / "mimi")
    model._network._model.set_attn_implementation(attention)
    audio = noise(1, 1, 30 * model.spec.hop)
    first, states = model.encode_step(audio[..., : 20 * model.spec.hop], [None])
    second, _ = model.encode_step(audio[..., 20 * model.spec.hop :], states)
    assert error(torch.cat((first, second), dim=-1), model.encode(audio)) < 1e-5


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("mimi", {"pad_mode": "reflect"}),
        ("pockettts", {"pad_mode": "reflect"}),
        ("encodec", {"pad_mode": "circular"}),
        ("encodec", {"use_causal_conv": False}),
    ],
)
def test_models_that_cannot_continue_are_trimmed(
    tmp_path: Path, name: str, config: dict[str, Any]
) -> None:
    WRITE[name](tmp_path / name, **config)
    spec = resolve(f"{name}:{tmp_path / name}").spec
    assert (spec.stitch, spec.step_frames) == ("trim", 0)
    with pytest.raises(ConfigError, match="cannot continue from a state"):
        Chunking.for_model(spec, stitch="state")


def frames_ahead(model: Any) -> int:
    """Number of later frames whose audio changes a frame of EnCodec, by its gradient."""
    hop, frame = model.spec.hop, 20
    audio = noise(1, 1, 40 * hop).double().requires_grad_()
    model._network._model.encoder.double()(audio)[..., frame].sum().backward()
    model._network._model.encoder.float()
    assert audio.grad is not None
    return int(audio.grad.flatten().nonzero().max()) // hop - frame


@pytest.mark.parametrize(
    "config",
    [
        {"upsampling_ratios": [8, 5, 4, 4], "use_conv_shortcut": False},  # of encodec_32khz
        {"upsampling_ratios": [5, 3], "num_residual_layers": 2, "dilation_growth_rate": 3},
        {"upsampling_ratios": [2, 2, 2], "kernel_size": 8, "last_kernel_size": 4},
    ],
)
def test_chunks_of_encodec_that_is_not_causal_are_the_whole(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    """Its latents next to a seam, and the audio decoded from them window by window."""
    write_encodec(tmp_path / "encodec", use_causal_conv=False, **config)
    model = load(tmp_path / "encodec")
    spec = model.spec
    assert spec.context is not None
    assert spec.context.right == frames_ahead(model) > 0
    seconds = 2 * spec.overlap_frames * spec.hop / spec.sample_rate
    chunking = Chunking.for_model(spec, seconds=seconds)
    audio = noise(1, 8 * spec.overlap_frames * spec.hop)
    whole = encode_whole(model, audio)
    assert error(encode_chunked(model, audio, chunking), whole) < 1e-5
    decoded = decode_latent(model, whole.numpy(), audio.shape[1], chunking)
    in_one = model.decode(whole[None], audio.shape[1])[0]
    assert error(torch.from_numpy(decoded), in_one) < 1e-5


@pytest.mark.parametrize("name", ["mimi", "pockettts"])
def test_other_models_that_are_not_causal_are_refused(
    tmp_path: Path, name: str, one_sentence: Callable[[BaseException], str]
) -> None:
    WRITE[name](tmp_path / name, use_causal_conv=False)
    with pytest.raises(ModelError) as caught:
        resolve(f"{name}:{tmp_path / name}")
    assert "use hf:REPO" in one_sentence(caught.value)


def test_chunks_that_are_too_short_for_the_padding_are_refused(tmp_path: Path) -> None:
    """EnCodec's padding at an item's start is the reflection of its first six frames."""
    write_encodec(tmp_path / "encodec")
    spec = resolve(f"encodec:{tmp_path / 'encodec'}").spec
    assert Chunking.for_model(spec, stitch="state", samples=7 * spec.hop).step == 7 * spec.hop
    with pytest.raises(ConfigError, match=f"at least {7 * spec.hop} samples"):
        Chunking.for_model(spec, stitch="state", samples=6 * spec.hop)
    with pytest.raises(ConfigError, match="leave out --overlap, or use --stitch trim"):
        Chunking.for_model(spec, overlap=0.25)
    assert Chunking.for_model(spec, overlap=0).overlap == 0


def test_weights_are_those_of_the_repository(repo: Path, tmp_path: Path) -> None:
    """Another weight of the first convolution changes the latents of a continued chunk."""
    copy = Path(shutil.copytree(repo, tmp_path / repo.name))
    state = load_file(copy / "model.safetensors")
    name = next(n for n, value in state.items() if "encoder" in n and value.ndim == 3)
    state[name] = state[name] + 0.1
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    assert json.loads((copy / "config.json").read_text())
    audio = noise(1, 1, 30 * load(repo).spec.hop)
    results = []
    for one in (load(repo), load(copy)):
        _, states = one.encode_step(audio, [None])
        results.append(one.encode_step(audio, states)[0].numpy())
    assert not np.allclose(*results, rtol=1e-3)
