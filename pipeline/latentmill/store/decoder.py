"""The numbers of a store, the table of its records, and decoding latents with its model."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from latentmill.decoding.decoder import LatentSource, decode_blocks, decode_latents
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.stored import deviations_of, refuse_earlier_rows
from latentmill.errors import ConfigError, ModelError
from latentmill.models import registry
from latentmill.models.base import Autoencoder
from latentmill.models.identity import check_decoder
from latentmill.models.inference.device import load_model, pick_device
from latentmill.models.trust import resolve_stored
from latentmill.ops import Origin, fit, mix
from latentmill.record import FloatArray, Latent, LatentLike, Record, as_array
from latentmill.store.index import IndexEntry
from latentmill.store.mixture import Mix
from latentmill.store.schema import DatasetInfo
from latentmill.store.thread_copy import copy_of_store

if TYPE_CHECKING:
    from latentmill.store.store import LatentStore

# Windows per forward pass: decoding needs several times the memory of encoding.
_DECODE_BATCH = {"cpu": 1, "cuda": 4}
START_SECONDS = 10.0  # of a record or a mix that a notebook plays


class StoreDecoder:
    """Base class of `LatentStore`, with what follows from dataset.json, and the model."""

    def __init__(
        self, device: str, *, trust_model: bool, model_options: Mapping[str, Any] | None
    ) -> None:
        self._device = device
        self._trust_model = trust_model
        self.model_options = dict(model_options or {})
        self._opened_with = {
            "device": device,
            "trust_model": trust_model,
            "model_options": self.model_options,
        }
        self._model: Autoencoder | None = None
        self._loading = threading.Lock()  # so that threads do not load a model each
        self._reloading = threading.Lock()  # so that none takes the index of the old seal

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentStore:
        return copy_of_store(cast("LatentStore", self), memo)

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL or path of the store."""

    @property
    @abstractmethod
    def info(self) -> DatasetInfo:
        """The contents of dataset.json."""

    @property
    @abstractmethod
    def chunking(self) -> Chunking:
        """The chunking with which the items were encoded."""

    @property
    @abstractmethod
    def origin(self) -> Origin:
        """The latent of silence."""

    @abstractmethod
    def __getitem__(self, key: str) -> Record:
        """Read the record with this key."""

    @abstractmethod
    def entry(self, key: str) -> IndexEntry:
        """The index entry of a record."""

    @abstractmethod
    def source(self, key: str) -> LatentSource:
        """The latent of a record, for decoding in pieces."""

    @property
    def codes(self) -> bool:
        """Whether the latents are discrete codes, which cannot be mixed."""
        model, field = self.info.model, self.info.field
        if field is not None and field.kind == "codes":
            return True
        return model.get("output") == "codes" or model.get("codebook_size") is not None

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean of every latent channel over the store, `[channels]`."""
        return np.array(self.info.mean)

    @property
    def std(self) -> npt.NDArray[np.float64]:
        """Standard deviation of every latent channel over the store, `[channels]`."""
        return np.array(self.info.std)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the fields and metadata of all records, without latents; row n is record n.

        `polars.from_arrow` and the table's `to_pandas` convert it. The columns are those of
        metadata.HASH.parquet: `key`, `duration`, `metadata_bpm`, ... (docs/curation.md).

        Raises:
            ConfigError: There is no such column.
            StoreError: The metadata file is damaged.
        """
        from latentmill.store.metadata_file import read_table  # imports LatentStore

        return read_table(cast("LatentStore", self), columns)

    @property
    def device(self) -> str:
        """The device of the model: `cpu`, `cuda` or `cuda:N`."""
        return pick_device(self._device)

    def model(self) -> Autoencoder:
        """Return the store's autoencoder; the first call loads it.

        Raises:
            ModelError: The model is not built in and the store was opened without `trust_model`,
                it cannot be loaded, or its weights differ from those that encoded the store. If
                only the version of its package differs, that is a warning.
            StoreError: An earlier version has stored the rows in another order.
        """
        with self._loading:
            if self._model is None:
                self._model = self._loaded_model()
            return self._model

    def _loaded_model(self) -> Autoencoder:
        stored = self.info.model
        refuse_earlier_rows(stored, self.url)
        handle = resolve_stored(
            stored.get("asked"),
            stored.get("options"),
            stored.get("asked_channels"),
            given=self.model_options,
            store=self.url,
            trusted=self._trust_model,
            stored=stored,
        )
        check_decoder(stored, handle.spec, self.url, self.model_options)
        return load_model(handle, pick_device(self._device))

    @property
    def decodable(self) -> bool:
        """Whether the values are latents of audio, or codes, that the model can decode."""
        info = self.info
        from_audio = info.field is None or info.field.follows_audio
        return from_audio and not registry.only_encodes(info.model.get("asked"))

    def decoder(self) -> Autoencoder:
        """Return the store's autoencoder for decoding; see `model`.

        Raises:
            ModelError: The values are not latents of audio, or the model cannot be loaded.
        """
        if not self.decodable:
            raise ModelError(
                f"The values in {self.url} are not latents of audio and cannot be decoded: use a "
                "store of latents."
            )
        return self.model()

    def decode(self, key: str, *, seed: int = 0, batch_size: int | None = None) -> FloatArray:
        """Decode a record to audio `[channels, samples]`, float32, at the model's rate.

        Args:
            key: The record's key.
            seed: Seed of a stochastic decoder's noise. With the same seed, the noise at a given
                time is the same in every item.
            batch_size: Windows per forward pass; default 1 on a CPU, 4 on a GPU.
        """
        source = self.source(key)  # may read a new seal, so read the length afterwards
        samples = self.entry(key).num_samples
        return self.decode_latent(source, samples, seed=seed, batch_size=batch_size)

    def decode_latent(
        self,
        latent: LatentLike | LatentSource,
        num_samples: int | None = None,
        *,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> FloatArray:
        """Decode latents in this store's format, such as a mix or the output of a generative model.

        Args:
            latent: A numpy array or a tensor on any device: `[D, T]`, or a batch `[B, D, T]`. In a
                store with `stitch: none`, an item is `[N, D, Z]` and a batch `[B, N, D, Z]`. Values
                must be as stored: undo a normalisation first, with `Normalize.undo`. Of a store
                with standard deviations, the rows of the means alone can be given.
            num_samples: Length of the audio; None for that of all frames, or of all chunks.
            seed: Seed of a stochastic decoder's noise, the same for all items of a batch.
            batch_size: Windows per forward pass, of all items of a batch; default 1 on a CPU, 4 on
                a GPU.

        Returns:
            Audio `[channels, samples]`, or `[B, channels, samples]`; float32.
        """
        batch = self._decode_batch if batch_size is None else batch_size
        latent = self._with_deviations(latent)
        return decode_latents(
            self.decoder(), latent, num_samples, self.chunking, seed=seed, batch_size=batch
        )

    def decode_blocks(
        self,
        latent: LatentLike | LatentSource,
        num_samples: int | None = None,
        *,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> Iterator[FloatArray]:
        """Decode one item in bounded memory; yields its audio in blocks `[channels, n]`.

        The arguments are those of `decode_latent`, which also decodes batches.
        """
        batch = self._decode_batch if batch_size is None else batch_size
        latent = self._with_deviations(latent)
        return decode_blocks(
            self.decoder(), latent, num_samples, self.chunking, seed=seed, batch_size=batch
        )

    def _with_deviations(self, latent: Any) -> Any:
        """Latents with all rows of the store; standard deviations, which decoding ignores, are 0.

        A latent that was drawn from a posterior, by a generative model too, has none.
        """
        model, shape = self.info.model, latent.shape
        deviations = deviations_of(model)
        only_means = len(shape) >= 2 and shape[-2] == model["latent_channels"] - deviations
        if not deviations or not only_means or isinstance(latent, LatentSource):
            return latent
        return np.pad(as_array(latent), [*[(0, 0)] * (len(shape) - 2), (0, deviations), (0, 0)])

    def mix(self, gains: Mapping[str, float] | Sequence[str]) -> Mix:
        """Mix records as latents, with the latent of silence; `.audio()` decodes the mix.

        Args:
            gains: The gain of each record by key, such as `{"song/drums": 1.0, "song/bass": 0.5}`,
                or a list of keys, each with the gain 1 (2 if it is in the list twice). Shorter
                records are continued with silence.

        Raises:
            KeyError: There is no record with a key.
            ConfigError: The latents cannot be mixed, for example because they are codes.
        """
        if isinstance(gains, str):
            raise ConfigError(
                f"{gains!r} is one key: give a list of keys, or their gains as {{{gains!r}: 1.0}}."
            )
        wanted = dict(gains if isinstance(gains, Mapping) else Counter(gains))
        records = [self[key] for key in wanted]
        frames = max((record.frames for record in records), default=0)
        latents = [
            record.latent
            if record.frames == frames
            else fit(record.latent, frames, origin=self.origin)
            for record in records
        ]
        return Mix(
            wanted,
            mix(latents, list(wanted.values()), origin=self.origin),
            max(record.num_samples for record in records),
            self.info.model["sample_rate"],
            self.decode_latent,
            self.decode_start,
        )

    def decode_start(self, latent: Latent, num_samples: int) -> tuple[FloatArray, int] | None:
        """Decode up to `START_SECONDS` for a notebook; None if the model is not loaded yet.

        Loading a model to show a record would take longer than a display should.
        """
        if self._model is None:
            return None
        rate: int = self.info.model["sample_rate"]
        samples = min(num_samples, round(START_SECONDS * rate))
        return self.decode_latent(latent, samples), rate

    @property
    def _decode_batch(self) -> int:
        """Windows per forward pass; no more than the model allows."""
        from latentmill.models.inference.batch import most_chunks  # imports torch, which is slow

        size = _DECODE_BATCH[pick_device(self._device).partition(":")[0]]
        return min(size, most_chunks(self.decoder().spec, self.chunking.samples))
