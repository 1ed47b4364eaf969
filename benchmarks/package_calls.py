"""The families with tiny random weights, each with the call of its own package.

A new family is an entry in `CASES`. A call takes the folder of a repository and audio `[1, C, T]`,
and returns latents `[1, D, Z]`, or codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Call = Callable[[Path, Tensor], Tensor]
WHOLE = "no package: latentmill's own encode, in one piece"


@dataclass(frozen=True)
class Case:
    """A model.

    Attributes:
        model: Its name; REPOS is the folder of the repositories.
        reference: The call of its package, for the table.
        theirs: The call; None if there is no package.
        options: Options of the model.
        settings: Other arguments of `latentmill encode`.
        codes: Whether latents are codes.
        split: Whether `--channels split` is measured, too.
    """

    model: str
    reference: str = WHOLE
    theirs: Call | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    codes: bool = False
    split: bool = False


def of_diffusers(name: str, folder: str, call: Callable[[Any, Tensor], Tensor]) -> Call:
    """A call on a class of diffusers that `from_pretrained` has loaded."""

    @cache
    def load(repo: Path) -> Any:
        import diffusers

        return getattr(diffusers, name).from_pretrained(repo / folder).eval()

    return lambda repo, audio: call(load(repo), audio)


def of_transformers(call: Callable[[Any, Tensor], Tensor]) -> Call:
    """A call on the model of transformers that `AutoModel` loads."""
    return lambda repo, audio: call(auto_model(repo), audio)


@cache
def auto_model(repo: Path) -> Any:
    import transformers

    return transformers.AutoModel.from_pretrained(repo).eval()


def of_a_tokenizer(model_type: str) -> Case:
    """`hf:` on a type of model, compared with the parts of its own class."""

    @cache
    def load(repo: Path) -> Any:
        from support.tokenizer_references import loaded

        return loaded(repo, model_type)

    def run(repo: Path, audio: Tensor) -> Tensor:
        from support.tokenizer_references import REFERENCES

        return REFERENCES[model_type][0](load(repo), audio)

    return Case(
        f"hf:REPOS/tokenizers/{model_type}",
        f"`{model_type}` before its quantiser",
        run,
        split=model_type == "wavtokenizer",
    )


def mode(model: Any, audio: Tensor) -> Tensor:
    latents: Tensor = model.encode(audio).latent_dist.mode()
    return latents


def cosmos(model: Any, audio: Tensor) -> Tensor:
    model.register_to_config(normalize_volume=False)
    return mode(model, audio)


def minimax(model: Any, audio: Tensor) -> Tensor:
    """As MiniMax-H3's pipeline."""
    mean, std = torch.tensor(model.config.latents_mean), torch.tensor(model.config.latents_std)
    return (mode(model, audio) - mean[:, None]) / std[:, None]


def encodec_codes(model: Any, audio: Tensor) -> Tensor:
    given = model.encode(audio, bandwidth=model.config.target_bandwidths[-1])
    codes: Tensor = given.audio_codes[0]  # of the only chunk
    return codes


def encodec_normalised(model: Any, audio: Tensor) -> Tensor:
    """The encoder on a chunk that is divided by its loudness, as `encode` does."""
    loudness = audio.mean(dim=1).square().mean(dim=-1).sqrt() + 1e-8
    latents: Tensor = model.encoder(audio / loudness)
    return latents


def vibevoice(model: Any, audio: Tensor) -> Tensor:
    latents: Tensor = model.encode(audio, sample=False).latents.transpose(1, 2)
    return latents


def log_mel(audio: Tensor, pad: int) -> Tensor:
    """LTX-2's and AudioLDM's spectrogram `[1, C, T, bins]` by transformers, in double precision.

    diffusers has none. The tests' models have 16 bins, the published ones 64.
    """
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    filters = mel_filter_bank(513, 16, 0, 8000, 16000, norm="slaney", mel_scale="slaney")
    mels = [
        spectrogram(
            np.pad(channel.numpy().astype(np.float64), pad, mode="reflect"),
            window_function(1024, "hann"),
            frame_length=1024,
            hop_length=160,
            center=False,
            power=1.0,
            mel_filters=filters,
            mel_floor=1e-5,
            log_mel="log",
        )
        for channel in audio[0]
    ]
    return torch.from_numpy(np.stack(mels)).float().transpose(1, 2)[None]


