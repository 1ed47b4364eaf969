"""Latents in a notebook: pictures, and a player if the audio is available."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import numpy.typing as npt

from latentmill.pictures.drawing import Picture, heat_map, waveform

MAX_VALUES = 1 << 24  # of a latent that are drawn: a picture appears at once
KBPS = 96


def latent_html(
    latent: npt.NDArray[Any],
    level_db: npt.NDArray[np.float32] | None,
    sound: tuple[npt.NDArray[Any], int] | None,
) -> str:
    """Pictures of the start of a latent and of its level in dBFS, and a player of `sound`.

    `sound` is audio and its rate.
    """
    frames = max(
        1, MAX_VALUES // max(1, latent.shape[-2] * (len(latent) if latent.ndim > 2 else 1))
    )
    parts = []
    if level_db is not None:
        envelope = 10 ** (level_db / 20)
        parts.append(_image(waveform(envelope[None] * [[1], [-1]], height=48), "Level"))
    if latent.size:
        parts.append(_image(heat_map(latent[..., :frames]), "Latent"))
    if sound is not None and sound[0].size:
        from latentmill.pictures.opus import opus, opus_uri

        uri = opus_uri(opus(*sound, kbps=KBPS))
        parts.append(f"<audio controls src='{uri}' style='width:100%;max-width:640px'></audio>")
    return "".join(parts)


def _image(picture: Picture, name: str) -> str:
    text = html.escape(f"{name}: {picture.scale}")
    return (
        f"<img src='{picture.uri}' width='{picture.width}' height='{picture.height}' alt='{text}' "
        f"title='{text}' style='display:block;margin:2px 0;max-width:100%'>"
    )
