"""The benchmarks of models and GPUs run on a CPU with tiny models; their figures mean nothing."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile as sf
import torch

from support import runs
from support.recordings import noise
from support.scripts import run_here

ROOT = Path(__file__).parent.parent


def benchmark(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a script on two seconds of noise; gives its JSON."""
    (folder / "audio").mkdir()
    sf.write(folder / "audio" / "noise.wav", noise(2.5, 44100), 44100)
    options = ["--device", "cpu", "--size", "tiny", "--rounds", "1"]
    options += ["--audio", str(folder / "audio"), "--results", str(folder)]
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *options, *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    result: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return result


@pytest.mark.slow
def test_models(tmp_path: Path) -> None:
    pytest.importorskip("linear_cae")
    options = ["--models", "mdct", "lin-cae", "--modes", "float32", "bf16", "--seconds", "2"]
    result = benchmark("models", tmp_path, *options)
    assert result["lin-cae"]["latents_differ_from_package"] < 1e-5
    assert result["lin-cae"]["float32"]["deviation_from_float32"] == 0
    assert 0 < result["lin-cae"]["bf16"]["deviation_from_float32"] < 0.2
    assert result["lin-cae"]["gflop_per_audio_second"] > 0.1
    assert result["mdct"]["float32"]["x_real_time"] > 0
    assert "over_package" not in result["mdct"]


@pytest.mark.slow
def test_models_of_all_families(tmp_path: Path) -> None:
    models = ("oobleck", "dac", "encodec", "mimi")
    result = benchmark("models", tmp_path, "--models", *models, "--seconds", "2")
    assert all(result[name]["float32"]["over_package"] > 0 for name in ("oobleck", "mimi"))


