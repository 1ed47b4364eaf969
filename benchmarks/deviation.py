"""Measures how far a model's latents are from those of its own package, and what chunking adds.

    python benchmarks/deviation.py [--audio FILE ...] [--only NAME ...] [--results FOLDER]

THE WEIGHTS ARE RANDOM AND SMALL: the repositories that the tests write, of the packages' real
classes. The first figure is ||ours - theirs|| / ||theirs|| of 10 s of music in one piece; for
codecs it is the share of codes that differ. The second one is ||chunked - whole|| / ||whole|| with
the model's own chunks and seams, on 2.5 chunks. Both are the largest of all recordings. The first
one is rounding, whatever the weights are; the second one depends on them if a frame depends on its
whole chunk.

A new family is one line in `CASES`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import RESULTS, ROOT, excerpt, random_linear_cae, recordings, write_result

SECONDS = 10.0
Call = Callable[[Path, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A family.

    Attributes:
        model: The model; REPOS is the folder of the tests' repositories.
        theirs: Its package's own call: the repository and audio `[1, C, T]`, to latents or codes.
        reference: The name of the call.
        codes: Whether to compare codes, as the package does not return latents.
        seconds: Length of the audio of the first comparison.
        chunk_seconds: Chunk length of the second one; None: the model's own.
    """

    model: str
    theirs: Call
    reference: str
    codes: bool = False
    seconds: float = SECONDS
    chunk_seconds: float | None = None


def of_diffusers(name: str, folder: str, call: Callable[[Any, Tensor], Tensor]) -> Call:
    """A call on a class of diffusers that `from_pretrained` has loaded."""

    def run(repo: Path, audio: Tensor) -> Tensor:
        import diffusers

        return call(getattr(diffusers, name).from_pretrained(repo / folder).eval(), audio)

    return run


def of_transformers(call: Callable[[Any, Tensor], Tensor]) -> Call:
    """A call on the model of transformers that `AutoModel` loads."""

    def run(repo: Path, audio: Tensor) -> Tensor:
        import transformers

        return call(transformers.AutoModel.from_pretrained(repo).eval(), audio)

    return run


def mode(model: Any, audio: Tensor) -> Tensor:
    latents: Tensor = model.encode(audio).latent_dist.mode()
    return latents


def minimax(model: Any, audio: Tensor) -> Tensor:
    """As MiniMax-H3's pipeline."""
    mean, std = torch.tensor(model.config.latents_mean), torch.tensor(model.config.latents_std)
    return (mode(model, audio) - mean[:, None]) / std[:, None]


def encodec_codes(model: Any, audio: Tensor) -> Tensor:
    given = model.encode(audio, bandwidth=model.config.target_bandwidths[-1])
    codes: Tensor = given.audio_codes[0]  # of the only chunk
    return codes


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


def lin_cae(repo: Path, audio: Tensor) -> Tensor:
    import linear_cae

    latents: Tensor = linear_cae.Autoencoder.from_pretrained("lin-cae").encode(audio[:, 0])
    return latents


def music2latent(repo: Path, audio: Tensor) -> Tensor:
    from music2latent import inference

    from latentmill.models.families.linear_cae.lean import exact_attention

    inference.download_model = lambda: None  # its weights are random here
    file = repo / "music2latent.pt"
    package = inference.EncoderDecoder(str(file), device=torch.device("cpu"))
    with exact_attention():
        latents: Tensor = package.encode(audio[:, 0])
    return latents


