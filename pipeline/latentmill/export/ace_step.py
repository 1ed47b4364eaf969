"""The tensor files of ACE-Step 1.5's trainer (github.com/ace-step/ACE-Step-1.5).

`PreprocessedTensorDataset` (acestep/training/data_module.py) reads all `.pt` files of one folder.
Their contents are those of acestep/training/dataset_builder_modules/preprocess.py, as float32:

- `target_latents` `[T, 64]` and `attention_mask` `[T]`, all ones;
- `encoder_hidden_states` `[L, D]`, of the condition encoder, and `encoder_attention_mask` `[L]`;
- `context_latents` `[T, 128]`: 64 channels of the source, which is silence for text to music or
  any other stream of hints, and 64 of the mask of frames to be generated, all ones
  (preprocess_context.py);
- `metadata`: caption, lyrics and others.

There is no manifest.json, because it has absolute paths; without it, the reader lists the folder.
So names have no folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from latentmill.errors import ConfigError, ItemError
from latentmill.export.layout import (
    Layout,
    Role,
    caption_of,
    escaped,
    same_length,
    torch_bytes,
)
from latentmill.record import FloatArray, Record

CHANNELS, RATE = 64, 25  # of its autoencoder; the rate in frames per second
STATES, CONTEXT = "encoder_hidden_states", "context_latents"


class ACEStep(Layout):
    """One `.pt` file for each item."""

    tool = "ACE-Step"
    roles: ClassVar[Mapping[str, Role]] = {
        STATES: Role(("tokens",), required=True),
        CONTEXT: Role(("frames",)),
    }

    def check(self) -> None:
        model = self.store.info.model
        channels = model["latent_channels"] - self.store.origin.deviations
        rate = model["sample_rate"] / model["hop"]
        if (channels, rate) != (CHANNELS, RATE):
            raise ConfigError(
                f"{self.store.url} has {channels} channels at {rate:g} frames/s, but ACE-Step "
                f"trains on {CHANNELS} at {RATE}: encode with its autoencoder, "
                "--model oobleck:ACE-Step/Ace-Step1.5."
            )

    @staticmethod
    def name(key: str) -> str:
        return escaped(key).replace("/", "%2F")

    def paths(self, name: str) -> Sequence[str]:
        return (f"{name}.pt",)

    def contents(self, record: Record, values: Mapping[str, FloatArray]) -> Sequence[bytes]:
        states = values[STATES].T
        if not len(states):
            raise ItemError("its field has no tokens")
        sample = {
            "target_latents": self.means(record.latent).T,
            "attention_mask": np.ones(record.frames, np.float32),
            STATES: states,
            "encoder_attention_mask": np.ones(len(states), np.float32),
            CONTEXT: self._context(record.frames, values.get(CONTEXT)).T,
            "metadata": _metadata(record),
        }
        return (torch_bytes(sample),)

    def _context(self, frames: int, hints: FloatArray | None) -> FloatArray:
        """`[128, frames]`: hints or silence, and the mask, unless the hints have it."""
        if hints is None:
            hints = self.means(self.store.origin.of_length(frames))
        same_length("its context", hints.shape[1], frames)
        if len(hints) not in (CHANNELS, 2 * CHANNELS):
            raise ItemError(
                f"its context has {len(hints)} channels: ACE-Step takes {CHANNELS}, or "
                f"{2 * CHANNELS} with the mask"
            )
        ones = np.ones((2 * CHANNELS - len(hints), frames), np.float32)
        return np.concatenate((hints, ones))


def _metadata(record: Record) -> dict[str, Any]:
    """What the preprocessing of ACE-Step stores of an item; the trainer does not need it."""
    own = record.metadata
    lyrics = own.get("lyrics") or "[Instrumental]"
    given = {name: own.get(name) for name in ("bpm", "keyscale", "timesignature")}
    return given | {
        "audio_path": record.source_uri,
        "filename": record.key,
        "caption": caption_of(own),
        "lyrics": lyrics,
        "duration": record.duration,
        "language": own.get("language") or "unknown",
        "is_instrumental": lyrics == "[Instrumental]",
    }
