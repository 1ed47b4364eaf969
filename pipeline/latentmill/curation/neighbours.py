"""The records of a store whose pooled latents are most similar to a record or an audio file."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from latentmill.encoding.encoder import UnitEncoder
from latentmill.encoding.timings import Meter
from latentmill.encoding.unit_audio import EncodeSettings, Loading, LocalAudio
from latentmill.errors import ConfigError, SourceError
from latentmill.evaluation.vectors import StoredVectors
from latentmill.record import FloatArray, Latent
from latentmill.sources.base import Item
from latentmill.store.store import LatentStore, open_store


@dataclass(frozen=True)
class Neighbour:
    """A record near the query.

    Attributes:
        key: Its key.
        similarity: Mean of two cosines, of the course in time and of the spectrum; 1 for equal
            sounds.
        duration: Its length in seconds.
    """

    key: str
    similarity: float
    duration: float


def neighbours(
    store: str | os.PathLike[str] | LatentStore, query: str | os.PathLike[str], count: int = 10
) -> tuple[Neighbour, ...]:
    """Find the records whose pooled latents are most similar, the most similar first.

    Uses the vectors that `latentmill evaluate STORE --only statistics` has written, and compares
    all of them. An audio file is encoded with the store's model and settings.

    Args:
        store: A complete store. To encode an audio file with a model that is not built in, open
            it with `trust_model=True`.
        query: The key of a record, which is not its own neighbour, or the path or URL of an audio
            file.
        count: Number of neighbours.

    Raises:
        ConfigError: There is no such record or file, it is silent, or the store contains codes.
        SourceError: The audio file cannot be encoded.
        StoreError: The vectors are missing, outdated or damaged.
    """
    opened = store if isinstance(store, LatentStore) else open_store(store)
    if count < 1:
        raise ConfigError(f"count must be at least 1, not {count}.")
    if opened.codes:
        raise ConfigError(
            f"{opened.url} contains codes, which have no neighbours: encode without output=codes."
        )
    vectors, name = StoredVectors(opened), os.fspath(query)
    own = opened.index.find(name)
    if own is not None:
        vector = vectors.row(own)
    else:
        # Path.is_file raises OSError for a name that is too long.
        if "://" not in name and not os.path.isfile(name):  # noqa: PTH113
            raise ConfigError(
                f"{opened.url} has no record {name}, and there is no audio file {name}: check the "
                "key or the path."
            )
        vector = vectors.of_latent(_encoded(opened, name))
    if not vector.any():
        raise ConfigError(f"{name} is silent, so it has no neighbours: use another query.")
    positions, similarities = _nearest(vectors, vector, count, own)
    seconds = opened.index.column("num_samples")[positions] / opened.info.model["sample_rate"]
    return tuple(
        Neighbour(key, round(float(similarity), 6), round(float(duration), 6))
        for key, similarity, duration in zip(
            opened.index.keys(positions), similarities, seconds, strict=True
        )
    )


def _nearest(
    vectors: StoredVectors, vector: FloatArray, count: int, own: int | None
) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Positions and similarities of the most similar records, with few of them in memory."""
    positions, best = np.zeros(0, np.int64), np.zeros(0, np.float32)
    for start, block in vectors.blocks():
        found = np.nan_to_num(block @ vector, nan=-1.0)
        if own is not None and start <= own < start + len(block):
            found[own - start] = -np.inf
        best = np.concatenate([best, found])
        positions = np.concatenate([positions, start + np.arange(len(block))])
        order = np.argsort(-best, kind="stable")[:count]
        best, positions = best[order], positions[order]
    kept = np.isfinite(best)
    return positions[kept], best[kept]


def _encoded(store: LatentStore, uri: str) -> Latent:
    """The latent of an audio file, as a run of this store would encode it."""
    model, chunking = store.model(), store.chunking
    settings = EncodeSettings(dtype=store.info.dtype, precision=store.precision)
    loading = Loading(model.spec, chunking, settings)
    encoder = UnitEncoder(model, chunking, settings, device=store.device)
    with closing(LocalAudio([Item(uri, uri, 0, "")], loading, Meter())) as audio:
        (outcome,) = encoder.encode(audio)
    if outcome.record is None:
        raise SourceError(f"{uri} cannot be encoded ({outcome.reason}): use another audio file.")
    return outcome.record.latent
