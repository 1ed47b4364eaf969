"""Train a diffusion transformer that adds a stem to a song, on the latents of a store.

    python examples/train_dit.py                            # the demo corpus, on a CPU in minutes
    python examples/train_dit.py --source ~/Stems --model trained:runs/linear --tags role genre
    python examples/train_dit.py --mixing waveform          # the baseline: mixes are encoded audio

The context is a random sub-mix of a song's stems, the target another stem. With linear latents the
2^n - 1 sub-mixes of n stems are made from n latents when a sample is read; `--mixing waveform`
encodes them all. The model is a DiT (W. Peebles, S. Xie, ICCV 2023), trained as a rectified flow
(X. Liu and others, ICLR 2023: from (1 - t) x + t e, with noise e, it predicts e - x) on tags from
the metadata and a field's text (`--text`), with guidance (J. Ho, T. Salimans, arXiv 2207.12598).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import latentmill as lm
from latentmill.audio import open_audio, open_media, prepare
from latentmill.demo.corpus import write_corpus
from latentmill.errors import ConfigError, ItemError
from latentmill.models.base import ModelSpec
from latentmill.models.registry import resolve
from latentmill.reader.stems import Stems

Tags = dict[str, list[float]]
Batch = dict[str, Tensor]
Trained = tuple["DiT", dict[str, Any], Batch, lm.Normalize]
Wrap = Callable[[nn.Module], nn.Module]
EMA = 0.999  # decay of the averaged weights, at most
STEMS = 8  # of a song, at most, if all its 2^n - 1 sub-mixes are encoded
DROPPED = 0.1  # probability that tags, and that the context, are left out in training


def add_stem(tags: Tags, waveform: bool, stems: Stems, random: np.random.Generator) -> Any:
    """One of the stems with its tags, and a random sub-mix of the others (encoded: `waveform`)."""
    single = [n for n, role in sorted(enumerate(stems.roles), key=lambda one: one[1])]
    single = [n for n in single if "+" not in stems.roles[n]]
    target = single.pop(int(random.integers(len(single))))
    chosen = [n for n in single if random.random() < 0.5] or single[:1]
    mix = "+".join(stems.roles[n] for n in chosen)
    context = stems.latents[stems.roles.index(mix)] if waveform and chosen else stems.mix(chosen)
    mask, own = stems.mask_of([*chosen, target]), np.array(tags[stems.keys[target]], np.float32)
    found = {"context": context, "target": stems.latents[target], "mask": mask, "tags": own}
    return found | ({"fields": fields} if (fields := stems.fields_of(target)) else {})


def vocabulary(store: lm.LatentStore, fields: list[str]) -> tuple[list[str], Tags]:
    """All tags of a store as `field=value`, and those of each record as numbers 0 or 1."""
    found = {}
    for record in map(store.without_latent, store.keys()):
        if "+" in str(record.role):  # an encoded mix is never a target
            continue
        values = {"role": record.role, **record.metadata}
        found[record.key] = {f"{name}={values[name]}" for name in fields if values.get(name)}
    names = sorted(set().union(*found.values()))
    return names, {key: [float(n in own) for n in names] for key, own in found.items()}


class Block(nn.Module):
    """Attention over frames and text, and an MLP, both modulated by time and tags."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        wide = 4 * width
        self.mlp = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))
        self.modulation = nn.Linear(width, 6 * width)
        for parameter in self.modulation.parameters():
            nn.init.zeros_(parameter)  # an untrained block is the identity

    def forward(self, x: Tensor, condition: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Frames `[B, T, W]`, condition `[B, 1, W]`, text `[B, L, W]`, mask `[B, T + L]`."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        seen = torch.cat((h, text), dim=1)
        x = x + gate * self.attention(h, seen, seen, key_padding_mask=~mask, need_weights=False)[0]
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(h)


class DiT(nn.Module):
    """Predicts the flow of targets `[B, D, T]` at times `[B]`, given a context, tags and text."""

    def __init__(self, channels: int, tags: int, text: int, width: int, depth: int) -> None:
        super().__init__()
        self.width = width
        self.enter, self.leave = nn.Linear(2 * channels, width), nn.Linear(width, channels)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.tags, self.text = (nn.Linear(n, width, bias=False) for n in (tags, text))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor, times: Tensor, batch: Batch) -> Tensor:
        """The flow `[B, D, T]`, from noisy targets and the batch's context, tags and mask."""
        h = self.enter(torch.cat((x, batch["context"]), dim=1).transpose(1, 2))
        h = h + waves(torch.arange(x.shape[2], device=x.device), self.width)
        condition = self.time(waves(1000 * times, self.width)) + self.tags(batch["tags"])
        text, mask = self.text(batch["text"]), torch.cat((batch["mask"], batch["seen"]), dim=1)
        for block in self.blocks:
            h = block(h, F.silu(condition)[:, None], text, mask)
        return self.leave(F.layer_norm(h, h.shape[-1:])).transpose(1, 2)


