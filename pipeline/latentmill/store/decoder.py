"""Decoding a store's latents with its model, which is loaded once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from latentmill.decoding.decoder import LatentSource, decode_blocks, decode_latents
from latentmill.encoding.chunks import Chunking
from latentmill.errors import ModelError
from latentmill.models.base import Autoencoder
from latentmill.models.inference.device import pick_device
from latentmill.models.trust import resolve_stored
from latentmill.record import FloatArray, Latent
from latentmill.store.schema import DatasetInfo

if TYPE_CHECKING:
    import torch

# Decoding needs several times the memory of encoding: few windows at once.
_DECODE_BATCH = {"cpu": 1, "cuda": 4}


class StoreDecoder:
    """The part of a store that needs its model."""

    def __init__(self, device: str, *, trust_model: bool) -> None:
        self._device = device
        self._trust_model = trust_model
        self._model: Autoencoder | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where the store is."""

    @property
    @abstractmethod
    def info(self) -> DatasetInfo:
        """What dataset.json says."""

    @property
    @abstractmethod
    def chunking(self) -> Chunking:
        """How the items were chunked."""

    @property
    def device(self) -> str:
        """Where its model is: `cpu`, `cuda` or `cuda:N`."""
        return pick_device(self._device)

    def model(self) -> Autoencoder:
        """The store's autoencoder, loaded once.

        Raises:
            ModelError: It is not built in and the store was opened without `trust_model`, it cannot
                be loaded, or its weights are not those that encoded the store.
        """
        if self._model is None:
            stored = self.info.model
            handle = resolve_stored(
                stored.get("asked"),
                stored.get("options"),
                stored.get("asked_channels"),
                store=self.url,
                trusted=self._trust_model,
            )
            spec = handle.spec
            names = ("sample_rate", "channels", "latent_channels", "hop", "scale_factor")
            present = {**spec.identity, **{name: getattr(spec, name) for name in names}}
            changed = [name for name, value in present.items() if stored.get(name) != value]
            if changed:
                raise ModelError(
                    f"{stored['asked']} is not the model that encoded {self.url} (other "
                    f"{', '.join(changed)}): install or download that one."
                )
            self._model = handle.load(pick_device(self._device))
        return self._model

    def decode_latent(
        self,
        latent: Latent | LatentSource | torch.Tensor,
        num_samples: int | None = None,
        *,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> FloatArray:
        """Decode any latents on this store's grid, such as a mix or what a model has generated.

        Args:
            latent: A numpy array or a tensor on any device: `[D, T]`, or a batch `[B, D, T]`. Of a
                store with `stitch: none` an item is `[N, D, Z]`, a batch `[B, N, D, Z]`. As they
                are stored: undo a normalisation first, with `Normalize.undo`.
            num_samples: Length of the audio; None: all that the frames hold.
            seed: Noise of a stochastic decoder, the same for all items of a batch.
            batch_size: Windows per forward pass; default 1 on a CPU, 4 on a GPU.

        Returns:
            Audio `[channels, samples]`, or `[B, channels, samples]`; float32.
        """
        batch = batch_size or self._decode_batch
        return decode_latents(
            self.model(), latent, num_samples, self.chunking, seed=seed, batch_size=batch
        )

    def decode_blocks(
        self,
        latent: Latent | LatentSource,
        num_samples: int | None = None,
        *,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> Iterator[FloatArray]:
        """Decode one item, giving its audio as it is done, `[channels, n]`, in bounded memory."""
        batch = batch_size or self._decode_batch
        return decode_blocks(
            self.model(), latent, num_samples, self.chunking, seed=seed, batch_size=batch
        )

    @property
    def _decode_batch(self) -> int:
        return _DECODE_BATCH[pick_device(self._device).partition(":")[0]]
