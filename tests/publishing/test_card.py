"""The dataset card: read by other tools, edited by users, and safe with any names."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import latentmill as lm
from latentmill.publishing.card import BEGIN, END, hub_card
from latentmill.publishing.contents import StoreFiles, contents_of
from latentmill.publishing.hub import pull, push
from latentmill.store.card import MARKER
from latentmill.store.measurement import write_measurement
from latentmill.store.results import LinearityEntry
from support import runs
from support.field_stores import write_fields
from support.hub_server import TOKEN, HubServer
from support.in_process import in_process
from support.latent_store import latent_of, write_again, write_latents

REPO = "hf://datasets/me/songs"


def header(card: str) -> dict[str, Any]:
    _, text, _ = card.split("---\n", 2)
    found = yaml.safe_load(text)
    assert isinstance(found, dict)
    return found


def blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that a real run has made; leave it unchanged."""
    folder = tmp_path_factory.mktemp("card")
    runs.write_songs(folder / "songs", 3)
    with in_process():
        lm.encode(str(folder / "songs"), str(folder / "store"), device="cpu", model="mdct")
    return str(folder / "store")


@pytest.fixture
def contents(tmp_path: Path) -> StoreFiles:
    return contents_of(write_latents(str(tmp_path / "store"), [5, 9, 17], per_unit=2).url)


def test_the_lines_of_the_card_read_and_decode(encoded: str, hub: HubServer) -> None:
    push(encoded, REPO)
    card = hub.content("me/songs")["README.md"].decode()
    names: dict[str, Any] = {}
    exec(blocks(card)[0], names)
    local = lm.open(encoded)
    key = next(local.keys())
    np.testing.assert_array_equal(names["record"].latent, local[key].latent)
    np.testing.assert_array_equal(names["audio"], local.decode(key))
    assert f"{local.info.encoded} records" in card


