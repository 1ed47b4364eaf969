"""Log-mel spectrograms for autoencoders that encode them, and packing of their latents."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

FLOOR = 1e-5  # magnitudes below it are raised to it before the logarithm


class LogMel:
    """Natural logarithm of the magnitudes in mel bands from 0 Hz to half the sample rate.

    Bands are those of librosa's defaults (Slaney's scale and normalisation), windows are Hann
    windows of `n_fft` samples. `pad` samples are mirrored at both ends: `n_fft // 2` centres
    window n on sample n * hop, and `(n_fft - hop) // 2` on the middle of hop n.
    """

    def __init__(
        self, sample_rate: int, bins: int, *, n_fft: int, hop: int, pad: int, device: torch.device
    ) -> None:
        self._bands = torch.from_numpy(mel_bands(sample_rate, n_fft, bins)).to(device)
        self._window = torch.hann_window(n_fft, device=device)
        self._n_fft, self._hop, self._pad = n_fft, hop, pad

    def __call__(self, audio: Tensor) -> Tensor:
        """Return `[B, C, frames, bins]` of audio `[B, C, T]`; autocast does not affect it."""
        with torch.autocast(audio.device.type, enabled=False):
            padded = F.pad(audio.float(), (self._pad, self._pad), mode="reflect")
            spectrum = torch.stft(
                padded.flatten(0, 1),
                self._n_fft,
                hop_length=self._hop,
                window=self._window,
                center=False,
                return_complex=True,
            )
            mel = torch.log(torch.clamp(self._bands @ spectrum.abs(), min=FLOOR))
        return mel.transpose(1, 2).reshape(*audio.shape[:2], -1, self._bands.shape[0])


def mel_bands(sample_rate: int, n_fft: int, bins: int) -> npt.NDArray[np.float32]:
    """Weights `[bins, n_fft // 2 + 1]`, float32, of triangular bands on Slaney's mel scale.

    The scale is linear up to 1000 Hz (15 mel) and logarithmic above: 27 mel are a factor of 6.4.
    Each band is divided by half its width in Hz.
    """
    top = sample_rate / 2
    top_mel = top * 3 / 200 if top < 1000 else 15 + 27 * np.log(top / 1000) / np.log(6.4)
    mels = np.linspace(0, top_mel, bins + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(np.log(6.4) / 27 * (mels - 15)))
    frequencies = np.linspace(0, top, n_fft // 2 + 1)
    below, centre, above = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (frequencies - below) / (centre - below)
    falling = (above - frequencies) / (above - centre)
    bands = np.maximum(0, np.minimum(rising, falling)) * 2 / (above - below)
    return np.asarray(bands, np.float32)


def pack(latents: Tensor) -> Tensor:
    """Pack channels and mel bins of `[B, C, Z, M]` as the rows of `[B, C * M, Z]`."""
    return latents.transpose(2, 3).flatten(1, 2)


def unpack(latents: Tensor, bins: int) -> Tensor:
    """Undo `pack`."""
    batch, rows, frames = latents.shape
    return latents.reshape(batch, rows // bins, bins, frames).transpose(2, 3)
