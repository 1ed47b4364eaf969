"""Tiny audio tokenizers of transformers for `hf:`: the real classes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SEMANTIC: dict[str, Any] = {
    "model_type": "hubert",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
ACOUSTIC: dict[str, Any] = {
    "model_type": "dac",
    "encoder_hidden_size": 2,
    "downsampling_ratios": [8, 5, 4, 2],
    "upsampling_ratios": [8, 5, 4, 2],
    "decoder_hidden_size": 32,
    "hidden_size": 32,
}
SPEECH: dict[str, Any] = {
    "model_type": "wav2vec2-bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "feature_projection_input_dim": 160,
    "conv_depthwise_kernel_size": 5,
}
WIDE: dict[str, Any] = {
    "hidden_size": 32,  # of 32 groups of its GroupNorm
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "encoder_hidden_size": 2,
    "semantic_model_config": SPEECH,
    "quantization_dim": 48,  # hidden size and that of the semantic model
}
# By model type: its configuration.
TOKENIZERS: dict[str, dict[str, Any]] = {
    "dac": {
        "encoder_hidden_size": 2,
        "decoder_hidden_size": 32,
        "n_codebooks": 2,
        "codebook_size": 16,
        "downsampling_ratios": [2, 4, 5, 8],
        "sampling_rate": 24000,
    },
    "encodec": {
        "num_filters": 2,
        "hidden_size": 8,
        "codebook_size": 16,
        "target_bandwidths": [1.2],
        "codebook_dim": 8,
    },
    "higgs_audio_v2_tokenizer": {
        "acoustic_model_config": ACOUSTIC,
        "semantic_model_config": SEMANTIC,
        "sample_rate": 16000,
        "semantic_sample_rate": 16000,
        "codebook_size": 16,
        "codebook_dim": 8,
        "target_bandwidths": [0.5],
    },
    "mimi": {
        "hidden_size": 16,
        "num_filters": 2,
        "codebook_size": 16,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
        "num_quantizers": 3,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "upsample_groups": 16,
    },
    "pocket_tts_audio_tokenizer": {
        "hidden_size": 16,
        "num_filters": 2,
        "latent_dim": 6,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "upsample_groups": 16,
        "sliding_window": 50,
        "layer_scale_initial_scale": 0.5,
    },
    "vibevoice_acoustic_tokenizer": {
        "hidden_size": 6,
        "num_filters": 4,
        "downsampling_ratios": [2, 4, 5],
        "depths": [1, 1, 1, 3],
        "layer_scale_init_value": 0.5,
        "initializer_range": 0.3,
    },
    "wavtokenizer": {
        "num_filters": 2,
        "hidden_size": 8,
        "codebook_size": 16,
        "codebook_dim": 8,
        "decoder_hidden_size": 32,
        "decoder_intermediate_size": 32,
        "decoder_num_layers": 1,
    },
    "xcodec": {
        "acoustic_model_config": ACOUSTIC,
        "semantic_model_config": SEMANTIC,
        "codebook_size": 16,
        "target_bandwidths": [0.5],
    },
    "neucodec": WIDE,
    "xcodec2": WIDE,
}
WITH_TORCHAUDIO = ("higgs_audio_v2_tokenizer", "neucodec", "xcodec2")


def write_tokenizer(folder: Path, model_type: str, seed: int = 0) -> Path:
    """Write the repository of a tiny tokenizer, whose codebooks and layers count."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **TOKENIZERS[model_type])
    model = transformers.MODEL_MAPPING[type(config)](config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("embed", "embed_sum")):
            buffer.normal_()
    for module in model.modules():  # their own initialisation is so small that silence comes out
        if isinstance(module, torch.nn.Conv1d) and model_type != "vibevoice_acoustic_tokenizer":
            torch.nn.init.kaiming_uniform_(module.weight, a=5**0.5)
    model.save_pretrained(folder)
    return folder
