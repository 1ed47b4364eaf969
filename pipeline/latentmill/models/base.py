"""The protocol of autoencoders. A complete model, whose frames are the means of 4 samples:

    from dataclasses import dataclass
    from latentmill.models.base import Context, ModelSpec
    from latentmill.models.checks import check_device
    from latentmill.models.families.codec import Codec

    class Means:  # audio [B, C, T] to latents [B, D, Z], and back
        def encode(self, audio):
            return audio.unflatten(-1, (-1, 4)).mean(-1)

        def decode(self, latents):
            return latents.repeat_interleave(4, -1)

    @dataclass(frozen=True)
    class MeansHandle:
        spec = ModelSpec(
            name="means", sample_rate=8000, channels=1, latent_channels=1, hop=4, overhang=0,
            sample_multiple=4, min_samples=4, context=Context(0, 0), stitch="trim",
            chunk_frames=2000, overlap_frames=0, batch_size={"cpu": 8, "cuda": 64},
            scale_factor=1.0, stochastic_decoder=False, identity={"version": 1},
        )

        def load(self, device):  # the Codec checks arguments, moves and scales tensors
            return Codec(self.spec, Means(), check_device(self.spec.name, device))

    factory = MeansHandle  # latentmill encode SOURCE STORE --model python:my_module:factory

A model encodes chunks: windows of samples of a fixed length. The spec converts between samples and
latent frames, so that planning and chunking do not load the model:

    frames(T)  = max(1, ceil((T - overhang) / hop))     latent frames of T samples
    samples(n) = n * hop + overhang                     samples that n frames decode to at most

`overhang` is the number of samples that the first frame needs beyond its hop: 1536 for lin-cae (a
2048-point STFT with hop 512 and eight STFT frames per latent frame), 0 for a padded convolutional
encoder, -hop for an MDCT, whose frames overlap by half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch

    # What a model keeps of the earlier audio of an item, for its next chunk.
    State: TypeAlias = tuple[torch.Tensor, ...]

Stitch = Literal["trim", "crossfade", "none", "state"]
Channels = Literal["mono", "split"]
Value = str | int | float | bool | None

# In the identity of a model with `--channels split` whose rows are means and deviations. Before,
# the deviations of the left channel came before the means of the right one.
ROWS, MEANS_FIRST = "split_rows", "means first"


class Context(NamedTuple):
    """Number of latent frames on each side that a frame depends on; causal models: right = 0."""

    left: int
    right: int


@dataclass(frozen=True)
class ModelSpec:
    """The constants of a model, known before the model is loaded.

    Attributes:
        name: Name of the model, such as `lin-cae`, without a repository. It does not depend on
            where the weights are stored; the identity has their hash.
        sample_rate: Hz.
        channels: Audio channels that `encode` expects.
        latent_channels: D of a latent `[D, Z]`.
        hop: Samples per latent frame.
        overhang: See the module's docstring.
        sample_multiple: `encode` accepts lengths that are multiples of this.
        min_samples: The shortest length that `encode` accepts; a multiple of `sample_multiple`.
        context: Number of frames at a chunk's start and at its end that differ from those of the
            whole item; None if all frames may differ (normalisation or attention over the chunk).
        stitch: Default way to stitch chunks.
        chunk_frames: Default chunk length in latent frames.
        overlap_frames: Default overlap of neighbouring chunks in latent frames.
        batch_size: Default chunks per forward pass, by device type (`cpu`, `cuda`).
        scale_factor: Latents are multiplied by this after encoding and divided by it before
            decoding.
        stochastic_decoder: Whether decoding draws noise; if so, `decode` uses its seed.
        identity: Everything else that changes the latents: package and version, sha256 of the
            weights, options. Part of the fingerprint, unchanged.
        provenance: Where the weights came from, and options that only change decoding. Recorded
            beside the fingerprint, so that a run resumes if a new revision has the same weights.
        codebook_size: Number of codes, if latents are codes: whole numbers from 0 to
            `codebook_size - 1` that cannot be blended. None if latents are continuous.
        max_batch_samples: Maximum number of samples in a batch; None if only memory limits it.
        short_last_chunk: Encode the last chunk at its own length, as the codec does, instead of
            moving it back or padding it with zeros. Applies with `stitch: none` (the missing frames
            are stored as zeros), and to chunks that do not overlap if frames have no context or one
            frame is the whole chunk.
        step_frames: With `stitch: state`: minimum number of frames of every chunk except an item's
            last; 0 if the model has no `encode_step`.
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
    step_frames: int = 0

    def frames(self, num_samples: int) -> int:
        """Number of latent frames that `encode` returns for `num_samples` samples."""
        return max(1, math.ceil((num_samples - self.overhang) / self.hop))

    def samples(self, frames: int) -> int:
        """Maximum number of samples that `frames` latent frames decode to."""
        return frames * self.hop + self.overhang

    def padded(self, num_samples: int) -> int:
        """The shortest length of at least `num_samples` that `encode` accepts."""
        multiple = self.sample_multiple
        return max(self.min_samples, math.ceil(num_samples / multiple) * multiple)

    @property
    def frame_rate(self) -> float:
        """Latent frames per second."""
        return self.sample_rate / self.hop


def has_deviations(identity: Mapping[str, Any]) -> bool:
    """Whether the last half of a latent's rows are standard deviations of the first half."""
    return identity.get("posterior") == "mean+std"


class Autoencoder(Protocol):
    """A model that is loaded onto a device.

    Implementations must be deterministic and must encode and decode the elements of a batch
    independently: an element's result may vary by 1e-4 (relative) with the rest of the batch. They
    need not be thread-safe.
    """

    @property
    def spec(self) -> ModelSpec: ...

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        """Encode float32 audio `[B, C, T]` in -1..1 to latents `[B, D, Z]`, float32.

        T is a multiple of `spec.sample_multiple`, at least `spec.min_samples`;
        Z is `spec.frames(T)`. Latents are scaled by `spec.scale_factor`. The audio may be on any
        device; the latents are on the model's device.
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
            latents: Scaled latents, as `encode` returns them.
            num_samples: At most `spec.samples(Z)`.
            seed: Seed of a stochastic decoder. The noise of a frame depends only on the seed and
                on the frame's position in the item, so that frames at equal positions share it.
            positions: Index in its item of the first frame of each batch element; default 0.
        """
        ...


class StatefulAutoencoder(Autoencoder, Protocol):
    """A causal model that encodes an item chunk after chunk; its spec has `step_frames`."""

    def encode_step(
        self, audio: torch.Tensor, states: Sequence[State | None]
    ) -> tuple[torch.Tensor, list[State]]:
        """Encode the next chunks `[B, C, T]` of several items to latents `[B, D, Z]`.

        The latents of an item's chunks, one after the other, are those of the whole item. All
        chunks but the last one of an item have `spec.step_frames` or more.

        Args:
            audio: As for `encode`. The items may be at different positions.
            states: The state of each item after its previous chunk; None for its first chunk.

        Returns:
            The latents, and the state of each item after the chunk, on the model's device.
        """
        ...


class ModelHandle(Protocol):
    """A resolved model: its weights are on this machine and its spec is known; it is not loaded.

    Must be picklable and small, because it is sent to the workers.
    """

    @property
    def spec(self) -> ModelSpec: ...

    def load(self, device: str) -> Autoencoder:
        """Load the model onto `device` (`cpu`, `cuda`, `cuda:1`).

        Raises:
            ModelError: The weights are missing on this machine or do not fit the model.
        """
        ...
