"""What every model must keep. A new family adds one line to `CASES`."""

from __future__ import annotations

import contextlib
import math
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentmill.config import fingerprint_document, load_config
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.encoder import UnitEncoder
from latentmill.encoding.fingerprint import fingerprint
from latentmill.encoding.loading import EncodeSettings, Loading
from latentmill.encoding.single import encode_chunked, encode_whole
from latentmill.encoding.timings import Timings
from latentmill.encoding.unit_audio import LocalAudio
from latentmill.errors import ConfigError, ModelError
from latentmill.evaluation.metrics import additivity, homogeneity
from latentmill.evaluation.probe import probe
from latentmill.models import base as model_base
from latentmill.models.base import Autoencoder, Channels, ModelHandle, ModelSpec, Stitch
from latentmill.models.registry import resolve, weights_of
from latentmill.sources.folder import FolderSource
from support.examples import example


@dataclass(frozen=True)
class Case:
    """A model: its name (`REPOS` is the folder of tiny repositories) and options, and the relative
    error of trimmed chunks that it promises."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    seam: float = math.nan  # no promise: stitched by crossfade
    channels: Channels | None = None


CASES = {
    "example": Case("python:means_example:factory", seam=0),  # of models/base.py
    "mdct-mono": Case("mdct", seam=0),
    "mdct-stereo": Case(
        "mdct", {"channels": 2, "hop": 256, "sample_rate": 48000, "scale_factor": 3.0}, seam=0
    ),
    "mdct-split": Case("mdct", seam=0, channels="split"),
    "lin-cae": Case("lin-cae"),
    "lin-cae-split": Case("lin-cae", channels="split"),
    "music2latent": Case("music2latent", {"repo": "REPOS/music2latent"}),
    "oobleck": Case("oobleck:REPOS/oobleck", seam=1e-6),
    "oobleck-std": Case("oobleck:REPOS/oobleck", {"posterior": "mean+std"}, seam=1e-6),
    "cosmos": Case("cosmos:REPOS/cosmos", {"posterior": "mean+std"}, seam=1e-5),
    "mmaudio": Case("mmaudio:REPOS/mmaudio"),
    "mmaudio-split": Case("mmaudio:REPOS/mmaudio", channels="split"),
    "ltx2": Case("ltx2:REPOS/ltx2", {"posterior": "mean+std"}, seam=1e-5),
    "audioldm2": Case("audioldm2:REPOS/audioldm2"),
    "same": Case("same:REPOS/same", seam=1e-5),
    "kvae": Case("kvae:REPOS/kvae"),
    "minimax": Case("minimax:REPOS/minimax", {"scale_factor": 0.5}),
    "longcat": Case("longcat:REPOS/longcat", seam=1e-6),
    "encodec-24k": Case("encodec:REPOS/encodec-24k", {"scale_factor": 0.5}, seam=1e-5),
    "encodec-32k": Case("encodec:REPOS/encodec-32k", seam=1e-5),
    "encodec-48k": Case("encodec:REPOS/encodec-48k"),
    "dac-44k": Case("dac:REPOS/dac-44k", seam=1e-6),
    "dac-44k-codes": Case("dac:REPOS/dac-44k", {"output": "codes"}, seam=0),
    "dac-24k": Case("dac:REPOS/dac-24k", {"quantise": True}, seam=1e-6),
    "mimi": Case("mimi:REPOS/mimi", seam=1e-3),
    "pockettts": Case("pockettts:REPOS/pockettts", {"scale_factor": 0.5}, seam=1e-6),
    "vibevoice": Case("vibevoice:REPOS/vibevoice", seam=1e-6),
    "vibevoice-split": Case("vibevoice:REPOS/vibevoice", seam=1e-6, channels="split"),
    "trained": Case("trained:REPOS/trained", seam=1e-5),
    "mimi-codes": Case("mimi:REPOS/mimi", {"output": "codes"}, seam=0),
}

# Another form of a model that the fast tests have, whose own tests compare the two.
SLOW = (
    "lin-cae-split",
    "music2latent",
    "oobleck-std",
    "mmaudio-split",
    "encodec-32k",
    "dac-24k",
    "vibevoice-split",
    "mimi-codes",
)

# Probed by the slow tests: the fast ones probe another model of the kind.
SLOW_PROBE = ("cosmos", "mmaudio", "ltx2", "kvae", "minimax", "longcat")
SLOW_PROBE += ("encodec-48k", "dac-44k-codes", "pockettts", "vibevoice")


means_example = types.ModuleType("means_example")
sys.modules[means_example.__name__] = means_example
exec(example(model_base), means_example.__dict__)


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES],
)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def handle(case: Case, tiny_cache: Path, tiny_repos: Path) -> ModelHandle:
    return resolved(case, tiny_repos)


def resolved(case: Case, repos: Path) -> ModelHandle:
    options = {k: _fill(v, repos) for k, v in case.options.items()}
    return resolve(_fill(case.name, repos), options, case.channels)


def _fill(value: Any, repos: Path) -> Any:
    return value.replace("REPOS", str(repos)) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def model(handle: ModelHandle) -> Autoencoder:
    return handle.load("cpu")


@pytest.fixture(scope="module")
def spec(handle: ModelHandle) -> ModelSpec:
    return handle.spec


def audio(spec: ModelSpec, blocks: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Noise `[B, C, T]` of `blocks` multiples more than the shortest length."""
    samples = spec.min_samples + blocks * spec.sample_multiple
    noise = torch.randn(
        batch, spec.channels, samples, generator=torch.Generator().manual_seed(seed)
    )
    return noise * torch.linspace(0.02, 0.3, samples)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "case",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW + SLOW_PROBE else n for n in CASES],
    indirect=True,
)
def test_probe_finds_no_failed_check(handle: ModelHandle) -> None:
    """Lengths, context, batches, determinism, silence, decoding and more: see models/probing."""
    result = probe(handle)
    assert result.failed == ()
    assert result.spec == handle.spec
    seconds = handle.spec.samples(handle.spec.chunk_frames) / handle.spec.sample_rate
    assert 0.9 < seconds < 61


