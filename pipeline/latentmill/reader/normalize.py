"""Normalisation by what dataset.json says of the latents: an explicit transform."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from latentmill.errors import ConfigError
from latentmill.reader.corpus import choice
from latentmill.reader.sample import Sample
from latentmill.store.store import LatentStore

By = Literal["channel", "overall", "scale"]


@dataclass(frozen=True)
class Normalize:
    """The transform (z - mean) / std, channel by channel. Put it after all that mixes.

    Latent arithmetic holds for latents as they are stored; a normalised latent has another origin.

    Attributes:
        mean: Of every channel.
        std: Of every channel, above zero.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ConfigError("Normalize needs a mean and a std above zero for every channel.")

    @classmethod
    def from_store(cls, store: LatentStore | str, by: By = "channel") -> Normalize:
        """What a store's dataset.json says.

        Args:
            store: The store, or its place.
            by: `channel`: mean and standard deviation of every channel; `overall`: those over all
                channels; `scale`: only the model's scale factor is taken out.

        Raises:
            ConfigError: Another `by`, or the store's channels do not vary (an empty store).
        """
        choice("by", by, By)
        opened = LatentStore(store) if isinstance(store, str) else store
        mean, std = opened.mean, opened.std
        if by == "overall":
            variance = float((std**2 + (mean - mean.mean()) ** 2).mean())
            mean = np.full_like(mean, mean.mean())
            std = np.full_like(std, np.sqrt(variance))
        elif by == "scale":
            mean = np.zeros_like(mean)
            std = np.full_like(std, float(opened.info.model["scale_factor"]))
        if not (std > 0).all():
            raise ConfigError(
                f"Channel {int(np.argmin(std))} of {opened.url} does not vary, so that it cannot "
                "be normalised by its deviation: take by='overall' or 'scale'."
            )
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Normalise a sample; nothing is random about it."""
        return replace(sample, latent=self.apply(sample.latent))

    def apply(self, latent: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        """Normalise latents `[..., channels, frames]`."""
        mean, std = self._columns(latent)
        return np.asarray((latent - mean) / std, np.float32)

    def undo(self, latent: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        """The stored form of normalised latents `[..., channels, frames]`, for decoding."""
        mean, std = self._columns(latent)
        return np.asarray(latent * std + mean, np.float32)

    def _columns(self, latent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
        if latent.shape[-2] != len(self.mean):
            raise ConfigError(
                f"Normalize is for {len(self.mean)} channels and the latent has "
                f"{latent.shape[-2]}: make it from the store that is read."
            )
        return (
            np.array(self.mean, np.float32)[:, None],
            np.array(self.std, np.float32)[:, None],
        )
