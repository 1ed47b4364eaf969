"""What every embedder must keep. A new family adds one line to `CASES`."""

from __future__ import annotations

import pickle
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentmill.errors import ModelError
from latentmill.models import embedder as protocol
from latentmill.models.embedder import Embedder, EmbedderHandle, EmbedderSpec, checked_embed
from latentmill.models.registry import available, resolve, resolve_embedder, weights_of
from latentmill.models.trust import check_named
from support.examples import example

TEXTS = ["solo piano", "", "drums", "a long text, slowly", "piano"]


@dataclass(frozen=True)
class Case:
    """An embedder: its name (`REPOS` is the folder of tiny repositories) and options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    without_empty: bool = False  # the tokenizer gives the empty text no token


CASES = {
    "example": Case("python:vowels_example:factory"),  # of models/embedder.py
    "peaks": Case("python:latents_example:factory"),
    "t5": Case("t5:REPOS/t5"),
    "umt5": Case("t5:REPOS/umt5"),
    "clap": Case("clap:REPOS/clap"),
    "bert": Case("text:REPOS/bert"),
    "bert-mean": Case("text:REPOS/bert", {"pool": "mean"}),
    "gpt": Case("text:REPOS/gpt", without_empty=True),
    "t5-short": Case("t5:REPOS/t5", {"max_tokens": 4}),
}


class Peaks:
    """An embedder of latents: the largest value of every channel in each two frames."""

    spec = EmbedderSpec("peaks", "frames", "latents", dimensions=3, stride=2)

    def load(self, device: str) -> Peaks:
        del device
        return self

    def embed(self, values: Any) -> list[Any]:
        padded = [np.pad(each, ((0, 0), (0, each.shape[1] % 2)), "edge") for each in values]
        return [np.maximum(each[:, ::2], each[:, 1::2]) for each in padded]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Peaks)

    __hash__ = None  # type: ignore[assignment]


vowels_example = types.ModuleType("vowels_example")
sys.modules[vowels_example.__name__] = vowels_example
exec(example(protocol), vowels_example.__dict__)
latents_example = types.ModuleType("latents_example")
sys.modules[latents_example.__name__] = latents_example
latents_example.factory = Peaks  # type: ignore[attr-defined]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def resolved(case: Case, repos: Path) -> EmbedderHandle:
    return resolve_embedder(case.name.replace("REPOS", str(repos)), case.options)


@pytest.fixture(scope="module")
def handle(case: Case, encoders: Path) -> EmbedderHandle:
    return resolved(case, encoders)


@pytest.fixture(scope="module")
def model(handle: EmbedderHandle) -> Embedder:
    return handle.load("cpu")


def values_for(spec: EmbedderSpec) -> list[Any]:
    if spec.input == "text":
        return TEXTS
    rng = np.random.default_rng(0)
    return [rng.standard_normal((3, n)).astype(np.float32) for n in (7, 1, 40, 8)]


def distance(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-9))


def test_shapes_and_dtypes(case: Case, model: Embedder) -> None:
    spec = model.spec
    values = values_for(spec)
    arrays = checked_embed(model, values)
    for value, array in zip(values, arrays, strict=True):
        assert array.dtype == np.float32
        assert array.shape[0] == spec.dimensions
        assert np.isfinite(array).all()
        if spec.kind == "vector":
            assert array.shape[1] == 1
        elif spec.kind == "frames":
            assert array.shape[1] == -(-value.shape[1] // spec.stride)
        else:
            assert (array.shape[1] == 0) == (value == "" and case.without_empty)
    assert spec.kind != "tokens" or len({array.shape[1] for array in arrays}) > 1  # ragged
    assert checked_embed(model, []) == []
    assert set(spec.batch_size) == {"cpu", "cuda"}


def test_values_of_a_call_are_independent(model: Embedder) -> None:
    values = values_for(model.spec)
    for value, together in zip(values, model.embed(values), strict=True):
        (alone,) = model.embed([value])
        assert alone.shape == together.shape
        assert distance(together, alone) < 1e-4


def test_embedding_is_deterministic(model: Embedder, handle: EmbedderHandle) -> None:
    values = values_for(model.spec)
    first = model.embed(values)
    torch.manual_seed(99)
    np.random.seed(99)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = model.embed(values)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    travelled = pickle.loads(pickle.dumps(handle))
    assert travelled == handle
    for others in (again, travelled.load("cpu").embed(values)):
        assert all(np.array_equal(a, b) for a, b in zip(first, others, strict=True))


def test_values_are_not_changed(model: Embedder) -> None:
    values = values_for(model.spec)
    kept = pickle.loads(pickle.dumps(values))
    model.embed(values)
    assert all(np.array_equal(a, b) for a, b in zip(values, kept, strict=True))


def test_the_handle_is_small(handle: EmbedderHandle) -> None:
    assert len(pickle.dumps(handle)) < 10_000
    for name, value in handle.spec.identity.items():
        assert isinstance(name, str)
        assert value is None or isinstance(value, (str, int, float, bool))


def test_any_changed_file_is_another_identity(
    case: Case, handle: EmbedderHandle, encoders: Path
) -> None:
    if weights_of(case.name, case.options) is None:
        assert not hasattr(handle, "files")
        return
    files = handle.files  # type: ignore[attr-defined]
    assert {"weights", "config", "tokenizer", "tokenizer_config"} <= set(files.paths)
    for role, path in files.paths.items():
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        try:
            identity = resolved(case, encoders).spec.identity
        finally:
            path.write_bytes(content)
        changed = {name for name, value in identity.items() if handle.spec.identity[name] != value}
        assert changed == {f"sha256_{role}"}


@pytest.mark.parametrize("device", ["cuda:99", "mps"])
def test_a_missing_device_is_an_error(case: Case, handle: EmbedderHandle, device: str) -> None:
    if case.name.startswith("python:"):
        pytest.skip("these run on any device")
    with pytest.raises(ModelError, match=device):
        handle.load(device)


def test_every_family_has_a_case() -> None:
    listed = {each.name.partition(":")[0] for each in available() if each.kind == "text embedder"}
    assert listed == {"t5", "clap", "text"}
    assert listed <= {case.name.partition(":")[0] for case in CASES.values()}


def test_the_vowels_are_counted() -> None:
    model = resolve_embedder("python:vowels_example:factory").load("cpu")
    (array,) = checked_embed(model, ["a queue, you see"])
    assert array[:, 0].tolist() == [1, 4, 0, 1, 3]


@pytest.mark.parametrize(
    "array",
    [np.zeros((5, 2), np.float32), np.zeros((5, 1)), np.zeros(5, np.float32), [0.0]],
)
def test_a_result_of_another_shape_is_an_error(array: Any) -> None:
    class Wrong(vowels_example.Vowels):  # type: ignore[name-defined,misc]
        def embed(self, values: Any) -> Any:
            return [array] * len(values)

    with pytest.raises(ModelError, match=r"float32 \[5, 1\]"):
        checked_embed(Wrong(), ["a"])


def test_models_of_another_input_are_errors() -> None:
    with pytest.raises(ModelError, match=r"--from metadata:NAME --model t5:some/repo"):
        resolve("t5:some/repo")
    with pytest.raises(ModelError, match="--from metadata:NAME --model python:vowels_example"):
        resolve("python:vowels_example:factory")
    with pytest.raises(ModelError, match="--from latents --model python:latents_example"):
        resolve("python:latents_example:factory")
    for name in ("mdct", "dac:descript/dac_44khz"):
        with pytest.raises(ModelError, match="encodes audio: leave out --from"):
            resolve_embedder(name)
    with pytest.raises(ModelError, match="returned a NoneType"):
        latents_example.nothing = lambda: None  # type: ignore[attr-defined]
        resolve_embedder("python:latents_example:nothing")
    with pytest.raises(ModelError, match=r"did you mean text:REPO\? known models are t5:REPO"):
        resolve_embedder("texts:some/repo")


def test_a_store_does_not_choose_the_code_of_an_embedder(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given: dict[str, Any] = {"by": "store s", "trusted": False}
    with pytest.raises(ModelError, match=r"would run vowels_example:factory\(\)"):
        check_named("python:vowels_example:factory", {}, **given)
    check_named("python:vowels_example:factory", {}, by="store s", trusted=True)
    check_named("t5:owner/name", {"revision": "v1"}, **given)
    assert "loading the weights of t5 from owner/name (revision v1)" in caplog.text
