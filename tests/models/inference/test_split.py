"""A mono model on stereo audio: the channels do not know of each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latentmill.errors import ModelError
from latentmill.models.base import Autoencoder
from latentmill.models.registry import resolve


@pytest.fixture(scope="module", params=["mdct", "lin-cae"])
def name(request: pytest.FixtureRequest, tiny_cache: Path) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Autoencoder:
    return resolve(name, channels="split").load("cpu")


def stereo(batch: int = 2) -> torch.Tensor:
    """Noise, the right channel another and quieter one than the left."""
    generator = torch.Generator().manual_seed(0)
    gains = torch.tensor([[0.3], [0.05]])
    return gains * torch.randn(batch, 2, 20_480, generator=generator)


def test_each_channel_is_the_mono_model_s(name: str, model: Autoencoder) -> None:
    mono = resolve(name).load("cpu")
    x = stereo()
    z = model.encode(x)
    left, right = z.chunk(2, dim=1)
    for channel, half in enumerate((left, right)):
        alone = mono.encode(x[:, channel : channel + 1])
        assert torch.allclose(half, alone, rtol=1e-4, atol=1e-4)
        ours = model.decode(z, 20_000, seed=3, positions=[4, 9])[:, channel]
        theirs = mono.decode(half.contiguous(), 20_000, seed=3, positions=[4, 9])[:, 0]
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_mono_audio_on_both_sides_gives_two_equal_halves(model: Autoencoder) -> None:
    z = model.encode(stereo()[:, :1].repeat(1, 2, 1))
    left, right = z.chunk(2, dim=1)
    assert torch.allclose(left, right, rtol=1e-5, atol=1e-5)
    audio = model.decode(z, 20_000, seed=1)  # they share the noise, so that the middle stays
    assert torch.allclose(audio[:, 0], audio[:, 1], atol=1e-5)


def test_pan_and_width_are_linear() -> None:
    """Any matrix over the channels does the same to the halves of the latent."""
    model = resolve("mdct", channels="split").load("cpu")
    x = stereo()
    mid_side = torch.tensor([[0.5, 0.5], [0.5, -0.5]])
    width = mid_side.inverse() @ torch.diag(torch.tensor([1.0, 0.3])) @ mid_side
    pan = torch.diag(torch.tensor([0.2, 0.98]))
    for matrix in (mid_side, width, pan):
        halves = model.encode(x).unflatten(1, (2, -1))  # [B, 2, D, Z]
        wanted = torch.einsum("ij,bjdz->bidz", matrix, halves).flatten(1, 2)
        changed = torch.einsum("ij,bjt->bit", matrix, x)
        assert torch.allclose(model.encode(changed), wanted, atol=1e-5)
        assert torch.allclose(model.decode(wanted, x.shape[-1]), changed, atol=1e-5)


def test_split_mdct_is_the_one_of_two_channels() -> None:
    x = stereo()
    split = resolve("mdct", channels="split").load("cpu")
    both = resolve("mdct", {"channels": 2}).load("cpu")
    assert torch.allclose(split.encode(x), both.encode(x), atol=1e-6)


def test_only_mono_models_are_split(
    tiny_repos: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    assert resolve("mdct", channels="mono") == resolve("mdct")
    for channels in ("mono", "split"):
        with pytest.raises(ModelError) as caught:
            resolve(f"oobleck:{tiny_repos / 'oobleck'}", channels=channels)  # type: ignore[arg-type]
        assert f"leave out channels {channels}" in one_sentence(caught.value)


def test_a_batch_holds_as_much_audio_as_without_split(name: str) -> None:
    mono, split = resolve(name).spec, resolve(name, channels="split").spec
    assert split.batch_size["cuda"] == mono.batch_size["cuda"] // 2
    assert split.batch_size["cpu"] == 1


@pytest.mark.parametrize("family", ["kvae", "minimax", "longcat", "vibevoice"])
def test_all_means_come_before_all_deviations(tiny_repos: Path, family: str) -> None:
    """Readers take the last half of the rows for standard deviations."""
    name = f"{family}:{tiny_repos / family}"
    options = {} if family == "vibevoice" else {"posterior": "mean+std"}
    mono, split = (resolve(name, options, channels) for channels in (None, "split"))
    marked = {} if family == "vibevoice" else {"split_rows": "means first"}
    assert split.spec.identity == {**mono.spec.identity, "split": 2, **marked}
    alone, both = mono.load("cpu"), split.load("cpu")
    x = 0.5 * stereo()[..., : 4 * mono.spec.hop]
    channels = [alone.encode(x[:, n : n + 1]) for n in range(2)]
    parts = 2 if options else 1
    rows = zip(*(each.chunk(parts, dim=1) for each in channels), strict=True)
    expected = torch.cat([row for part in rows for row in part], dim=1)
    found = both.encode(x)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    decoded = [alone.decode(each, x.shape[-1]) for each in channels]
    assert torch.allclose(both.decode(found, x.shape[-1]), torch.cat(decoded, dim=1), atol=1e-5)
