"""What users see of the package: names, signatures, and how objects are shown."""

from __future__ import annotations

import subprocess
import sys
import typing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ByteSize

import latentmill as lm
from latentmill.config import RunConfig
from latentmill.errors import ConfigError
from latentmill.reader.stems import ContextAndTarget
from support.latent_store import write_latents


def test_dir_shows_all_public_names_and_no_others() -> None:
    assert dir(lm) == sorted(lm.__all__)
    assert {"LatentDataset", "BatchSampler", "collate", "encode", "open"} <= set(dir(lm))
    assert not {"Any", "TYPE_CHECKING", "config", "store", "_LAZY"} & set(dir(lm))
    for name in dir(lm):
        assert getattr(lm, name) is not None
    code = "import sys, latentmill; dir(latentmill); assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_options_of_encode_are_those_of_a_run() -> None:
    def wanted(annotation: Any) -> Any:
        """What a caller may give: any sequence for a tuple, text for a size, None for a default."""
        if annotation is ByteSize:
            return int | str
        if typing.get_origin(annotation) is tuple:
            return Sequence[str]
        members = typing.get_args(annotation)
        if type(None) in members and typing.get_origin(annotation) is not dict:
            return typing.Union[tuple(wanted(member) for member in members)]  # noqa: UP007
        return annotation

    options = typing.get_type_hints(lm.EncodeOptions)
    fields = {
        n: f.annotation for n, f in RunConfig.model_fields.items() if n not in ("source", "out")
    }
    assert set(options) == set(fields)
    for name, annotation in fields.items():
        if name not in ("model_options", "with_fields"):  # any mapping
            assert options[name] == wanted(annotation) | None, name
    assert lm.encode.__annotations__["options"] == "Unpack[EncodeOptions]"


HOSTILE = "<script>alert('x')</script>\x1b[31m&"


@pytest.fixture
def store(tmp_path: Path) -> lm.LatentStore:
    return write_latents(str(tmp_path / "<b>store"), [20] * 8, prefix="item")


def test_objects_are_shown_in_a_line_and_in_a_table(store: lm.LatentStore) -> None:
    shown = {
        store: ("records=8", "made-up", "float16"),
        lm.LatentDataset(store, crop=8): ("samples=8", "crop=8", "random"),
        lm.LatentStream(store): ("samples=8", "whole items"),
        lm.StemDataset(store, ContextAndTarget(), crop=8, active_db=None): ("songs=2",),
    }
    for thing, words in shown.items():
        text, page = repr(thing), thing._repr_html_()
        assert text.startswith(f"{type(thing).__name__}(")
        assert all(word in text for word in words)
        assert len(text) < 400
        assert "&lt;b&gt;store" in page
        assert "<b>" not in page
    record = replace(
        store["item/00003"], key=HOSTILE, source_uri=HOSTILE, metadata={HOSTILE: HOSTILE}
    )
    assert "[4, 20]" in repr(record)
    assert "\x1b" not in repr(record) + record._repr_html_()
    assert "<script" not in record._repr_html_()
    assert "&lt;script&gt;" in record._repr_html_()


def test_a_repr_reads_nothing(tmp_path: Path) -> None:
    place = str(tmp_path / "part")
    write_latents(place, [20] * 8, sealed=False)
    with pytest.warns(lm.IncompleteStoreWarning):
        store = lm.open(place)
    store = lm.LatentStore(place)
    (tmp_path / "part" / "plan" / "plan.json").unlink()
    assert "complete=False" in repr(store)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> lm.LatentStore:
    """A store of the built-in model, of one item."""
    import soundfile

    from store.store_files import write_store

    folder = tmp_path_factory.mktemp("spoken")
    (folder / "audio").mkdir()
    noise = np.random.default_rng(0).standard_normal((20000, 1)) * 0.1
    soundfile.write(folder / "audio" / "a.wav", noise, 8000)
    model = {"hop": 32, "sample_rate": 8000}
    return write_store(str(folder / "latents"), folder / "audio", model_options=model)


@pytest.mark.parametrize("kind", ["numpy", "float32", "bfloat16"])
def test_generated_latents_are_audio_in_one_call(spoken: lm.LatentStore, kind: str) -> None:
    """Without a length, one or a batch, as arrays or tensors, as the model itself decodes them."""
    (key,) = spoken.keys()
    latent = spoken[key].latent.astype(np.float32)[:, :64]
    given: Any = np.stack([latent, 2 * latent])
    if kind != "numpy":
        given = torch.from_numpy(given).to(getattr(torch, kind)).requires_grad_()
    exact = torch.as_tensor(given).detach().float()
    spec = spoken.model().spec
    expected = spoken.model().decode(exact, spec.samples(64), seed=0, positions=[0, 0]).numpy()
    batch = spoken.decode_latent(given)
    assert batch.shape == (2, spec.channels, spec.samples(64))
    assert np.allclose(batch, expected, atol=1e-5)
    one = spoken.decode_latent(given[1])
    assert np.array_equal(one, batch[1])
    assert np.array_equal(spoken.decode_latent(given, 100), batch[..., :100])
    for wrong in (given[0, 0], given[None], given[:0]):
        with pytest.raises(ConfigError, match=r"cannot be decoded: give \[D, T\]"):
            spoken.decode_latent(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_normalize_takes_and_gives_tensors(store: lm.LatentStore, dtype: torch.dtype) -> None:
    normal = lm.Normalize.from_store(store)
    latents = torch.arange(160, dtype=dtype).reshape(2, 4, 20).requires_grad_()
    mean, std = (torch.from_numpy(values)[:, None] for values in (store.mean, store.std))
    done = normal.apply(latents)
    assert isinstance(done, torch.Tensor)
    assert done.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(done.double(), (latents.double() - mean) / std, rtol=1e-5)
    back = normal.undo(done)
    assert torch.allclose(back, latents.to(back.dtype), atol=1e-3)
    back.sum().backward()
    assert latents.grad is not None
    assert isinstance(normal.undo(done.detach().numpy()), np.ndarray)
