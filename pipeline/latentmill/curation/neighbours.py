"""The records of a store whose pooled latents are most similar to a record or an audio file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from latentmill.curation.field_vectors import FieldVectors
from latentmill.encoding.encoder import UnitEncoder
from latentmill.encoding.loading import EncodeSettings, Loading
from latentmill.encoding.timings import Timings
from latentmill.encoding.unit_audio import LocalAudio
from latentmill.errors import ConfigError, SourceError
from latentmill.evaluation.vectors import StoredVectors
from latentmill.record import FloatArray, Latent
from latentmill.sources.base import Item
from latentmill.store.describe import warn_incomplete
from latentmill.store.field_layout import base_url
from latentmill.store.store import LatentStore, open_store

Blocks = Iterator[tuple[npt.NDArray[np.int64], FloatArray]]


@dataclass(frozen=True)
class Neighbour:
    """A record near the query.

    Attributes:
        key: Its key.
        similarity: Mean of two cosines, of the course in time and of the spectrum; 1 for equal
            sounds. Of a field, the cosine of its vectors.
        duration: Its length in seconds.
    """

    key: str
    similarity: float
    duration: float


def neighbours(
    store: str | os.PathLike[str] | LatentStore,
    query: str | os.PathLike[str],
    count: int = 10,
    *,
    field: str | None = None,
) -> tuple[Neighbour, ...]:
    """Find the records whose pooled latents are most similar, the most similar first.

    Uses the vectors that `latentmill evaluate STORE --only statistics` has written, and compares
    all of them. An audio file is encoded with the store's model and settings.

    With `field`, the records whose vectors in this field are most similar.

    Args:
        store: A complete store. To encode an audio file with a model that is not built in, open
            it with `trust_model=True`.
        query: The key of a record, which is not its own neighbour, or the path or URL of an audio
            file.
        count: Number of neighbours.
        field: Name of a field of vectors, such as those of CLAP. The query must be a key.

    Raises:
        ConfigError: There is no such record or file, it is silent, or the store contains codes; or
            the field has no vectors, or none of the record.
        SourceError: The audio file cannot be encoded.
        StoreError: The vectors are missing, outdated or damaged, or there is no such field.
    """
    opened = store if isinstance(store, LatentStore) else open_store(store)
    if count < 1:
        raise ConfigError(f"count must be at least 1, not {count}.")
    if field is not None:
        return _in_field(FieldVectors(opened, field), field, os.fspath(query), count)
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
    return _found(opened, *_nearest(_numbered(vectors), vector, count, own))


def _in_field(vectors: FieldVectors, field: str, query: str, count: int) -> tuple[Neighbour, ...]:
    warn_incomplete(vectors.store)
    own = vectors.store.index.find(query)
    if own is None:
        raise ConfigError(
            f"field {field} has no vector of {query}: use the key of a record that has one "
            f"(`latentmill status {base_url(vectors.store.url)}` shows what was skipped)."
        )
    vector = vectors.row(own)
    if not vector.any():
        raise ConfigError(
            f"the vector of {query} is zero, so it has no neighbours: use another key."
        )
    return _found(vectors.store, *_nearest(vectors.blocks(), vector, count, own))


def _found(
    opened: LatentStore, positions: npt.NDArray[np.int64], similarities: FloatArray
) -> tuple[Neighbour, ...]:
    seconds = opened.index.column("num_samples")[positions] / opened.info.model["sample_rate"]
    return tuple(
        Neighbour(key, round(float(similarity), 6), round(float(duration), 6))
        for key, similarity, duration in zip(
            opened.index.keys(positions), similarities, seconds, strict=True
        )
    )


def _numbered(vectors: StoredVectors) -> Blocks:
    for start, block in vectors.blocks():
        yield start + np.arange(len(block)), block


def _nearest(
    blocks: Blocks, vector: FloatArray, count: int, own: int | None
) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Positions and similarities of the most similar records, with few of them in memory."""
    positions, best = np.zeros(0, np.int64), np.zeros(0, np.float32)
    for numbers, block in blocks:
        found = np.nan_to_num(block @ vector, nan=-1.0)
        if own is not None:
            found[numbers == own] = -np.inf
        best = np.concatenate([best, found])
        positions = np.concatenate([positions, numbers])
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
    with closing(LocalAudio([Item(uri, uri, 0, "")], loading, Timings())) as audio:
        (outcome,) = encoder.encode(audio)
    if outcome.record is None:
        raise SourceError(f"{uri} cannot be encoded ({outcome.reason}): use another audio file.")
    return outcome.record.latent