def packed(latents: Tensor) -> Tensor:
    """`[1, C, Z, bins]` to `[1, C * bins, Z]`."""
    return latents.transpose(2, 3).flatten(1, 2)


def ltx2(model: Any, audio: Tensor) -> Tensor:
    """As LTX-2's pipeline."""
    latents = packed(mode(model, log_mel(audio, 512)))
    return (latents - model.latents_mean[:, None]) / model.latents_std[:, None]


def linear_cae(name: str) -> Case:
    @cache
    def load() -> Any:
        import linear_cae

        return linear_cae.Autoencoder.from_pretrained(name)

    def run(repo: Path, audio: Tensor) -> Tensor:
        latents: Tensor = load().encode(audio[:, 0])
        return latents

    return Case(name, "`linear_cae.Autoencoder.encode`", run, split=name == "lin-cae")


@cache
def load_music2latent(repo: Path) -> Any:
    from music2latent import inference

    inference.download_model = lambda: None  # its weights are random here
    return inference.EncoderDecoder(str(repo / "music2latent.pt"), device=torch.device("cpu"))


def music2latent(repo: Path, audio: Tensor) -> Tensor:
    """`EncoderDecoder.encode` without its truncation to whole latent frames."""
    from music2latent import hparams_inference
    from music2latent.audio import to_representation_encoder

    encoder = load_music2latent(repo).gen.encoder
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its results have another rounding
    try:
        latents: Tensor = encoder(to_representation_encoder(audio[:, 0]))
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return latents / hparams_inference.sigma_rescale


def clap(repo: Path, audio: Tensor) -> Tensor:
    """One vector for each window of 10 s."""
    import transformers

    extractor = transformers.ClapFeatureExtractor.from_pretrained(repo)
    vectors = []
    for window in audio[0, 0].split(extractor.nb_max_samples):
        features = extractor(window.numpy(), sampling_rate=48000, return_tensors="pt")
        vectors.append(auto_model(repo).get_audio_features(**features).pooler_output)
    return torch.stack(vectors, dim=-1)


def wav2vec(repo: Path, audio: Tensor) -> Tensor:
    import transformers

    extractor = transformers.AutoFeatureExtractor.from_pretrained(repo)
    features = extractor(audio[0, 0].numpy(), sampling_rate=16000, return_tensors="pt")
    states: Tensor = auto_model(repo)(**features).last_hidden_state
    return states.transpose(1, 2)