def script(name: str, *arguments: str) -> str:
    """What a script prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=280)
    return done.stdout


@pytest.mark.slow
def test_context(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sf.write(tmp_path / "noise.wav", noise(3, 24000), 24000)
    options = ["--only", "mimi", "--audio", str(tmp_path / "noise.wav")]
    header, _, *rows = script("context", *options).splitlines()
    assert header.startswith("| frames from the cut |")
    assert [row.split("|")[1].strip() for row in rows] == ["mimi, left", "mimi, right"]


@pytest.mark.slow
def test_deviation(tmp_path: Path) -> None:
    for package in ("transformers", "diffusers", "linear_cae", "music2latent"):
        pytest.importorskip(package)
    (tmp_path / "audio").mkdir()
    for name, seconds in (("short", 1), ("long", 12)):
        sf.write(tmp_path / "audio" / f"{name}.wav", noise(seconds, 24000), 24000)
    options = ["--audio", str(tmp_path / "audio"), "--results", str(tmp_path)]
    script("deviation", *options, "--only", "longcat", "encodec, 24 kHz, codes")
    models = json.loads((tmp_path / "deviation.json").read_text())["models"]
    assert {*models} == {"longcat", "longcat, split", "encodec, 24 kHz, codes"}
    for row in models.values():
        assert (row["items"], row["failed"], row["longer_items"]) == (2, 0, 1)
    assert models["longcat"]["latent_channels"] * 2 == models["longcat, split"]["latent_channels"]
    assert models["longcat"]["deviation"] < 1e-6
    assert models["longcat"]["longer"] < 1e-6
    assert models["encodec, 24 kHz, codes"]["differing_codes"] == 0


@pytest.mark.slow
def test_load_tasks(tmp_path: Path) -> None:
    (tmp_path / "audio").mkdir()
    sf.write(tmp_path / "audio" / "noise.flac", noise(2.5, 44100), 44100)
    options = ["--source", str(tmp_path / "audio"), "--files", "2", "--rounds", "1"]
    script("load_tasks", *options, "--results", str(tmp_path))
    result = json.loads((tmp_path / "load_tasks.json").read_text())
    assert {*result} >= {"flac", "mp3", "wav"}
    assert result["wav"]["tasks_over_threads"] > 0


def test_int16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--seconds", "2", "--rounds", "1", "--results", tmp_path)
    assert run_here(capsys, ROOT / "benchmarks" / "int16.py", *options).code == 0
    result = json.loads((tmp_path / "int16.json").read_text())
    assert result["us_per_second_of_audio"]["check_and_convert"] > 0


@pytest.mark.slow
def test_objects(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    pytest.importorskip("s3fs")
    script("objects", "--objects", "64", "--rounds", "1", "--results", str(tmp_path))
    ways = json.loads((tmp_path / "objects.json").read_text())["ways"]
    assert all(ways[name]["obstore_over_s3fs"] > 0 for name in ("objects", "ranges"))


@pytest.mark.slow
def test_planning(tmp_path: Path) -> None:
    script, options = ROOT / "benchmarks" / "planning.py", ["--items", "3000", "--grouped"]
    command = [sys.executable, str(script), *options, "--results", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    plain, grouped = json.loads((tmp_path / "planning.json").read_text())["plans"]
    assert plain["items"] == grouped["items"] == 3000
    assert plain["units"] > 100
    assert 0 < plain["rss_before_mib"] <= plain["peak_rss_mib"]


@pytest.mark.slow
def test_evaluate(tmp_path: Path) -> None:
    script("evaluate", "--records", "3000", "--frames", "20", "--results", str(tmp_path))
    result = json.loads((tmp_path / "evaluate.json").read_text())
    assert result["near_duplicates"] == result["planted"] == 3
    assert result["outliers"] == 0
    assert 0 < result["rss_before_mib"] <= result["peak_rss_mib"]


@pytest.mark.slow
def test_report(tmp_path: Path) -> None:
    script("report", "--records", "120", "--seconds", "0.2", "--results", str(tmp_path))
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["players"] == 12
    assert 100_000 < result["page_bytes"] < 15_000_000


@pytest.mark.slow
def test_gpu(tmp_path: Path) -> None:
    """Two families on true stereo; the process may not import ray."""
    pytest.importorskip("linear_cae")
    pytest.importorskip("diffusers")
    (tmp_path / "ray.py").write_text("raise ImportError('there is no ray here')")
    options = ["--device", "cpu", "--size", "tiny", "--models", "lin-cae", "same-s"]
    options += ["--distinct", "3", "--shortest", "1", "--longest", "3", "--hours", "0.001"]
    options += ["--chunk-seconds", "0.2", "--load-threads", "1", "--seconds-alone", "0.1"]
    options += ["--seconds-end-to-end", "60", "--budget", "250", "--grace", "120"]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *options]
    command += ["--audio", "synthesised", "--results", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run(command, check=True, capture_output=True, timeout=290, env=environment)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert 600 < result["corpus"]["kbit_per_second"] < 900
    for name in ("lin-cae", "same-s"):
        measured = result["models"][name]
        assert measured["alone"]["float32"]["through_feed_x_real_time"] > 0
        end_to_end = measured["end_to_end, float32"]
        assert end_to_end["items_encoded"] == result["corpus"]["files"]
        assert end_to_end["whole_corpus"]
        assert end_to_end["bound_by"].startswith("bound by")
    assert result["models"]["same-s"]["cold, float32"]["cold_bytes"] > 0
    assert str(tmp_path) not in json.dumps(result)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


PROCESS = """
import json, sys, time
kind = json.loads(sys.argv[1])["model"]
def emit(key, value): print(json.dumps({"key": key, "value": value}), flush=True)
emit("first", 1)
for line in sys.stdin:
    if kind == "dies": sys.exit(1)
    if kind == "hangs": time.sleep(600)
    emit("second", 2)
    emit("end", None)
