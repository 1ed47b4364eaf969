"""A store may not choose which code runs: models that it names, and configs that lie in it."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import store_files

import latentmill as lm
from latentmill.config import load_config
from latentmill.errors import ConfigError, LatentmillError, ModelError
from latentmill.evaluation.linearity import measure_linearity
from latentmill.evaluation.seams import measure_seams
from latentmill.store.verify import verify
from support import runs

Capture = pytest.CaptureFixture[str]

KEY = "drums"


def name_model(store: Path, asked: object, options: object) -> None:
    """Write another model's name into dataset.json and plan.json."""
    document = json.loads((store / "dataset.json").read_text())
    document["model"] |= {"asked": asked, "options": options}
    (store / "dataset.json").write_text(json.dumps(document))
    plan = json.loads((store / "plan/plan.json").read_text())
    plan |= {"model": asked, "model_options": options}
    (store / "plan/plan.json").write_text(json.dumps(plan))


@pytest.fixture
def spoilable(stores: dict[str, Path], tmp_path: Path) -> Path:
    """A sealed store's folder that a test may spoil; the shards' format makes no difference."""
    return Path(shutil.copytree(stores["parquet"], tmp_path / "store"))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that exists when something ran."""
    return tmp_path / "ran"


@pytest.fixture(params=["python:os:system", "a module in the working folder", "an entry point"])
def evil(
    request: pytest.FixtureRequest,
    spoilable: Path,
    tmp_path: Path,
    marker: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Path, str]:
    """A store that names code, and what the refusal must say would be run."""
    if request.param == "python:os:system":
        name_model(spoilable, request.param, {"command": f"touch '{marker}'"})
        return spoilable, "os:system(command="
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "evilmod.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from latentmill.models.families.mdct import build as x\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "evilmod", raising=False)
    name = "python:evilmod:x"
    if request.param == "an entry point":
        info = folder / "evil-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[latentmill.models]\nnice = evilmod:x\n")
        name = "nice"
    name_model(spoilable, name, store_files.MODEL_OPTIONS)
    return spoilable, f"evilmod:x(hop={store_files.HOP}, "


COMMANDS: list[list[str]] = [
    ["decode", "STORE", KEY, "-o", "OUT"],
    ["mix", "STORE", KEY, "one-frame", "--length", "longest", "-o", "OUT/mix.wav"],
    ["evaluate", "STORE", "--only", "linearity"],
    ["verify", "STORE", "--decode", "1"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_commands_refuse_to_run_what_a_store_names(
    command: list[str], evil: tuple[Path, str], marker: Path, tmp_path: Path, capsys: Capture
) -> None:
    store, what = evil
    places = {"STORE": str(store), "OUT": str(tmp_path / "out")}
    args = [places.get(arg, arg.replace("OUT/", f"{places['OUT']}/")) for arg in command]
    result = runs.call(capsys, *args)
    assert result.code == 7, result.err
    assert what in result.err
    assert "--trust-model" in result.err
    assert not marker.exists()


def test_evaluate_measures_what_needs_no_model(
    evil: tuple[Path, str], marker: Path, capsys: Capture
) -> None:
    store, what = evil
    result = runs.call(capsys, "evaluate", store, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["statistics"]["records"] == len(lm.open(str(store)))
    for part in ("linearity", "reconstruction", "seams"):
        assert what in found["unavailable"][part]
        assert "--trust-model" in found["unavailable"][part]
    assert not marker.exists()


CALLS: dict[str, Callable[[lm.LatentStore], Any]] = {
    "model": lambda store: store.model(),
    "decode": lambda store: store.decode(KEY),
    "blocks": lambda store: list(store.decode_blocks(store[KEY].latent, 100)),
    "seams": measure_seams,
    "linearity": measure_linearity,
    "verify": lambda store: verify(store, decode=1),
}


@pytest.mark.parametrize("call", CALLS)
def test_functions_refuse_to_run_what_a_store_names(
    call: str, evil: tuple[Path, str], marker: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    store, what = evil
    with pytest.raises(ModelError, match="trust_model=True") as caught:
        CALLS[call](lm.open(str(store), device="cpu"))
    assert what in one_sentence(caught.value)
    assert not marker.exists()


def test_with_consent_it_runs(evil: tuple[Path, str], marker: Path, capsys: Capture) -> None:
    store, what = evil
    opened = lm.open(str(store), device="cpu", trust_model=True)
    if what.startswith("os:"):
        with pytest.raises(LatentmillError, match="its factory returned a int"):
            opened.model()
    else:
        assert opened.decode(KEY).shape[0] == 1
        result = runs.call(capsys, "verify", store, "--decode", 1, "--trust-model")
        assert result.code == 0, result.err
    assert marker.exists()


@pytest.mark.parametrize(
    ("asked", "options", "weights"),
    [
        ("dac:evil/repo", {}, "the weights of dac from evil/repo"),
        ("encodec:/no/such folder", {}, "the weights of encodec from /no/such folder"),
        ("m2l", {"repo": "evil/m2l", "revision": "x"}, "m2l from evil/m2l (revision x)"),
        ("lin-cae", {}, "the weights of lin-cae from its default repository"),
    ],
)
def test_the_repository_is_named_before_weights_are_loaded(
    asked: str,
    options: dict[str, str],
    weights: str,
    spoilable: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def resolve(*args: object, **options: object) -> None:
        assert weights in caplog.text
        raise ModelError("not on this machine.")

    monkeypatch.setattr("latentmill.models.registry.resolve", resolve)
    name_model(spoilable, asked, options)
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError, match="not on this machine"):
        lm.open(str(spoilable), device="cpu").model()
    assert str(spoilable) in caplog.text


@pytest.mark.parametrize("asked", [None, 3, ["python:os:system"]])
def test_a_model_that_is_no_name_is_refused(asked: object, spoilable: Path) -> None:
    name_model(spoilable, asked, {})
    with pytest.raises(LatentmillError, match=r"does not have a valid model|json is damaged"):
        lm.open(str(spoilable), device="cpu").model()


@pytest.mark.parametrize("place", ["run.yaml", "plan/run.yaml", "a/b/run.yaml", "a link"])
def test_a_config_in_a_store_runs_nothing_without_consent(
    place: str, spoilable: Path, marker: Path, tmp_path: Path
) -> None:
    file = spoilable / ("run.yaml" if place == "a link" else place)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = f"source: x\nout: y\nmodel: python:os:system\nmodel_options: {{command: touch {marker}}}"
    file.write_text(text)
    if place == "a link":
        file = tmp_path / "linked.yaml"
        file.symlink_to(spoilable / "run.yaml")
    with pytest.raises(ModelError, match=r"config .* would run os:system\(command="):
        load_config(file, {})
    with pytest.raises(ModelError, match="would run os:system"):
        lm.encode("x", str(tmp_path / "y"), config=str(file))
    assert load_config(file, {"model": "mdct"}).model == "mdct"
    assert load_config(file, {}, trust_model=True).model == "python:os:system"
    outside = tmp_path / "own.yaml"
    outside.write_text(text)
    assert load_config(outside, {}).model == "python:os:system"  # the user's own
    file.write_text("source: x\nout: y\naddress: ray://evil:10001")
    with pytest.raises(ConfigError, match="names the Ray cluster ray://evil:10001"):
        load_config(file, {})
    assert load_config(file, {"address": "auto"}).address == "auto"
    assert not marker.exists()


@pytest.mark.parametrize("command", ["encode", "plan"])
def test_commands_refuse_a_config_in_a_store(
    command: str, spoilable: Path, marker: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = spoilable / "run.yaml"
    file.write_text(f"model: python:os:system\nmodel_options: {{command: touch {marker}}}\n")
    args = [command, spoilable, tmp_path / "new", "--config", file]
    refused = runs.call(capsys, *args)
    assert (refused.code, marker.exists()) == (7, False), refused.err
    assert "would run os:system(command=" in refused.err
    runs.call(capsys, *args, "--trust-model")
    assert marker.exists()