def test_load_dataset_and_duckdb_read_it(encoded: str, hub: HubServer, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    pytest.importorskip("datasets")
    lm.select(encoded, tmp_path / "view", sample=2)
    push(tmp_path / "view", REPO)
    copy = tmp_path / "copy"
    pull(REPO, copy)
    lines = blocks((copy / "README.md").read_text())[1]
    environment = {  # read when the packages are imported, so in a process of its own
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    report = (
        "print(json.dumps({r['key']: r['latent'].hex() for r in rows}), latent.tobytes().hex())"
    )
    code = [lines, report, lines.replace(", streaming=True", ""), report]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(["import json", *code])],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wanted = {record.key: record.latent for record in lm.open(tmp_path / "view")}
    for line in done.stdout.splitlines():
        rows, first = line.rsplit(" ", 1)
        found = {key: bytes.fromhex(data) for key, data in json.loads(rows).items()}
        assert found == {key: latent.T.tobytes() for key, latent in wanted.items()}
        assert bytes.fromhex(first) == next(iter(wanted.values())).tobytes()
    assert len(done.stdout.splitlines()) == 2

    card = header((copy / "README.md").read_text())
    paths = [str(copy / path) for path in card["configs"][0]["data_files"][0]["path"]]
    keys = duckdb.execute(f"SELECT key FROM read_parquet({paths}) ORDER BY key").fetchall()
    assert [key for (key,) in keys] == list(wanted)


def test_the_card_of_a_field_without_a_rate(tmp_path: Path) -> None:
    store = write_latents(str(tmp_path / "store"), [5, 9])
    write_fields(store, [5, 9], names=["text"])
    field, whole = (
        hub_card(contents_of(url), REPO, None, new=True, license_=None)
        for url in (f"{store.url}/fields/text", store.url)
    )
    assert "tokens of 5 numbers (float16)" in field and "4 channels, 10.77 frames/s" in whole
    assert "per frame" not in field and "4096 samples per frame" in whole
    assert "decode" not in field and "store.decode(" in whole


def test_the_picture(encoded: str, hub: HubServer) -> None:
    plt = pytest.importorskip("matplotlib.image")
    push(encoded, REPO)
    data = hub.content("me/songs")["latents.png"]
    pixels = plt.imread(io.BytesIO(data), format="png")
    assert pixels.shape[:2] == (256, 1280)
    assert pixels[..., :3].std() > 0.05


def test_edits_on_the_hub_stay(hub: HubServer, contents: StoreFiles) -> None:
    url = contents.storage.root
    push(url, REPO)
    card = hub.content("me/songs")["README.md"].decode()
    assert MARKER in card
    edited = card.replace(
        "---\n", "---\nlanguage: [en, no]\npretty_name: 'Songs: all'\ngated: true\n", 1
    )
    edited = edited.replace("tags:\n", "tags:\n- mine\n").replace(BEGIN, f"# My songs\n\n{BEGIN}")
    edited = edited.replace("configs:\n", "configs:\n- config_name: extra\n  data_files: a.csv\n")
    edited = edited.replace("4 channels", "four channels") + "\nCite me.\n"
    hub.write("me/songs", "README.md", edited.encode())
    write_again(url, [1], [latent_of(7, length) for length in (5, 9, 17)])
    push(url, REPO, license="mit")
    now = hub.content("me/songs")["README.md"].decode()
    fields = header(now)
    assert (fields["language"], fields["pretty_name"]) == (["en", "no"], "Songs: all")
    assert fields["gated"] is True
    assert fields["tags"] == ["mine", "audio", "latents", "latentmill"]
    assert fields["license"] == "mit"
    listed = {config["config_name"]: config["data_files"] for config in fields["configs"]}
    assert listed["extra"] == "a.csv"
    assert listed["default"][0]["path"] == ["shards/000000.parquet", "shards/000001.r1.parquet"]
    assert now.index("# My songs") < now.index(BEGIN) < now.index(END) < now.index("Cite me.")
    assert "four channels" not in now
    assert MARKER not in now
    push(url, REPO)
    assert hub.content("me/songs")["README.md"].decode() == now

    own = now[: now.index(BEGIN)] + now[now.index(END) + len(END) :]
    hub.write("me/songs", "README.md", own.encode())
    push(url, REPO)
    assert BEGIN not in hub.content("me/songs")["README.md"].decode()


def test_cards_that_were_there_before(contents: StoreFiles) -> None:
    def made(existing: str | None, **options: Any) -> str:
        return hub_card(contents, REPO, existing, **{"new": True, "license_": None, **options})

    written = made("---\nlicense: mit\n---\nHello.\n")
    assert header(written)["license"] == "mit"
    assert written.index("Hello.") < written.index(BEGIN)
    assert made(written, new=False) == written
    for odd in ("---\nlicense: [\n---\nx", "---\n- a\n---\nx", "---\nno end", "\r\n", ""):
        text = made(odd)
        assert header(text)["configs"][0]["config_name"] == "default"
        assert odd.strip().splitlines()[-1:] == [] or odd.splitlines()[-1] in text
        assert made(text, new=False) == text
    Path(contents.storage.root, "README.md").write_text("Mine.\n")
    assert "Mine." in made(None)
    assert "Mine." not in made("Other.")


@pytest.mark.parametrize("odd", ['```\n<script>"\\`|{x}', "\U0001f600 \u4e16\u202e'\\"])
def test_names_cannot_break_the_card(odd: str, tmp_path: Path) -> None:
    store = write_latents(str(tmp_path / "s"), [5], prefix=odd, model={"name": odd})
    text = hub_card(contents_of(store.url), REPO, None, new=True, license_=odd)
    assert header(text)["license"] == odd
    assert len(blocks(text)) == 2
    line = next(line for line in blocks(text)[0].splitlines() if line.startswith("record ="))
    names = {"store": {next(store.keys()): "found"}}
    exec(line, names)
    assert names["record"] == "found"
    assert "<script>" not in text.replace(blocks(text)[0], "").split("## Data")[1]


def test_the_linearity_card(contents: StoreFiles) -> None:
    text = hub_card(contents, REPO, None, new=True, license_=None)
    assert "## Linearity" not in text
    entry = LinearityEntry(
        items=2,
        pairs=1,
        homogeneity=0.0123,
        homogeneity_raw=0.5,
        additivity=0.02,
        additivity_raw=0.25,
        by_gain={"0.5": 0.01},
    )
    write_measurement(contents.storage, contents.info, entry)
    text = hub_card(contents, REPO, None, new=True, license_=None)
    assert "| scaling | 0.0123 | 0.5 |\n| adding | 0.02 | 0.25 |" in text


def test_an_empty_store(tmp_path: Path, hub: HubServer) -> None:
    url = write_latents(str(tmp_path / "s"), [5, 6], per_unit=2).url
    write_again(url, [0], [latent_of(1, 5), latent_of(2, 6)], failed=[0, 1])
    push(url, REPO)
    found = hub.content("me/songs")
    assert "latents.png" not in found
    assert header(found["README.md"].decode())["configs"] == []
    assert len(lm.open(REPO)) == 0
