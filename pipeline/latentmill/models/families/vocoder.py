"""Vocoders, which turn the spectrograms that an autoencoder decodes into audio.

Only decoding needs one. Its files are found and loaded when the first latent is decoded, so
encoding works with repositories that have no vocoder and does not download it or keep it in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

import torch

from latentmill.errors import ModelError
from latentmill.models.families.diffusers_codec import STEMS
from latentmill.models.weights import (
    LOAD_ERRORS,
    ModelFiles,
    does_not_load,
    find,
    read_config,
    read_state,
)


def load_vocoder(
    name: str,
    autoencoder: ModelFiles,
    device: torch.device,
    make: Callable[[dict[str, Any]], Any],
    stems: Sequence[str] = STEMS,
) -> Any:
    """Load the vocoder in the folder `vocoder` beside the folder of the autoencoder.

    `make` builds it from its configuration; a `ValueError` of it says what does not fit.
    """
    folders = vocoder_folders(autoencoder)
    wanted = {
        "config": [f"{folder}config.json" for folder in folders],
        "weights": [f"{folder}{stem}" for folder in folders for stem in stems],
    }
    try:
        files = find(name, autoencoder.repo, wanted)
    except ModelError as error:
        raise ModelError(
            f"{str(error).rstrip('.')}, because decoding needs the vocoder (encoding does not)."
        ) from error
    config = read_config(name, files.paths["config"])
    state = read_state(name, files.paths["weights"])
    try:
        vocoder = make(config)
        vocoder.load_state_dict(state)
    except LOAD_ERRORS as error:
        raise does_not_load(name, files.paths["weights"], error) from error
    return vocoder.float().eval().requires_grad_(False).to(device)


def vocoder_folders(autoencoder: ModelFiles) -> list[str]:
    """Where the vocoder may be, relative to the repository.

    If the repository is a local path to the autoencoder's own folder, also beside that.
    """
    folder = PurePosixPath(autoencoder.names["config"]).parent
    beside = [f"{folder.parent / 'vocoder'}/"]
    if autoencoder.repo.local and not folder.name:
        beside.append("../vocoder/")
    return beside