"""


def started(child: Any) -> bool:
    return bool(child.lines.qsize())


def test_a_model_that_dies_or_hangs_loses_only_the_rest_of_its_part(
    gpu: Any, tmp_path: Path
) -> None:
    (tmp_path / "process.py").write_text(PROCESS)
    arguments = argparse.Namespace(results=tmp_path, budget=6000.0, grace=0.5)
    run = gpu.Run(arguments, "cpu", result={"models": {}})
    limits = {"dies": 600.0, "hangs": 0.1, "works": 600.0}
    parts = [gpu.Part(name, "alone", {}, seconds) for name, seconds in limits.items()]
    for number, part in enumerate(parts):
        run.result["models"][part.model] = {}
        with gpu.Child({"model": part.model}, tmp_path / "process.py") as child:
            runs.until(functools.partial(started, child), "the process has started")
            run._measure(part, child, parts[number:], None)
            run._measure(replace(part, name="next"), child, parts[number:], None)
    models = json.loads((tmp_path / "gpu.json").read_text())["models"]
    assert models["dies"]["alone"]["first"] == models["hangs"]["alone"]["first"] == 1
    assert models["dies"]["alone"]["error"] == "the process ended"
    assert models["hangs"]["alone"]["error"].startswith("stopped after")
    assert models["dies"]["next"]["error"] == "the process had ended"
    assert models["works"]["alone"]["second"] == models["works"]["next"]["second"] == 2


def test_what_the_budget_does_not_reach_says_so(gpu: Any, tmp_path: Path) -> None:
    (tmp_path / "process.py").write_text(PROCESS)
    arguments = argparse.Namespace(results=tmp_path, budget=0.0, grace=0.5)
    run = gpu.Run(arguments, "cpu", result={"models": {"works": {}}})
    part = gpu.Part("works", "alone", {}, 1.0)
    with gpu.Child({"model": "works"}, tmp_path / "process.py") as child:
        run._measure(part, child, [part], None)
    assert run.result["models"]["works"]["alone"] == {"error": "the budget was used up"}


@pytest.mark.parametrize("channels", [1, 2])
def test_the_corpus_is_true_stereo_of_mixed_lengths(
    gpu: Any, tmp_path: Path, channels: int
) -> None:
    (tmp_path / "audio").mkdir()
    recording = noise(2.5, 44100, channels)
    sf.write(tmp_path / "audio" / "noise.wav", recording, 44100)
    lengths = {"distinct": 3, "shortest": 1.0, "longest": 4.0, "hours": 14 / 3600}
    corpus = gpu.write_corpus(tmp_path / "flac", tmp_path / "audio", **lengths, threads=2)
    files = sorted((tmp_path / "flac").iterdir())
    assert len(files) == corpus.files == 6  # each of 1, 2 and 4 s twice
    assert sorted(sf.info(file).duration for file in files) == [1, 1, 2, 2, 4, 4]
    for file in files:
        audio, _ = sf.read(file)
        side, mid = audio[:, 0] - audio[:, 1], audio.sum(axis=1)
        assert side.std() > 0.1 * mid.std()
    distinct = {file.stat().st_ino: file.stat().st_size for file in files}
    assert corpus.kbit_per_second == pytest.approx(8 * sum(distinct.values()) / 7 / 1000, abs=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    done = run_here(capsys, ROOT / "benchmarks" / "gpu.py")
    assert done.code == 0
    assert done.out.startswith("No GPU found")
    assert done.out.count("\n") == 1


@pytest.mark.slow
def test_reader_without_its_peers(tmp_path: Path) -> None:
    """The contenders that need nothing more: crops are checked against the originals."""
    command = [sys.executable, str(ROOT / "benchmarks" / "reader.py"), "--results", str(tmp_path)]
    options = ["--items", "40", "--rounds", "1", "--seconds", "0.05", "--folder", str(tmp_path)]
    names = ["latentmill", "latentmill tar", "npy files", "webdataset"]
    done = [*command, *options, "--only", *names]
    subprocess.run(done, check=True, capture_output=True, timeout=280)
    result = json.loads((tmp_path / "reader.json").read_text())
    assert set(result["readers"]) == set(names)
    assert all(one["crops_per_second"] > 0 for one in result["readers"].values())
    assert result["required"]["crops_over_best_peer"] > 1


@pytest.mark.slow
def test_fields(tmp_path: Path) -> None:
    sizes = ["--items", "20", "--captions", "50", "--records", "2000", "--rounds", "1"]
    sizes += ["--imports", "500"]
    script("fields", *sizes, "--results", str(tmp_path))
    result = json.loads((tmp_path / "fields.json").read_text())
    assert {*result["read"]["samples_a_second"]} > {"latents", "all", "codec", "text", "clap"}
    assert 0 < result["size"]["saved"] < 1
    assert result["opening"]["records"] == 2000
    assert result["imports"]["vectors"].keys() == {"500"}
