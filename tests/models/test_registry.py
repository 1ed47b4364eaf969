"""Models by name, options by signature, and models from outside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from latentmill.errors import ModelError
from latentmill.models.registry import available, resolve

USER_MODULE = """
from __future__ import annotations
from typing import TYPE_CHECKING
from latentmill.models.families import mdct
if TYPE_CHECKING:
    from nowhere import Something

def factory(*, hop: int, mode: str | None = None):
    assert mode is None or isinstance(mode, str)
    return mdct.build(hop=hop)

def unchecked(*, hop: Something = 512):
    return mdct.build(hop=hop)

def anything(**options):
    return mdct.build(**options)

def nothing():
    return None

number = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "user_models.py").write_text(USER_MODULE)
    (tmp_path / "unfinished.py").write_text("def factory(:")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "user_models", raising=False)
    return tmp_path


def test_available_lists_the_built_in_models() -> None:
    entries = {entry.name: entry for entry in available()}
    assert {"mdct", "lin-cae", "lin-cae-2", "m2l"} <= set(entries)
    assert all(entry.description and "\n" not in entry.description for entry in available())
    assert entries["mdct"].requirement == ""
    assert entries["m2l"].requirement == "pip install 'latentmill[linear-cae]'"


FAMILIES = ("oobleck", "kvae", "minimax", "longcat", "encodec", "dac", "mimi")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("suffix", ["", ":", ":REPO"])
def test_a_family_needs_a_repository(family: str, suffix: str) -> None:
    assert f"{family}:REPO" in {entry.name for entry in available()}
    with pytest.raises(ModelError, match=rf"write {family}:REPO, as in {family}:\w+/\w+"):
        resolve(family + suffix)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_options_do_not_name_the_repository(family: str) -> None:
    with pytest.raises(
        ModelError, match=r"unknown option 'repo'; .*options are revision: str \| N"
    ):
        resolve(f"{family}:owner/name", {"repo": "other/name"})


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("lincae", "lin-cae"),
        ("MDCT", "mdct"),
        ("lin-cae2", "lin-cae-2"),
        ("oobleek:stabilityai/stable-audio-open-1.0", "oobleck:REPO"),
        ("music2latents", "music2latent"),
    ],
)
def test_an_unknown_name_gets_the_closest(name: str, close: str) -> None:
    with pytest.raises(
        ModelError, match=rf"did you mean {close}\? known models are mdct, lin-cae,"
    ):
        resolve(name)


def test_a_name_like_no_other_gets_no_guess() -> None:
    with pytest.raises(ModelError, match="Unknown model 'whisper'; known models are"):
        resolve("whisper")


def test_options_reach_the_model() -> None:
    spec = resolve("mdct", {"hop": 256, "scale_factor": 2}).spec
    assert (spec.hop, spec.scale_factor) == (256, 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hops": 256}, r"unknown option 'hops'; did you mean hop\? options are hop: int = 512, "),
        ({"window": "kbd"}, "unknown option 'window'; options are hop"),
        ({"hop": "256"}, "option hop must be int, not '256'; options are"),
        ({"hop": 256.0}, "option hop must be int, not 256.0"),
        ({"hop": True}, "option hop must be int, not True"),
        ({"scale_factor": None}, "option scale_factor must be float, not None"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve("mdct", options)


def test_options_of_the_linear_cae_models_are_checked_before_any_download() -> None:
    expected = r"scale_factor: float \| None = None, diffusion_steps: int = 1"
    with pytest.raises(ModelError, match=expected):
        resolve("lin-cae", {"scale": 3})
    with pytest.raises(ModelError, match="diffusion_steps must be int"):
        resolve("m2l", {"diffusion_steps": 1.5})


def test_a_python_factory(user_module: Path) -> None:
    name = "python:user_models:factory"
    assert resolve(name, {"hop": 64, "mode": "fast"}).spec.hop == 64
    with pytest.raises(ModelError, match="option hop is required; options are hop: int, mode"):
        resolve(name)
    with pytest.raises(ModelError, match=r"mode must be str \| None, not 3"):
        resolve(name, {"hop": 64, "mode": 3})
    assert resolve("python:user_models:anything", {"hop": 32}).spec.hop == 32
    assert resolve("python:user_models:unchecked", {"hop": 32}).spec.hop == 32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("python:user_models", "write it as python:package.module:factory"),
        (
            "python:./user_models.py:factory",
            "write it as python:package.module:factory; a file models",
        ),
        ("python:models/user_models:factory", "write it as python:package.module:factory"),
        ("python:unfinished:factory", r"cannot import .*\(unfinished\.py, line 1\)"),
        ("python:no_such_package.models:factory", "No module named 'no_such_package'"),
        ("python:user_models:missing", "no attribute 'missing'"),
        ("python:user_models:number", "is not a function but of type int"),
        ("python:user_models:nothing", "returned a NoneType"),
    ],
)
def test_python_factories_that_are_none(user_module: Path, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(name)


def test_an_entry_point_of_an_installed_package(user_module: Path) -> None:
    info = user_module / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[latentmill.models]\ntheirs = user_models:factory\nmdct = user_models:nothing\n"
        "dac = user_models:nothing\n"
    )
    assert resolve("theirs", {"hop": 64}).spec.hop == 64
    (entry,) = [entry for entry in available() if entry.name == "theirs"]
    assert entry.description == "from their-package (user_models:factory)"
    assert resolve("mdct").spec.name == "mdct"  # a built-in name cannot be taken over
    assert [entry.name for entry in available() if entry.name.startswith("dac")] == ["dac:REPO"]
    with pytest.raises(ModelError, match="did you mean theirs"):
        resolve("their")