def test_latents_given_to_decode_do_not_change(model: Autoencoder, spec: ModelSpec) -> None:
    """They may be stored afterwards."""
    x = audio(spec, blocks=20)
    z = model.encode(x)
    latents = z.clone()
    model.decode(z, x.shape[-1])
    assert torch.equal(z, latents)


def test_shapes_and_dtypes(model: Autoencoder, spec: ModelSpec) -> None:
    x = audio(spec, blocks=40, batch=3)
    z = model.encode(x)
    assert z.shape == (3, spec.latent_channels, spec.frames(x.shape[-1]))
    assert z.dtype == torch.float32
    assert z.device.type == "cpu"
    assert not z.requires_grad
    y = model.decode(z, x.shape[-1])
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    assert y.isfinite().all()


@settings(max_examples=60)
@given(st.data())
def test_length_arithmetic(spec: ModelSpec, data: st.DataObject) -> None:
    samples = data.draw(st.integers(1, 10**9))
    frames = data.draw(st.integers(1, 10**6))
    padded = spec.padded(samples)
    assert padded >= samples
    assert padded % spec.sample_multiple == 0
    assert spec.padded(padded) == padded
    assert spec.samples(spec.frames(samples)) >= samples
    longest = spec.samples(frames)
    if longest >= spec.min_samples:
        assert spec.frames(longest) == frames
        assert spec.frames(longest + 1) == frames + 1


@pytest.mark.parametrize("frames", [2, 3, 9])
def test_a_latent_decodes_to_at_most_its_samples(
    model: Autoencoder, spec: ModelSpec, frames: int
) -> None:
    z = torch.zeros(1, spec.latent_channels, frames)
    longest = spec.samples(frames)
    whole = model.decode(z, longest)
    assert whole.shape[-1] == longest
    assert torch.equal(model.decode(z, longest - 7), whole[..., :-7])
    with pytest.raises(ModelError, match=f"at most {longest} samples"):
        model.decode(z, longest + 1)


def test_encode_is_deterministic(model: Autoencoder, handle: ModelHandle, spec: ModelSpec) -> None:
    x = audio(spec, blocks=20)
    first = model.encode(x)
    torch.manual_seed(99)
    assert torch.equal(model.encode(x), first)
    travelled = pickle.loads(pickle.dumps(handle))
    assert travelled == handle
    assert torch.equal(travelled.load("cpu").encode(x), first)


