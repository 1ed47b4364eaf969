"""Values that no run writes, in any file of a store: one sentence, never a raw exception."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import store_files

import latentmill as lm
from latentmill.cli import show, show_status
from latentmill.errors import LatentmillError
from latentmill.evaluation.linearity import measure_linearity
from latentmill.evaluation.reconstruction import measure_reconstruction
from latentmill.evaluation.seams import measure_seams
from latentmill.evaluation.statistics import measure_statistics
from latentmill.export.export import Target, export_store
from latentmill.reporting.media import Budget
from latentmill.reporting.report import render
from latentmill.store.verify import verify

DATASET, PLAN, COMMIT = "dataset.json", "plan/plan.json", "commits/000000.json"


def walk(store: lm.LatentStore) -> None:
    for key in store.keys():  # noqa: SIM118
        _ = store[key]
        store.crop(key, 0, 2)
        store.decode(key)


def view(store: lm.LatentStore) -> None:
    """Every answer of `latentmill view` about every record."""
    pytest.importorskip("starlette", reason="needs Starlette: pip install 'latentmill[view]'")
    from latentmill.view.app import Viewer
    from latentmill.view.query import Channel, MixRequest
    from latentmill.view.recipe import python_lines

    viewer = Viewer(store)
    for position, key in enumerate(store.keys()):
        viewer._catalog.record(position)
        viewer._catalog.rows([position])
        mix = MixRequest(channels=(Channel(key=key), Channel(key=key, offset=3)))
        viewer._desk.audio(mix, "latent")
        python_lines(viewer._desk, mix, url=store.url, options="")
        viewer._drawn(key, "latent", lambda: None)


READS: dict[str, Callable[[lm.LatentStore], object]] = {
    "info": lambda store: show.info(store.measured_info),
    "repr": lambda store: (store.info, repr(store), store._repr_html_(), store.origin),
    "verify": lambda store: verify(store, decode=1),
    "walk": walk,
    "seams": lambda store: measure_seams(store, items=1),
    "linearity": lambda store: measure_linearity(store, items=2),
    "reconstruction": lambda store: measure_reconstruction(store, items=2),
    "statistics": measure_statistics,
    "report": lambda store: render(store, Budget(), items=0),
    "export": lambda store: export_store(store, f"{store.url}-out", Target.WEBDATASET),
    "dataset": lambda store: lm.LatentDataset(store, crop=4)[0],
    "stream": lambda store: list(lm.LatentStream(store, crop=4)),
    "where": lambda store: lm.LatentDataset(store, crop=4, where="bpm == 1")[0],
    "status": lambda store: show_status.status(show_status.StoreStatus.of(store)),
    "normalize": lm.Normalize.from_store,
    "view": view,
}

HUGE = 10**30
VALUES = [  # file, where in it, what stands there
    (DATASET, "model", []),
    (DATASET, "model.hop", [-1, 2]),
    (DATASET, "model.hop", 0),
    (DATASET, "model.sample_rate", "x"),
    (DATASET, "model.sample_rate", None),
    (DATASET, "model.scale_factor", "a\0b"),
    (DATASET, "model.scale_factor", float("nan")),
    (DATASET, "model.latent_channels", HUGE),
    (DATASET, "model.latent_channels", 3),
    (DATASET, "model.asked", 7),
    (DATASET, "model.options", ["x"]),
    (DATASET, "chunking", {}),
    (DATASET, "chunking.samples", True),
    (DATASET, "chunking.samples", 1),
    (DATASET, "chunking.samples", 1 << 40),
    (DATASET, "chunking.overlap", 10**6),
    (DATASET, "chunking.step", 1 << 30),
    (DATASET, "chunking.stitch", "x"),
    (DATASET, "mean", []),
    (DATASET, "shards", []),
    (DATASET, "shards.0.path", "shards/x"),
    (DATASET, "items", -HUGE),
    (PLAN, "fingerprint", [[]]),
    (PLAN, "fingerprint.model", None),
    (PLAN, "fingerprint.model.latent_channels", 1e308),
    (PLAN, "fingerprint.chunking.step", {"a": 1}),
    (PLAN, "fingerprint.numeric", {}),
    (PLAN, "fingerprint.numeric.precision", [[]]),
    (PLAN, "model_options", "x"),
    (PLAN, "ignored", {"a": "b"}),
    (PLAN, "parts.0.formats", [1]),
    (PLAN, "parts.0.seconds", "x"),
    (COMMIT, "items.0.shape", [-1, 2]),
    (COMMIT, "items.0.shape", [1 << 40, 1 << 40]),
    (COMMIT, "items.0.shape", []),
    (COMMIT, "items.0.offset", 1 << 70),
    (COMMIT, "items.0.offset", 1 << 62),
    (COMMIT, "items.0.length", -2),
    (COMMIT, "items.0.length", 1 << 50),
    (COMMIT, "items.0.hash", "x"),
    (COMMIT, "items.0.num_samples", -1),
    (COMMIT, "statistics.mean", [1.0]),
    (COMMIT, "statistics.frames", HUGE),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed store of three short items, one of which failed, with its measurements."""
    folder = tmp_path_factory.mktemp("base")
    source = folder / "source"
    source.mkdir()
    for name, seconds in {"a": 0.9, "b": 1.2}.items():
        noise = np.random.default_rng(len(name)).standard_normal(int(seconds * store_files.RATE))
        soundfile.write(source / f"{name}.wav", noise * 0.1, store_files.RATE, subtype="FLOAT")
    (source / "a.json").write_text('{"bpm": 1}')
    (source / "c.wav").write_text("no audio")
    store_files.write_store(str(folder / "store"), source, chunk_seconds=0.5)
    return folder / "store"


def with_value(store: Path, file: str, where: str, value: object) -> None:
    document = json.loads((store / file).read_text())
    part: Any = document
    *steps, last = [int(step) if step.isdigit() else step for step in where.split(".")]
    for step in steps:
        part = part[step]
    part[last] = value
    (store / file).write_text(json.dumps(document))
    if file == COMMIT:  # a sealed store is read by its index
        (store / DATASET).unlink()


def assert_one_sentence(store: Path) -> None:
    """Every way of reading ends well or in one sentence."""
    for name, read in READS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(lm.open(str(store), device="cpu"))
        except LatentmillError as error:
            assert "\n" not in str(error)
        except Exception as error:
            raise AssertionError(f"{name}: {error!r}") from error


@pytest.mark.parametrize(("file", "where", "value"), VALUES)
def test_a_value_that_no_run_writes(
    file: str, where: str, value: object, base: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(base, tmp_path / "store"))
    with_value(store, file, where, value)
    assert_one_sentence(store)


CONTENTS: dict[str, Callable[[Path], object]] = {
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "deep objects": lambda path: path.write_bytes(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "a huge number": lambda path: path.write_bytes(b"9" * 100_000),
    "a list": lambda path: path.write_bytes(b"[1, 2]"),
    "other bytes": lambda path: path.write_bytes(bytes(range(256))),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


QUICK = ("deep", "other bytes", "a folder")


@pytest.mark.parametrize(
    "content",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CONTENTS],
)
@pytest.mark.parametrize(
    "file", [DATASET, PLAN, COMMIT, "INDEX", "METADATA", "origin.npy", "evaluation/seams.json"]
)
def test_a_file_of_other_content(file: str, content: str, base: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(base, tmp_path / "store"))
    named = {"INDEX": "index.*", "METADATA": "metadata.*"}
    path = next(store.glob(named.get(file, file)), store / file)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    CONTENTS[content](path)
    if file == COMMIT:
        (store / DATASET).unlink()
    assert_one_sentence(store)
