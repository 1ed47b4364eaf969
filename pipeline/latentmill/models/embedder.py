"""The protocol of embedders: models whose input is not audio but a text, or an item's latent.

They compute the fields of a store (`latentmill add`). A complete embedder, whose vectors count the
vowels of a text:

    from dataclasses import dataclass
    import numpy as np
    from latentmill.models.embedder import EmbedderSpec

    @dataclass(frozen=True)
    class Vowels:
        spec = EmbedderSpec(name="vowels", kind="vector", input="text", dimensions=5)

        def load(self, device):
            return self

        def embed(self, values):
            return [np.array([[text.count(v)] for v in "aeiou"], np.float32) for text in values]

    factory = Vowels  # latentmill add STORE --field NAME --from metadata:prompt
                      #                 --model python:my_module:factory

Models whose input is audio follow `latentmill.models.base` instead, also those that cannot decode
(`clap:REPO`, `audio:REPO`): their attribute `kind` tells what an item's values are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from latentmill.errors import ModelError
from latentmill.models.base import Value
from latentmill.record import FloatArray

Kind = Literal["frames", "vector", "tokens", "codes"]
Input = Literal["text", "latents"]


@dataclass(frozen=True)
class EmbedderSpec:
    """The constants of an embedder, known before it is loaded.

    Attributes:
        name: Name of the model, without a repository, as in `ModelSpec`.
        kind: What the arrays `[D, n]` are. `vector`: n is 1. `tokens`: n differs between values and
            nothing is padded. `frames`: a frame for every `stride` frames of the latent. `codes`:
            frames of whole numbers.
        input: `text` (str), or `latents` (float32 `[C, T]`, as the store has them).
        dimensions: D.
        batch_size: Maximum number of values of one call, by device type (`cpu`, `cuda`).
        stride: Latent frames per frame of the result, for `frames` and `codes`.
        identity: Everything else that changes the values, as in `ModelSpec`.
        provenance: Where the weights came from, as in `ModelSpec`.
    """

    name: str
    kind: Kind
    input: Input
    dimensions: int
    batch_size: Mapping[str, int] = field(default_factory=lambda: {"cpu": 16, "cuda": 64})
    stride: int = 1
    identity: Mapping[str, Value] = field(default_factory=dict)
    provenance: Mapping[str, Value] = field(default_factory=dict)


class Embedder(Protocol):
    """An embedder that is loaded onto a device.

    Implementations must be deterministic and must not use global random generators. A value's
    result may vary by 1e-4 (relative) with the other values of the call. They need not be
    thread-safe.
    """

    @property
    def spec(self) -> EmbedderSpec: ...

    def embed(self, values: Sequence[Any]) -> list[FloatArray]:
        """Embed values of the spec's `input`; return a float32 array `[D, n]` for each, in order.

        The values are not changed. Arrays are on the CPU. An array with n = 0 means that the value
        has no embedding; its item fails.
        """
        ...


class EmbedderHandle(Protocol):
    """A resolved embedder: its weights are on this machine and its spec is known; not loaded.

    Must be picklable and small, because it is sent to the workers.
    """

    @property
    def spec(self) -> EmbedderSpec: ...

    def load(self, device: str) -> Embedder:
        """Load the embedder onto `device` (`cpu`, `cuda`, `cuda:1`).

        Raises:
            ModelError: The weights are missing on this machine or do not fit the model.
        """
        ...


def checked_embed(embedder: Embedder, values: Sequence[Any]) -> list[FloatArray]:
    """Embed values; raise `ModelError` if the result does not have the shape of the spec."""
    spec = embedder.spec
    arrays = list(embedder.embed(values))
    if len(arrays) != len(values):
        raise ModelError(
            f"Model {spec.name}: embed returned {len(arrays)} arrays for {len(values)} values: "
            "return one for each."
        )
    for value, array in zip(values, arrays, strict=True):
        shape: tuple[int, ...] = getattr(array, "shape", ())
        wanted: tuple[Any, ...] = (spec.dimensions, shape[1] if len(shape) == 2 else "n")
        if spec.kind == "vector":
            wanted = (spec.dimensions, 1)
        elif spec.kind in ("frames", "codes") and spec.input == "latents":
            wanted = (spec.dimensions, -(-value.shape[1] // spec.stride))
        dtype = getattr(array, "dtype", None)
        if shape != wanted or dtype != np.float32:
            raise ModelError(
                f"Model {spec.name}: embed returned an array of type {dtype} and shape "
                f"{list(shape)}, but by its spec it is float32 {list(wanted)}: correct the spec or "
                "the model."
            )
    return arrays
