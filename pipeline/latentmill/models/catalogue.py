"""The built-in models: names, factories and descriptions.

A new family is one file with a factory, and an entry in `BUILT_IN`, in `FAMILIES` or, for models of
texts and latents, in `EMBEDDERS`. The last two have the families whose names include a repository
(`dac:descript/dac_44khz`), which is the factory's first argument.
"""

from __future__ import annotations

from typing import NamedTuple


class BuiltIn(NamedTuple):
    """A model, or a family of models."""

    factory: str  # module:attribute, imported when the model is resolved
    description: str
    requirement: str = ""
    example: str = ""  # a repository of the family
    placeholder: str = "REPO"  # what follows the family in lists


_LINEAR_CAE = "pip install 'latentmill[linear-cae]'"
BUILT_IN = {
    "mdct": BuiltIn(
        "latentmill.models.families.mdct:build",
        "exactly linear and invertible transform without weights (demo, tests, baseline)",
    ),
    "lin-cae": BuiltIn(
        "latentmill.models.families.linear_cae.model:lin_cae",
        "linear consistency autoencoder, 44.1 kHz mono, 64 channels at 10.8 frames/s",
        _LINEAR_CAE,
    ),
    "lin-cae-2": BuiltIn(
        "latentmill.models.families.linear_cae.model:lin_cae_2",
        "second linear consistency autoencoder, same architecture, scale factor 40",
        _LINEAR_CAE,
    ),
    "m2l": BuiltIn(
        "latentmill.models.families.linear_cae.model:m2l",
        "baseline of lin-cae without linearity training, same architecture, scale factor 15",
        _LINEAR_CAE,
    ),
    "music2latent": BuiltIn(
        "latentmill.models.families.music2latent:build",
        "consistency autoencoder, 44.1 kHz mono, 64 channels at 10.8 frames/s (CC BY-NC)",
        "pip install 'latentmill[music2latent]'",
    ),
}
_TRANSFORMERS = "pip install 'latentmill[transformers]'"
_DIFFUSERS = "pip install 'latentmill[diffusers]'"
FAMILIES = {
    "oobleck": BuiltIn(
        "latentmill.models.families.oobleck:build",
        "VAE of Stable Audio Open and ACE-Step 1.5, stereo, 64 channels at 21.5 or 25 frames/s",
        _DIFFUSERS,
        "stabilityai/stable-audio-open-1.0",
    ),
    "same": BuiltIn(
        "latentmill.models.families.same:build",
        "autoencoder of Stable Audio 3, 44.1 kHz stereo, 256 channels at 10.8 frames/s",
        _DIFFUSERS,
        "stabilityai/stable-audio-3-medium",
    ),
    "cosmos": BuiltIn(
        "latentmill.models.families.cosmos:build",
        "audio tokenizer of Cosmos 3, 48 kHz stereo, 64 channels at 25 frames/s",
        _DIFFUSERS,
        "/models/cosmos-3",
    ),
    "ltx2": BuiltIn(
        "latentmill.models.families.ltx2:build",
        "audio VAE of LTX-2 over log-mel spectrograms, 16 kHz stereo, 128 channels at 25 frames/s",
        _DIFFUSERS,
        "Lightricks/LTX-2",
    ),
    "mmaudio": BuiltIn(
        "latentmill.models.families.mmaudio:build",
        "VAE of MMAudio over log-mel spectrograms, 44.1 kHz mono, 40 channels at 43 frames/s",
        _DIFFUSERS,
        "/models/kandinsky-6",
    ),
    "audioldm2": BuiltIn(
        "latentmill.models.families.audioldm2:build",
        "VAE of AudioLDM 2, AudioLDM and MusicLDM, 16 kHz mono, 128 channels at 25 frames/s",
        "pip install 'latentmill[diffusers,transformers]'",
        "cvssp/audioldm2",
    ),
    "kvae": BuiltIn(
        "latentmill.models.families.waveform_vae:build_kvae",
        "KVAE-Audio of Kandinsky, 48 kHz mono, 64 channels at 50 frames/s",
        _DIFFUSERS,
        "kandinskylab/KVAE-Audio",
    ),
    "minimax": BuiltIn(
        "latentmill.models.families.waveform_vae:build_minimax",
        "audio VAE of MiniMax-H3, 32 kHz mono, 32 channels at 40 frames/s",
        _DIFFUSERS,
        "MiniMaxAI/MiniMax-H3",
    ),
    "longcat": BuiltIn(
        "latentmill.models.families.waveform_vae:build_longcat",
        "VAE of LongCat-AudioDiT, 24 kHz mono, 64 channels at 11.7 frames/s",
        _DIFFUSERS,
        "ruixiangma/LongCat-AudioDiT-1B-Diffusers",
    ),
    "encodec": BuiltIn(
        "latentmill.models.families.encodec:build",
        "EnCodec before quantisation, 24 or 32 kHz mono, or 48 kHz stereo; 50, 75 or 150 frames/s",
        _TRANSFORMERS,
        "facebook/encodec_24khz",
    ),
    "dac": BuiltIn(
        "latentmill.models.families.dac:build",
        "Descript Audio Codec before quantisation, mono, 1024 channels at 50 to 86 frames/s",
        _TRANSFORMERS,
        "descript/dac_44khz",
    ),
    "mimi": BuiltIn(
        "latentmill.models.families.mimi:build",
        "Mimi before quantisation, 24 kHz mono, 512 channels at 12.5 frames/s",
        _TRANSFORMERS,
        "kyutai/mimi",
    ),
    "pockettts": BuiltIn(
        "latentmill.models.families.pockettts:build",
        "audio tokenizer of Pocket TTS, 24 kHz mono, 32 channels at 12.5 frames/s",
        _TRANSFORMERS,
        "eustlb/pocket-tts-audio-tokenizer",
    ),
    "vibevoice": BuiltIn(
        "latentmill.models.families.vibevoice:build",
        "acoustic tokenizer of VibeVoice, 24 kHz mono, 64 channels at 7.5 frames/s",
        _TRANSFORMERS,
        "microsoft/VibeVoice-AcousticTokenizer",
    ),
    "hf": BuiltIn(
        "latentmill.models.families.hf.model:build",
        "any audio tokenizer of transformers, before quantisation (dac, xcodec, wavtokenizer, ...)",
        _TRANSFORMERS,
        "swiss-ai/wavtokenizer-large-unify-40token",
    ),
    "trained": BuiltIn(
        "latentmill.models.families.trained:build",
        "a model that jobs/train_linear.py trained; PATH is the folder of its run",
        example="runs/linear",
        placeholder="PATH",
    ),
}
# Models of audio that cannot decode; their names are in `FAMILIES`, too.
ENCODERS = {
    "clap": BuiltIn(
        "latentmill.models.families.audio_encoder:build_clap",
        "one vector of audio, or one for each 10 s, by CLAP, 48 kHz mono",
        _TRANSFORMERS,
        "laion/larger_clap_music",
    ),
    "audio": BuiltIn(
        "latentmill.models.families.audio_encoder:build_audio",
        "frames of wav2vec 2.0, HuBERT, WavLM and models like them, 16 kHz mono, 50 frames/s",
        _TRANSFORMERS,
        "facebook/hubert-base-ls960",
    ),
}
FAMILIES |= ENCODERS
# The models whose input is a text: `resolve_embedder`.
EMBEDDERS = {
    "t5": BuiltIn(
        "latentmill.models.families.text_encoder:build_t5",
        "tokens of a text by the encoder of T5, mT5 or umT5",
        _TRANSFORMERS,
        "google/flan-t5-large",
    ),
    "clap": BuiltIn(
        "latentmill.models.families.text_encoder:build_clap",
        "one vector of a text, to compare with CLAP's vectors of audio",
        _TRANSFORMERS,
        "laion/larger_clap_music",
    ),
    "text": BuiltIn(
        "latentmill.models.families.text_encoder:build",
        "tokens of a text, or their mean, by any text encoder of transformers",
        _TRANSFORMERS,
        "FacebookAI/roberta-base",
    ),
}
