"""Options of the commands that make stores from stores."""

from __future__ import annotations

from pathlib import Path

import pytest

import latentmill as lm
from support.latent_store import write_latents
from support.runs import call


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_keys_with_unusual_characters(
    end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only a line feed ends a key in the file of --keys."""
    store = write_latents(str(tmp_path / "s"), [3] * 4, prefix="a\u2028b\x85c\x0cd\x1ce\rf")
    wanted = list(store.keys())[1:3]
    file = tmp_path / "keys.txt"
    file.write_bytes(("\ufeff" + end.join([wanted[0], "", *wanted[1:], ""])).encode())
    result = call(capsys, "select", store.url, tmp_path / "out", "--keys", file)
    assert result.code == 0, result.err
    assert list(lm.open(str(tmp_path / "out")).keys()) == wanted
