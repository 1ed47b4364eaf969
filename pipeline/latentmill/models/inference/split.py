"""A mono model on stereo audio: the channels are encoded separately and stored in one latent.

The latent `[2 * D, Z]` has the left channel's D rows, then the right channel's. Pan and width stay
linear, because arithmetic on the rows of one channel changes only that channel. If the rows of a
channel are means and standard deviations, the means of both channels come first, because readers
take the last half of the rows for deviations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from latentmill.models.base import (
    MEANS_FIRST,
    ROWS,
    Autoencoder,
    ModelHandle,
    ModelSpec,
    StatefulAutoencoder,
    Value,
    has_deviations,
)
from latentmill.models.checks import check_audio, check_latents

if TYPE_CHECKING:
    from torch import Tensor

    from latentmill.models.base import State

AUDIO_CHANNELS = 2


@dataclass(frozen=True)
class SplitHandle:
    """Handle of a mono model that runs on stereo audio."""

    inner: ModelHandle

    @property
    def spec(self) -> ModelSpec:
        """The mono model's spec with twice the audio and latent channels and half the batch."""
        spec = self.inner.spec
        identity: dict[str, Value] = {**spec.identity, "split": AUDIO_CHANNELS}
        if has_deviations(identity):
            identity[ROWS] = MEANS_FIRST
        return replace(
            spec,
            channels=AUDIO_CHANNELS,
            latent_channels=AUDIO_CHANNELS * spec.latent_channels,
            batch_size={
                device: max(1, size // AUDIO_CHANNELS) for device, size in spec.batch_size.items()
            },
            identity=identity,
            max_batch_samples=spec.max_batch_samples and spec.max_batch_samples // AUDIO_CHANNELS,
        )

    @property
    def kind(self) -> str:
        """What a field of the values is. AttributeError if the mono model has no `kind`."""
        kind: str = cast(Any, self.inner).kind
        return kind

    def load(self, device: str) -> Split:
        return Split(self.spec, self.inner.load(device))


class Split:
    """Runs a mono model on all channels in one batch; implements `Autoencoder`."""

    def __init__(self, spec: ModelSpec, inner: Autoencoder) -> None:
        self.spec = spec
        self._inner = inner
        self._parts = 2 if has_deviations(spec.identity) else 1  # means and deviations

    def encode(self, audio: Tensor) -> Tensor:
        """Encode `[B, 2, T]` to `[B, 2 * D, Z]`."""
        check_audio(self.spec, audio)
        return self._joined(self._inner.encode(audio.flatten(0, 1)[:, None]))

    def encode_step(
        self, audio: Tensor, states: Sequence[State | None]
    ) -> tuple[Tensor, list[State]]:
        """Encode the next chunks `[B, 2, T]`; the state of a row is the channels' states."""
        check_audio(self.spec, audio)
        each: list[State | None] = []
        for state in states:
            middle = len(state or ()) // AUDIO_CHANNELS
            each += (None, None) if state is None else (state[:middle], state[middle:])
        inner = cast(StatefulAutoencoder, self._inner)
        latents, after = inner.encode_step(audio.flatten(0, 1)[:, None], each)
        return self._joined(latents), [
            left + right for left, right in zip(after[::2], after[1::2], strict=True)
        ]

    def decode(
        self,
        latents: Tensor,
        num_samples: int,
        *,
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> Tensor:
        """Decode `[B, 2 * D, Z]` to `[B, 2, num_samples]`; both channels share the noise."""
        check_latents(self.spec, latents, num_samples, positions)
        batch, _, frames = latents.shape
        rows = latents.reshape(batch, self._parts, AUDIO_CHANNELS, -1, frames)
        each = rows.transpose(1, 2).reshape(batch * AUDIO_CHANNELS, -1, frames)
        doubled = None
        if positions is not None:
            doubled = [position for position in positions for _ in range(AUDIO_CHANNELS)]
        audio = self._inner.decode(each, num_samples, seed=seed, positions=doubled)
        return audio.reshape(batch, AUDIO_CHANNELS, num_samples)

    def _joined(self, latents: Tensor) -> Tensor:
        """The latents of the channels, `[B * 2, D, Z]`, as `[B, 2 * D, Z]`."""
        _, depth, frames = latents.shape
        rows = latents.reshape(-1, AUDIO_CHANNELS, self._parts, depth // self._parts, frames)
        return rows.transpose(1, 2).reshape(len(rows), -1, frames)
