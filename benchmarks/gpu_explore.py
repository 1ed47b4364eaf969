"""Variants and a profile of encoders on a GPU, for `gpu.py --explore`: what would be faster.

Each variant encodes full batches of music that are in GPU memory. `x_real_time` counts only the new
audio of a chunk, so that variants with longer chunks, which overlap less, are comparable. The
library is not changed; the figures show what a change would gain in speed and cost in accuracy.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch

from gpu_model import (
    DEVIATION_CHUNKS,
    Emit,
    Subject,
    clean,
    encoded,
    peak_gib,
    relative,
    reported,
    reset_peak,
    timed,
)
from latentmill.models.inference.precision import numeric_mode

VARIANT_SECONDS = 0.6  # measuring time of each variant
BATCH_SECONDS = {"cuda": (20, 40, 80, 160, 320), "cpu": (0.5,)}
LONG_BATCH_SECONDS = {"cuda": (80, 160, 320), "cpu": (0.5,)}  # for chunks of twice the frames
TOP = 15
Encode = Callable[[torch.Tensor], torch.Tensor]


def explore(subject: Subject, emit: Emit, *, seconds: float, modes: list[str]) -> None:
    """Run the variants, the slowest to compile last because the time limit may cut them off."""
    del seconds  # the process is limited instead
    bench = _Bench(subject, emit)
    kind = "cuda" if subject.on_gpu else "cpu"
    frames = subject.handle.spec.frames(subject.chunking.model_samples(subject.handle.spec))
    fast = [mode for mode in modes if mode in ("tf32", "bf16")] or modes
    for mode in modes:
        bench.variant(f"default, {mode}", mode)
    for mode in fast:
        for wanted in BATCH_SECONDS[kind]:
            bench.variant(f"batches of {wanted} s, {mode}", mode, batch_seconds=wanted)
        for wanted in LONG_BATCH_SECONDS[kind]:
            name = f"{2 * frames} frames, batches of {wanted} s, {mode}"
            bench.variant(name, mode, frames=2 * frames, batch_seconds=wanted)
    if subject.name == "lin-cae":
        encoder = subject.model._generator.encoder
        before = next(p for p in encoder.parameters() if p.ndim == 4).is_contiguous(
            memory_format=torch.channels_last
        )
        other = torch.contiguous_format if before else torch.channels_last
        encoder.to(memory_format=other)
        for mode in modes:
            bench.variant(f"{'contiguous' if before else 'channels-last'}, {mode}", mode)
        encoder.to(memory_format=torch.channels_last if before else torch.contiguous_format)
    half = None
    with reported(lambda _, value: emit("bf16 weights", {"error": value})):
        half = in_bf16(subject)
        bench.variant("bf16 weights", "tf32", half)
    if subject.on_gpu:
        bench.graph("CUDA graph, tf32", "tf32", subject.model.encode)
        if half is not None:
            bench.graph("CUDA graph, bf16 weights", "tf32", half)
    for mode in fast:
        with reported(lambda _, value: emit("profile", {"error": value})):
            emit(f"profile, {mode}", bench.profile(mode))
    if not subject.on_gpu:
        return
    if half is not None:
        bench.compiled("torch.compile, bf16 weights", "tf32", half)
    bench.compiled("torch.compile, tf32", "tf32", subject.model.encode)
    for mode in fast:  # what `latentmill encode --compile` does, with CUDA graphs
        bench.library_compiled(f"--compile, {mode}", mode)


def in_bf16(subject: Subject) -> Encode:
    """Return the encoder with bf16 weights and activations; front ends stay float32."""
    model = subject.model
    if subject.name == "lin-cae":
        encoder = copy.deepcopy(model._generator.encoder).bfloat16()

        def encode(audio: torch.Tensor) -> torch.Tensor:
            spectrum = model._frontend.to_representation(audio[:, 0])
            return encoder(spectrum.bfloat16()).float() * model.spec.scale_factor  # type: ignore[no-any-return]

        return encode
    network = subject.handle.load(subject.device)._network._model.bfloat16()
    for module in network.modules():
        if hasattr(module, "inv_freq"):  # bf16 cannot represent the positions exactly
            module.float()

    def encode_same(audio: torch.Tensor) -> torch.Tensor:
        return network.encode(audio.bfloat16()).latents.float() * model.spec.scale_factor  # type: ignore[no-any-return]

    return encode_same


class _Bench:
    """Measures variants on batches of music; a failure is recorded as a result."""

    def __init__(self, subject: Subject, emit: Emit) -> None:
        self._subject = subject
        self._emit = emit
        self._size = subject.batch_size("tf32" if subject.on_gpu else "float32")
        self._samples = subject.chunking.model_samples(subject.handle.spec)
        few = subject.audio(DEVIATION_CHUNKS, self._samples)
        self._few = torch.from_numpy(few).to(subject.device)
        self._exact = encoded(subject, few, "float32")
        self._long = torch.from_numpy(subject.audio(self._size, 2 * self._samples))

    def variant(
        self,
        name: str,
        mode: str,
        encode: Encode | None = None,
        *,
        frames: int | None = None,
        batch_seconds: float | None = None,
    ) -> None:
        """Time one variant of encoding."""
        subject, spec = self._subject, self._subject.handle.spec
        encode = encode or subject.model.encode
        samples = spec.samples(frames) if frames else self._samples
        size = self._size
        if batch_seconds is not None:
            size = max(1, round(batch_seconds * spec.sample_rate / samples))
        most = spec.max_batch_samples
        if most is not None and size * samples > most:
            return
        with reported(lambda _, value: self._emit(name, {"error": value})):
            audio = self._audio(size, samples)
            reset_peak(subject)
            with torch.inference_mode(), numeric_mode(mode, subject.device):  # type: ignore[arg-type]
                times = timed(subject, lambda: encode(audio), VARIANT_SECONDS)
                deviation = relative(encode(self._few).float().cpu(), self._exact)
            self._report(name, audio, times, deviation)
        clean(None)

    def graph(self, name: str, mode: str, encode: Encode) -> None:
        """Time the same kernels as one CUDA graph, which shows the cost of launching them."""
        subject = self._subject
        with reported(lambda _, value: self._emit(name, {"error": value})):
            audio = self._audio(self._size, self._samples)
            reset_peak(subject)
            with torch.inference_mode(), numeric_mode(mode, subject.device):  # type: ignore[arg-type]
                side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(3):
                        encode(audio)
                torch.cuda.current_stream().wait_stream(side)
                recorded = torch.cuda.CUDAGraph()
                with torch.cuda.graph(recorded):
                    encode(audio)
                times = timed(subject, recorded.replay, VARIANT_SECONDS)
            self._report(name, audio, times, None)
        clean(None)

    def compiled(self, name: str, mode: str, encode: Encode) -> None:
        """Time the encoder under torch.compile; the compile time is reported separately."""
        import time

        began = time.perf_counter()
        with reported(lambda _, value: self._emit(name, {"error": value})):
            program = torch.compile(encode, dynamic=False)
            audio = self._audio(self._size, self._samples)
            with torch.no_grad(), numeric_mode(mode, self._subject.device):  # type: ignore[arg-type]
                program(audio)
                self._subject.wait()
                seconds = time.perf_counter() - began
                reset_peak(self._subject)
                times = timed(self._subject, lambda: program(audio), VARIANT_SECONDS)
                size = len(self._few)
                deviation = relative(program(audio)[:size].float().cpu(), self._reference(audio))
            self._report(name, audio, times, deviation, compile_seconds=round(seconds, 1))
        torch.compiler.reset()
        clean(None)

    def library_compiled(self, name: str, mode: str) -> None:
        """Time the encoder as the library compiles it."""
        from latentmill.models.inference.compiled import Compiled

        subject, spec = self._subject, self._subject.handle.spec
        shape = (self._size, spec.channels, self._samples)
        with reported(lambda _, value: self._emit(name, {"error": value})):
            model = Compiled(subject.model, shape, subject.device, mode)  # type: ignore[arg-type]
            self.variant(name, mode, model.encode)
        torch.compiler.reset()

    def profile(self, mode: str) -> dict[str, Any]:
        """Profile one full batch; returns the kernels that take longest."""
        subject = self._subject
        activities = [torch.profiler.ProfilerActivity.CPU]
        key = "self_cpu_time_total"
        if subject.on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            key = "self_device_time_total"
        audio = self._audio(self._size, self._samples)
        with torch.inference_mode(), numeric_mode(mode, subject.device):  # type: ignore[arg-type]
            subject.model.encode(audio)
            subject.wait()
            with torch.profiler.profile(activities=activities) as profiler:
                subject.model.encode(audio)
                subject.wait()
        rows = sorted(profiler.key_averages(), key=lambda row: -getattr(row, key))
        if subject.on_gpu:  # kernels, not the operators that launch them
            cuda = torch.autograd.DeviceType.CUDA
            rows = [row for row in rows if row.device_type == cuda]
        total = sum(getattr(row, key) for row in rows)
        kernels = [
            {
                "name": row.key[:120],
                "ms": round(getattr(row, key) / 1000, 3),
                "calls": row.count,
                "share": round(getattr(row, key) / max(total, 1e-9), 3),
            }
            for row in rows[:TOP]
        ]
        return {"total_ms": round(total / 1000, 3), "kernels": kernels}

    def _audio(self, size: int, samples: int) -> torch.Tensor:
        """Return a batch of music on the device; batches above the default size repeat passages."""
        flat = self._long[:, :, :samples]
        repeats = -(-size // len(flat))
        return flat.repeat(repeats, 1, 1)[:size].contiguous().to(self._subject.device)

    def _reference(self, audio: torch.Tensor) -> torch.Tensor:
        first = audio[: len(self._few)].cpu().numpy()
        return encoded(self._subject, first, "float32")  # type: ignore[no-any-return]

    def _report(
        self,
        name: str,
        audio: torch.Tensor,
        times: list[float],
        deviation: float | None,
        **more: Any,
    ) -> None:
        spec, chunking = self._subject.handle.spec, self._subject.chunking
        new = audio.shape[2] - (self._samples - chunking.step)
        seconds = statistics.median(times)
        figures = {
            "x_real_time": round(len(audio) * new / spec.sample_rate / seconds, 1),
            "batch_ms": round(1000 * seconds, 3),
            "batch": list(audio.shape),
            "batches": len(times),
            "peak_gpu_gib": peak_gib(self._subject),
        }
        if deviation is not None:
            figures["deviation_from_float32"] = deviation
        self._emit(name, {**figures, **more})
