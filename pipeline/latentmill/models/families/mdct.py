"""The built-in model `mdct`: a linear and invertible transform without weights.

The modified discrete cosine transform of N = `hop` coefficients over frames of 2N samples,

    X[k] = sqrt(2/N) * sum_n w[n] x[n] cos(pi/N (n + 1/2 + N/2) (k + 1/2)),

with the sine window w[n] = sin(pi/(2N) (n + 1/2)). Because w[n]^2 + w[n+N]^2 = 1, the aliasing of
neighbouring frames cancels and the transform is orthonormal: J. Princen, A. Johnson, A. Bradley,
"Subband/Transform Coding Using Filter Bank Designs Based on Time Domain Aliasing Cancellation",
ICASSP 1987.

A frame [a, b, c, d] of four blocks of N/2 samples folds to [-c_r - d, a - b_r] (`_r`: reversed in
time). X is the type-IV cosine transform of that; it is its own inverse and is computed by a complex
FFT of N/2 points between two multiplications with the same twiddle factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from latentmill.errors import ModelError
from latentmill.models.base import Context, ModelSpec
from latentmill.models.checks import check_device
from latentmill.models.families.codec import Codec, check_scale_factor

CHUNK_SECONDS = 8.0
CONTEXT = 1  # the first and the last frame of a chunk overlap samples outside it


@dataclass(frozen=True)
class MdctHandle:
    """The model `mdct`; loading it computes its window."""

    spec: ModelSpec

    def load(self, device: str) -> Codec:
        chosen = check_device(self.spec.name, device)
        return Codec(self.spec, Mdct(self.spec.hop, chosen), chosen)


class Mdct:
    """The transform on one device, as a `Network`."""

    def __init__(self, hop: int, device: torch.device) -> None:
        self._hop = hop
        phase = (
            math.pi / (2 * hop) * (torch.arange(2 * hop, dtype=torch.float64, device="cpu") + 0.5)
        )
        self._window = torch.sin(phase).float().to(device)  # [2 * hop]
        # sqrt(2/N) is split evenly between the multiplication before and after the FFT.
        angle = -math.pi / hop * (torch.arange(hop // 2, dtype=torch.float64, device="cpu") + 0.125)
        twiddle = torch.polar(torch.full_like(angle, (2 / hop) ** 0.25), angle)
        self._twiddle = twiddle.to(torch.complex64).to(device)  # [hop / 2]

    def encode(self, audio: Tensor) -> Tensor:
        """Transform audio `[B, C, T]` to `[B, C * hop, T / hop + 1]`."""
        batch, channels, _ = audio.shape
        hop = self._hop
        padded = F.pad(audio, (hop, hop))
        blocks = padded.reshape(batch, channels, -1, hop)  # [B, C, Z + 1, hop]
        a, b = (blocks[..., :-1, :] * self._window[:hop]).chunk(2, dim=-1)
        c, d = (blocks[..., 1:, :] * self._window[hop:]).chunk(2, dim=-1)
        folded = torch.cat((-c.flip(-1) - d, a - b.flip(-1)), dim=-1)
        coefficients = self._cosine4(folded)  # [B, C, Z, hop]
        return coefficients.transpose(2, 3).reshape(batch, channels * hop, -1)

    def decode(self, latents: Tensor) -> Tensor:
        """Invert the transform, to `[B, C, (Z - 1) * hop]`."""
        batch, _, frames = latents.shape
        hop = self._hop
        coefficients = latents.reshape(batch, -1, hop, frames).transpose(2, 3)
        folded = self._cosine4(coefficients)  # [B, C, Z, hop]
        p, q = folded.chunk(2, dim=-1)
        rising = torch.cat((q, -q.flip(-1)), dim=-1) * self._window[:hop]
        falling = torch.cat((-p.flip(-1), -p), dim=-1) * self._window[hop:]
        return (rising[..., 1:, :] + falling[..., :-1, :]).flatten(-2)

    def _cosine4(self, blocks: Tensor) -> Tensor:
        """Orthonormal type-IV cosine transform of the last dimension, N points."""
        pairs = torch.complex(blocks[..., 0::2], blocks.flip(-1)[..., 0::2])  # [..., N / 2]
        spectrum = torch.fft.fft(pairs * self._twiddle) * self._twiddle
        return torch.stack((spectrum.real, -spectrum.imag.flip(-1)), dim=-1).flatten(-2)


def build(
    *, hop: int = 512, sample_rate: int = 44100, channels: int = 1, scale_factor: float = 1.0
) -> MdctHandle:
    """Make the model's handle.

    `hop` is the number of samples per frame and of coefficients per channel. It must be even. The
    latent has `channels * hop` channels; its coefficients are multiplied by `scale_factor`.
    """
    if hop < 2 or hop % 2:
        raise ModelError(f"Model mdct: option hop must be even and at least 2, not {hop}.")
    if sample_rate < 1 or channels < 1:
        raise ModelError("Model mdct: options sample_rate and channels must be at least 1.")
    scale = check_scale_factor("mdct", scale_factor)
    spec = ModelSpec(
        name="mdct",
        sample_rate=sample_rate,
        channels=channels,
        latent_channels=channels * hop,
        hop=hop,
        overhang=-hop,
        sample_multiple=hop,
        min_samples=hop,
        context=Context(CONTEXT, CONTEXT),
        stitch="trim",
        chunk_frames=max(4 * CONTEXT, round(CHUNK_SECONDS * sample_rate / hop)),
        overlap_frames=2 * CONTEXT,
        batch_size={"cpu": 1, "cuda": 64},  # on a CPU one chunk already fills the cache
        scale_factor=scale,
        stochastic_decoder=False,
        identity={
            "transform": "mdct",
            "version": 1,
            "window": "sine",
            "hop": hop,
            "sample_rate": sample_rate,
            "channels": channels,
            "scale_factor": scale,
        },
    )
    return MdctHandle(spec)
