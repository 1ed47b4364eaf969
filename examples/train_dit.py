"""Train a diffusion transformer that adds a stem to a song, on the latents of a store.

    python examples/train_dit.py                            # the demo corpus, on a CPU in minutes
    python examples/train_dit.py --source ~/Stems --model trained:runs/linear --tags role genre
    python examples/train_dit.py --mixing waveform          # the baseline: mixes are encoded audio

The context is a random sub-mix of a song's stems; the target is another stem. Because the latents
are linear, the 2^n - 1 sub-mixes of n stems are made from their n latents when a sample is read;
`--mixing waveform` mixes the audio, and encodes all sub-mixes. The model is a rectified flow (X.
Liu and others, ICLR 2023): for a latent x and noise e its input is (1 - t) x + t e, and it predicts
e - x. It is a DiT (W. Peebles, S. Xie, ICCV 2023), conditioned on tags from the metadata, with
classifier-free guidance (J. Ho, T. Salimans, arXiv 2207.12598).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from dit import DiT
from torch import Tensor, nn

import latentmill as lm
from latentmill.audio import open_audio, open_media, prepare
from latentmill.demo.corpus import write_corpus
from latentmill.errors import ConfigError, ItemError
from latentmill.models.base import ModelSpec
from latentmill.models.registry import resolve
from latentmill.reader.stems import Stems

EMA = 0.999  # decay of the averaged weights, at most
STEMS = 8  # of a song, at most, if all sub-mixes are encoded
DROPPED = 0.1  # probability that tags, and that the context, are left out in training


@dataclass(frozen=True)
class AddStem:
    """The task of `lm.StemDataset`: a random sub-mix, and one of the other stems with its tags."""

    tags: dict[str, list[float]]  # of each record
    waveform: bool  # take the sub-mix from the records of encoded mixes

    def __call__(self, stems: Stems, random: np.random.Generator) -> dict[str, Any]:
        single = [n for n, role in sorted(enumerate(stems.roles), key=lambda one: one[1])]
        single = [n for n in single if "+" not in stems.roles[n]]
        target = single.pop(int(random.integers(len(single))))
        chosen = [n for n in single if random.random() < 0.5] or single[:1]
        if self.waveform and chosen:
            context = stems.latents[stems.roles.index("+".join(stems.roles[n] for n in chosen))]
        else:
            context = stems.mix(chosen)
        return {
            "context": context,
            "target": stems.latents[target],
            "mask": stems.mask_of([*chosen, target]),
            "tags": np.array(self.tags[stems.keys[target]], np.float32),
        }


def vocabulary(
    store: lm.LatentStore, fields: list[str]
) -> tuple[list[str], dict[str, list[float]]]:
    """All tags of a store as `field=value`, and those of each record as numbers 0 or 1."""
    found = {}
    for record in map(store.without_latent, store.keys()):
        if "+" in str(record.role):  # an encoded mix is never a target
            continue
        values = {"role": record.role, **record.metadata}
        found[record.key] = {f"{name}={values[name]}" for name in fields if values.get(name)}
    names = sorted(set().union(*found.values()))
    return names, {key: [float(n in own) for n in names] for key, own in found.items()}


def flow_loss(model: Callable[..., Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Mean squared error of the flow over frames that are not padding; 2 for an output of zero."""
    target, mask = batch["target"], batch["mask"]
    noise, times = torch.randn_like(target), torch.rand(len(target), device=target.device)
    t = times[:, None, None]
    tags, context = (
        one * (torch.rand(len(one), *[1] * (one.ndim - 1), device=one.device) >= DROPPED)
        for one in (batch["tags"], batch["context"])
    )
    flow = model((1 - t) * target + t * noise, times, context, tags, mask)
    return ((flow - noise + target).square().mean(dim=1) * mask).sum() / mask.sum()


@torch.no_grad()
def sample(model: DiT, batch: dict[str, Tensor], *, steps: int, guidance: float) -> Tensor:
    """Normalised latents `[B, D, T]` for contexts and tags: Euler steps from noise to data."""
    context, tags, mask = batch["context"], batch["tags"], batch["mask"]
    x = torch.randn_like(context)
    for step in range(steps):
        times = torch.full((len(x),), 1 - step / steps, device=x.device)
        given = model(x, times, context, tags, mask)
        free = model(x, times, torch.zeros_like(context), torch.zeros_like(tags), mask)
        x = x - (free + guidance * (given - free)) / steps
    return x


