"""What `hf:` must return: the latents before the quantiser, and the audio of latents.

Both are computed with the parts of the package's models, by model type.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REFERENCES: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    "dac": (
        lambda model, x: model.encoder(x),
        lambda model, z: model.decode(quantized_representation=z).audio_values[:, None],
    ),
    "encodec": (lambda model, x: model.encoder(x), lambda model, z: model.decoder(z)),
    "mimi": (
        lambda model, x: model.encoder(x).latents,
        lambda model, z: model.decoder(z).audio_values,
    ),
    "pocket_tts_audio_tokenizer": (
        lambda model, x: model.encode(x).latents.transpose(1, 2),
        lambda model, z: model.decode(z.transpose(1, 2)).audio_values,
    ),
    "vibevoice_acoustic_tokenizer": (
        lambda model, x: model.encode(x, sample=False).latents.transpose(1, 2),
        lambda model, z: model.decode(z.transpose(1, 2)).audio,
    ),
    "wavtokenizer": (
        lambda model, x: model.encoder_model.encoder(x),
        lambda model, z: model.head(model.backbone(z, torch.tensor([0]))).reshape(len(z), 1, -1),
    ),
    "xcodec": (
        lambda model, x: model.fc(
            torch.cat(
                (
                    model.acoustic_encoder(x),
                    model.encoder_semantic(model._extract_semantic_features(x).transpose(1, 2)),
                ),
                dim=1,
            ).transpose(1, 2)
        ).transpose(1, 2),
        lambda model, z: model.acoustic_decoder(model.fc2(z.transpose(1, 2)).transpose(1, 2)),
    ),
}


def loaded(repo: Path, model_type: str) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(repo)
    return transformers.MODEL_MAPPING[type(config)].from_pretrained(repo).eval()
