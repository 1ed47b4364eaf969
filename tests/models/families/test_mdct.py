"""The MDCT against its defining sum, and what makes it the default."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from latentmill.errors import ModelError
from latentmill.models.registry import resolve


def noise(channels: int, samples: int) -> torch.Tensor:
    return torch.randn(2, channels, samples, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("hop", [2, 6, 64, 512])
def test_is_the_sum_of_its_definition(hop: int) -> None:
    x = noise(1, 20 * hop)
    n = torch.arange(2 * hop, dtype=torch.float64)[:, None]
    k = torch.arange(hop, dtype=torch.float64)
    basis = math.sqrt(2 / hop) * torch.cos(math.pi / hop * (n + 0.5 + hop / 2) * (k + 0.5))
    basis = basis * torch.sin(math.pi / (2 * hop) * (n + 0.5))
    frames = torch.nn.functional.pad(x.double(), (hop, hop)).unfold(-1, 2 * hop, hop)
    expected = (frames @ basis)[:, 0].transpose(1, 2)  # [B, hop, Z]
    z = resolve("mdct", {"hop": hop, "scale_factor": 0.5}).load("cpu").encode(x)
    assert torch.allclose(z.double(), expected * 0.5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"channels": 2, "hop": 1024, "scale_factor": 7.0}])
def test_decoding_gives_the_audio_back(options: dict[str, Any]) -> None:
    model = resolve("mdct", options).load("cpu")
    x = noise(model.spec.channels, 100 * model.spec.hop)
    y = model.decode(model.encode(x), x.shape[-1])
    snr = 10 * torch.log10(x.square().sum() / (x - y).square().sum())
    assert snr > 100


def test_is_linear_and_orthonormal() -> None:
    model = resolve("mdct", {"channels": 2}).load("cpu")
    x, y = noise(2, 51200).split(1)
    z = model.encode(x)
    assert torch.allclose(model.encode(2 * x - y), 2 * z - model.encode(y), atol=1e-5)
    assert z.square().sum() / x.square().sum() == pytest.approx(1, abs=1e-5)
    assert not model.encode(torch.zeros_like(x)).any()


def test_channels_lie_one_after_the_other() -> None:
    x = noise(2, 5120)
    stereo = resolve("mdct", {"channels": 2}).load("cpu").encode(x)
    mono = resolve("mdct").load("cpu")
    assert torch.equal(stereo[:, :512], mono.encode(x[:, :1]))
    assert torch.equal(stereo[:, 512:], mono.encode(x[:, 1:]))


def test_trimmed_chunks_are_the_whole_to_the_bit() -> None:
    model = resolve("mdct").load("cpu")
    spec = model.spec
    x = noise(1, 60 * spec.hop)
    whole = model.encode(x)
    for start, frames in [(0, 20), (18, 21), (37, 24)]:
        chunk = model.encode(x[..., start * spec.hop :][..., : spec.samples(frames)])
        assert chunk.shape[-1] == frames
        assert torch.equal(chunk[..., 1:-1], whole[..., start + 1 : start + frames - 1])


@pytest.mark.parametrize(
    "options",
    [{"hop": 511}, {"hop": 0}, {"channels": 0}, {"sample_rate": 0}, {"scale_factor": math.nan}],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(options))):
        resolve("mdct", options)
