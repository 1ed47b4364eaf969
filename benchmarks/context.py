"""Measures how many frames of context a model needs: the error of latents next to a cut.

    python benchmarks/context.py [--size full] [--audio FILE] [--only mimi]

The audio is encoded as a whole, then only after a cut (`left`: how far a frame depends on earlier
audio), then only before a cut (`right`). The table shows ||part - whole|| / ||whole|| of single
frames by their distance from the cut. The architectures are the published ones (or, with `--size
tiny`, those of the tests) with random weights. The reach of a convolution does not depend on the
weights; the influence of attention, an LSTM or the edge of a chunk does.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from common import ROOT, write_result
from latentmill.models.base import Autoencoder, ModelSpec
from latentmill.models.registry import resolve

FRAMES = (0, 1, 2, 4, 8, 16, 32, 48, 125, 190)
SECONDS = {"oobleck": 4, "dac": 2, "encodec": 6, "mimi": 40}  # enough for the frames in the table


def write_full(family: str, folder: Path) -> None:
    """Write a model repository with a published architecture and random weights."""
    import diffusers
    import transformers
    from transformers import DacConfig, EncodecConfig, MimiConfig

    torch.manual_seed(0)
    if family == "oobleck":
        model = diffusers.AutoencoderOobleck()
    elif family == "dac":  # the 44.1 kHz version
        config = DacConfig(downsampling_ratios=[2, 4, 8, 8], sampling_rate=44100)
        model = transformers.DacModel(config)
        for module in model.modules():  # with its own initialisation, the output is almost zero
            if isinstance(module, torch.nn.Conv1d):
                torch.nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    elif family == "encodec":
        model = transformers.EncodecModel(EncodecConfig())
    else:
        model = transformers.MimiModel(MimiConfig())
    model.save_pretrained(folder)


def write_tiny(family: str, folder: Path) -> None:
    """Write the tiny repository that the tests use for a family."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import tiny_models

    dac = {"downsampling_ratios": [2, 4, 8, 8], "sampling_rate": 44100}
    write: dict[str, Callable[[Path], None]] = {
        "oobleck": tiny_models.write_oobleck,
        "dac": lambda path: tiny_models.write_dac(path, **dac),
        "encodec": tiny_models.write_encodec,
        "mimi": tiny_models.write_mimi,
    }
    write[family](folder)


def read_audio(spec: ModelSpec, file: Path | None, samples: int) -> torch.Tensor:
    """Load audio `[1, C, samples]` from a recording, or make noise that swells and fades."""
    if file is None:
        noise = torch.randn(1, spec.channels, samples, generator=torch.Generator().manual_seed(0))
        return noise * (0.1 + 0.09 * torch.sin(torch.arange(samples) / spec.sample_rate * 7))
    from latentmill.audio import open_audio, open_media, prepare

    with open_media(str(file)) as media:
        stream = prepare(
            open_audio(media), sample_rate=spec.sample_rate, channels=spec.channels
        ).blocks()
        audio = torch.cat([torch.from_numpy(block) for block in stream], dim=1)
    if audio.shape[1] < samples:
        raise SystemExit(f"{file} is shorter than {samples / spec.sample_rate:.0f} s")
    return audio[None, :, :samples]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--audio", type=Path, help="a recording; default noise")
    parser.add_argument("--only", choices=sorted(SECONDS), help="one family")
    arguments = parser.parse_args()
    table = {}
    for family in [arguments.only] if arguments.only else SECONDS:
        with tempfile.TemporaryDirectory() as folder:
            (write_full if arguments.size == "full" else write_tiny)(family, Path(folder))
            model = resolve(f"{family}:{folder}").load("cpu")
        hop, rate = model.spec.hop, model.spec.sample_rate
        frames = max(4 * max(model.spec.context or (0,)), round(SECONDS[family] * rate / hop))
        table[family] = beside_the_cuts(
            model, read_audio(model.spec, arguments.audio, frames * hop)
        )
    print("| frames from the cut | " + " | ".join(map(str, FRAMES)) + " |")
    print("|---" * (len(FRAMES) + 1) + "|")
    for family, sides in table.items():
        for side, errors in sides.items():
            cells = " | ".join(f"{errors[n]:.0e}" if n in errors else "" for n in FRAMES)
            print(f"| {family}, {side} | {cells} |")
    if arguments.size == "full" and not arguments.only:
        audio = arguments.audio.name if arguments.audio else "noise"
        write_result(
            "context",
            {"script": "benchmarks/context.py", "audio": audio, "relative_error": table},
        )


if __name__ == "__main__":
    main()
