"""The benchmarks of models and GPUs run on a CPU with tiny models; their figures mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile as sf
import torch

from support.recordings import noise

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
def test_context() -> None:
    pytest.importorskip("transformers")
    header, _, *rows = script("context", "--size", "tiny", "--only", "mimi").splitlines()
    assert header.startswith("| frames from the cut |")
    assert [row.split("|")[1].strip() for row in rows] == ["mimi, left", "mimi, right"]


@pytest.mark.slow
def test_decode_tasks(tmp_path: Path) -> None:
    (tmp_path / "audio").mkdir()
    sf.write(tmp_path / "audio" / "noise.flac", noise(2.5, 44100), 44100)
    options = ["--source", str(tmp_path / "audio"), "--files", "2", "--rounds", "1"]
    script("decode_tasks", *options, "--results", str(tmp_path))
    result = json.loads((tmp_path / "decode_tasks.json").read_text())
    assert {*result} >= {"flac", "mp3", "wav"}
    assert result["wav"]["tasks_over_threads"] > 0


def test_int16(tmp_path: Path) -> None:
    script("int16", "--seconds", "2", "--rounds", "1", "--results", str(tmp_path))
    result = json.loads((tmp_path / "int16.json").read_text())
    assert result["us_per_second_of_audio"]["check_and_convert"] > 0


def test_planning(tmp_path: Path) -> None:
    script, options = ROOT / "benchmarks" / "planning.py", ["--items", "3000", "--grouped"]
    command = [sys.executable, str(script), *options, "--results", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    plain, grouped = json.loads((tmp_path / "planning.json").read_text())["plans"]
    assert plain["items"] == grouped["items"] == 3000
    assert plain["units"] > 100
    assert 0 < plain["rss_before_mib"] <= plain["peak_rss_mib"]


@pytest.mark.slow
def test_gpu(tmp_path: Path) -> None:
    pytest.importorskip("linear_cae")
    result = benchmark("gpu", tmp_path, "--minutes", "0.03", "--decode-threads", "1")
    assert result["float32"]["model"]["x_real_time"] > 0
    assert result["float32"]["end_to_end"]["files"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_sentence() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("There is no GPU here")
    assert done.stdout.count("\n") == 1


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