@pytest.mark.parametrize("stitch", ["trim", "state"])
def test_stitched_chunks_are_the_whole(
    case: Case, model: Autoencoder, spec: ModelSpec, stitch: Stitch
) -> None:
    if spec.context is None:
        pytest.skip("no context suffices: stitched by crossfade")
    if stitch == "state" and not spec.step_frames:
        with pytest.raises(ConfigError, match="use --stitch trim"):
            Chunking.for_model(spec, stitch="state")
        return
    seam = case.seam if stitch == "trim" else min(case.seam, 1e-6)
    frames = 2 * spec.overlap_frames + 1
    seconds = spec.samples(frames) / spec.sample_rate
    chunking = Chunking.for_model(spec, stitch=stitch, seconds=seconds)
    assert chunking.samples == spec.samples(frames)
    x = audio(spec, blocks=int(2.6 * chunking.samples / spec.sample_multiple))[0]
    whole = encode_whole(model, x)
    chunked = encode_chunked(model, x, chunking)
    assert distance(chunked, whole) <= seam
    worst = (chunked - whole).norm(dim=0).max() / whole.norm(dim=0).mean()
    assert worst <= 3 * seam


@pytest.mark.parametrize(
    ("chunks", "extra"),
    [
        (1, 0),
        (1, 1),
        (2, -1),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in ((1, -1), (2, 0), (2, 1))),
    ],
)
def test_items_that_end_on_a_chunk_s_boundary(
    model: Autoencoder, spec: ModelSpec, chunks: int, extra: int
) -> None:
    frames = max(12, 2 * spec.overlap_frames)
    chunking = Chunking.for_model(spec, seconds=spec.samples(frames) / spec.sample_rate)
    samples = chunking.samples + (chunks - 1) * chunking.step + extra
    x = audio(spec, blocks=math.ceil(samples / spec.sample_multiple))[0, :, :samples]
    latent = encode_chunked(model, x, chunking)
    assert latent.shape == (spec.latent_channels, spec.frames(spec.padded(samples)))
    if (chunks, extra) == (1, 0):
        assert torch.equal(latent, encode_whole(model, x))


@pytest.mark.parametrize("most", [1, 100])
def test_items_shorter_than_a_frame(model: Autoencoder, spec: ModelSpec, most: int) -> None:
    samples = min(most, spec.hop - 1)
    x = audio(spec, blocks=1)[0, :, :samples]
    latent = encode_chunked(model, x, Chunking.for_model(spec))
    assert latent.shape == (spec.latent_channels, spec.frames(spec.padded(samples)))
    assert torch.equal(latent, encode_whole(model, x))
    assert model.decode(latent[None], samples).shape == (1, spec.channels, samples)


