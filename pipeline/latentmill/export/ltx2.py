"""The folders of the LTX-2 trainer (github.com/Lightricks/LTX-2, packages/ltx-trainer).

`PrecomputedDataset` (src/ltx_trainer/datasets.py) reads files of the same name from each of its
folders. Their contents are those of scripts/process_videos.py and scripts/process_captions.py:

- `audio_latents/KEY.pt`: `latents` `[C, T, M]` float32, normalised with the statistics of the
  checkpoint; `num_time_steps` T, `frequency_bins` M, `duration` in seconds.
- `conditions/KEY.pt`: the embedded caption, `[L, D]` bfloat16, and `prompt_attention_mask` `[L]`,
  0 for padding, which is on the left. As in the scripts, padding is not stored, except one row if
  there are 128, 256, ... tokens; the reader pads to 1024.
- `audio_masks/KEY.pt`: `mask` `[T]`, 1 for frames that are given, 0 for frames to be generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from latentmill.errors import ConfigError, ItemError
from latentmill.export.layout import (
    Layout,
    Role,
    escaped,
    same_length,
    torch_bytes,
    with_first_escaped,
)
from latentmill.record import FloatArray, Record

CHANNELS = 8  # C of its audio autoencoder; the rows of our latents are C * M
TOKENS = 1024  # to which the reader pads
TILE = 128  # the trainer's connector takes multiples of it

PROMPT = "prompt_embeds"  # for both modalities
VIDEO, AUDIO = "video_prompt_embeds", "audio_prompt_embeds"
MASK = "audio_mask"


class LTX2(Layout):
    """`audio_latents/`, and `conditions/` and `audio_masks/` if there are fields for them."""

    tool = "LTX-2"
    roles: ClassVar[Mapping[str, Role]] = {
        PROMPT: Role(("tokens",)),
        VIDEO: Role(("tokens",)),
        AUDIO: Role(("tokens",)),
        MASK: Role(("frames",)),
    }

    def check(self) -> None:
        model = self.store.info.model
        if model["name"] != "ltx2":
            raise ConfigError(
                f"{self.store.url} has latents of {model['name']}, but LTX-2 trains on those of "
                "its own autoencoder: encode with --model ltx2:Lightricks/LTX-2."
            )
        if self._rows % CHANNELS:
            raise ConfigError(
                f"{self.store.url} has {self._rows} channels, but LTX-2 needs a multiple of "
                f"{CHANNELS}: encode with an autoencoder of LTX-2."
            )
        if self._prompts in ((), (PROMPT,), (VIDEO,), (VIDEO, AUDIO)):
            return
        raise ConfigError(
            f"invalid fields {', '.join(self._prompts)}: LTX-2 takes {PROMPT} for both modalities, "
            f"or {VIDEO}, alone or with {AUDIO}."
        )

    @property
    def _rows(self) -> int:
        return int(self.store.info.model["latent_channels"]) - self.store.origin.deviations

    @property
    def _prompts(self) -> tuple[str, ...]:
        return tuple(role for role in (PROMPT, VIDEO, AUDIO) if role in self.fields)

    @staticmethod
    def name(key: str) -> str:
        name = escaped(key)
        # The reader looks for conditions/condition_X.pt beside a file latent_X.pt.
        reserved = name.rpartition("/")[2].startswith("latent_")
        return with_first_escaped(name) if reserved else name

    def paths(self, name: str) -> Sequence[str]:
        folders = ["conditions"] if self._prompts else []
        folders += ["audio_masks"] if MASK in self.fields else []
        return [f"{folder}/{name}.pt" for folder in (*folders, "audio_latents")]

    def contents(self, record: Record, values: Mapping[str, FloatArray]) -> Sequence[bytes]:
        found = []
        if self._prompts:
            found.append(_conditions({role: values[role] for role in self._prompts}))
        if MASK in self.fields:
            found.append(_mask(values[MASK], record.frames))
        latents = self.means(record.latent).reshape(CHANNELS, -1, record.frames).swapaxes(1, 2)
        latent = {
            "latents": latents,
            "num_time_steps": record.frames,
            "frequency_bins": self._rows // CHANNELS,
            "duration": record.duration,
        }
        return [*found, torch_bytes(latent)]


def _mask(values: FloatArray, frames: int) -> bytes:
    same_length("its mask", values.shape[1], frames)
    if len(values) != 1:
        raise ItemError(f"its mask has {len(values)} rows: LTX-2 takes one")
    return torch_bytes({"mask": values[0]})


def _conditions(prompts: Mapping[str, FloatArray]) -> bytes:
    """The embedded captions `[D, L]` of one sample, by role."""
    import torch  # slow, and other formats do not need it

    lengths = {values.shape[1] for values in prompts.values()}
    count = max(lengths)
    if len(lengths) > 1 or not 0 < count <= TOKENS:
        found = " and ".join(map(str, sorted(lengths)))
        raise ItemError(f"its caption has {found} tokens: LTX-2 takes 1 to {TOKENS}")
    padding = int(count % TILE == 0 and count < TOKENS)
    mask = np.ones(padding + count, np.int64)
    mask[:padding] = 0
    padded: dict[str, Any] = {
        role: torch.from_numpy(np.pad(values.T, ((padding, 0), (0, 0)))).to(torch.bfloat16)
        for role, values in prompts.items()
    }
    return torch_bytes(padded | {"prompt_attention_mask": mask})