def normalisation(data: lm.StemDataset[Any], samples: int = 64) -> lm.Normalize:
    """Mean and standard deviation of the targets' channels; those of the store include mixes."""
    targets = np.stack([data[n % len(data)]["target"] for n in range(samples)])
    std = targets.std(axis=(0, 2))
    mean = targets.mean(axis=(0, 2))
    return lm.Normalize(tuple(mean.tolist()), tuple(std.clip(min=0.02 * std.max()).tolist()))


def batches(loader: lm.Loader, normal: lm.Normalize, device: torch.device) -> Iterator[Any]:
    """Endless batches on the device, with normalised latents; zeros are the mean of the corpus."""
    while True:
        for read in loader:
            batch = {n: read[n].to(device) for n in ("context", "target", "mask", "tags")}
            yield batch | {n: normal.apply(batch[n]) for n in ("context", "target")}


@torch.no_grad()
def fixed_loss(model: nn.Module, some: list[dict[str, Tensor]]) -> float:
    """The loss of some batches with fixed noise, to compare before and after training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return float(torch.stack([flow_loss(model, batch) for batch in some]).mean())


def train(
    store: lm.LatentStore,
    args: argparse.Namespace,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> tuple[DiT, dict[str, Any], list[dict[str, Tensor]], lm.Normalize]:
    """Train; return the averaged model, what was measured, and batches to sample from."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    names, tags = vocabulary(store, args.tags)
    task = AddStem(tags, args.mixing == "waveform")
    data = lm.StemDataset(store, task, crop=args.crop, seed=args.seed, per_song=16)
    normal = normalisation(copy.copy(data))
    model = DiT(len(normal.mean), len(names), args.width, args.depth).to(device)
    ema, trained = copy.deepcopy(model).requires_grad_(False), wrap(model)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.manual_seed(args.seed + rank)  # each process draws its own noise and times
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, waited, worked = [], 0.0, 0.0
    with lm.Loader(data, batch_size=args.batch, workers=args.workers) as loader:
        stream = batches(loader, normal, device)
        some = [next(stream) for _ in range(4)]
        before = fixed_loss(model, some)
        for step in range(args.steps):
            start = time.perf_counter()
            batch = next(stream)
            begun = time.perf_counter()
            loss = flow_loss(trained, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay = min(EMA, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            losses.append(loss.item())
            if step:  # the first step initialises torch
                waited, worked = waited + begun - start, worked + time.perf_counter() - begun
            if step % max(1, args.steps // 10) == 0:
                print(f"step {step:4d}  loss {losses[-1]:.3f}")
    mixes = [2 ** sum("+" not in role for role in group.roles) - 1 for group in data.groups]
    result = {
        "mixing": args.mixing,
        "steps": args.steps,
        "sub_mixes": sum(mixes),
        "records": len(store),
        "encoded_hours": store.info.hours,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss_before": before,
        "loss_after": fixed_loss(ema, some),
        "losses": [round(loss, 4) for loss in losses],
        "steps_per_second": max(1, args.steps - 1) / max(1e-9, waited + worked),
        "reader_wait_share": waited / max(1e-9, waited + worked),
    }
    return ema, result, some, normal


def write_samples(
    ema: DiT, store: lm.LatentStore, batch: dict[str, Tensor], normal: lm.Normalize, args: Any
) -> None:
    """Sample stems, and write each as WAV: alone, and mixed with its context in latent space."""
    torch.manual_seed(args.seed)
    drawn = normal.undo(sample(ema, batch, steps=args.sampling_steps, guidance=args.guidance))
    folder = args.folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    rate = store.info.model["sample_rate"]
    for number, stem in enumerate(drawn.cpu().numpy()):
        context, target = (
            normal.undo(batch[n][number].cpu().numpy()) for n in ("context", "target")
        )
        mixed = lm.mix([stem, context], origin=store.origin)
        for name, latent in (("stem", stem), ("mix", mixed), ("target", target)):
            audio = store.decode_latent(latent, seed=0)
            soundfile.write(folder / f"{number}-{name}.wav", np.clip(audio.T, -1, 1), rate)


def write_sub_mixes(source: Path, folder: Path, spec: ModelSpec) -> None:
    """Write the stems of each folder of `source`, and all their sub-mixes, as WAV with tags."""
    songs: dict[Path, dict[str, np.ndarray]] = {}
    sidecars: dict[Path, dict[str, Any]] = {}
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        song = path.parent.relative_to(source)
        if path.suffix == ".json":
            sidecars[song / path.stem] = json.loads(path.read_text())
        with contextlib.suppress(ItemError), open_media(str(path)) as media:
            wave = prepare(open_audio(media), sample_rate=spec.sample_rate, channels=spec.channels)
            audio = np.concatenate(list(wave.blocks()), axis=1).T
            if path.stem not in ("mix", "mixture"):
                songs.setdefault(song, {})[path.stem] = audio
        if len(songs.get(song, {})) > STEMS:
            raise ConfigError(
                f"{path.parent} has more than {STEMS} stems, and n stems have 2^n - 1 sub-mixes: "
                "use --mixing latent, or one folder for each song."
            )
    for song, stems in songs.items():
        (folder / song).mkdir(parents=True, exist_ok=True)
        for chosen in itertools.product((False, True), repeat=len(stems)):
            if roles := list(itertools.compress(sorted(stems), chosen)):
                length = max(len(stems[role]) for role in roles)
                mix = np.zeros((length, spec.channels), np.float32)
                for role in roles:
                    mix[: len(stems[role])] += stems[role]
                out, name = folder / song / "+".join(roles), {"group": str(song)}
                tags = sidecars.get(song / roles[0], {}) if len(roles) == 1 else {}
                soundfile.write(f"{out}.wav", mix, spec.sample_rate, subtype="FLOAT")
                Path(f"{out}.json").write_text(json.dumps(tags | name | {"role": out.name}))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--store", help="a store to train on")
    parser.add_argument("--source", help="folders of stems to encode first; default: a demo corpus")
    parser.add_argument("--model", default="mdct", help="the autoencoder, for --source")
    parser.add_argument("--folder", type=Path, default=Path("dit"), help="folder for the results")
    parser.add_argument("--mixing", choices=("latent", "waveform"), default="latent")
    parser.add_argument("--tags", nargs="*", default=["role", "key"], help="fields of the metadata")
    parser.add_argument("--guidance", type=float, default=2.0)
    numbers = {"steps": 300, "batch": 8, "crop": 128, "seed": 0, "workers": 1}
    numbers |= {"width": 192, "depth": 3, "sampling-steps": 32}
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    return parser.parse_args(given)


def encoded(args: argparse.Namespace) -> lm.LatentStore:
    """The store to train on; encodes the source first if no store is given."""
    if args.store is None:
        source = Path(args.source or write_corpus(args.folder / "corpus").folder)
        options = {"hop": 128} if args.model == "mdct" else {}
        if args.mixing == "waveform":
            mixes = args.folder / "sub-mixes"
            write_sub_mixes(source, mixes, resolve(args.model, options).spec)
            source = mixes
        args.store = str(args.folder / f"latents-{args.mixing}")
        by = "(?P<group>.*)/(?P<role>[^/]*)"
        lm.encode(str(source), args.store, model=args.model, model_options=options, group_by=by)
    return lm.open(args.store)


def main() -> None:
    args = arguments()
    store = encoded(args)
    ema, result, some, normal = train(store, args)
    write_samples(ema, store, some[0], normal, args)
    (args.folder / "result.json").write_text(json.dumps(result, indent=2))
    torch.save(ema.state_dict(), args.folder / "dit.pt")
    shown = {name: value for name, value in result.items() if name != "losses"}
    print(
        *(
            f"{n.replace('_', ' ')}: {v if isinstance(v, str) else f'{v:.4g}'}"
            for n, v in shown.items()
        ),
        sep="\n",
    )


if __name__ == "__main__":
    main()
