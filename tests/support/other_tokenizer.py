"""A type of audio tokenizer that transformers does not have yet."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor


class OtherConfig(transformers.PreTrainedConfig):
    model_type = "tokenizer_of_tomorrow"
    sampling_rate = 8000
    frame_rate = 50  # its hop is 128 all the same
    kind = "loudest"


class OtherModel(transformers.PreTrainedModel):
    config_class = OtherConfig

    def __init__(self, config: OtherConfig) -> None:
        super().__init__(config)
        self.front = torch.nn.Conv1d(1, 6, 128, stride=128)
        self.back = torch.nn.ConvTranspose1d(6, 1, 128, stride=128)
        self.post_init()

    def encode(self, input_values: Tensor) -> Any:
        latents = self.front(input_values).transpose(1, 2)
        kind = self.config.kind
        if kind == "loudest":
            latents = latents / input_values.abs().max().clamp_min(1e-6)
        if kind == "noise":
            latents = latents + torch.randn_like(latents)
        name = "hidden" if kind == "hidden" else "latents"
        return transformers.utils.ModelOutput({name: latents})

    def decode(self, latents: Tensor) -> Any:
        return transformers.utils.ModelOutput(audio=self.back(latents.transpose(1, 2)))
