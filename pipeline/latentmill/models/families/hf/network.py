"""An audio tokenizer of transformers as a `Network`, with the latents before its quantiser.

The input of the module `quantizer` is recorded while the model's own `encode` runs, and its output
is replaced while `decode` runs on codes that have no meaning. A model without a quantiser returns
its latents as `latents`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import soxr
import torch
from torch import Tensor

from latentmill.errors import ModelError

SAMPLING = ("sample", "sample_posterior")  # parameters of `encode` that add noise


class _ReachedError(Exception):
    """Ends `encode` when the quantiser is reached."""


class Quantiser:
    """A quantiser whose input is recorded and whose output is replaced.

    Attributes:
        given: What its encoding methods were given.
        instead: The latents that its decoding methods return; None: their own.
        ends: Whether reaching it ends the call of the model.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.given: list[Tensor] = []
        self.instead: Tensor | None = None
        self.ends = True
        for name in ("encode", "forward"):
            if name in vars(type(module)) or hasattr(type(module), name):
                setattr(module, name, self._recorded(getattr(module, name)))
        for name in ("decode", "from_codes"):
            if hasattr(type(module), name):
                setattr(module, name, self._replaced(getattr(module, name)))

    def _recorded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(hidden: Tensor, *args: Any, **options: Any) -> Any:
            self.given.append(hidden)
            if self.ends:
                raise _ReachedError
            return method(hidden, *args, **options)

        return call

    def _replaced(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            result = method(*args, **options)
            if self.instead is None:
                return result
            latents: Tensor = self.instead
            parts = result if isinstance(result, tuple) else (result,)
            first = parts[0]
            if first.shape != latents.shape:
                raise ModelError(
                    f"its quantiser returns latents of shape {list(first.shape)}, not "
                    f"{list(latents.shape)}"
                )
            latents = latents.to(first.dtype)
            return (latents, *parts[1:]) if isinstance(result, tuple) else latents

        return call


@dataclass(frozen=True)
class CodesShape:
    """The shape of a model's codes: `batch` and `frames` are the axes of these sizes."""

    shape: tuple[int, ...]
    batch: int
    frames: int

    def zeros(self, batch: int, frames: int, device: torch.device) -> Tensor:
        shape = list(self.shape)
        shape[self.batch], shape[self.frames] = batch, frames
        return torch.zeros(shape, dtype=torch.long, device=device)


class TokenizerNetwork:
    """A tokenizer on one device.

    Attributes:
        frames_first: Whether the model's latents are `[B, Z, D]`.
        one_by_one: Whether the elements of a batch are encoded and decoded one after the other,
            because they change each other.
        codes: The shape of its codes; None if it decodes latents.
        options: Arguments of `decode` that have no defaults.
        resample: Sample rates of the decoded audio and of the input, if they differ.
    """

    def __init__(self, model: Any, extractor: Any, sample_rate: int, channels: int) -> None:
        self._model, self._extractor = model, extractor
        self._sample_rate, self._channels = sample_rate, channels
        module = quantiser_of(model)
        self.quantiser = None if module is None else Quantiser(module)
        self._accepts = set(inspect.signature(model.encode).parameters)
        self.frames_first = self.one_by_one = False
        self.codes: CodesShape | None = None
        self.options: dict[str, Any] = {}
        self.resample: tuple[int, int] | None = None

    def encode(self, audio: Tensor) -> Tensor:
        if self.one_by_one and len(audio) > 1:
            return torch.cat([self.encode(one[None]) for one in audio])
        latents = self.raw(audio)
        return latents.transpose(1, 2) if self.frames_first else latents

    def raw(self, audio: Tensor) -> Tensor:
        """The latents in the model's own order of dimensions."""
        if self.quantiser is None:
            output = self._encoded(audio)
            latents = output.get("latents") if hasattr(output, "get") else None
            if not isinstance(latents, Tensor):
                raise ModelError("it has neither a quantiser nor latents")
            return latents
        self.quantiser.given.clear()
        try:
            self._encoded(audio)
        except _ReachedError:
            return self.quantiser.given[-1]
        raise ModelError("encode does not use its quantiser")

    def whole(self, audio: Tensor) -> tuple[Any, int]:
        """The output of `encode` with codes, and how often it used the quantiser."""
        if self.quantiser is None:
            return self._encoded(audio), 0
        self.quantiser.given.clear()
        self.quantiser.ends = False
        try:
            return self._encoded(audio), len(self.quantiser.given)
        finally:
            self.quantiser.ends = True

    def required(self) -> list[str]:
        """The parameters that `decode` requires besides codes."""
        given = inspect.signature(self._model.decode).parameters.values()
        return [
            one.name
            for one in given
            if one.default is one.empty
            and one.kind is one.POSITIONAL_OR_KEYWORD
            and one.name != "audio_codes"
        ]

    def decode_options(self, output: Any) -> dict[str, Any]:
        """Values that `encode` returned besides codes, for parameters that `decode` requires."""
        return {name: output[name] for name in self.required() if name in output}

    def decode(self, latents: Tensor) -> Tensor:
        if self.one_by_one and len(latents) > 1:
            return torch.cat([self.decode(one[None]) for one in latents])
        own = latents.transpose(1, 2) if self.frames_first else latents
        if self.codes is None or self.quantiser is None:
            output = self._model.decode(latents=own)
        else:
            codes = self.codes.zeros(len(latents), latents.shape[-1], latents.device)
            self.quantiser.instead = own
            try:
                output = self._model.decode(audio_codes=codes, **self.options)
            finally:
                self.quantiser.instead = None
        audio: Tensor = output.to_tuple()[0]
        audio = audio.reshape(len(latents), self._channels, -1)
        return audio if self.resample is None else _resampled(audio, *self.resample)

    def _encoded(self, audio: Tensor) -> Any:
        inputs: dict[str, Any] = {"input_values": audio}
        if self._extractor is not None:
            given = audio.squeeze(1) if self._channels == 1 else audio  # mono has no channel axis
            made = self._extractor(
                list(given.cpu().numpy()), sampling_rate=self._sample_rate, return_tensors="pt"
            )
            inputs = {n: v.to(audio.device) for n, v in made.items() if n in self._accepts}
        options = {name: False for name in SAMPLING if name in self._accepts}
        return self._model.encode(**inputs, **options)


def quantiser_of(model: torch.nn.Module) -> torch.nn.Module | None:
    """The outermost module that is named `quantizer`."""
    found = [
        (n.count("."), n, m) for n, m in model.named_modules() if n.split(".")[-1] == "quantizer"
    ]
    return min(found, key=lambda one: one[:2])[2] if found else None


def codes_of(
    network: TokenizerNetwork, sounds: Sequence[Tensor]
) -> tuple[CodesShape | None, dict[str, Any]]:
    """The shape of the codes, from three sounds: one, a longer one and a batch; `options`."""
    if network.quantiser is None:
        return None, {}
    shapes, options = [], {}
    for sound in sounds:
        output, _ = network.whole(sound)
        shapes.append(tuple(output.audio_codes.shape))
        options = network.decode_options(output)
    first, longer, more = shapes
    frames = [axis for axis, (a, b) in enumerate(zip(first, longer, strict=True)) if a != b]
    batch = [axis for axis, (a, b) in enumerate(zip(first, more, strict=True)) if a != b]
    if len(frames) != 1 or len(batch) != 1:
        raise ModelError(f"its codes have unexpected shapes: {shapes}")
    return CodesShape(first, batch[0], frames[0]), options


def _resampled(audio: Tensor, rate: int, wanted: int) -> Tensor:
    flat = audio.reshape(-1, audio.shape[-1]).T.contiguous().cpu().numpy()
    changed = np.ascontiguousarray(soxr.resample(flat, rate, wanted).T)
    return torch.from_numpy(changed).reshape(*audio.shape[:-1], -1).to(audio.device)
