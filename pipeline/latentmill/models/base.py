"""The protocol of every autoencoder. A complete model, whose frames are the means of 4 samples:

    import torch
    from latentmill.models.base import Context, ModelSpec

    class Means:
        spec = ModelSpec(
            name="means", sample_rate=8000, channels=1, latent_channels=1, hop=4, overhang=0,
            sample_multiple=4, min_samples=4, context=Context(0, 0), stitch="trim",
            chunk_frames=2000, overlap_frames=0, batch_size={"cpu": 8, "cuda": 64},
            scale_factor=1.0, stochastic_decoder=False, identity={"version": 1},
        )

        def load(self, device):  # a model without weights is its own handle
            return self

        def encode(self, audio):
            return audio.unflatten(-1, (-1, 4)).mean(-1)

        def decode(self, latents, num_samples, *, seed=0, positions=None):
            return latents.repeat_interleave(4, -1)[..., :num_samples]

    factory = Means  # latentmill encode SOURCE STORE --model python:my_module:factory

A model sees chunks: windows of samples of a fixed length. The spec converts between samples and
latent frames, so that planning and chunking need no model in memory:

    frames(T)  = max(1, ceil((T - overhang) / hop))     latent frames of T samples
    samples(n) = n * hop + overhang                     samples that n frames decode to at most

`overhang` is what the first frame needs beyond its hop: 1536 for lin-cae (a 2048-point STFT with
hop 512, eight STFT frames a latent frame), 0 for a padded convolutional encoder, -hop for an MDCT
whose frames overlap by half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

Stitch = Literal["trim", "crossfade", "none"]
Channels = Literal["mono", "split"]
Value = str | int | float | bool | None


class Context(NamedTuple):
    """Latent frames beside a chunk that its own frames may depend on; 0 right of a causal model."""

    left: int
    right: int


@dataclass(frozen=True)
class ModelSpec:
    """What is fixed about a model; known without loading it onto a device.

    Attributes:
        name: The name it was asked for by, such as `lin-cae`, without a repository: where the
            weights were does not matter, what they are is in the identity.
        sample_rate: Hz.
        channels: Audio channels that `encode` expects.
        latent_channels: D of a latent `[D, Z]`.
        hop: Samples per latent frame.
        overhang: See the module's text.
        sample_multiple: `encode` takes lengths that are multiples of this.
        min_samples: The shortest length that `encode` takes (itself a multiple).
        context: Frames from a chunk's start and from its end after which its frames equal those
            of the whole item; None where no context suffices (normalisation or attention over
            the chunk).
        stitch: The default way to stitch chunks.
        chunk_frames: Default chunk length in latent frames.
        overlap_frames: Default overlap of neighbouring chunks in latent frames.
        batch_size: Default chunks per forward pass, by device type (`cpu`, `cuda`).
        scale_factor: What latents are multiplied by after encoding, divided by before decoding.
        stochastic_decoder: Whether decoding draws noise (then it takes a seed).
        identity: What else changes the latents: package and version, sha256 of the weights,
            options. Goes into the fingerprint as it is.
        provenance: Where the weights came from and what only decoding depends on; recorded
            beside the fingerprint, so that a new revision with the same weights still resumes.
        codebook_size: Where latents are codes, numbers from 0 to this less 1 that cannot be
            blended; None: latents are continuous.
        max_batch_samples: The most samples of a whole batch that the model can take; None: as
            memory allows.
        short_last_chunk: With `stitch: none`, encode the last chunk at its own length instead of
            filling it up with zeros, as the codec does; the frames that it lacks are stored as
            zeros.
    """

    name: str
    sample_rate: int
    channels: int
    latent_channels: int
    hop: int
    overhang: int
    sample_multiple: int
    min_samples: int
    context: Context | None
    stitch: Stitch
    chunk_frames: int
    overlap_frames: int
    batch_size: Mapping[str, int]
    scale_factor: float
    stochastic_decoder: bool
    identity: Mapping[str, Value] = field(default_factory=dict)
    provenance: Mapping[str, Value] = field(default_factory=dict)
    codebook_size: int | None = None
    max_batch_samples: int | None = None
    short_last_chunk: bool = False

    def frames(self, num_samples: int) -> int:
        """Latent frames that `encode` gives for `num_samples` samples."""
        return max(1, math.ceil((num_samples - self.overhang) / self.hop))

    def samples(self, frames: int) -> int:
        """The most samples that `frames` latent frames decode to."""
        return frames * self.hop + self.overhang

    def padded(self, num_samples: int) -> int:
        """The shortest length that `encode` takes and that holds `num_samples`."""
        multiple = self.sample_multiple
        return max(self.min_samples, math.ceil(num_samples / multiple) * multiple)

    @property
    def frame_rate(self) -> float:
        """Latent frames per second."""
        return self.sample_rate / self.hop


class Autoencoder(Protocol):
    """A model in memory, on one device.

    Implementations must be deterministic, must treat the elements of a batch independently
    (equal to 1e-4 relative whatever the batch), and need not be thread-safe.
    """

    @property
    def spec(self) -> ModelSpec:
        """What is fixed about this model."""
        ...

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        """Encode float32 audio `[B, C, T]` in -1..1 to latents `[B, D, Z]`, float32.

        T is a multiple of `spec.sample_multiple`, at least `spec.min_samples`;
        Z is `spec.frames(T)`. Latents are scaled by `spec.scale_factor`. The audio may lie on
        any device; latents come back on the model's.
        """
        ...

    def decode(
        self,
        latents: torch.Tensor,
        num_samples: int,
        *,
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Decode latents `[B, D, Z]` to audio `[B, C, num_samples]`, float32.

        Args:
            latents: Scaled latents, as `encode` gives them.
            num_samples: At most `spec.samples(Z)`.
            seed: For a stochastic decoder. The noise of a frame depends on the seed and the
                frame's position on the item's time line alone, so that equal positions share it.
            positions: First frame of each batch element on its item's time line; default 0.
        """
        ...


class ModelHandle(Protocol):
    """A model by name: resolved (weights on this machine, identity known), not yet loaded.

    Must be picklable and small: it travels to the workers.
    """

    @property
    def spec(self) -> ModelSpec:
        """The model's spec."""
        ...

    def load(self, device: str) -> Autoencoder:
        """Load the model onto `device` (`cpu`, `cuda`, `cuda:1`).

        Raises:
            ModelError: The weights are not on this machine, or do not fit the model.
        """
        ...
