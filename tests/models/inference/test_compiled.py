"""A compiled encoder: the model's latents, for the one shape; everything else goes past it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentmill.encoding.chunks import Chunking
from latentmill.encoding.encoder import UnitEncoder, _QueuedBatch
from latentmill.encoding.loading import EncodeSettings
from latentmill.engine import tuning
from latentmill.engine.worker import Job
from latentmill.errors import ModelError
from latentmill.models.base import Autoencoder
from latentmill.models.families import mdct
from latentmill.models.inference.compiled import Compiled, uncompiled
from latentmill.models.registry import resolve

MODEL = mdct.build(hop=16, sample_rate=800).load("cpu")
SHAPE = (2, 1, 160)
SLOW = pytest.mark.slow
COMPILE = torch.compile


def noise(*shape: int) -> torch.Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["aot_eager", pytest.param("inductor", marks=SLOW)])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """The fast tests trace the program, and let PyTorch run it instead of a C++ compiler."""

    def compile_for(function: Any, **options: Any) -> Any:
        return COMPILE(function, **options, backend=request.param)

    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "inductor":
            patch.setattr(torch, "compile", compile_for)
        yield


@pytest.fixture(scope="module")
def compiled(_backend: None) -> Compiled:
    return Compiled(MODEL, SHAPE)


def test_latents_are_the_model_s(compiled: Compiled) -> None:
    x = noise(*SHAPE)
    z = compiled.encode(x)
    assert torch.allclose(z, MODEL.encode(x), atol=1e-6)
    assert (z.dtype, z.requires_grad) == (torch.float32, False)
    assert torch.equal(compiled.encode(x), z)
    assert compiled.spec == MODEL.spec
    assert torch.equal(compiled.decode(z, 160), MODEL.decode(z, 160))
    assert uncompiled(compiled) is MODEL
    assert uncompiled(MODEL) is MODEL


def test_earlier_latents_are_not_overwritten(compiled: Compiled) -> None:
    first = compiled.encode(noise(*SHAPE))
    kept = first.clone()
    compiled.encode(torch.ones(SHAPE))
    assert torch.equal(first, kept)


def test_nothing_is_compiled_again(compiled: Compiled) -> None:
    """Not for another length or batch, not in another thread, not under the caller's autocast."""
    from torch._dynamo.utils import counters

    programs = dict(counters["stats"])
    assert programs["unique_graphs"] > 0
    for shape in ((1, 1, 160), (2, 1, 320), (3, 1, 176)):
        x = noise(*shape)
        assert torch.equal(compiled.encode(x), MODEL.encode(x))
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(compiled.encode(noise(*SHAPE))))
    thread.start()
    thread.join()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled.encode(noise(*SHAPE)), found[0])
    assert dict(counters["stats"]) == programs


def test_only_the_one_shape_goes_through_the_program(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, seen = compiled._program, []
    monkeypatch.setattr(compiled, "_program", lambda x: seen.append(tuple(x.shape)) or program(x))
    for shape in (SHAPE, (1, 1, 160), (2, 1, 176)):
        compiled.encode(noise(*shape))
    assert seen == [SHAPE]
    with pytest.raises(ModelError, match="float32"):
        compiled.encode(noise(*SHAPE).half())


def test_a_retry_in_float32_is_not_compiled(compiled: Compiled) -> None:
    """What overflows in a faster mode is encoded once more, by the model as it is."""

    class Exact:
        spec = MODEL.spec
        calls = 0

        def encode(self, audio: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return MODEL.encode(audio)

        decode = MODEL.decode

    overflowing: Any = Compiled.__new__(Compiled)
    overflowing.inner = exact = Exact()
    chunking = Chunking.for_model(MODEL.spec)
    encoder = UnitEncoder(overflowing, chunking, EncodeSettings(precision="bf16"))

    class Batch:
        def audio(self) -> Any:
            return noise(*SHAPE).numpy()

    latents = encoder._encode_in_float32(_QueuedBatch(Batch(), []), {})  # type: ignore[arg-type]
    assert exact.calls == 1
    assert np.array_equal(latents, MODEL.encode(noise(*SHAPE)).numpy())


def test_without_a_compiler_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, one_sentence: Callable[[BaseException], str]
) -> None:
    from torch._inductor import cpp_builder

    monkeypatch.setattr(torch, "compile", COMPILE)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    torch.compiler.reset()
    other = mdct.build(hop=8, sample_rate=800).load("cpu")
    with pytest.raises(ModelError) as caught:
        Compiled(other, (1, 1, 48))
    assert "install a C++ compiler" in one_sentence(caught.value)


def no_compiler(*_: object) -> str:
    from torch._inductor.exc import InvalidCxxCompiler

    raise InvalidCxxCompiler


def test_a_worker_compiles_for_full_batches_of_full_chunks(_backend: None) -> None:
    handle = mdct.build(hop=16, sample_rate=800)
    chunking = Chunking.for_model(handle.spec, seconds=0.2)
    job = Job(
        model=handle,
        chunking=chunking,
        settings=EncodeSettings(batch_size=2),
        store="out",
        format="parquet",
        fingerprint="",
        info={},
        device="cpu",
        threads=1,
        compile=True,
    )
    model = tuning.compiled(handle.load("cpu"), job, "cpu")
    assert model._shape == (2, 1, chunking.model_samples(handle.spec))


def test_a_model_that_cannot_be_compiled_is_refused(
    one_sentence: Callable[[BaseException], str],
) -> None:
    class Strange:
        spec = MODEL.spec

        def encode(self, audio: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such kernel.")

        decode = MODEL.decode

    with pytest.raises(ModelError) as caught:
        Compiled(Strange(), SHAPE)
    assert "(no such kernel): leave out --compile" in one_sentence(caught.value)


@pytest.mark.slow  # minutes
@pytest.mark.parametrize("name", ["dac:REPOS/dac-44k", "oobleck:REPOS/oobleck", "lin-cae"])
def test_models_with_weights_compile(name: str, tiny_cache: Path, tiny_repos: Path) -> None:
    model: Autoencoder = resolve(name.replace("REPOS", str(tiny_repos))).load("cpu")
    spec = model.spec
    x = noise(1, spec.channels, spec.padded(spec.samples(3)))
    expected = model.encode(x)
    z = Compiled(model, tuple(x.shape)).encode(x)  # type: ignore[arg-type]
    assert (z - expected).norm() <= 1e-4 * expected.norm()