CODES = {"output": "codes"}
CASES = {
    "mdct": Case("mdct", split=True),
    "lin-cae": linear_cae("lin-cae"),
    "lin-cae-2": linear_cae("lin-cae-2"),
    "m2l": linear_cae("m2l"),
    "music2latent": Case(
        "music2latent",
        "`music2latent.EncoderDecoder.encode`, without truncation",
        music2latent,
        {"repo": "REPOS/music2latent"},
        ("--max-seconds", "4"),  # its architecture is the published one
        split=True,
    ),
    "oobleck": Case(
        "oobleck:REPOS/oobleck",
        "`AutoencoderOobleck.encode`, mode",
        of_diffusers("AutoencoderOobleck", "vae", mode),
    ),
    "oobleck of ACE-Step 1.5": Case(
        "oobleck:REPOS/ace-step",
        "`AutoencoderOobleck.encode`, mode",
        of_diffusers("AutoencoderOobleck", "vae", mode),
    ),
    "cosmos": Case(
        "cosmos:REPOS/cosmos",
        "`Cosmos3AVAEAudioTokenizer.encode`, mode, without `normalize_volume`",
        of_diffusers("Cosmos3AVAEAudioTokenizer", "sound_tokenizer", cosmos),
    ),
    "same": Case(
        "same:REPOS/same",
        "`AutoencoderSAME.encode`",
        of_diffusers("AutoencoderSAME", "", lambda model, audio: model.encode(audio).latents),
        settings=("--chunk-seconds", "1", "--max-seconds", "4"),  # its frames are 64 times shorter
    ),
    "kvae": Case(
        "kvae:REPOS/kvae",
        "`AutoencoderKLKVAEAudio.encode`, mode",
        of_diffusers("AutoencoderKLKVAEAudio", "diffusers", mode),
        split=True,
    ),
    "minimax": Case(
        "minimax:REPOS/minimax",
        "`AutoencoderKLMiniMaxH3Audio.encode`, mode, normalised",
        of_diffusers("AutoencoderKLMiniMaxH3Audio", "audio_vae", minimax),
        split=True,
    ),
    "longcat": Case(
        "longcat:REPOS/longcat",
        "`LongCatAudioDiTVae.encode(sample_posterior=False)`",
        of_diffusers(
            "LongCatAudioDiTVae",
            "vae",
            lambda model, audio: model.encode(audio, sample_posterior=False).latents,
        ),
        split=True,
    ),
    "ltx2": Case(
        "ltx2:REPOS/ltx2",
        "`AutoencoderKLLTX2Audio.encode`, mode, normalised",
        of_diffusers("AutoencoderKLLTX2Audio", "audio_vae", ltx2),
    ),
    "mmaudio": Case(
        "mmaudio:REPOS/mmaudio",
        "`MMAudioVAE.encode`, mode",
        of_diffusers("MMAudioVAE", "audio_vae", lambda model, audio: mode(model, audio[:, 0])),
        split=True,
    ),
    "audioldm2": Case(
        "audioldm2:REPOS/audioldm2",
        "`AutoencoderKL.encode`, mode",
        of_diffusers(
            "AutoencoderKL", "vae", lambda model, audio: packed(mode(model, log_mel(audio, 432)))
        ),
        split=True,
    ),
    "dac": Case(
        "dac:REPOS/dac-44k",
        "`DacModel.encoder`",
        of_transformers(lambda model, audio: model.encoder(audio)),
        split=True,
    ),
    "dac, codes": Case(
        "dac:REPOS/dac-44k",
        "`DacModel.encode`",
        of_transformers(lambda model, audio: model.encode(audio).audio_codes),
        CODES,
        codes=True,
    ),
    "encodec, 24 kHz": Case(
        "encodec:REPOS/encodec-24k",
        "`EncodecModel.encoder`",
        of_transformers(lambda model, audio: model.encoder(audio)),
        split=True,
    ),
    "encodec, 24 kHz, codes": Case(
        "encodec:REPOS/encodec-24k",
        "`EncodecModel.encode`",
        of_transformers(encodec_codes),
        CODES,
        codes=True,
    ),
    "encodec, 48 kHz": Case(
        "encodec:REPOS/encodec-48k",
        "`EncodecModel.encoder`, normalised",
        of_transformers(encodec_normalised),
    ),
    "encodec, 48 kHz, codes": Case(
        "encodec:REPOS/encodec-48k",
        "`EncodecModel.encode`",
        of_transformers(encodec_codes),
        CODES,
        ("--max-seconds", "1"),
        codes=True,
    ),
    "mimi": Case(
        "mimi:REPOS/mimi",
        "`MimiModel.encoder`",
        of_transformers(lambda model, audio: model.encoder(audio).latents),
        split=True,
    ),
    "mimi, codes": Case(
        "mimi:REPOS/mimi",
        "`MimiModel.encode`",
        of_transformers(lambda model, audio: model.encode(audio).audio_codes),
        CODES,
        codes=True,
    ),
    "pockettts": Case(
        "pockettts:REPOS/pockettts",
        "`PocketTTSAudioTokenizerModel.encode`",
        of_transformers(lambda model, audio: model.encode(audio).latents.transpose(1, 2)),
        split=True,
    ),
    "vibevoice": Case(
        "vibevoice:REPOS/vibevoice",
        "`VibeVoiceAcousticTokenizerModel.encode(sample=False)`",
        of_transformers(vibevoice),
        split=True,
    ),
    **{
        f"hf, {model_type}": of_a_tokenizer(model_type)
        for model_type in (
            "dac",
            "encodec",
            "mimi",
            "pocket_tts_audio_tokenizer",
            "vibevoice_acoustic_tokenizer",
            "wavtokenizer",
            "xcodec",
        )
    },
    "trained, conv": Case("trained:REPOS/trained", split=True),
    "clap": Case(
        "clap:REPOS/encoders/clap", "`ClapModel.get_audio_features`, each 10 s", clap, split=True
    ),
    "audio, wav2vec2": Case("audio:REPOS/encoders/wav2vec2", "`Wav2Vec2Model`", wav2vec),
    "audio, hubert": Case("audio:REPOS/encoders/hubert", "`HubertModel`", wav2vec, split=True),
    "audio, wavlm": Case("audio:REPOS/encoders/wavlm", "`WavLMModel`", wav2vec),
}
