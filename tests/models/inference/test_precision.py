"""Numeric modes: what they are on which device, and that they leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import latentmill
from latentmill.errors import ConfigError, StoreError
from latentmill.models.inference.precision import numeric_mode, pick_precision


def switches() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_the_default_is_by_the_device() -> None:
    assert pick_precision(None, "cpu") == "float32"
    assert pick_precision(None, "cuda") == pick_precision(None, "cuda:1") == "tf32"
    assert pick_precision("float32", "cuda") == "float32"
    assert pick_precision("bf16", "cpu") == "bf16"


def test_tf32_on_a_cpu_is_refused(one_sentence: Callable[[BaseException], str]) -> None:
    with pytest.raises(ConfigError) as caught:
        pick_precision("tf32", "cpu")
    assert "use --precision float32" in one_sentence(caught.value)


def test_a_run_refuses_it_before_it_writes(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tf32"):
        latentmill.encode(str(corpus), str(tmp_path / "out"), device="cpu", precision="tf32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_half_precision_is_autocast(precision: str, dtype: str) -> None:
    a = torch.ones(4, 4)
    with numeric_mode(precision, "cpu"):  # type: ignore[arg-type]
        assert (a @ a).dtype == getattr(torch, dtype)
    assert (a @ a).dtype == torch.float32
    with numeric_mode("float32", "cpu"):
        assert (a @ a).dtype == torch.float32


def test_float32_on_a_gpu_is_no_tf32_and_the_switches_come_back() -> None:
    before = switches()
    assert before[1], "PyTorch lets convolutions use TF32 unless told not to"
    with numeric_mode("float32", "cuda"):
        assert switches() == (False, False)
        with numeric_mode("tf32", "cuda"):
            assert switches() == (True, True)
        assert switches() == (False, False)
    assert switches() == before
    with pytest.raises(ZeroDivisionError), numeric_mode("tf32", "cuda:1"):
        raise ZeroDivisionError
    assert switches() == before


def test_on_a_cpu_the_switches_stay() -> None:
    before = switches()
    with numeric_mode("float32", "cpu"):
        assert switches() == before


def test_a_store_is_not_resumed_in_another_mode(corpus: Path, tmp_path: Path, inline: None) -> None:
    arguments = (str(corpus), str(tmp_path / "out"))
    latentmill.encode(*arguments, device="cpu", threads=1)
    with pytest.raises(StoreError) as caught:
        latentmill.encode(*arguments, device="cpu", threads=1, precision="bf16")
    assert str(caught.value).startswith("--precision changed: ")
    same = latentmill.encode(*arguments, device="cpu", threads=1, precision="float32")
    assert same.resumed_units == same.units