def waves(positions: Tensor, width: int) -> Tensor:
    """Sines and cosines of positions `[N]` at many rates, `[N, width]`."""
    exponents = torch.arange(width // 2, device=positions.device) * (9.2 / (width // 2))
    angles = positions[:, None] * torch.exp(-exponents)  # rates from 1 to 1/10,000
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def flow_loss(model: Callable[..., Tensor], batch: Batch) -> Tensor:
    """Mean squared error of the flow over frames that are not padding; 2 for an output of zero."""
    target, mask = batch["target"], batch["mask"]
    noise, times = torch.randn_like(target), torch.rand(len(target), device=target.device)
    t = times[:, None, None]
    kept = torch.rand(2, len(target), 1, device=target.device) >= DROPPED
    given = {"tags": batch["tags"] * kept[0], "context": batch["context"] * kept[1][..., None]}
    given["text"] = batch["text"] * kept[0][..., None]
    flow = model((1 - t) * target + t * noise, times, batch | given)
    return ((flow - noise + target).square().mean(dim=1) * mask).sum() / mask.sum()


@torch.no_grad()
def sample(model: DiT, batch: Batch, *, steps: int, guidance: float) -> Tensor:
    """Normalised latents `[B, D, T]` for contexts and tags: Euler steps from noise to data."""
    x = torch.randn_like(batch["context"])
    dropped = batch | {name: torch.zeros_like(batch[name]) for name in ("context", "tags", "text")}
    for step in range(steps):
        times = torch.full((len(x),), 1 - step / steps, device=x.device)
        given, free = model(x, times, batch), model(x, times, dropped)
        x = x - (free + guidance * (given - free)) / steps
    return x


def batches(loader: lm.Loader, normal: lm.Normalize, device: torch.device) -> Iterator[Any]:
    """Endless batches on the device, with normalised latents; zeros are the mean of the corpus."""
    for read in itertools.chain.from_iterable(itertools.repeat(loader)):
        none = torch.zeros(len(read["mask"]), 0, 1), torch.zeros(len(read["mask"]), 0).bool()
        (read["text"], read["seen"]), *_ = [*read.pop("fields", {}).values(), none]
        batch = {name: value.to(device) for name, value in read.items()}
        yield batch | {n: normal.apply(batch[n]) for n in ("context", "target")}


@torch.no_grad()
def fixed_loss(model: nn.Module, some: list[Batch]) -> float:
    """The loss of some batches with fixed noise, to compare before and after training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return float(torch.stack([flow_loss(model, batch) for batch in some]).mean())


def train(store: lm.LatentStore, args: Any, wrap: Wrap = lambda model: model) -> Trained:
    """Train; return the averaged model, what was measured, and a batch to sample from."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    names, tags = vocabulary(store, args.tags)
    task = partial(add_stem, tags, args.mixing == "waveform")
    text = [args.text] if args.text else []  # a field of tokens, such as embedded captions
    data = lm.StemDataset(store, task, crop=args.crop, seed=args.seed, per_song=16, fields=text)
    reader = copy.copy(data)
    targets = np.stack([reader[n % len(data)]["target"] for n in range(64)])
    mean, std = targets.mean(axis=(0, 2)), targets.std(axis=(0, 2))  # the store's include mixes
    normal = lm.Normalize(tuple(mean.tolist()), tuple(std.clip(min=0.02 * std.max()).tolist()))
    size = store.field(args.text).info.model["latent_channels"] if text else 1
    model = DiT(len(normal.mean), len(names), size, args.width, args.depth).to(device)
    ema, trained = copy.deepcopy(model).requires_grad_(False), wrap(model)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.manual_seed(args.seed + rank)  # each process draws its own noise and times
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, waited, worked = [], 0.0, 0.0
    with lm.Loader(lm.BatchSampler(data, args.batch, even="pad"), workers=args.workers) as loader:
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
    sub_mixes = sum(2 ** sum("+" not in r for r in g.roles) - 1 for g in data.groups)
    result = {"mixing": args.mixing, "steps": args.steps, "sub_mixes": sub_mixes}
    result |= {"records": len(store), "encoded_hours": store.info.hours, "loss_before": before}
    result |= {"loss_after": fixed_loss(ema, some), "losses": [round(loss, 4) for loss in losses]}
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["steps_per_second"] = max(1, args.steps - 1) / max(1e-9, waited + worked)
    result["reader_wait_share"] = waited / max(1e-9, waited + worked)
    return ema, result, some[0], normal


def write_results(trained: Trained, store: lm.LatentStore, args: argparse.Namespace) -> None:
    """Write the weights, what was measured, and samples: a stem, and its mix with the context."""
    ema, result, batch, normal = trained
    folder, rate = args.folder / "samples", store.info.model["sample_rate"]
    folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "result.json").write_text(json.dumps(result, indent=2))
    torch.save(ema.state_dict(), args.folder / "dit.pt")
    torch.manual_seed(args.seed)
    stems = sample(ema, batch, steps=args.sampling_steps, guidance=args.guidance)
    for number, latents in enumerate(zip(stems, batch["context"], batch["target"], strict=True)):
        stem, context, target = (normal.undo(latent.cpu().numpy()) for latent in latents)
        mixed = lm.mix([stem, context], origin=store.origin)
        for name, latent in (("stem", stem), ("mix", mixed), ("target", target)):
            audio = store.decode_latent(latent, seed=0)
            soundfile.write(folder / f"{number}-{name}.wav", np.clip(audio.T, -1, 1), rate)


