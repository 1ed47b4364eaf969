"""Measures how many frames of context a model needs: the error of latents next to a cut.

    python benchmarks/context.py [--size narrow] [--audio FILE ...] [--only mimi]

Audio is encoded as a whole, then only after a cut (`left`: how far a frame depends on earlier
audio), then only before a cut (`right`). The table shows ||part - whole|| / ||whole|| of single
frames by their distance from the cut, the largest of all recordings. The recordings are music.
THE WEIGHTS ARE RANDOM: the architectures are the published ones, by default with few channels,
which changes no reach (`--size full`: all channels). The reach of a convolution does not depend on
the weights; the size of an error does, and so does the influence of attention, an LSTM or the edge
of a chunk.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, excerpt, recordings, write_result
from latentmill.models.base import Autoencoder
from latentmill.models.registry import resolve

FRAMES = (0, 1, 2, 4, 8, 16, 32, 48, 125, 190)
CLASSES = {
    "oobleck": "AutoencoderOobleck",
    "longcat": "LongCatAudioDiTVae",
    "kvae": "AutoencoderKLKVAEAudio",
    "minimax": "AutoencoderKLMiniMaxH3Audio",
}
# Settings of the width; strides, kernels, depths and attention windows are the published ones.
NARROW: dict[str, dict[str, Any]] = {
    "oobleck": {"encoder_hidden_size": 8, "decoder_channels": 4, "decoder_input_channels": 4},
    "dac": {"encoder_hidden_size": 4, "decoder_hidden_size": 32, "codebook_size": 16},
    "longcat": {"channels": 4, "latent_dim": 4, "encoder_latent_dim": 8},
    "encodec": {"num_filters": 4, "hidden_size": 16, "codebook_size": 16},
    "mimi": {
        "hidden_size": 64,
        "num_filters": 8,
        "codebook_size": 16,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "upsample_groups": 64,
    },
    "kvae": {"encoder_dim": 4, "latent_dim": 64, "codebook_dim": 8, "decoder_dim": 64},
    "minimax": {
        "encoder_dim": 4,
        "latent_dim": 64,
        "latent_channels": 8,
        "decoder_dim": 128,
        "resblock_kernel_sizes": (3,),
        "resblock_dilation_sizes": ((1,),),
    },
}
# Enough for the frames in the table.
SECONDS = {
    "oobleck": 10,
    "dac": 5,
    "longcat": 20,
    "encodec": 6,
    "mimi": 40,
    "kvae": 8,
    "minimax": 10,
}


def write_model(family: str, folder: Path, narrow: bool) -> None:
    """Write a repository with a published architecture and random weights, or a narrow one."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    small = NARROW[family] if narrow else {}
    if family == "dac":  # the 44.1 kHz version
        published = {"downsampling_ratios": [2, 4, 8, 8], "sampling_rate": 44100}
        model = transformers.DacModel(transformers.DacConfig(**published, **small))
        for module in model.modules():  # with its own initialisation, the output is almost zero
            if isinstance(module, torch.nn.Conv1d):
                torch.nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    elif family == "encodec":
        model = transformers.EncodecModel(transformers.EncodecConfig(**small))
    elif family == "mimi":
        model = transformers.MimiModel(transformers.MimiConfig(**small))
    else:
        strides = {"strides": [2, 4, 4, 8, 8]} if family == "longcat" else {}
        model = getattr(diffusers, CLASSES[family])(**strides, **small)
    model.save_pretrained(folder)


def beside_the_cuts(model: Autoencoder, audio: torch.Tensor) -> dict[str, dict[int, float]]:
    """Measure the relative error of single frames, by side and by distance from the cut."""
    whole = model.encode(audio)[0]  # [D, Z]
    hop, total = model.spec.hop, whole.shape[1]
    cut = total - 2 - min(FRAMES[-1], total // 2)  # leaves enough frames on both sides
    after = model.encode(audio[..., cut * hop :])[0]
    end = min(FRAMES[-1] + 2, total // 2)
    before = model.encode(audio[..., : end * hop])[0]

    def error(part: torch.Tensor, reference: torch.Tensor) -> float:
        return float(f"{(part - reference).norm() / reference.norm():.2g}")

    return {
        "left": {n: error(after[:, n], whole[:, cut + n]) for n in FRAMES if cut + n < total},
        "right": {
            n: error(before[:, end - 1 - n], whole[:, end - 1 - n]) for n in FRAMES if n < end
        },
    }


def largest(tables: list[dict[str, dict[int, float]]]) -> dict[str, dict[int, float]]:
    """The largest error of all recordings, by side and distance."""
    return {
        side: {n: max(table[side][n] for table in tables) for n in errors}
        for side, errors in tables[0].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("narrow", "full"), default="narrow")
    parser.add_argument("--audio", type=Path, nargs="+", help="recordings; default: shared music")
    parser.add_argument("--only", choices=sorted(SECONDS), help="one family")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    files = recordings(arguments.audio)
    table = {}
    for family in [arguments.only] if arguments.only else SECONDS:
        with tempfile.TemporaryDirectory() as folder:
            write_model(family, Path(folder), arguments.size == "narrow")
            model = resolve(f"{family}:{folder}").load("cpu")
        hop, rate = model.spec.hop, model.spec.sample_rate
        frames = max(4 * max(model.spec.context or (0,)), round(SECONDS[family] * rate / hop))
        table[family] = largest(
            [beside_the_cuts(model, excerpt(file, model.spec, frames * hop)) for file in files]
        )
        print(family, table[family], file=sys.stderr, flush=True)
    print("| frames from the cut | " + " | ".join(map(str, FRAMES)) + " |")
    print("|---" * (len(FRAMES) + 1) + "|")
    for family, sides in table.items():
        for side, errors in sides.items():
            cells = " | ".join(f"{errors[n]:.0e}" if n in errors else "" for n in FRAMES)
            print(f"| {family}, {side} | {cells} |")
    if not arguments.only:
        write_result(
            "context",
            {
                "script": "benchmarks/context.py",
                "weights": f"random, {arguments.size}",
                "audio": [file.name for file in files],
                "relative_error": table,
            },
            arguments.results,
        )


if __name__ == "__main__":
    main()
