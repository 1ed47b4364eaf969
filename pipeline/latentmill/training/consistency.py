"""Training lin-cae: a consistency autoencoder of the package linear-cae, by the package's classes.

The loss is that of Music2Latent (M. Pasini and others, ISMIR 2024), from which the package is
derived: with the representation X of a target, noise n and levels s > s' drawn as the package does,
the decoder's result for X + s n must be its result for X + s' n, which gets no gradient. Distances
are pseudo-Huber, weighted by 1 / (s - s').
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentmill.models.families.linear_cae.files import import_linear_cae, read_arguments
from latentmill.models.registry import resolve
from latentmill.models.weights import LOAD_ERRORS, does_not_load, read_state
from latentmill.training.architectures import Trainable, copy_files
from latentmill.training.linearity import LinearityBatch
from latentmill.training.settings import TrainSettings

NAME = "lin-cae"
LEVELS = 10_000  # noise levels that one is drawn from, as in the package
HUBER = 0.00054  # of Music2Latent, per square root of the number of values


class TrainableLinearCae(Trainable):
    """The package's model; `settings.model` is lin-cae, or lin-cae:PATH with its four files."""

    def __init__(self, settings: TrainSettings) -> None:
        repo = settings.model.partition(":")[2]
        handle: Any = resolve(NAME, {"repo": repo} if repo else {})
        super().__init__("lin-cae", handle.spec)
        package, _ = import_linear_cae(NAME)
        self._files = dict(handle.files.paths)
        arguments = read_arguments(NAME, package, handle.files)
        self.network = package.Autoencoder(*arguments.values(), name=NAME)
        # Their layers get no time embedding, and DistributedDataParallel requires gradients of all.
        for name, parameter in self.network.generator.decoder.named_parameters():
            parameter.requires_grad_("proj_emb" not in name)
        if not settings.from_scratch:
            try:
                self.network.load_state_dict(read_state(NAME, self._files["weights"]))
            except LOAD_ERRORS as error:
                raise does_not_load(NAME, self._files["weights"], error) from error
        self._steps = settings.steps

    def forward(self, batch: LinearityBatch) -> Tensor:
        generator, diffusion = self.network.generator, self.network.diffusion
        encoded = generator.encoder(self._representation(batch.inputs))
        latents = batch.latents(encoded)
        target = self._representation(batch.targets)
        noise = batch.noise(torch.randn_like(target))
        level, lower = self._levels(len(target), target.device)
        features = generator.decoder(latents)
        given = generator.forward_generator(
            latents, diffusion.add_noise(target, noise, level), level, features
        )
        with torch.no_grad():
            wanted = generator.forward_generator(
                latents, diffusion.add_noise(target, noise, lower), lower, features
            )
        weight = diffusion.get_loss_weight(level, lower)
        distance = pseudo_huber(given.float(), wanted.float())
        loss: Tensor = (weight * distance).mean()
        return loss

    def write(self, folder: Path) -> None:
        copy_files({k: v for k, v in self._files.items() if k != "weights"}, folder)
        torch.save(self.network.state_dict(), folder / self._files["weights"].name)

    def _representation(self, audio: Tensor) -> Tensor:
        """Complex spectra `[N, 2, bins, frames]` of audio `[N, 1, T]`, in float32."""
        with torch.autocast(audio.device.type, enabled=False):
            spectrum: Tensor = self.network.frontend.to_representation(audio[:, 0].float())
        return spectrum

    def _levels(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pairs of noise levels, drawn as in the package's `precompute_noise_schedule`."""
        diffusion = self.network.diffusion
        if diffusion.use_lognormal:
            weights = diffusion.get_sampling_weights(LEVELS, device=device)
            drawn = torch.multinomial(weights, count, replacement=True)
            place = (drawn + torch.rand(count, device=device)) / (LEVELS - 1)
        else:
            place = torch.rand(count, device=device)
        distance = diffusion.get_step_schedule(self.step, self._steps)
        lower = diffusion.get_step_continuous(place, distance)
        # Both levels at the bottom would give a weight of 1 / 0.
        place = torch.maximum(place, lower + 1e-4)
        return diffusion.get_sigma_continuous(place), diffusion.get_sigma_continuous(lower)


def pseudo_huber(given: Tensor, wanted: Tensor) -> Tensor:
    """sqrt(d^2 + c^2) - c, averaged over each element of the batch: `[N]`."""
    c = HUBER * math.sqrt(given[0].numel())
    return ((given - wanted).square() + c**2).sqrt().sub(c).flatten(1).mean(dim=1)