def write_sub_mixes(source: Path, folder: Path, spec: ModelSpec) -> Path:
    """Write the stems of each folder of `source`, and all their sub-mixes, as WAV with tags."""
    songs: dict[Path, dict[str, np.ndarray]] = {}
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        with contextlib.suppress(ItemError), open_media(str(path)) as media:
            wave = prepare(open_audio(media), sample_rate=spec.sample_rate, channels=spec.channels)
            audio = np.concatenate(list(wave.blocks()), axis=1).T
            if path.stem not in ("mix", "mixture"):
                songs.setdefault(path.parent.relative_to(source), {})[path.stem] = audio
    for song, stems in songs.items():
        if len(stems) > STEMS:
            raise ConfigError(f"{source / song} has more than {STEMS} stems: use --mixing latent.")
        (folder / song).mkdir(parents=True, exist_ok=True)
        for chosen in itertools.product((False, True), repeat=len(stems)):
            if roles := list(itertools.compress(sorted(stems), chosen)):
                role, length = "+".join(roles), max(len(stems[role]) for role in roles)
                mix = sum(np.pad(a, ((0, length - len(a)), (0, 0))) for a in map(stems.get, roles))
                sidecar = source / song / f"{role}.json"
                tags = json.loads(sidecar.read_text()) if sidecar.exists() else {}
                tags |= {"group": str(song), "role": role}
                (folder / song / f"{role}.json").write_text(json.dumps(tags))
                soundfile.write(folder / song / f"{role}.wav", mix, spec.sample_rate, "FLOAT")
    return folder


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--store", help="a store to train on")
    parser.add_argument("--source", help="folders of stems to encode first; default: a demo corpus")
    parser.add_argument("--model", default="mdct", help="the autoencoder, for --source")
    parser.add_argument("--folder", type=Path, default=Path("dit"), help="folder for the results")
    parser.add_argument("--mixing", choices=("latent", "waveform"), default="latent")
    parser.add_argument("--text", help="a field with tokens for each stem")
    parser.add_argument("--tags", nargs="*", default=["role", "key"], help="fields of the metadata")
    numbers = {"steps": 300, "batch": 8, "crop": 128, "seed": 0, "workers": 1, "guidance": 2.0}
    numbers |= {"width": 192, "depth": 3, "sampling-steps": 32}
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=type(number), default=number)
    return parser.parse_args(given)


def encoded(args: argparse.Namespace) -> lm.LatentStore:
    """The store to train on; encodes the source first if no store is given."""
    if args.store is None:
        source = Path(args.source or write_corpus(args.folder / "corpus").folder)
        options = {"hop": 128} if args.model == "mdct" else {}
        if args.mixing == "waveform":
            spec = resolve(args.model, options).spec
            source = write_sub_mixes(source, args.folder / "sub-mixes", spec)
        args.store = str(args.folder / f"latents-{args.mixing}")
        by = "(?P<group>.*)/(?P<role>[^/]*)"
        lm.encode(str(source), args.store, model=args.model, model_options=options, group_by=by)
    return lm.open(args.store)


def main() -> None:
    args = arguments()
    store = encoded(args)
    trained = train(store, args)
    write_results(trained, store, args)
    for name, value in trained[1].items():
        if name != "losses":
            print(f"{name.replace('_', ' ')}: {value if name == 'mixing' else f'{value:.4g}'}")


if __name__ == "__main__":
    main()
