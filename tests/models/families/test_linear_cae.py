"""The linear-cae models against the package itself, its traps, and its files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import linear_cae
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from latentmill.errors import ModelError
from latentmill.models.families.linear_cae.model import LinearCae, LinearCaeHandle, frame_noise
from latentmill.models.inference.precision import numeric_mode
from latentmill.models.registry import resolve
from support.exact_attention import exact_attention
from support.hub import serve
from support.linear_cae_weights import FRONTEND, random_state, use_cache, write_folder

REPO = "BernardoTorres/linear_consistency_autoencoders"
FOLDER = "0a3afbec_weights"
PIPELINE = Path(__file__).parents[3] / "pipeline"


@pytest.fixture(scope="module")
def handle(tiny_cache: Path) -> Any:
    return resolve("lin-cae")


@pytest.fixture(scope="module")
def model(handle: LinearCaeHandle) -> LinearCae:
    return handle.load("cpu")


@pytest.fixture(scope="module")
def package_model(tiny_cache: Path) -> Any:
    return linear_cae.Autoencoder.from_pretrained("lin-cae")


def noise(batch: int, samples: int = 40960) -> torch.Tensor:
    return 0.1 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(0))


def test_spec_of_the_published_architecture(handle: LinearCaeHandle) -> None:
    spec = handle.spec
    assert (spec.sample_rate, spec.channels, spec.latent_channels) == (44100, 1, 64)
    assert (spec.hop, spec.overhang, spec.sample_multiple, spec.min_samples) == (
        4096,
        1536,
        512,
        2048,
    )
    assert spec.samples(spec.chunk_frames) == 443904  # 10.07 s
    assert spec.max_batch_samples == 380 * 44100  # 2**31 elements, pytorch issue 117736


@settings(max_examples=200)
@given(st.integers(0, 5000))
def test_lengths_are_the_package_s(handle: Any, package_model: Any, blocks: int) -> None:
    samples = 2048 + 512 * blocks
    assert handle.spec.frames(samples) == package_model.get_latent_size(samples)
    assert handle.spec.samples(blocks + 1) == package_model.get_decoded_size(blocks + 1)


def test_the_package_fails_obscurely_below_its_shortest_length(
    model: LinearCae, package_model: Any
) -> None:
    short = noise(1, 1536)
    with pytest.raises(RuntimeError, match="maximum size for tensor"):
        package_model.encode(short[:, 0])
    with pytest.raises(ModelError, match="at least 2048"):
        model.encode(short)


def test_encode_is_the_package_s(model: LinearCae, package_model: Any) -> None:
    x = noise(3)
    expected = package_model.encode(x[:, 0], max_batch_size=3)  # as its README calls it
    alone = package_model.encode(x[:1, 0])
    assert torch.equal(model.encode(x), expected)
    assert torch.equal(model.encode(x[:1]), alone)
    assert expected.std() > 1  # scaled, not squashed


def test_the_lean_encoder_is_the_package_s_in_every_numeric_mode(
    model: LinearCae, package_model: Any
) -> None:
    x = noise(2, 30_720)
    for precision, tolerance in (("float32", 0.0), ("bf16", 1e-6)):
        with torch.inference_mode(), exact_attention():
            spectrum = package_model.frontend.to_representation(x[:, 0])
            with numeric_mode(precision, "cpu"):  # type: ignore[arg-type]
                expected = package_model.generator.encoder(spectrum).float() * 33.0
                ours = model.encode(x)
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max()
    assert torch.backends.mha.get_fastpath_enabled()


def test_encoding_leaves_the_flags_of_other_threads_alone(
    model: LinearCae, package_model: Any
) -> None:
    """The flag of the fast path is global to the process."""
    flags: list[bool] = []
    hook = model._generator.encoder.register_forward_hook(
        lambda *_: flags.append(torch.backends.mha.get_fastpath_enabled())
    )
    sounds = [noise(1), noise(2, 30_720), noise(3)]
    try:
        wanted = [model.encode(sound) for sound in sounds]
        with ThreadPoolExecutor(3) as pool:
            found = [list(pool.map(model.encode, sounds)) for _ in range(4)]
    finally:
        hook.remove()
    assert flags == [True] * 15
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(torch.equal(*pair) for one in found for pair in zip(one, wanted, strict=True))


def test_encode_does_not_grow_the_state_dict(model: LinearCae) -> None:
    package_model = linear_cae.Autoencoder.from_pretrained("lin-cae")
    before = set(package_model.state_dict())
    LinearCae(model.spec, package_model, torch.device("cpu"), 1).encode(noise(1))
    assert set(package_model.state_dict()) == before
    with torch.inference_mode():
        package_model.encode(noise(1)[:, 0])
    assert len(package_model.state_dict()) > len(before)  # the trap


def test_weights_in_channels_last_give_the_same_latents(handle: LinearCaeHandle) -> None:
    """As on a GPU; on a CPU GroupNorm in this order is inaccurate for large chunks."""
    model, x = handle.load("cpu"), noise(2)
    before = model.encode(x)
    model._generator.encoder.to(memory_format=torch.channels_last)
    weights = [p for p in model._generator.encoder.parameters() if p.ndim == 4 and p.shape[1] > 1]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert (model.encode(x) - before).norm() < 1e-5 * before.norm()


def test_nothing_asks_for_gradients(model: LinearCae) -> None:
    assert not any(p.requires_grad for p in model._generator.parameters())
    assert not model._generator.training
    assert model.encode(noise(1)).grad_fn is None


def test_autocast_around_encode_reaches_the_encoder_alone(model: LinearCae) -> None:
    x = noise(1)
    exact = model.encode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = model.encode(x)
    assert coarse.dtype == torch.float32
    assert 1e-4 < (coarse - exact).norm() / exact.norm() < 0.2


@pytest.mark.parametrize("steps", [1, 3])
def test_decode_is_the_package_s_with_the_same_noise(
    package_model: Any, handle: LinearCaeHandle, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    model = dataclasses.replace(handle, diffusion_steps=steps).load("cpu")
    x = noise(2)
    z = model.encode(x)
    drawn = list(model._noise(z.shape[-1], 5, [3, 40]).unbind(1))
    ours = model.decode(z, x.shape[-1], seed=5, positions=[3, 40])

    feed = iter([*drawn, drawn[0]])  # the package draws once more after the last step
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(feed))
    monkeypatch.setattr(torch, "randn_like", lambda *_: next(feed))
    theirs = package_model.decode(z, x.shape[-1], diffusion_steps=steps, max_batch_size=2)
    assert torch.equal(ours[:, 0], theirs)
    assert ours.std() > 1e-3


def test_noise_depends_on_seed_and_position_alone() -> None:
    shape = (1, 2, 16, 8)
    whole = frame_noise(3, [0], 50, shape)[0]
    assert torch.equal(frame_noise(3, [17], 20, shape)[0], whole[17:37])
    assert torch.equal(frame_noise(3, [30, 5], 9, shape), torch.stack((whole[30:39], whole[5:14])))
    assert whole.flatten(1).unique(dim=0).shape[0] == 50
    assert not torch.equal(frame_noise(4, [0], 50, shape)[0], whole)
    assert not torch.equal(frame_noise(-3, [0], 50, shape)[0], whole)
    for integer in (np.int64, np.uint32, torch.tensor):
        part = frame_noise(integer(3), [integer(17)], 20, shape)  # type: ignore[arg-type,list-item]
        assert torch.equal(part[0], whole[17:37])
    negative = frame_noise(np.int64(-3), np.array([0]), 50, shape)  # type: ignore[arg-type]
    assert torch.equal(negative, frame_noise(-3, [0], 50, shape))
    assert whole.std() == pytest.approx(1, abs=0.03)
    assert whole.mean() == pytest.approx(0, abs=0.03)


def test_noise_of_more_steps_begins_with_that_of_fewer() -> None:
    one = frame_noise(0, [7], 3, (1, 2, 16, 8))
    assert torch.equal(frame_noise(0, [7], 3, (4, 2, 16, 8))[:, :, :1], one)


def test_noise_is_that_of_the_first_release() -> None:
    expected = [-0.3608266, -0.2086328]
    assert frame_noise(1, [2], 1, (2,)).flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_scale_factor_is_the_name_s_or_the_option_s(
    tiny_cache: Path, handle: LinearCaeHandle, model: LinearCae
) -> None:
    assert (handle.spec.scale_factor, resolve("m2l").spec.scale_factor) == (33.0, 15.0)
    doubled = resolve("lin-cae", {"scale_factor": 66})
    assert doubled.spec.identity["scale_factor"] == 66.0
    x = noise(1)
    z = doubled.load("cpu").encode(x)
    assert torch.allclose(z, 2 * model.encode(x))
    assert torch.allclose(
        doubled.load("cpu").decode(z, 40960), model.decode(z / 2, 40960), atol=1e-6
    )


@pytest.mark.parametrize("options", [{"scale_factor": 0.0}, {"diffusion_steps": 0}])
def test_options_out_of_range_are_refused(tiny_cache: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(options))):
        resolve("lin-cae", options)


def test_identity_names_every_file(handle: LinearCaeHandle, tiny_home: Path) -> None:
    identity, provenance = handle.spec.identity, handle.spec.provenance
    (revision,) = (tiny_home / "hub").glob("*/refs/main")
    assert provenance["revision"] == revision.read_text()
    assert provenance["repo"] == REPO
    assert not {"revision", "diffusion_steps"} & set(identity)  # they do not change latents
    assert identity["package_version"] == "0.1.4"
    assert {len(str(v)) for k, v in identity.items() if k.startswith("sha256_")} == {64}


def test_one_changed_weight_is_another_identity(own_cache: Path) -> None:
    before = resolve("lin-cae")
    path = own_cache / FOLDER / "autoencoder_inference_model_last.pth"
    state = torch.load(path)
    state["generator.encoder.conv_out.bias"][0] += 1e-3
    torch.save(state, path)
    after = resolve("lin-cae")
    changed = {k for k, v in after.spec.identity.items() if before.spec.identity[k] != v}
    assert changed == {"sha256_weights"}
    with pytest.raises(ModelError, match=r"the weights file of .* on this machine"):
        before.load("cpu")
    after.load("cpu")


def test_the_frontend_s_values_are_the_model_s_not_the_package_s(own_cache: Path) -> None:
    path = own_cache / FOLDER / "frontend_kwargs_last.yaml"
    path.write_text(yaml.safe_dump({**FRONTEND, "hop_size": 256, "sample_rate": 22050}))
    generator = own_cache / FOLDER / "generator_kwargs_last.yaml"
    generator.write_text(yaml.safe_dump({"hop": 256, "bottleneck_channels": 32}))
    spec = resolve("lin-cae").spec
    assert (spec.hop, spec.overhang, spec.sample_multiple) == (2048, 768, 256)
    assert (spec.sample_rate, spec.latent_channels) == (22050, 32)


def test_missing_weights_say_what_to_run(own_cache: Path) -> None:
    (own_cache / FOLDER / "generator_kwargs_last.yaml").unlink()
    with pytest.raises(ModelError, match=r"hf download .*'0a3afbec_weights/\*'") as caught:
        resolve("lin-cae")
    assert "HF_HUB_OFFLINE is set" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_files_are_of_the_first_one_s_commit(own_cache: Path) -> None:
    """`main` moved on, and only one file of the new commit was downloaded."""
    newer = own_cache.with_name("f" * 40)
    (newer / FOLDER).mkdir(parents=True)
    weights = f"{FOLDER}/autoencoder_inference_model_last.pth"
    shutil.copy(own_cache / weights, newer / weights)
    (own_cache.parents[1] / "refs" / "main").write_text(newer.name)
    with pytest.raises(ModelError, match=rf"--revision {newer.name}`"):
        resolve("lin-cae")
    pinned = resolve("lin-cae", {"revision": own_cache.name})
    assert pinned.spec.provenance["revision"] == own_cache.name
    pinned.load("cpu")


def test_a_handle_keeps_its_commit_when_main_moves_on(own_cache: Path) -> None:
    handle = resolve("lin-cae")
    (own_cache.parents[1] / "refs" / "main").write_text("f" * 40)
    handle.load("cpu")
    with pytest.raises(ModelError, match="not on this machine"):
        resolve("lin-cae")


@pytest.mark.parametrize("folder", [".", FOLDER])
def test_a_local_folder_gives_the_same_latents(
    handle: LinearCaeHandle, model: LinearCae, tiny_home: Path, folder: str
) -> None:
    (snapshot,) = (tiny_home / "hub").glob("*/snapshots/*")
    local = resolve("lin-cae", {"repo": str(snapshot / folder)})
    assert local.spec.identity == handle.spec.identity
    assert local.spec.provenance["revision"] is None
    assert torch.equal(local.load("cpu").encode(noise(1)), model.encode(noise(1)))


def test_a_weights_file_runs_no_code(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # has no power over us

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"x": Payload()}, own_cache / FOLDER / "autoencoder_inference_model_last.pth")
    with pytest.raises(ModelError, match="does not load"):
        resolve("lin-cae").load("cpu")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("spoil", ["cut", "other"])
def test_weights_that_do_not_fit_are_refused(own_cache: Path, spoil: str) -> None:
    path = own_cache / FOLDER / "autoencoder_inference_model_last.pth"
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        torch.save({"frontend.window": torch.zeros(2048)}, path)
    with pytest.raises(ModelError, match=r"does not load .*delete it"):
        resolve("lin-cae").load("cpu")


@pytest.mark.parametrize("text", ["[1, 2]", "colour: blue", "a: [", ""])
def test_a_configuration_that_does_not_fit_is_refused(own_cache: Path, text: str) -> None:
    (own_cache / FOLDER / "frontend_kwargs_last.yaml").write_text(text)
    with pytest.raises(ModelError, match="does not fit the installed linear-cae"):
        resolve("lin-cae")


@pytest.mark.parametrize(
    ("part", "text"), [("generator", "freq_downsample_list: 5"), ("frontend", "hop_size: x")]
)
def test_settings_that_make_no_sense_are_refused(own_cache: Path, part: str, text: str) -> None:
    (own_cache / FOLDER / f"{part}_kwargs_last.yaml").write_text(text)
    with pytest.raises(ModelError, match=r"0a3afbec_weights does not load \("):
        resolve("lin-cae")


def test_without_the_package_the_error_is_the_pip_line(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "linear_cae.inference", None)
    line = "--no-deps linear-cae==0.1.4" if sys.version_info >= (3, 13) else r"latentmill\[lin"
    with pytest.raises(ModelError, match=f"pip install .*{line}"):
        resolve("lin-cae")


@pytest.mark.parametrize("version", ["0.1.2", "0.1.3"])
def test_withdrawn_releases_are_refused(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr("latentmill.models.weights.version", lambda _: version)
    with pytest.raises(ModelError, match=f"{version} was withdrawn"):
        resolve("lin-cae")


def test_downloads_once_from_the_hub_then_works_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The download is in a process of its own: huggingface_hub reads its variables at import."""
    script = (
        "import json, torch\n"
        "from latentmill.models.registry import resolve\n"
        "torch.set_num_threads(1)\n"
        "handle = resolve('lin-cae')\n"
        "handle.load('cpu').encode(torch.zeros(1, 1, 8192))\n"
        "print(json.dumps([handle.spec.identity, handle.spec.provenance]))\n"
    )
    served, home, revision = tmp_path / "served", tmp_path / "home", "ab" * 20
    write_folder(served)
    with serve(served, REPO, revision) as hub:
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(PIPELINE)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
        )
        downloads = [r for r in hub.requests if r.startswith(f"GET /{REPO}/resolve/")]
    assert done.returncode == 0, done.stderr
    identity, provenance = json.loads(done.stdout.splitlines()[-1])
    assert provenance["revision"] == revision
    assert len(downloads) == 4  # from_pretrained finds what was downloaded for the handle

    use_cache(monkeypatch, home)
    offline = resolve("lin-cae")
    assert offline.spec.identity == identity
    offline.load("cpu")


@pytest.mark.slow
def test_random_weights_are_the_same_every_time_and_all_count(model: LinearCae) -> None:
    first, again, other = (random_state("tiny", seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["generator.conv_out.weight"], other["generator.conv_out.weight"])
    norms = [m for m in model._generator.encoder.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == 27  # as in the published models
    x = noise(1)
    z = model.encode(x)
    assert 0.1 < (z / model.spec.scale_factor).std() < 0.5
    for name, parameter in model._generator.encoder.named_parameters():
        if not name.endswith("weight"):
            continue
        kept = parameter.clone()
        parameter.mul_(0.5)
        assert not torch.equal(model.encode(x), z), name
        parameter.copy_(kept)
