"""The autoencoders that can be trained, each with its loss and its format of files.

A new architecture is a subclass of `Trainable`, an entry in `ARCHITECTURES` and one in
`models/families/trained.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from latentmill.errors import ConfigError
from latentmill.models.base import ModelSpec
from latentmill.models.families.conv import ConvAutoencoder, conv_spec
from latentmill.models.families.trained import WEIGHTS, Architecture
from latentmill.models.registry import resolve
from latentmill.models.weights import import_package
from latentmill.training.linearity import LinearityBatch
from latentmill.training.losses import reconstruction_loss
from latentmill.training.settings import TrainSettings


class Trainable(nn.Module):
    """An autoencoder and its loss. `forward` computes the loss of a batch, a scalar."""

    def __init__(self, architecture: Architecture, spec: ModelSpec) -> None:
        super().__init__()
        self.architecture, self.spec = architecture, spec
        self.step = 0  # set by the training loop

    def forward(self, batch: LinearityBatch) -> Tensor:
        raise NotImplementedError

    def shape(self) -> dict[str, Any]:
        """The settings of the network for `trained.json`, if the family has no file of its own."""
        return {}

    def write(self, folder: Path) -> None:
        """Write the weights, and the files that the family needs beside them."""
        raise NotImplementedError


class Conv(Trainable):
    """The small autoencoder of `models/families/conv.py`."""

    def __init__(self, settings: TrainSettings) -> None:
        super().__init__("conv", conv_spec(settings.network))
        import_package("conv", "safetensors", install="pip install 'latentmill[training]'")
        self.network = ConvAutoencoder(settings.network)
        self._kl_weight = settings.kl_weight

    def forward(self, batch: LinearityBatch) -> Tensor:
        encoded = self.network.posterior(batch.inputs)
        if not self.network.settings.posterior:
            return reconstruction_loss(self.network.decode(batch.latents(encoded)), batch.targets)
        latents, divergence = drawn(batch, encoded)
        loss = reconstruction_loss(self.network.decode(latents), batch.targets)
        return loss + self._kl_weight * divergence

    def shape(self) -> dict[str, Any]:
        return self.network.settings.model_dump(mode="json")

    def write(self, folder: Path) -> None:
        write_safetensors(self.network, folder / WEIGHTS)


class Oobleck(Trainable):
    """The VAE of diffusers. Latents are sampled from the posterior, as in its own training."""

    def __init__(self, settings: TrainSettings) -> None:
        from latentmill.models.families import diffusers_codec, oobleck, stable_audio

        handle: Any = resolve(settings.model)
        super().__init__("oobleck", handle.spec)
        self.network = diffusers_codec.load_autoencoder(
            settings.model, oobleck.CLASS, handle.files, torch.device("cpu"), stable_audio.OOBLECK
        ).requires_grad_(True)
        if settings.from_scratch:
            self.network = type(self.network).from_config(self.network.config)
        self._kl_weight = settings.kl_weight

    def forward(self, batch: LinearityBatch) -> Tensor:
        latents, divergence = drawn(batch, self.network.encoder(batch.inputs))
        given = self.network.decoder(latents)
        loss: Tensor = reconstruction_loss(given, batch.targets) + self._kl_weight * divergence
        return loss

    def write(self, folder: Path) -> None:
        self.network.save_pretrained(folder)


def drawn(batch: LinearityBatch, encoded: Tensor) -> tuple[Tensor, Tensor]:
    """The latents of the targets, drawn from the inputs' posteriors, and the KL divergence.

    `encoded` `[B, 2 D, Z]` are means and, before softplus, standard deviations. The divergence is
    that from a standard normal distribution, as in the code of Stable Audio. The origin is not
    drawn: it is the mean for silence.
    """
    mean, scale = encoded.float().chunk(2, dim=1)
    deviation = F.softplus(scale) + 1e-4
    noise = torch.randn_like(mean)
    sounds = len(mean) - batch.origin
    noise[sounds:] = 0
    variance = deviation[:sounds].square()
    divergence = (mean[:sounds].square() + variance - variance.log() - 1).sum(dim=1).mean()
    return batch.latents(mean + deviation * noise), divergence


class Dac(Trainable):
    """The Descript Audio Codec of transformers, without its quantiser."""

    def __init__(self, settings: TrainSettings) -> None:
        handle: Any = resolve(settings.model)
        super().__init__("dac", handle.spec)
        loaded = handle.loader(
            settings.model, handle.files, torch.device("cpu"), output="latents", quantise=False
        )
        self.network = loaded.model
        if settings.from_scratch:
            self.network = type(self.network)(self.network.config)
        self.network.requires_grad_(True)
        self.network.quantizer.requires_grad_(False)  # not used

    def forward(self, batch: LinearityBatch) -> Tensor:
        latents = batch.latents(self.network.encoder(batch.inputs))
        given = self.network.decoder(latents)  # with odd strides a few samples shorter
        return reconstruction_loss(given, batch.targets[..., : given.shape[-1]])

    def write(self, folder: Path) -> None:
        self.network.save_pretrained(folder)


def _linear_cae(settings: TrainSettings) -> Trainable:
    from latentmill.training.consistency import TrainableLinearCae

    return TrainableLinearCae(settings)


ARCHITECTURES: dict[str, Callable[[TrainSettings], Trainable]] = {
    "conv": Conv,
    "oobleck": Oobleck,
    "dac": Dac,
    "lin-cae": _linear_cae,
}


def build(settings: TrainSettings) -> Trainable:
    """Build what `settings.model` names, in training mode, on the CPU."""
    family, _, repo = settings.model.partition(":")
    if family not in ARCHITECTURES:
        known = "conv, oobleck:REPO, dac:REPO, lin-cae and lin-cae:PATH"
        raise ConfigError(f"model {settings.model!r} cannot be trained: use {known}.")
    if family == "conv" and repo:
        raise ConfigError(f"model {settings.model!r}: conv has no repository; write conv.")
    return ARCHITECTURES[family](settings).train()


def crop_samples(spec: ModelSpec, seconds: float) -> int:
    """Samples of a crop: at least `seconds`, and whole latent frames without padding."""
    frames = spec.frames(max(1, round(seconds * spec.sample_rate)))
    return spec.padded(max(spec.min_samples, spec.samples(frames)))


def write_safetensors(module: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    state = module.state_dict()
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)


def copy_files(files: dict[str, Path], folder: Path) -> None:
    """Copy a family's configuration files into `folder`, under their own names."""
    for path in files.values():
        shutil.copyfile(path, folder / path.name)
