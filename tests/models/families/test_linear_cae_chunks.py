"""`stitch: none` against the linear-cae package's own chunks and overlap-add."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import linear_cae
import numpy as np
import pytest
import torch

from latentmill.decoding.decoder import decode_latent
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.single import encode_chunked
from latentmill.errors import ConfigError
from latentmill.models.families.linear_cae.model import LinearCae
from latentmill.models.registry import resolve
from support.exact_attention import exact_attention

CHUNK = 15_000  # 29 blocks of 512 samples and 152 more, as 441,000 has 168 more


@pytest.fixture(scope="module")
def model(tiny_cache: Path) -> LinearCae:
    return resolve("lin-cae").load("cpu")  # type: ignore[return-value]


@pytest.fixture(scope="module")
def theirs(tiny_cache: Path) -> Any:
    return linear_cae.Autoencoder.from_pretrained(
        "lin-cae", max_chunk_size=CHUNK, max_batch_size=16
    )


def noise(samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(1, samples, generator=torch.Generator().manual_seed(0))


def chunking_of(model: LinearCae, overlap: float) -> Chunking:
    return Chunking.for_model(model.spec, stitch="none", samples=CHUNK, overlap=overlap)


# Around one chunk, and where the last chunk begins and ends.
LENGTHS = [CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 11_250, CHUNK + 11_251, 3 * CHUNK + 77]
CASES = [*((samples, 0.25) for samples in LENGTHS), (40_000, 0.3333), (40_000, 0.0), (40_000, 0.5)]


@pytest.mark.parametrize(("samples", "overlap"), CASES)
def test_chunks_and_audio_are_the_package_s(
    model: LinearCae,
    theirs: Any,
    monkeypatch: pytest.MonkeyPatch,
    samples: int,
    overlap: float,
) -> None:
    monkeypatch.setattr(theirs, "overlap_percentage", overlap)
    chunking = chunking_of(model, overlap)
    x = noise(samples)
    ours = encode_chunked(model, x, chunking)  # [N, D, Z]
    with torch.inference_mode(), exact_attention():
        expected = theirs.encode(x)  # [1, N, D, Z], or [1, D, Z] of a single chunk
    expected = expected if expected.ndim == 4 else expected[:, None]
    assert ours.shape == expected.shape[1:]
    assert torch.allclose(ours, expected[0], rtol=1e-5, atol=1e-4)  # scaled by 33
    assert expected.std() > 1

    positions = [n * chunking.step // model.spec.hop for n in range(len(ours))]
    drawn = model._noise(ours.shape[-1], 5, positions)[:, 0]
    monkeypatch.setattr(torch, "randn", lambda *_, **__: drawn)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # drawn, but not used, at the end
    given = expected if len(ours) > 1 else expected[:, 0]
    with torch.inference_mode(), exact_attention():
        wanted = theirs.decode(given.clone(), full_length=samples)[0].numpy()
    decoded = decode_latent(model, ours.numpy(), samples, chunking, seed=5)[0]
    assert decoded.shape == (samples,)
    assert wanted.shape == (samples,)
    assert np.abs(decoded - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.abs(wanted).max() > 1e-3


@pytest.mark.parametrize("samples", [2048, 2048 + 512, 14_848])
def test_an_item_of_less_than_a_chunk_is_the_package_s(
    model: LinearCae, theirs: Any, samples: int
) -> None:
    x = noise(samples)
    ours = encode_chunked(model, x, chunking_of(model, 0.25))
    with torch.inference_mode(), exact_attention():
        # Not to the bit: for one or two STFT frames PyTorch may choose another convolution, by the
        # strides that a tensor of size 1 happens to have.
        assert (ours - theirs.encode(x)).abs().max() < 1e-5 * ours.abs().max()


def test_the_end_of_such_an_item_is_kept_where_the_package_drops_it(
    model: LinearCae, theirs: Any
) -> None:
    """All of its samples come back; the package gives 511 fewer."""
    samples = 2048 + 7 * 512 + 511
    x = noise(samples)
    chunking = chunking_of(model, 0.25)
    ours = encode_chunked(model, x, chunking)
    with torch.inference_mode(), exact_attention():
        assert torch.equal(ours, theirs.encode(torch.nn.functional.pad(x, (0, 1))))
        assert theirs.decode(theirs.encode(x), full_length=samples).shape[-1] == samples - 511
    assert decode_latent(model, ours.numpy(), samples, chunking).shape == (1, samples)


def test_a_chunk_that_drifts_in_the_package_is_refused_here(
    model: LinearCae, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package itself gives shorter audio than it was given."""
    monkeypatch.setattr(theirs, "max_chunk_size", 47_103)
    samples = 47_103 + 2 * (47_103 - int(47_103 * 0.25))
    x = noise(samples)
    with torch.inference_mode(), exact_attention():
        decoded = theirs.decode(theirs.encode(x), full_length=samples)
    assert decoded.shape[-1] == samples - 511 - 2 * 384
    with pytest.raises(ConfigError, match="47104"):
        Chunking.for_model(model.spec, stitch="none", samples=47_103)


@pytest.mark.parametrize("fewer", [1, 11_250 + 9, 11_250 + 3_750, 2 * 11_250 + 1_000])
def test_a_shorter_decode_is_the_beginning_of_the_whole(model: LinearCae, fewer: int) -> None:
    """Also where it ends within an overlap: the fade keeps its length."""
    samples, chunking = 3 * CHUNK, chunking_of(model, 0.25)
    latent = encode_chunked(model, noise(samples), chunking).numpy()
    whole = decode_latent(model, latent, samples, chunking, seed=1)
    part = decode_latent(model, latent, fewer, chunking, seed=1)
    assert part.shape == (1, fewer)
    assert np.abs(part - whole[:, :fewer]).max() < 1e-5 * np.abs(whole).max()
