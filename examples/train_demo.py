"""Train a small autoencoder with and without linearity, and judge both on audio that it never saw.

    make train-demo                                   # three seeds, two processes, one thread each
    python examples/train_demo.py --validate --seeds 1 --steps 600 network.norm=false

The audio is the demo corpus and, if it exists, the folder --audio. The song night-drive and every
fourth recording are held out. --validate judges on other recordings instead, which are then not
trained on; settings (NAME=VALUE, as in jobs/train_linear.yaml) are chosen with it. Both models of a
seed have the same crops and steps; the only difference is the augmentation. Errors are those of
`latentmill evaluate`: with c the latent of silence, ||E(a x) - a E(x) - (1 - a) c||,
||E(x) + E(y) - c - E(x + y)|| and ||D(E(x) + E(y) - c) - D(E(x)) - D(E(y)) + D(c)||, each divided
by the norm of its target without the origin; MR-STFT of D(E(x)); and the first error after
decoding. The results are train_demo.json and training.svg in --folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentmill.audio import open_audio, open_media, prepare, probe
from latentmill.demo.corpus import write_corpus
from latentmill.errors import ItemError
from latentmill.evaluation.audio_metrics import mr_stft
from latentmill.evaluation.metrics import GAINS, additivity, combination, homogeneity, relative_l2
from latentmill.evaluation.tracks import audible
from latentmill.models.base import Autoencoder
from latentmill.models.registry import resolve
from latentmill.training.loop import Trainer
from latentmill.training.metrics import read_metrics
from latentmill.training.settings import TrainSettings, load_settings, merged, parse_options

HERE = Path(__file__).parent
ROOT = HERE.parent
RATE = 16_000
STEPS = 600
SECONDS = 2.0  # judged of each held-out recording
LONGEST = 30.0  # used of each recording for training
LABELS = {
    "mr_stft": "reconstruction (MR-STFT)",
    "decoded_homogeneity": "encoder homogeneity, decoded",
}
STYLE = """text{fill:#1f2328}.note{fill:#59636e}.page{fill:#fff}.grid{stroke:#d1d9e0}
.range{stroke:#1f2328;stroke-width:2}.baseline{fill:#8a8f98}.linear{fill:#0b6e4f}
@media (prefers-color-scheme: dark){text{fill:#f0f6fc}.note{fill:#9198a1}.page{fill:#0d1117}
.grid{stroke:#3d444d}.range{stroke:#f0f6fc}.linear{fill:#3fb950}}"""
MEASURES = (
    "encoder_homogeneity",
    "encoder_additivity",
    "decoder_additivity",
    "mr_stft",
    "decoded_homogeneity",  # the first, after decoding: what the decoder ignores does not count
)
SETTINGS: dict[str, Any] = {
    "model": "conv",
    "network": {"sample_rate": RATE, "strides": [16], "width": 48, "latent_channels": 8},
    "kl_weight": 0.01,
    "linearity": {"mixing": "sum", "annealing": "none", "origin": True},
    "batch_size": 8,
    "crop_seconds": 0.128,
    "quieter_db": 18.0,
    "learning_rate": 3e-3,
    "final_learning_rate": 3e-5,
    "warmup_steps": 30,
    "clip_norm": 5.0,
    "ema": 0.98,
    "checkpoint_every": 10_000,
    "load_threads": 1,
}


def manifests(folder: Path, audio: Path, validate: bool = False) -> tuple[Path, list[Path]]:
    """Write the manifest of the recordings to train on; return it and the files to judge."""
    corpus = write_corpus(folder / "corpus").folder
    files = sorted(path for root in (corpus, audio) for path in root.rglob("*") if path.is_file())
    songs: list[tuple[Path, float]] = []
    for path in files:
        try:
            with open_media(str(path)) as media:
                info = probe(media)
        except ItemError:  # texts, and the damaged files of the corpus
            continue
        songs.append((path, (info.num_samples or 0) / info.sample_rate))
    judged, lines, long = [], [], 0
    for path, seconds in songs:
        part = "train"
        if path.is_relative_to(corpus):
            part = {"night-drive": "held out", "harbour": "validation"}.get(path.parent.name, part)
        elif seconds >= SECONDS:
            long += 1
            if "stems" not in path.parts:  # a song is not split
                part = {0: "held out", 2: "validation"}.get(long % 4, part)
        if part == "train" or (part == "validation" and not validate):
            cut = {"start": 0.0, "duration": LONGEST} if seconds > LONGEST else {}
            lines.append(json.dumps({"path": str(path.absolute()), **cut}))
        elif (part == "validation") == validate and path.stem != "mix":
            judged.append(path)
    manifest = folder / "train.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest, judged


def train(settings: TrainSettings) -> tuple[float, float]:
    """Train one model; return the mean loss of its last tenth, and the CPU seconds."""
    torch.set_num_threads(1)
    start = time.process_time()
    Trainer(settings).train()
    losses = [line["loss"] for line in read_metrics(Path(settings.out))]
    last = statistics.fmean(losses[-max(1, len(losses) // 10) :])
    return last, time.process_time() - start


def processes(count: int) -> ProcessPoolExecutor:
    """Processes that end with this one, also if it is killed."""
    return ProcessPoolExecutor(count, get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    def wait() -> None:
        if parent := parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def load(path: Path) -> torch.Tensor:
    """The first `SECONDS` from the first audible sample on, `[1, T]`."""
    with open_media(str(path)) as media:
        waveform = prepare(open_audio(media), sample_rate=RATE, channels=1)
        audio = np.concatenate(list(waveform.blocks()), axis=1)
    start = int(np.argmax(np.abs(audio[0]) >= 0.01))
    part = torch.zeros(1, int(SECONDS * RATE))
    found = audio[:, start : start + part.shape[1]]
    part[:, : found.shape[1]] = torch.from_numpy(np.ascontiguousarray(found))
    return part


def judge(out: Path, sounds: Sequence[torch.Tensor]) -> dict[str, list[float]]:
    """The measures of a model, one value for each sound (with its neighbour)."""
    torch.set_num_threads(1)
    model = resolve(f"trained:{out}").load("cpu")
    silence = model.encode(torch.zeros_like(sounds[0])[None])[0]
    nothing = model.decode(silence[None], sounds[0].shape[-1])[0]
    values: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for number, x in enumerate(sounds):
        y = sounds[(number + 1) % len(sounds)]
        louder = homogeneity(model, x, GAINS)
        errors = [one.with_origin for one in louder.values()]
        values["encoder_homogeneity"].append(statistics.fmean(errors))
        values["encoder_additivity"].append(additivity(model, [x, y]).with_origin)
        values["decoder_additivity"].append(decoder_additivity(model, x, y))
        latent = model.encode(x[None])[0]
        decoded = model.decode(latent[None], x.shape[-1])[0]
        values["mr_stft"].append(mr_stft(decoded, x))
        errors = []
        for gain in GAINS:
            op = combination([latent], [gain], silence).float()
            given, target = (
                model.decode(z[None], x.shape[-1])[0] for z in (model.encode(gain * x[None])[0], op)
            )
            errors.append(relative_l2(given, target, target - nothing))
        values["decoded_homogeneity"].append(statistics.fmean(errors))
    return values


def decoder_additivity(model: Autoencoder, x: torch.Tensor, y: torch.Tensor) -> float:
    """||D(E(x) + E(y) - c) - (D(E(x)) + D(E(y)) - D(c))|| / ||the second, without D(c)||."""
    silence = torch.zeros_like(x)
    latents = [model.encode(sound[None])[0] for sound in (x, y, silence)]
    mixed = combination(latents[:2], [1.0, 1.0], latents[2]).float()
    first, second, nothing, sound = (
        model.decode(latent[None], x.shape[-1])[0].double() for latent in (*latents, mixed)
    )
    wanted = first + second - nothing
    return relative_l2(sound, wanted, wanted - nothing)


def compare(
    runs: Sequence[tuple[dict[str, list[float]], dict[str, list[float]]]],
) -> dict[str, Any]:
    """Ratios baseline / linear of medians over sounds, geometric means over seeds, intervals.

    The 95 % intervals are of a bootstrap over the sounds, in all seeds at once.
    """
    tables = {  # [models, seeds, sounds]
        measure: np.array([[run[model][measure] for run in runs] for model in (0, 1)])
        for measure in MEASURES
    }

    def ratios(chosen: np.ndarray) -> dict[str, float]:
        found = {}
        for measure, table in tables.items():
            medians = np.log(np.median(table[:, :, chosen], axis=2))  # [models, seeds]
            found[measure] = float(np.exp((medians[0] - medians[1]).mean()))
        found["linearity"] = math.prod(found[m] for m in MEASURES[:3]) ** (1 / 3)
        return found

    count = tables["mr_stft"].shape[2]
    random = np.random.default_rng(0)
    drawn = [ratios(random.integers(0, count, count)) for _ in range(2000)]
    result = {}
    for name, ratio in ratios(np.arange(count)).items():
        low, high = np.quantile([one[name] for one in drawn], [0.025, 0.975])
        result[name] = {"ratio": ratio, "low": float(low), "high": float(high)}
    return result


def medians(runs: Sequence[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Median over sounds: the geometric mean of the seeds, the lowest and the highest seed."""
    found = {}
    for measure in MEASURES:
        values = [statistics.median(run[measure]) for run in runs]
        mean = statistics.geometric_mean(values)
        found[measure] = {"value": mean, "low": min(values), "high": max(values)}
    return found


def picture(card: dict[str, dict[str, dict[str, float]]]) -> str:
    """An SVG with a bar for each measure and model, on a logarithmic scale."""
    width, row, left, top = 680, 46, 230, 34
    low, high = 0.01, 10.0
    place = lambda value: left + (width - left - 70) * math.log(value / low) / math.log(high / low)  # noqa: E731
    height = top + row * len(MEASURES) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="sans-serif" font-size="13"><title>Errors with and without linearity</title>'
        "<desc>Bars of the errors of the baseline and of the linear model on held-out audio, on a "
        f"logarithmic scale.</desc><style>{STYLE}</style>"
        f'<rect width="{width}" height="{height}" class="page"/>'
    ]
    for tick in (0.01, 0.1, 1.0, 10.0):
        x = place(tick)
        parts.append(
            f'<path d="M{x:.1f} {top}V{height - 34}" class="grid"/><text x="{x:.1f}" '
            f'y="{height - 18}" text-anchor="middle" class="note">{tick:g}</text>'
        )
    names = ("baseline", "linear")
    for number, name in enumerate(names):
        x = left + 110 * number
        parts.append(
            f'<rect x="{x}" y="10" width="12" height="12" class="{name}"/>'
            f'<text x="{x + 18}" y="21">{name}</text>'
        )
    for index, measure in enumerate(MEASURES):
        y = top + row * index
        label = LABELS.get(measure, measure.replace("_", " "))
        parts.append(f'<text x="{left - 10}" y="{y + 26}" text-anchor="end">{label}</text>')
        for number, name in enumerate(names):
            one, at = card[name][measure], y + 6 + 18 * number
            end, least, most = (place(max(low, one[n])) for n in ("value", "low", "high"))
            parts.append(
                f'<rect x="{left}" y="{at}" width="{max(1.0, end - left):.1f}" height="14" '
                f'class="{name}"/><path class="range" d="M{least:.1f} {at + 7}H{most:.1f}"/>'
                f'<text x="{most + 8:.1f}" y="{at + 12}">{one["value"]:.3g}</text>'
            )
    return "\n".join(parts) + "\n</svg>\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--audio", type=Path, default=ROOT.parent / "shared" / "audio")
    parser.add_argument("--folder", type=Path, default=Path("train-demo"), help="models and corpus")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--results", type=Path, help="folder of train_demo.json and training.svg; default: --folder"
    )
    parser.add_argument(
        "--validate", action="store_true", help="judge on recordings that are not the held-out ones"
    )
    parser.add_argument("settings", nargs="*", help="NAME=VALUE, for both models")
    args = parser.parse_args()
    start = time.perf_counter()
    args.folder.mkdir(parents=True, exist_ok=True)
    manifest, held_out = manifests(args.folder, args.audio, args.validate)
    loaded = {path.stem: load(path) for path in held_out}
    sounds = {name: sound for name, sound in loaded.items() if audible(sound)}
    print(
        f"{len(manifest.read_text().splitlines())} recordings to train on, {len(sounds)} to judge"
    )
    settings = merged(SETTINGS, parse_options(args.settings))
    names = [(kind, seed) for seed in range(args.seeds) for kind in ("baseline", "linear")]
    folders = [args.folder / f"{kind}-{seed}-{args.steps}" for kind, seed in names]
    with processes(args.processes) as pool:
        training = []
        for (kind, seed), folder in zip(names, folders, strict=True):
            options = {**settings, "source": str(manifest), "out": str(folder)}
            options |= {"seed": seed, "steps": args.steps}
            if kind == "baseline":
                options["linearity"] = None
            training.append(pool.submit(train, load_settings(None, options)))
        for (kind, seed), future in zip(names, training, strict=True):
            loss, _ = future.result()
            print(f"{kind} {seed}: loss {loss:.3f}, {time.perf_counter() - start:.0f} s")
        judging = [pool.submit(judge, folder, list(sounds.values())) for folder in folders]
        judged = [future.result() for future in judging]
    baseline, linear = judged[0::2], judged[1::2]
    card = {"baseline": medians(baseline), "linear": medians(linear)}
    result = {
        "settings": settings,
        "steps": args.steps,
        "seeds": args.seeds,
        "held_out": list(sounds),
        "seconds": round(time.perf_counter() - start),
        "training_cpu_seconds": round(sum(future.result()[1] for future in training)),
        "card": card,
        "baseline_over_linear": compare(list(zip(baseline, linear, strict=True))),
        "values": {"baseline": baseline, "linear": linear},
    }
    results = args.results or args.folder
    results.mkdir(parents=True, exist_ok=True)
    (results / "train_demo.json").write_text(json.dumps(result, indent=1) + "\n")
    # `--results examples` replaces the published results; their picture is in the documentation.
    where = ROOT / "docs" if results.resolve() == HERE.resolve() else results
    (where / "training.svg").write_text(picture(card))
    for name, one in result["baseline_over_linear"].items():
        print(
            f"{name}: baseline / linear {one['ratio']:.2f} ({one['low']:.2f} to {one['high']:.2f})"
        )


if __name__ == "__main__":
    main()