CASES = {
    "lin-cae": Case("lin-cae", lin_cae, "linear_cae.Autoencoder.encode"),
    "music2latent": Case("music2latent", music2latent, "music2latent.EncoderDecoder.encode"),
    "oobleck": Case(
        "oobleck:REPOS/oobleck",
        of_diffusers("AutoencoderOobleck", "vae", mode),
        "AutoencoderOobleck.encode, mode",
    ),
    "oobleck of ACE-Step 1.5": Case(
        "oobleck:REPOS/ace-step",
        of_diffusers("AutoencoderOobleck", "vae", mode),
        "AutoencoderOobleck.encode, mode",
    ),
    "cosmos": Case(
        "cosmos:REPOS/cosmos",
        of_diffusers("Cosmos3AVAEAudioTokenizer", "sound_tokenizer", mode),
        "Cosmos3AVAEAudioTokenizer.encode, mode, at a peak of 0.95",
    ),
    "same": Case(
        "same:REPOS/same",
        of_diffusers("AutoencoderSAME", "", lambda model, audio: model.encode(audio).latents),
        "AutoencoderSAME.encode",
        seconds=1.0,
        chunk_seconds=0.5,  # the tiny model's frames are 64 times shorter
    ),
    "kvae": Case(
        "kvae:REPOS/kvae",
        of_diffusers("AutoencoderKLKVAEAudio", "diffusers", mode),
        "AutoencoderKLKVAEAudio.encode, mode",
    ),
    "minimax": Case(
        "minimax:REPOS/minimax",
        of_diffusers("AutoencoderKLMiniMaxH3Audio", "audio_vae", minimax),
        "AutoencoderKLMiniMaxH3Audio.encode, mode, normalised",
    ),
    "longcat": Case(
        "longcat:REPOS/longcat",
        of_diffusers(
            "LongCatAudioDiTVae",
            "vae",
            lambda model, audio: model.encode(audio, sample_posterior=False).latents,
        ),
        "LongCatAudioDiTVae.encode(sample_posterior=False)",
    ),
    "ltx2": Case(
        "ltx2:REPOS/ltx2",
        of_diffusers("AutoencoderKLLTX2Audio", "audio_vae", ltx2),
        "AutoencoderKLLTX2Audio.encode, mode, normalised",
    ),
    "mmaudio": Case(
        "mmaudio:REPOS/mmaudio",
        of_diffusers("MMAudioVAE", "audio_vae", lambda model, audio: mode(model, audio[:, 0])),
        "MMAudioVAE.encode, mode",
    ),
    "audioldm2": Case(
        "audioldm2:REPOS/audioldm2",
        of_diffusers(
            "AutoencoderKL", "vae", lambda model, audio: packed(mode(model, log_mel(audio, 432)))
        ),
        "AutoencoderKL.encode, mode",
    ),
    "dac, 44.1 kHz": Case(
        "dac:REPOS/dac-44k",
        of_transformers(lambda model, audio: model.encode(audio).audio_codes),
        "DacModel.encode",
        codes=True,
    ),
    "encodec, 24 kHz": Case(
        "encodec:REPOS/encodec-24k",
        of_transformers(encodec_codes),
        "EncodecModel.encode",
        codes=True,
    ),
    "encodec, 48 kHz": Case(
        "encodec:REPOS/encodec-48k",
        of_transformers(encodec_codes),
        "EncodecModel.encode",
        codes=True,
        seconds=1.0,
    ),
    "mimi": Case(
        "mimi:REPOS/mimi",
        of_transformers(lambda model, audio: model.encode(audio).audio_codes),
        "MimiModel.encode",
        codes=True,
    ),
    "pockettts": Case(
        "pockettts:REPOS/pockettts",
        of_transformers(lambda model, audio: model.encode(audio).latents.transpose(1, 2)),
        "PocketTTSAudioTokenizerModel.encode",
    ),
    "vibevoice": Case(
        "vibevoice:REPOS/vibevoice",
        of_transformers(vibevoice),
        "VibeVoiceAcousticTokenizerModel.encode(sample=False)",
    ),
}


def measure(case: Case, repos: Path, files: list[Path]) -> dict[str, Any]:
    """The two figures of a family, the largest of all recordings."""
    from latentmill.encoding.chunks import Chunking
    from latentmill.models.registry import resolve
    from support.chunked import encode_chunked, encode_whole

    name = case.model.replace("REPOS", str(repos))
    repo = Path(name.partition(":")[2] or repos / name)
    local = {"repo": str(repo)} if name == "music2latent" else {}
    model = resolve(name, local).load("cpu")
    compared = resolve(name, {"output": "codes"}).load("cpu") if case.codes else model
    spec = model.spec
    chunking = Chunking.for_model(spec, seconds=case.chunk_seconds)
    package, seam = 0.0, 0.0
    for file in files:
        frames = round(case.seconds * spec.sample_rate / spec.hop)
        audio = excerpt(file, spec, spec.samples(frames))
        with torch.inference_mode():
            theirs = case.theirs(repo, audio).float()
        ours = compared.encode(audio)
        if case.codes:
            differing = float((ours[:, : theirs.shape[1]] != theirs).float().mean())
            package = max(package, differing)
        else:
            package = max(package, relative(ours * _unscaled(case, spec), theirs))
        audio = excerpt(file, spec, round(2.5 * chunking.samples))
        chunked, whole = encode_chunked(model, audio[0], chunking), encode_whole(model, audio[0])
        seam = max(seam, relative(chunked, whole))
    return {
        "reference": case.reference,
        "differing_codes" if case.codes else "deviation": float(f"{package:.2g}"),
        "stitch": chunking.stitch,
        "chunked": float(f"{seam:.2g}"),
    }


def number(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).norm() / expected.norm())


def _unscaled(case: Case, spec: Any) -> float:
    """Packages whose call returns unscaled latents."""
    return 1 / spec.scale_factor if ":" in case.model else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--audio", type=Path, nargs="+", help="recordings; default: shared music")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    files = recordings(arguments.audio)
    sys.path.insert(0, str(ROOT / "tests"))
    with random_linear_cae("tiny"), tempfile.TemporaryDirectory() as folder:
        from music2latent import models

        from support import tiny_models

        for name, value in tiny_models.MUSIC2LATENT.items():
            setattr(models, name, value)
        tiny_models.write_repos(Path(folder))
        table = {}
        for name in arguments.only:
            table[name] = measure(CASES[name], Path(folder), files)
            print(name, table[name], file=sys.stderr, flush=True)
    print("| model | compared with | deviation from it | chunked and whole items |")
    print("|---|---|---|---|")
    for name, row in table.items():
        codes = row.get("differing_codes")
        found = number(row["deviation"]) if codes is None else f"{codes:.2g} of the codes"
        seam = f"{number(row['chunked'])}, {row['stitch']}"
        print(f"| {name} | `{row['reference']}` | {found} | {seam} |")
    write_result(
        "deviation",
        {
            "script": "benchmarks/deviation.py",
            "weights": "random, tiny",
            "audio": [file.name for file in files],
            "models": table,
        },
        arguments.results,
    )


if __name__ == "__main__":
    main()
