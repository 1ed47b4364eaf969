"""Distances between two sounds `[C, T]`, each computed for one item, never over a batch.

    SNR     10 log10(||t||^2 / ||p - t||^2)
    SI-SDR  SNR of p against g t, with the fitted gain g = <p, t> / <t, t>
            (J. Le Roux and others, "SDR - half-baked or well done?", ICASSP 2019)
    level   20 log10(g), which SI-SDR hides
    MR-STFT mean over three resolutions of the spectral convergence || |P| - |T| || / || |T| || and
            the mean absolute difference of log |P| and log |T|
            (R. Yamamoto and others, "Parallel WaveGAN", ICASSP 2020)
    log-mel mean absolute difference of two mel spectrograms in dB

All channels of a sound count as one vector. Decibels are limited to -200..200, because JSON has no
infinity. The convergence is a ratio, so its value over a batch is not the mean of those of its
items; auraloss 0.4 computes it over the batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Spectrum = Callable[[Tensor, int, int, int], Tensor]

LIMIT_DB = 200.0
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))  # FFT, hop, window
MEL_FFT, MEL_HOP, MEL_BANDS = 2048, 512, 80
_LEAST_POWER = 1e-8  # of a bin, as in auraloss: -80 dB of an amplitude of 1
_LEAST_MEL = 1e-5


def snr(given: Tensor, target: Tensor) -> float:
    """Signal-to-noise ratio in dB."""
    given, target = given.double(), target.double()
    return _decibels(_energy(target), _energy(given - target))


def si_sdr(given: Tensor, target: Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio in dB."""
    given, target = given.double(), target.double()
    scaled = _fitted_gain(given, target) * target
    return _decibels(_energy(scaled), _energy(given - scaled))


def level(given: Tensor, target: Tensor) -> float:
    """Level error in dB: the fitted gain; -200 if it is not positive."""
    gain = _fitted_gain(given.double(), target.double())
    return max(-LIMIT_DB, 20 * math.log10(gain)) if gain > 0 else -LIMIT_DB


def mr_stft(
    given: Tensor,
    target: Tensor,
    dtype: torch.dtype = torch.float32,
    spectrum: Spectrum | None = None,
) -> float:
    """Multi-resolution STFT distance.

    float32 takes a quarter of the time of float64, and has as many digits as the sounds. `spectrum`
    is `magnitude` by default, or a function that remembers its results.
    """
    total, spectrum = 0.0, spectrum or magnitude
    for fft, hop, window in RESOLUTIONS:
        p, t = (spectrum(s.to(dtype), fft, hop, window) for s in (given, target))
        convergence = _energy(p - t) ** 0.5 / _energy(t) ** 0.5
        total += convergence + float((p / t).log_().abs_().mean(dtype=torch.float64))
    return total / len(RESOLUTIONS)


def log_mel(given: Tensor, target: Tensor, rate: int) -> float:
    """Log-mel distance in dB: 80 bands, FFT of 2048, hop 512, at least -100 dB."""
    bands = mel_bands(rate).float()
    levels = [
        20
        * (bands @ magnitude(sound.float(), MEL_FFT, MEL_HOP, MEL_FFT))
        .clamp(min=_LEAST_MEL)
        .log10()
        for sound in (given, target)
    ]
    return float((levels[0] - levels[1]).abs().mean(dtype=torch.float64))


@functools.cache
def mel_bands(rate: int) -> Tensor:
    """Triangular filters `[80, bins]` of height 1, evenly spaced on the mel scale up to rate / 2.

    mel = 2595 log10(1 + f / 700).
    """
    highest = 2595 * math.log10(1 + rate / 2 / 700)
    mels = torch.linspace(0, highest, MEL_BANDS + 2, dtype=torch.float64, device="cpu")
    edges = 700 * (10 ** (mels / 2595) - 1)
    bins = torch.linspace(0, rate / 2, MEL_FFT // 2 + 1, dtype=torch.float64, device="cpu")
    low, middle, high = (edges[n : n + MEL_BANDS, None] for n in range(3))
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0)


def measures_of(
    rate: int, spectrum: Spectrum | None = None
) -> dict[str, Callable[[Tensor, Tensor], float]]:
    """All measures by name, for sounds of this sample rate; `spectrum` as in `mr_stft`."""
    return {
        "snr": snr,
        "si_sdr": si_sdr,
        "level": level,
        "mr_stft": functools.partial(mr_stft, spectrum=spectrum),
        "log_mel": functools.partial(log_mel, rate=rate),
    }


def rms(sound: Tensor) -> float:
    """Root mean square over all channels."""
    return float(sound.double().square().mean().sqrt())


def magnitude(sound: Tensor, fft: int, hop: int, window: int) -> Tensor:
    """STFT magnitudes `[C, bins, frames]`, with a Hann window; short sounds are padded."""
    sound = F.pad(sound.cpu(), (0, max(0, fft - sound.shape[-1])))
    weights = torch.hann_window(window, dtype=sound.dtype)
    spectrum = torch.stft(sound, fft, hop, window, weights, return_complex=True)
    power = torch.view_as_real(spectrum).square_().sum(dim=-1)
    return power.clamp_(min=_LEAST_POWER).sqrt_()


def _energy(sound: Tensor) -> float:
    return float(sound.square().sum(dtype=torch.float64))


def _fitted_gain(given: Tensor, target: Tensor) -> float:
    energy = _energy(target)
    return float((given * target).sum()) / energy if energy else 0.0


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return LIMIT_DB if signal else 0.0
    if signal == 0:
        return -LIMIT_DB
    return min(LIMIT_DB, max(-LIMIT_DB, 10 * math.log10(signal / noise)))
