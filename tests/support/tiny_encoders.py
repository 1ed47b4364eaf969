"""Tiny random-weight encoders of the real classes, each with a small real tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"


def write_encoders(root: Path) -> None:
    """Write one repository for each case of the contract suite of embedders below `root`."""
    write_t5(root / "t5")
    write_t5(root / "umt5", umt5=True)
    write_bert(root / "bert")
    write_gpt(root / "gpt")
    write_clap(root / "clap")
    write_clap(root / "clap-fused", fusion=True)
    write_wav2vec(root / "wav2vec2", "Wav2Vec2")
    write_wav2vec(root / "hubert", "Hubert", feat_extract_norm="layer", do_stable_layer_norm=True)
    write_wav2vec(root / "wavlm", "WavLM")


def write_t5(folder: Path, *, umt5: bool = False, seed: int = 0, **saving: Any) -> None:
    """A whole T5, encoder and decoder, as T5's own repositories have it."""
    from transformers import T5Config, T5Model, T5Tokenizer, UMT5Config, UMT5Model

    torch.manual_seed(seed)
    pieces = ["\N{LOWER ONE EIGHTH BLOCK}", "\N{LOWER ONE EIGHTH BLOCK}piano", "drum", "ing", "s"]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words += [(piece, -2.0 - n / 8) for n, piece in enumerate([*pieces, *LETTERS])]
    tokenizer = T5Tokenizer(vocab=words, extra_ids=0, additional_special_tokens=["<extra_id_0>"])
    small = {"d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 3}
    config, model = (UMT5Config, UMT5Model) if umt5 else (T5Config, T5Model)
    model(config(vocab_size=64, decoder_start_token_id=0, **small)).save_pretrained(
        folder, **saving
    )
    tokenizer.save_pretrained(folder)


def write_bert(folder: Path, seed: int = 0) -> None:
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(seed)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "piano", "drum", "##s", "##ing"]
    words += [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(words)}, model_max_length=20)
    small = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2}
    config = BertConfig(
        vocab_size=len(words), num_attention_heads=3, max_position_embeddings=20, **small
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_gpt(folder: Path, seed: int = 0) -> None:
    """A causal model, whose tokenizer has neither a token for padding nor for the end."""
    from transformers import GPT2Config, GPT2Model, GPT2Tokenizer

    torch.manual_seed(seed)
    tokenizer = GPT2Tokenizer(vocab=byte_vocabulary("<|endoftext|>"), merges=[])
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=12, n_layer=2, n_head=3)
    GPT2Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_clap(folder: Path, seed: int = 0, *, fusion: bool = False) -> None:
    """Text and audio tower, tokenizer and feature extractor, as CLAP's own repositories have it."""
    from transformers import (
        ClapAudioConfig,
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        ClapTextConfig,
        RobertaTokenizer,
    )

    torch.manual_seed(seed)
    vocabulary = byte_vocabulary("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    tokenizer = RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=40)
    text = ClapTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=42,
    )
    audio = ClapAudioConfig(
        patch_embeds_hidden_size=8,
        hidden_size=16,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        num_hidden_layers=2,
        enable_fusion=fusion,
        fusion_type="aff_2d" if fusion else None,
        aff_block_r=2,
    )
    model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=10))
    for module in model.modules():  # its own initialisation makes all vectors nearly equal
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight, gain=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    truncation = "fusion" if fusion else "rand_trunc"
    ClapFeatureExtractor(truncation=truncation).save_pretrained(folder)


def write_wav2vec(folder: Path, kind: str, seed: int = 0, **config: Any) -> None:
    """A `Wav2Vec2`, `Hubert` or `WavLM` with the kernels and strides of the published ones."""
    import transformers

    torch.manual_seed(seed)
    small = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2}
    made = getattr(transformers, f"{kind}Config")(
        num_attention_heads=3,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=3,
        **small,
        **config,
    )
    getattr(transformers, f"{kind}Model")(made).save_pretrained(folder)
    normalise = config.get("feat_extract_norm") == "layer"
    transformers.Wav2Vec2FeatureExtractor(do_normalize=normalise).save_pretrained(folder)


def byte_vocabulary(*special: str) -> dict[str, int]:
    """A vocabulary of special tokens and all bytes, as byte-level BPE spells them."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = [*special, *sorted(ByteLevel.alphabet())]
    return {word: number for number, word in enumerate(words)}