def test_nan_is_refused_and_harms_no_neighbour(
    model: Autoencoder, spec: ModelSpec, tmp_path: Path
) -> None:
    """An item with one NaN fails before the model sees it, whatever the model would make of it."""
    samples = spec.min_samples + 20 * spec.sample_multiple
    for name in ("a", "b", "c"):
        sound = audio(spec, blocks=20)[0].T.numpy()
        if name == "b":
            sound[samples // 2] = math.nan
        soundfile.write(tmp_path / f"{name}.wav", sound, spec.sample_rate, "FLOAT")
    chunking, run = Chunking.for_model(spec), EncodeSettings(dtype="float32", batch_size=4)
    items = sorted(FolderSource(str(tmp_path), ("wav",)).items(), key=lambda item: item.key)
    with contextlib.closing(LocalAudio(items, Loading(spec, chunking, run), Timings())) as decoded:
        a, b, c = UnitEncoder(model, chunking, run).encode(decoded)
    assert b.status == "failed"
    assert "NaN" in (b.reason or "")
    whole = model.encode(audio(spec, blocks=20))[0]
    for one in (a, c):
        assert one.record is not None
        assert distance(torch.from_numpy(one.record.latent.copy()), whole) < 1e-4


def test_gain_and_sum_are_reported(
    model: Autoencoder, spec: ModelSpec, record_property: Callable[[str, object], None]
) -> None:
    """Random weights promise nothing, so that the figures are reported, in `--junit-xml`; of the
    transform that is linear they are checked."""
    sounds = [audio(spec, blocks=40, seed=seed)[0] for seed in (0, 1)]
    if spec.codebook_size is not None:
        with pytest.raises(ModelError, match="codes"):
            additivity(model, sounds)
        return
    louder, summed = homogeneity(model, sounds[0]), additivity(model, sounds)
    for gain, one in louder.items():
        record_property(f"homogeneity {gain}", f"{one.with_origin:.3g}, raw {one.raw:.3g}")
    record_property("additivity", f"{summed.with_origin:.3g}, raw {summed.raw:.3g}")
    figures = [summed, *louder.values()]
    assert all(math.isfinite(one.with_origin) and math.isfinite(one.raw) for one in figures)
    if spec.name == "mdct":
        assert max(max(one.with_origin, one.raw) for one in figures) < 1e-6


def test_any_changed_byte_of_its_files_is_another_fingerprint(
    case: Case, handle: ModelHandle, tiny_repos: Path
) -> None:
    """The weights and each configuration file; the model is resolved again from its files."""
    files = getattr(getattr(handle, "inner", handle), "files", None)
    if weights_of(case.name, case.options) is None:
        assert files is None  # the options alone are its identity
        return
    assert files is not None
    assert "sha256_weights" in handle.spec.identity
    for role, path in files.paths.items():
        content = path.read_bytes()
        changed = bytearray(content + b"\n")  # still a configuration, and the same one
        if role == "weights":
            changed = bytearray(content)
            changed[len(content) // 2] ^= 1
        path.write_bytes(changed)
        try:
            spec = resolved(case, tiny_repos).spec
        finally:
            path.write_bytes(content)
        before = handle.spec.identity
        assert set(spec.identity.items()) ^ set(before.items()) == {
            (f"sha256_{role}", one.identity[f"sha256_{role}"]) for one in (spec, handle.spec)
        }
        assert fingerprint_of(spec) != fingerprint_of(handle.spec)
    assert fingerprint_of(resolved(case, tiny_repos).spec) == fingerprint_of(handle.spec)


def fingerprint_of(spec: ModelSpec) -> str:
    config = load_config(None, {"source": "source", "out": "out"})
    return fingerprint(fingerprint_document(config, spec, Chunking.for_model(spec)))


def test_loading_unpickles_nothing(handle: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unpickler that runs code is never called; torch's own takes tensors only."""
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "Unpickler", lambda *_, **__: pytest.fail("unpickled"))
    loaded: list[dict[str, Any]] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **o: loaded.append(o) or load(*a, **o))
    handle.load("cpu")
    assert all(options["weights_only"] is True for options in loaded)


def test_the_handle_is_small(handle: ModelHandle) -> None:
    assert len(pickle.dumps(handle)) < 10_000
    for name, value in handle.spec.identity.items():
        assert isinstance(name, str)
        assert value is None or isinstance(value, (str, int, float, bool))


def test_decoding_is_a_function_of_seed_and_position(model: Autoencoder, spec: ModelSpec) -> None:
    x = audio(spec, blocks=40)
    z, samples = model.encode(x), x.shape[-1]
    state = torch.get_rng_state()
    first = model.decode(z, samples, seed=7, positions=[3])
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are used up
    torch.manual_seed(99)
    assert torch.equal(model.decode(z, samples, seed=7, positions=[3]), first)
    pair = model.decode(z.repeat(2, 1, 1), samples, seed=7, positions=[3, 4])
    assert distance(pair[:1], first) < 1e-4
    assert torch.equal(model.decode(z, samples), model.decode(z, samples, seed=0, positions=[0]))
    differs = spec.stochastic_decoder
    assert (distance(pair[1:], first) > 1e-3) == differs
    assert (distance(model.decode(z, samples, seed=8, positions=[3]), first) > 1e-3) == differs


def test_wrong_audio_is_refused(model: Autoencoder, spec: ModelSpec) -> None:
    x = audio(spec, blocks=8)
    with pytest.raises(ModelError, match="float32"):
        model.encode((x * 32767).to(torch.int16))
    with pytest.raises(ModelError, match="float32"):
        model.encode(x.half())
    with pytest.raises(ModelError, match="shape"):
        model.encode(x[0])
    with pytest.raises(ModelError, match="shape"):
        model.encode(x.repeat(1, spec.channels + 1, 1))
    if spec.sample_multiple > 1:
        with pytest.raises(ModelError, match="multiple"):
            model.encode(x[..., :-1])
    with pytest.raises(ModelError, match=f"pad them to {spec.min_samples}"):
        model.encode(x[..., : spec.min_samples - spec.sample_multiple])


def test_wrong_latents_are_refused(model: Autoencoder, spec: ModelSpec) -> None:
    z = torch.zeros(2, spec.latent_channels, 4)
    with pytest.raises(ModelError, match="float32"):
        model.decode(z.half(), 10)
    with pytest.raises(ModelError, match="shape"):
        model.decode(z[:, :-1], 10)
    with pytest.raises(ModelError, match="positions"):
        model.decode(z, 10, positions=[0])


@pytest.mark.parametrize("device", ["cuda:99", "mps", "gpu"])
def test_a_device_that_is_not_there_is_refused(handle: ModelHandle, device: str) -> None:
    with pytest.raises(ModelError, match=device):
        handle.load(device)
