"""The metrics written out in numpy, without the library and without torch."""

from __future__ import annotations

import functools

import numpy as np


def snr(p: np.ndarray, t: np.ndarray, rate: int = 0) -> float:
    return 10 * np.log10(np.sum(t**2) / np.sum((p - t) ** 2))


def si_sdr(p: np.ndarray, t: np.ndarray, rate: int = 0) -> float:
    g = np.vdot(t, p) / np.vdot(t, t)
    return 10 * np.log10(np.sum((g * t) ** 2) / np.sum((p - g * t) ** 2))


def level(p: np.ndarray, t: np.ndarray, rate: int = 0) -> float:
    g = np.vdot(t, p) / np.vdot(t, t)
    return 20 * np.log10(g) if g > 0 else -200.0


def magnitudes(x: np.ndarray, fft: int, hop: int, window: int) -> np.ndarray:
    """`[C, frames, bins]`: frames centred on multiples of the hop, the edges mirrored."""
    x = np.pad(x, ((0, 0), (0, max(0, fft - x.shape[1]))))
    x = np.pad(x, ((0, 0), (fft // 2, fft // 2)), mode="reflect")
    hann = np.zeros(fft)
    begin = (fft - window) // 2
    hann[begin : begin + window] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    starts = range(0, x.shape[1] - fft + 1, hop)
    frames = np.stack([x[:, s : s + fft] * hann for s in starts], axis=1)
    power = np.abs(np.fft.rfft(frames)) ** 2
    return np.sqrt(np.maximum(power, 1e-8))


def mr_stft(p: np.ndarray, t: np.ndarray, rate: int = 0) -> float:
    values = []
    for fft, hop, window in ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240)):
        P, T = magnitudes(p, fft, hop, window), magnitudes(t, fft, hop, window)
        convergence = np.linalg.norm((P - T).ravel()) / np.linalg.norm(T.ravel())
        values.append(convergence + np.mean(np.abs(np.log(P) - np.log(T))))
    return float(np.mean(values))


@functools.cache
def mel_bands(rate: int) -> np.ndarray:
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = [700 * (10 ** (mel / 2595) - 1) for mel in np.linspace(0, top, 82)]
    bands = np.zeros((80, 1025))
    for band in range(80):
        low, middle, high = edges[band : band + 3]
        for k in range(1025):
            f = k * rate / 2048
            if low < f <= middle:
                bands[band, k] = (f - low) / (middle - low)
            elif middle < f < high:
                bands[band, k] = (high - f) / (high - middle)
    return bands


def log_mel(p: np.ndarray, t: np.ndarray, rate: int) -> float:
    bands = mel_bands(rate)
    P, T = (
        20 * np.log10(np.maximum(magnitudes(x, 2048, 512, 2048) @ bands.T, 1e-5)) for x in (p, t)
    )
    return float(np.mean(np.abs(P - T)))


METRICS = {"snr": snr, "si_sdr": si_sdr, "level": level, "mr_stft": mr_stft, "log_mel": log_mel}


def relative_l2(p: np.ndarray, t: np.ndarray, norm: np.ndarray) -> float:
    return float(np.linalg.norm(p - t) / np.linalg.norm(norm))
