"""The diffusion transformer of train_dit.py (W. Peebles, S. Xie, "Scalable Diffusion Models with
Transformers", ICCV 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Block(nn.Module):
    """Attention over frames and an MLP, both modulated by time and tags."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        inner = 4 * width
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
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


class DiT(nn.Module):
    """Predicts the flow of targets `[B, D, T]` at times `[B]`, given a context and tags."""

    def __init__(self, channels: int, tags: int, width: int, depth: int, heads: int = 4) -> None:
        super().__init__()
        self.width = width
        self.enter, self.leave = nn.Linear(2 * channels, width), nn.Linear(width, channels)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.tags = nn.Linear(tags, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        nn.init.zeros_(self.leave.weight)

    def forward(
        self, x: Tensor, times: Tensor, context: Tensor, tags: Tensor, mask: Tensor
    ) -> Tensor:
        """The flow `[B, D, T]`; tags `[B, N]` are 0 or 1, `mask` `[B, T]` is False for padding."""
        positions = torch.arange(x.shape[2], dtype=torch.float32, device=x.device)
        h = self.enter(torch.cat((x, context), dim=1).transpose(1, 2))
        h = h + waves(positions, self.width)
        condition = F.silu(self.time(waves(1000 * times, self.width)) + self.tags(tags))[:, None]
        for block in self.blocks:
            h = block(h, condition, mask[:, None, None])
        return self.leave(F.layer_norm(h, h.shape[-1:])).transpose(1, 2)


def waves(positions: Tensor, width: int) -> Tensor:
    """Sines and cosines of positions `[N]` at many rates, `[N, width]`."""
    exponents = torch.arange(width // 2, device=positions.device) * (9.2 / (width // 2))
    angles = positions[:, None] * torch.exp(-exponents)  # rates from 1 to 1/10,000
    return torch.cat((angles.sin(), angles.cos()), dim=1)
