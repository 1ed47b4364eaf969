"""`evaluate`, `report` and `decode` of values that no model decodes, and without a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import latentmill as lm
from latentmill.errors import ConfigError, ModelError
from latentmill.evaluation.evaluate import PARTS
from latentmill.reporting.media import Budget
from latentmill.reporting.report import render
from support import runs
from support.in_process import encode, in_process
from support.tiny_encoders import write_clap, write_t5, write_wav2vec

FIELDS = ("vector", "windows", "frames", "tokens", "imported", "pooled")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with fields whose values no model decodes. Leave it unchanged."""
    root = tmp_path_factory.mktemp("fields")
    write_clap(root / "clap")
    write_t5(root / "t5")
    write_wav2vec(root / "hubert", "Hubert")
    songs = runs.write_songs(root / "songs", 4, 11.0)
    for path in songs.rglob("*.wav"):
        path.with_suffix(".json").write_text(json.dumps({"prompt": "piano"}))
    with in_process():
        encode(songs, root / "store")
        keys = list(lm.open(root / "store").keys())
        rows = [json.dumps({"key": key, "imported": [1.0, 2.0]}) for key in keys]
        (root / "imported.jsonl").write_text("\n".join(rows))
        for name, options in {
            "vector": {"model": f"clap:{root / 'clap'}"},
            "windows": {"model": f"clap:{root / 'clap'}", "per_window": True},
            "frames": {"model": f"audio:{root / 'hubert'}"},
            "tokens": {"model": f"t5:{root / 't5'}", "source": "metadata:prompt"},
            "imported": {"source": str(root / "imported.jsonl")},
            "pooled": {"model": "python:support.vector_model:build"},
        }.items():
            lm.add(root / "store", field=name, device="cpu", **options)
    return root / "store"


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_cannot_be_decoded_has_statistics(name: str, store: Path) -> None:
    field = lm.open(store / "fields" / name, trust_model=True)
    found = lm.evaluate(field, items=2, record=False)
    assert found.statistics is not None
    assert found.statistics.records == 4
    measured = {part for part in PARTS if getattr(found, part) is not None}
    assert measured == ({"statistics", "seams"} if name == "frames" else {"statistics"})
    for part in ("linearity", "reconstruction"):
        assert found.unavailable[part] == (  # type: ignore[index]
            f"The values in {field.url} are not latents of audio and cannot be decoded: use a "
            "store of latents."
        )
    with pytest.raises(ModelError, match="are not latents of audio"):
        lm.evaluate(field, only=["reconstruction"], record=False)
    if name != "frames":
        with pytest.raises(ConfigError, match="have no seams"):
            lm.evaluate(field, only=["seams"], record=False)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_cannot_be_decoded_has_a_report(name: str, store: Path) -> None:
    field = lm.open(store / "fields" / name, trust_model=True)
    page = render(field, Budget(), items=2)
    assert f"No reconstructions: The values in {field.url} are not latents of audio" in page
    assert "the model cannot be loaded" not in page
    assert "<audio" in page  # the originals
    offered = {part for part in PARTS if f"--only {part}" in page}
    assert offered == ({"statistics", "seams"} if name == "frames" else {"statistics"})
    assert page.count("not measured, because these values are not latents of audio") == (
        2 if name == "frames" else 3
    )


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_cannot_be_decoded_is_not_decoded(
    name: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    field, out = store / "fields" / name, tmp_path / "out"
    result = runs.call(capsys, "decode", field, "--all", "-o", out, "--trust-model")
    assert result.code == 7
    assert "are not latents of audio and cannot be decoded" in result.err


def test_a_store_whose_model_cannot_be_loaded_has_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    songs, store = runs.write_songs(tmp_path / "songs", 3), tmp_path / "store"
    with in_process():
        encode(songs, store, model="python:support.saturated_model:build", model_options={})
    result = runs.call(capsys, "evaluate", store)
    assert result.code == 0, result.err
    assert result.out.startswith("statistics\nrecords   3, ")
    for part in ("linearity", "reconstruction", "seams"):
        assert f"\n\n{part}\nnot measured: The store {store} names the model" in result.out
    assert "add --trust-model" in result.out
    assert (store / "evaluation/statistics.json").exists()
    asked = runs.call(capsys, "evaluate", store, "--only", "linearity")
    assert asked.code == 7
    assert "add --trust-model" in asked.err
