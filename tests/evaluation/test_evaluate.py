"""The command `evaluate` and `lm.evaluate`: which parts are measured, recorded and printed."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import latentmill as lm
from latentmill.errors import ConfigError
from latentmill.evaluation.evaluate import PARTS
from latentmill.evaluation.scores import Key, Scores
from support import runs
from support.latent_store import write_latents
from support.stem_files import write_stem_store, write_stems


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stems(tmp_path_factory.mktemp("songs"))


@pytest.fixture
def store(source: Path, tmp_path: Path) -> lm.LatentStore:
    return write_stem_store(tmp_path / "store", source)


def files(store: lm.LatentStore) -> dict[str, bytes]:
    root = Path(store.url)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_all_parts_are_measured_and_recorded(
    store: lm.LatentStore, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(store)
    result = runs.call(capsys, "evaluate", store.url, "--items", 3, "--json")
    assert result.code == 0
    assert "warning" not in result.err
    parsed = runs.outcome(result)
    assert set(parsed) == {*PARTS, "unavailable"}
    assert parsed["unavailable"] == {}
    after = files(store)
    vectors = json.loads(after["evaluation/statistics.json"])["statistics"]["vectors"]["file"]
    results = {f"evaluation/{part}.json" for part in PARTS}
    assert set(after) - set(before) == {*results, vectors}
    assert {name: after[name] for name in before} == before
    for part in PARTS:
        written = json.loads(after[f"evaluation/{part}.json"])
        assert written["seal"] == store.info.seal
        assert list(written.keys() & set(PARTS)) == [part]


def test_sources_at_other_addresses_are_read_with_consent_only(
    store: lm.LatentStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_sentence: Callable[[BaseException], str],
) -> None:
    monkeypatch.setattr("latentmill.store.remote_sources.source_is_near", lambda *_: False)
    called = runs.call(capsys, "evaluate", store.url, "--items", 1, "--json")
    assert called.err.count("at another address") == 1
    result = runs.outcome(called)
    assert set(result["unavailable"]) == {"linearity", "reconstruction", "seams"}
    for reason in result["unavailable"].values():
        assert "at another address (add --remote-sources if" in one_sentence(ConfigError(reason))
    assert result["statistics"]["lufs_records"] == 0
    found = runs.call(
        capsys, "evaluate", store.url, "--remote-sources", "--items", 1, "--only", "reconstruction"
    )
    assert found.code == 0
    assert "warning" not in found.err


def test_only_chooses_parts(store: lm.LatentStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert lm.evaluate(store.url, only=["seams"], items=2).linearity is None
    assert {n for n in files(store) if n.startswith("evaluation/")} == {"evaluation/seams.json"}
    result = runs.call(capsys, "evaluate", store.url, "--only", "seams", "--only", "linearity")
    assert [line for line in result.out.splitlines() if line in PARTS] == ["linearity", "seams"]
    result = runs.call(capsys, "evaluate", store.url, "--only", "seam")
    assert (result.code, result.err) == (
        2,
        "latentmill: invalid part 'seam' of an evaluation: use linearity, reconstruction, "
        "statistics, seams.\n",
    )


def test_a_part_that_cannot_be_measured(
    store: lm.LatentStore, one_sentence: Callable[[BaseException], str]
) -> None:
    """It is reported with the others; if it was asked for, it is an error."""
    found = lm.evaluate(store, max_seconds=0.1)
    assert found.linearity is not None
    assert found.seams is None
    assert "no items with seams of at most 0.1 s" in found.unavailable["seams"]
    with pytest.raises(ConfigError) as caught:
        lm.evaluate(store, only=["seams"], max_seconds=0.1)
    assert "no items with seams of at most 0.1 s" in one_sentence(caught.value)


@pytest.mark.parametrize("gain", ["0", "-1", "nan", "inf", "1000"])
def test_a_gain_that_measures_nothing_is_refused(
    gain: str, store: lm.LatentStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """An infinite error would make the card unreadable, and `info` and `mix` with it."""
    result = runs.call(capsys, "evaluate", store.url, "--only", "linearity", "--gain", gain)
    assert (result.code, result.err) == (
        2,
        f"latentmill: invalid gain {gain}: use a factor from 0.01 to 100.\n",
    )


@pytest.mark.parametrize(
    "options",
    [
        *({"items": items} for items in (0, -1, 1.5, True)),
        *({"max_seconds": seconds} for seconds in (0, -1, 1e-6, math.nan, math.inf)),
    ],
    ids=str,
)
def test_an_amount_that_measures_nothing_is_refused(
    options: dict[str, Any], store: lm.LatentStore, one_sentence: Callable[[BaseException], str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        lm.evaluate(store, **options)
    assert f"invalid {next(iter(options))}" in one_sentence(caught.value)


@pytest.mark.parametrize("option", [("--gain", "0.1"), ("--compat", "linear-cae")])
def test_an_option_without_effect_is_refused(
    option: tuple[str, str], store: lm.LatentStore, capsys: pytest.CaptureFixture[str]
) -> None:
    result = runs.call(capsys, "evaluate", store.url, "--only", "statistics", *option)
    assert (result.code, result.err) == (
        2,
        f"latentmill: {option[0]} changes only the part linearity, which is not measured: add "
        f"--only linearity, or remove {option[0]}.\n",
    )


def test_a_device_that_does_not_exist_stops_all_parts(
    store: lm.LatentStore, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(store)
    result = runs.call(capsys, "evaluate", store.url, "--device", "cuda:99")
    assert (result.code, result.out) == (2, "")
    assert "--device cuda:99 is not available" in result.err
    assert files(store) == before


@pytest.mark.filterwarnings("ignore::latentmill.errors.IncompleteStoreWarning")
def test_a_store_without_records(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    store = write_latents(str(tmp_path / "store"), [], sealed=False)
    with pytest.raises(ConfigError) as caught:
        lm.evaluate(store)
    assert "has no records: run `latentmill status" in one_sentence(caught.value)


def test_an_infinite_error_is_not_recorded(one_sentence: Callable[[BaseException], str]) -> None:
    key = Key("encoder_additivity", "relative_l2", "encoded", "raw")
    with pytest.raises(ConfigError) as caught:
        Scores().add(0, key, math.inf)
    assert "the encoder additivity error of track 1 is inf" in one_sentence(caught.value)


def test_a_store_that_is_not_sealed_is_measured_and_not_recorded(
    store: lm.LatentStore, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(store.url, "dataset.json").unlink()
    before = files(store)
    done = runs.call(capsys, "evaluate", store.url, "--items", 2)
    assert done.code == 0
    assert "latentmill: warning: not recorded: " in done.err
    assert files(store) == before


@pytest.mark.parametrize(
    ("part", "compat"),
    [("linearity", None), ("linearity", "linear-cae"), ("reconstruction", None), ("seams", None)],
)
def test_a_result_is_that_of_the_seal_at_the_start(
    store: lm.LatentStore, part: str, compat: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store shows a later seal when its model runs."""
    monkeypatch.setattr("latentmill.evaluation.compat.CHUNK", 1500)
    path, precision = Path(store.url, "dataset.json"), lm.LatentStore.precision.fget
    before = store.info.seal

    def sealed_again(self: lm.LatentStore) -> Any:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seal": "f" * 32}))
        self.reload()
        return precision(self)

    monkeypatch.setattr(lm.LatentStore, "precision", property(sealed_again))
    lm.evaluate(store, only=[part], items=2, compat=compat)
    assert store.info.seal == "f" * 32
    file = part if compat is None else f"{part}-{compat}"
    written = json.loads(Path(store.url, f"evaluation/{file}.json").read_text())
    assert written["seal"] == before


def test_a_store_that_is_read_only_is_measured_and_not_recorded(
    store: lm.LatentStore,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, before = os.open, files(store)

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(store.url):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *rest, **more)

    def refuse_folder(path: Any, *rest: Any, **more: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "mkdir", refuse_folder)  # root may write everywhere, chmod would not do
    done = runs.call(capsys, "evaluate", store.url, "--items", 2)
    assert done.code == 0
    assert {line for line in done.out.splitlines() if line in PARTS} == {*PARTS}
    warnings = [line for line in done.err.splitlines() if "warning" in line]
    assert len(warnings) == len(PARTS)
    for line in warnings:
        assert line.startswith(f"latentmill: warning: not recorded: Cannot write {store.url}/")
        assert line.endswith(": Read-only file system.")
    assert files(store) == before
