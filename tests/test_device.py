"""A device that was asked for is taken or refused, never replaced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from latentmill.device import pick_device
from latentmill.errors import ConfigError


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    assert pick_device("cpu") == "cpu"


@pytest.mark.parametrize(("gpus", "refused"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_a_gpu_that_is_not_there_is_refused(
    gpus: int,
    refused: str,
    monkeypatch: pytest.MonkeyPatch,
    one_sentence: Callable[[BaseException], str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError) as caught:
        pick_device(refused)
    assert f"{gpus} GPUs" in one_sentence(caught.value)
    assert gpus == 0 or pick_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize("wanted", ["", "gpu", "CPU", "cuda:x", "cuda:-1", "meta", "mps"])
def test_what_is_no_device_is_refused(
    wanted: str, one_sentence: Callable[[BaseException], str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        pick_device(wanted)
    assert "auto, cpu, cuda" in one_sentence(caught.value)
