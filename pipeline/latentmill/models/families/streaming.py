"""Causal networks that continue from a state, chunk after chunk.

The modules of transformers take caches for streaming, but one cache holds a whole batch whose items
are all at the same position. These caches hold the state of each row instead, so that a batch may
contain chunks from any positions of any items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

if TYPE_CHECKING:
    from latentmill.models.base import State


class Steps:
    """The states of the rows of a batch: the tensors that the modules keep, in order of use.

    Each module calls `before` for what it kept at the previous chunk, and then `keep` once.
    """

    def __init__(self, states: Sequence[State | None]) -> None:
        self._states = states
        self._kept: list[Tensor] = []  # [B, ...] each

    @property
    def first(self) -> bool:
        """Whether all rows are the first chunks of their items."""
        return all(state is None for state in self._states)

    def before(self, first: Tensor) -> Tensor:
        """The next module's state of the previous chunk, `[B, ...]`; first chunks get `first`."""
        index = len(self._kept)
        if self.first:
            return first
        return torch.stack(
            [
                row if state is None else state[index].to(row)
                for row, state in zip(first, self._states, strict=True)
            ]
        )

    def keep(self, value: Tensor) -> None:
        """Keep a copy, because `value` may be the end of large activations."""
        self._kept.append(_copy(value))

    def after(self) -> list[State]:
        """The new state of each row, in memory of its own and in float32."""
        rows = range(len(self._states))
        return [tuple(kept[row].clone() for kept in self._kept) for row in rows]

    def left(self, hidden: Tensor, padding: int, mode: str) -> Tensor:
        """The `padding` steps before `hidden` `[B, C, T]`; those before an item follow `mode`."""
        before = self.before(_left(hidden, padding, mode))
        enough = hidden.shape[-1] >= padding
        both = hidden if enough else torch.cat([before, hidden], dim=-1)
        self.keep(both[..., both.shape[-1] - padding :])
        return before

    def padded(self, hidden: Tensor, padding: int, mode: str) -> Tensor:
        """`hidden` with the steps before it; see `left`."""
        return torch.cat([self.left(hidden, padding, mode), hidden], dim=-1)


def _copy(value: Tensor) -> Tensor:
    return value.to(torch.float32, copy=True) if value.is_floating_point() else value.clone()


def _left(hidden: Tensor, padding: int, mode: str) -> Tensor:
    """The padding on the left of an item, as in the codecs: `_pad1d` of `EncodecConv1d`."""
    if mode == "replicate":
        return hidden[..., :1].expand(*hidden.shape[:-1], padding)
    if mode == "reflect":  # an item that is too short is extended by zeros
        short = max(0, padding + 1 - hidden.shape[-1])
        return F.pad(hidden, (0, short))[..., 1 : padding + 1].flip(-1)
    if mode != "constant":
        raise ValueError(f"padding mode {mode}")
    return hidden.new_zeros(*hidden.shape[:-1], padding)


PADDING_MODES = ("constant", "replicate", "reflect")


class _Padding:
    """Padding cache of the convolutions of Mimi and Pocket TTS."""

    def __init__(self, steps: Steps, encoder: Any) -> None:
        self._steps = steps
        convolutions = [one for one in encoder.modules() if hasattr(one, "padding_total")]
        self._convolutions = {one.layer_idx: one for one in convolutions}

    def update(self, hidden: Tensor, layer_idx: int | None) -> Tensor:
        """The steps before `hidden`. A shortcut, which has one tap, has no index."""
        convolution = self._convolutions[layer_idx]
        return self._steps.left(hidden, int(convolution.padding_total), convolution.pad_mode)


class _Attention:
    """Cache of keys and values of a transformer whose layers attend to the last `window` steps."""

    def __init__(self, steps: Steps, config: Any, hidden: Tensor) -> None:
        self._steps = steps
        self._past = config.sliding_window - 1
        start = steps.before(torch.zeros(len(hidden), dtype=torch.int64))
        steps.keep(start + hidden.shape[1])
        self._length = min(self._past, int(start.max()))  # the longest past of any row
        self.mask: Tensor | None = None  # the model's own
        self.positions: Tensor | None = None
        if self._length:
            start = start.to(hidden.device)[:, None]
            steps_here = torch.arange(hidden.shape[1], device=hidden.device)
            self.positions = start + steps_here
            keys = torch.arange(-self._length, hidden.shape[1], device=hidden.device)
            ago = steps_here[:, None] - keys
            near = (ago >= 0) & (ago <= self._past)
            allowed = near & (keys >= -start)[:, None, None]  # [B, 1, T, past + T]
            self.mask = allowed
            if config._attn_implementation == "eager":  # which adds it
                lowest = torch.finfo(hidden.dtype).min
                self.mask = torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill(
                    ~allowed, lowest
                )

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, **_: Any
    ) -> tuple[Tensor, Tensor]:
        return self._extended(keys), self._extended(values)

    def _extended(self, new: Tensor) -> Tensor:
        """`[B, heads, T, size]` with the last steps before it."""
        empty = new.new_zeros(*new.shape[:2], self._past, new.shape[3])
        both = torch.cat([self._steps.before(empty), new], dim=2)
        self._steps.keep(both[:, :, -self._past :])
        return both[:, :, self._past - self._length :]

    # transformers calls these to make its own mask: report an empty cache.

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


def transformer_step(
    encoder: Any, audio: Tensor, states: Sequence[State | None]
) -> tuple[Tensor, list[State]]:
    """Encode the next chunks with the encoder of Mimi or Pocket TTS, to `[B, D, Z]`."""
    steps = Steps(states)
    padding = _Padding(steps, encoder)
    hidden = encoder.encoder_seanet(audio, padding_cache=padding).transpose(1, 2)
    attention = _Attention(steps, encoder.config, hidden)
    hidden = encoder.encoder_transformer(
        hidden,
        attention_mask=attention.mask,
        position_ids=attention.positions,
        cache=attention,
        use_cache=True,
    ).last_hidden_state
    latents: Tensor = encoder.downsample(hidden.transpose(1, 2), padding_cache=padding)
    return latents, steps.after()
