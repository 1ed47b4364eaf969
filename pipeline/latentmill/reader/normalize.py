"""Normalisation of latents by the statistics in dataset.json, as a transform."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from latentmill.errors import ConfigError
from latentmill.reader.corpus import as_store, choice
from latentmill.reader.sample import Sample, check_has_origin
from latentmill.store.store import LatentStore

Latents = TypeVar("Latents", np.ndarray[Any, Any], torch.Tensor)
By = Literal["channel", "overall"]


@dataclass(frozen=True)
class Normalize:
    """The transform (z - mean) / std per channel. Apply it after all transforms that mix.

    Latent arithmetic holds for latents as they are stored; a normalised latent has another origin.
    For a posterior, the means are normalised and the standard deviations are divided by the same
    `std`, so drawing a latent before or after gives the same result.

    Attributes:
        mean: Mean of every channel; for a posterior, of the channels of means only.
        std: Standard deviation of the same channels, above zero.
        deviations: Number of channels of standard deviations that follow, until a latent is drawn.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    deviations: int = 0

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ConfigError("Normalize needs a mean and a std above zero for every channel.")

    @classmethod
    def from_store(
        cls, store: LatentStore | str | os.PathLike[str], by: By = "channel"
    ) -> Normalize:
        """Normalise by the statistics in a store's dataset.json.

        Args:
            store: The store: a path, a URL or an open store.
            by: `channel` uses mean and standard deviation of every channel, `overall` those over
                all channels.

        Raises:
            ConfigError: `by` is invalid, or a channel does not vary (for example, in an empty
                store).
        """
        choice("by", by, By)
        opened = as_store(store)
        deviations = opened.origin.deviations
        means = len(opened.mean) - deviations
        mean, std = opened.mean[:means], opened.std[:means]
        if by == "overall":
            variance = float((std**2 + (mean - mean.mean()) ** 2).mean())
            mean = np.full_like(mean, mean.mean())
            std = np.full_like(std, np.sqrt(variance))
        if not (std > 0).all():
            raise ConfigError(
                f"channel {int(np.argmin(std))} of {opened.url} does not vary, so it cannot be "
                "normalised by its standard deviation: use by='overall', or give Normalize a mean "
                "and a std."
            )
        return cls(tuple(mean.tolist()), tuple(std.tolist()), deviations)

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Normalise a sample and its origin; `random` is not used."""
        check_has_origin(sample, self, 'normalise batches, as in normal.apply(batch["context"])')
        origin = sample.origin
        if origin is not None:
            origin = replace(origin, changes=(*origin.changes, self.apply))
        return replace(sample, latents=self.apply(sample.latents), origin=origin)

    def apply(self, latents: Latents) -> Latents:
        """Normalise latents `[..., channels, frames]`: an array, or a tensor on any device."""
        mean, std = self._columns(latents)
        normalised: Latents = self._as_given((latents - mean) / std)
        return normalised

    def undo(self, latents: Latents) -> Latents:
        """Undo the normalisation, e.g. of generated latents before decoding.

        Args:
            latents: `[..., channels, frames]`: an array, or a tensor on any device.

        Returns:
            A float32 array for an array; for a tensor, a tensor on its device, with gradients.
        """
        mean, std = self._columns(latents)
        stored: Latents = self._as_given(latents * std + mean)
        return stored

    @staticmethod
    def _as_given(latents: Any) -> Any:
        return latents if isinstance(latents, torch.Tensor) else np.asarray(latents, np.float32)

    def _columns(self, latents: Any) -> tuple[Any, Any]:
        channels, means = latents.shape[-2], len(self.mean)
        if channels not in (means, means + self.deviations):
            raise ConfigError(
                f"Normalize was made for {means + self.deviations} channels, but the latent has "
                f"{channels} channels: use Normalize.from_store with the store that is read."
            )
        mean, std = (column[:channels] for column in self._all_columns)
        if isinstance(latents, torch.Tensor):
            device = latents.device
            return torch.from_numpy(mean).to(device), torch.from_numpy(std).to(device)
        return mean, std

    @cached_property
    def _all_columns(self) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
        mean = np.array(self.mean + (0.0,) * self.deviations, np.float32)
        std = np.array(self.std + self.std[: self.deviations], np.float32)
        return mean[:, None], std[:, None]
