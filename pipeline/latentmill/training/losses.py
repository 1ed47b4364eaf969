"""The reconstruction loss of deterministic autoencoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

RESOLUTIONS = ((1024, 256), (512, 128), (256, 64))  # FFT and window, hop
_LEAST = 1e-3  # magnitude under which a bin counts as silent


def reconstruction_loss(given: Tensor, target: Tensor) -> Tensor:
    """The distance of sounds `[N, C, T]`, averaged over N; finite and smooth for silence.

    The mean absolute difference of samples and, for three resolutions, the spectral convergence and
    the mean absolute difference of log magnitudes (R. Yamamoto and others, "Parallel WaveGAN",
    ICASSP 2020), each per sound and then averaged.
    """
    total: Tensor
    with torch.autocast(given.device.type, enabled=False):
        given, target = given.float(), target.float()
        total = (given - target).abs().mean()
        for window, hop in RESOLUTIONS:
            p, t = _magnitudes(given, window, hop), _magnitudes(target, window, hop)
            size = t.flatten(1).norm(dim=1).clamp(min=_LEAST * t[0].numel() ** 0.5)
            convergence = (p - t).flatten(1).norm(dim=1) / size
            logarithmic = (p.log() - t.log()).abs().mean()
            total = total + (convergence.mean() + logarithmic) / len(RESOLUTIONS)
        return total


def _magnitudes(sounds: Tensor, window: int, hop: int) -> Tensor:
    """STFT magnitudes `[N, C, bins, frames]`, at least `_LEAST`."""
    flat = F.pad(sounds.flatten(0, 1), (0, max(0, window - sounds.shape[-1])))
    weights = torch.hann_window(window, device=sounds.device)
    spectrum = torch.stft(flat, window, hop, window=weights, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    magnitudes = power.clamp(min=_LEAST**2).sqrt()
    return magnitudes.reshape(*sounds.shape[:2], *magnitudes.shape[1:])
