"""Train a tiny diffusion transformer on the latents of a store, on a CPU, in minutes.

    python examples/train_dit.py                      # encodes the demo corpus into dit/latents
    python examples/train_dit.py --store latents      # on a store of your own
    python examples/train_dit.py --source ~/Music     # encodes a folder into dit/latents first

The example shows how to read latents with `LatentStream`, `Normalize` and `collate`, and measures
the fraction of a step's time that training waits for the reader. The model is a rectified flow (X.
Liu and others, "Flow Straight and Fast", ICLR 2023): for a latent x and noise e its input is
(1 - t) x + t e, and it predicts e - x. It is a transformer whose blocks are modulated by t (W.
Peebles, S. Xie, "Scalable Diffusion Models with Transformers", ICCV 2023).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import latentmill as lm
from latentmill.demo.corpus import write_corpus


class Block(nn.Module):
    """Attention over frames and an MLP, both modulated by the time of the flow."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)  # an untrained block is the identity
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        """Frames `[B, T, W]`, condition `[B, 1, W]`, mask of real frames `[B, 1, 1, T]`."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, T, W / H]
        x = x + gate * self.out(attended.transpose(1, 2).flatten(2))
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(h)


class TinyDiT(nn.Module):
    """Predicts the flow of latents `[B, D, T]` at times `[B]`."""

    def __init__(self, channels: int, width: int = 192, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.width = width
        self.enter, self.leave = nn.Linear(channels, width), nn.Linear(width, channels)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        nn.init.zeros_(self.leave.weight)

    def forward(self, latents: Tensor, times: Tensor, mask: Tensor) -> Tensor:
        """The flow `[B, D, T]`; `mask` `[B, T]` is False for padding."""
        positions = torch.arange(latents.shape[2], dtype=torch.float32)
        x = self.enter(latents.transpose(1, 2)) + waves(positions, self.width)
        condition = F.silu(self.time(waves(1000 * times, self.width)))[:, None]
        for block in self.blocks:
            x = block(x, condition, mask[:, None, None])
        return self.leave(F.layer_norm(x, x.shape[-1:])).transpose(1, 2)


def waves(positions: Tensor, width: int) -> Tensor:
    """Sines and cosines of positions `[N]` at many rates, `[N, width]`."""
    rates = torch.exp(-torch.arange(width // 2) * (9.2 / (width // 2)))  # 1 to 1/10,000
    angles = positions[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def flow_loss(model: TinyDiT, latents: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of the flow over frames that are not padding; 2 for an output of zero."""
    noise, times = torch.randn_like(latents), torch.rand(len(latents))
    t = times[:, None, None]
    error = model((1 - t) * latents + t * noise, times, mask) - (noise - latents)
    return (error.square().mean(dim=1) * mask).sum() / mask.sum()


def endless(loader: torch.utils.data.DataLoader[Any]) -> Iterator[dict[str, Any]]:
    """Repeat the loader; each iteration is the stream's next epoch."""
    while True:
        yield from loader


@torch.no_grad()
def fixed_loss(model: TinyDiT, batches: list[dict[str, Any]]) -> float:
    """The loss of some batches with fixed noise, to compare before and after training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses = [flow_loss(model, batch["latents"], batch["mask"]) for batch in batches]
    return float(torch.stack(losses).mean())


def train(store: lm.LatentStore, *, steps: int, batch: int, crop: int, seed: int) -> dict[str, Any]:
    """Train; return the losses and the fraction of time that training waited for the reader."""
    torch.manual_seed(seed)
    stream = lm.LatentStream(
        store,
        crop=crop,
        mode="windows",
        seed=seed,
        batch_size=batch,
        metadata=False,
        transforms=[lm.Normalize.from_store(store, by="channel")],
    )
    batch = min(batch, len(stream))
    loader = torch.utils.data.DataLoader(
        stream,
        batch_size=batch,
        collate_fn=lm.collate,
        drop_last=True,
    )
    model = TinyDiT(store.info.model["latent_channels"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, waited, worked = [], 0.0, 0.0
    batches = endless(loader)
    fixed = [next(batches) for _ in range(4)]
    before = fixed_loss(model, fixed)
    for step in range(steps):
        start = time.perf_counter()
        read = next(batches)
        begun = time.perf_counter()
        loss = flow_loss(model, read["latents"], read["mask"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step:  # the first step opens files and initialises torch
            waited, worked = waited + begun - start, worked + time.perf_counter() - begun
        if step % max(1, steps // 10) == 0:
            print(f"step {step:4d}  loss {losses[-1]:.3f}")
    return {
        "steps": steps,
        "samples": len(stream),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss_before": before,
        "loss_after": fixed_loss(model, fixed),
        "losses": [round(loss, 4) for loss in losses],
        "step_ms": 1000 * (waited + worked) / max(1, steps - 1),
        "reader_wait_share": waited / (waited + worked) if steps > 1 else 0.0,
    }


def main() -> None:
    """Encode a store if none is given, train on it, print and save the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--store", help="a store to train on")
    parser.add_argument("--source", help="a folder of audio to encode first")
    parser.add_argument("--folder", type=Path, default=Path("dit"), help="folder for the results")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=128, help="frames per sample")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.store is None:
        source = args.source or str(write_corpus(args.folder / "corpus").folder)
        args.store = str(args.folder / "latents")
        lm.encode(source, args.store, model="mdct", model_options={"hop": 128})
    store = lm.open(args.store)
    result = train(store, steps=args.steps, batch=args.batch, crop=args.crop, seed=args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "result.json").write_text(json.dumps(result, indent=2))
    print(
        f"loss {result['loss_before']:.3f} -> {result['loss_after']:.3f} in {args.steps} steps of "
        f"{result['step_ms']:.0f} ms; {result['reader_wait_share']:.2%} waiting for the reader"
    )


if __name__ == "__main__":
    main()
