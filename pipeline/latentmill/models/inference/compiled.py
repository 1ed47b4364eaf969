"""A model whose encoder is compiled for the one shape that most batches have.

`torch.compile` compiles a program for each shape, which takes minutes. Full batches of full chunks
have one shape. The last batch of a unit and items shorter than a chunk have other shapes, which the
uncompiled model encodes. On a GPU the program is replayed as CUDA graphs. Their state belongs to a
thread, so one thread runs all of them (pytorch issue 123177).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from latentmill.errors import ModelError
from latentmill.models.base import Autoencoder
from latentmill.models.inference.precision import Precision, numeric_mode


class Compiled:
    """Encodes batches of shape `[B, C, T]` with a compiled program; implements `Autoencoder`.

    The constructor compiles the program, for one numeric mode. It raises `ModelError` if that fails
    on this machine.
    """

    def __init__(
        self,
        inner: Autoencoder,
        shape: tuple[int, int, int],
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> None:
        self.inner, self.spec, self.decode = inner, inner.spec, inner.decode
        self._shape = shape
        self._device = torch.device(device)
        self._precision: Precision = precision
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compiled")
        on_gpu = self._device.type == "cuda"
        try:
            mode = "reduce-overhead" if on_gpu else None
            self._program = torch.compile(inner.encode, dynamic=False, mode=mode)
            for _ in range(3 if on_gpu else 1):  # compiles, warms up, captures the graphs
                self.encode(torch.zeros(shape, dtype=torch.float32, device="cpu"))
        except RuntimeError as error:
            raise _does_not_compile(inner.spec.name, error) from error

    def encode(self, audio: Tensor) -> Tensor:
        """Encode `[B, C, T]` to `[B, D, Z]`, with the program if the shape is the compiled one."""
        if audio.shape != self._shape or audio.dtype != torch.float32:
            return self.inner.encode(audio)
        return self._thread.submit(self._run, audio).result()

    def _run(self, audio: Tensor) -> Tensor:
        """Run the program, in the one thread, where the caller's autocast region does not apply.

        The compiler does not support inference mode; see `no_gradients`.
        """
        with torch.no_grad(), numeric_mode(self._precision, str(self._device)):
            latents: Tensor = self._program(audio.to(self._device))
            return latents.clone()  # the next batch overwrites the output of a CUDA graph


def uncompiled(model: Autoencoder) -> Autoencoder:
    """The uncompiled model, for a numeric mode other than the compiled one."""
    return model.inner if isinstance(model, Compiled) else model


def _does_not_compile(name: str, error: RuntimeError) -> ModelError:
    reason = next(reversed([one.strip() for one in str(error).splitlines()[:2] if one.strip()]), "")
    reason = reason.rstrip(".") or type(error).__name__
    advice = "leave out --compile"
    if "compiler" in reason.lower() or "triton" in reason.lower():
        advice = (
            "install a C++ compiler (`apt-get install g++`) and, for a GPU, Triton (`pip "
            "install triton`), or leave out --compile"
        )
    return ModelError(f"Model {name} does not compile on this machine ({reason}): {advice}.")
