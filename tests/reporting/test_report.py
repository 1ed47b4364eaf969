"""The report as a file: its numbers, pictures and sounds, its size, and what it never contains."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import latentmill as lm
from latentmill.errors import ConfigError
from latentmill.reporting.media import PAGE_BYTES, Budget
from latentmill.reporting.report import _template, render, report
from latentmill.store.store import LatentStore
from reporting.conftest import ENCODED, HOSTILE_KEY, HOSTILE_METADATA
from support import runs
from support.field_stores import write_fields
from support.latent_store import write_latents


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text without style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._skipped = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._skipped = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._skipped = False

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def data(self, tag: str) -> list[bytes]:
        """What the data URIs of these elements contain."""
        sources = [one["src"] or "" for one in self.all(tag)]
        return [base64.b64decode(source.partition(",")[2]) for source in sources]


@pytest.fixture(scope="module")
def page(report_file: Path) -> Page:
    return Page(report_file.read_text(encoding="utf-8"))


def test_the_counts_add_up(page: Page) -> None:
    assert f"encoded {ENCODED} skipped by a filter 1 failed 2 without a result yet 0" in page.text
    assert f"in the plan {ENCODED + 3}" in page.text
    assert "1 .jpg" in page.text


def test_failures_are_listed_by_reason_with_examples(page: Page) -> None:
    reasons = page.text.partition("Why items failed")[2].partition("Why items were skipped")[0]
    assert "broken 0 , broken 1 2" in reasons
    assert "--retry-failed" in reasons
    assert "short 1" in page.text.partition("Why items were skipped")[2]


def test_histograms_count_every_record(page: Page) -> None:
    durations = page.text.partition("Counts of Duration")[2].partition("Level")[0]
    assert (
        "0.5 s to 1 s 1 1 s to 2 s 3 2 s to 5 s 6 5 s to 10 s 0 10 s to 20 s 0 20 s to 30 s 1"
        in (durations)
    )
    silence = page.text.partition("Counts of Silent share of a record")[2]
    assert re.search(r"none 10 .* all 1 ", silence)


def test_hostile_names_are_text(page: Page) -> None:
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert HOSTILE_KEY in page.text
    assert HOSTILE_METADATA["note"] in page.text
    assert "\u202e" not in page.text
    assert "\\u202etxt" in page.text


def test_the_page_may_use_no_network(page: Page) -> None:
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv")]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#"))
        assert not any(name.startswith("on") or name == "style" for name in attributes)


def test_pictures_and_players_can_be_decoded(page: Page) -> None:
    image = pytest.importorskip("PIL.Image")
    for data, attributes in zip(page.data("img"), page.all("img"), strict=True):
        size = image.open(io.BytesIO(data)).size
        assert size == (int(attributes["width"] or 0), int(attributes["height"] or 0))
        assert attributes["alt"]
    players = page.data("audio")
    assert len(players) >= 2 * ENCODED
    for data in players:
        audio, rate = soundfile.read(io.BytesIO(data))
        assert rate == 48_000
        assert 0 < len(audio) <= 10.1 * rate
    assert all(one["aria-label"] for one in page.all("audio"))


def test_results_of_the_evaluation_are_shown(page: Page, report_store: LatentStore) -> None:
    for part in ("statistics", "linearity", "reconstruction"):
        assert f"--only {part}" not in page.text
        assert (Path(report_store.url) / "evaluation" / f"{part}.json").exists()
    assert "Scaling, adding and subtracting latents is within the limits" in page.text
    result = json.loads((Path(report_store.url) / "evaluation/linearity.json").read_text())
    for one in result["linearity"]["scores"]:
        if one["form"] == "origin" and one["measure"] in ("si_sdr", "mr_stft"):
            assert f"{one['median']:.3g}" in page.text
    assert "The stems of north , 0 s to" in page.text  # each is in a shard of its own
    assert "One mix adds the source audio;" in page.text
    assert "Same file same 1 same 2" in page.text
    assert "Silent: silent" in page.text


def test_correlation_over_time_is_that_of_numpy(page: Page, report_store: LatentStore) -> None:
    """Means over channels of sum(z[t] z[t+n]) / pairs / variance, with the mean removed."""
    latents = [record.latent.astype(np.float64) for record in report_store]
    frames = np.concatenate(latents, axis=1)
    mean, variance = frames.mean(axis=1, keepdims=True), frames.var(axis=1)
    rows = page.text.partition("Correlations as a table")[2].partition("effective rank")[0]
    for lag in (1, 8):
        products = [(z[:, lag:] - mean) * (z[:, :-lag] - mean) for z in latents]
        of_channels = np.concatenate(products, axis=1).mean(axis=1) / variance
        expected = [of_channels.mean(), *np.quantile(of_channels, (0.1, 0.9))]
        (shown,) = re.findall(rf" {lag} \S+ s (\S+) (\S+) (\S+)", rows)
        assert np.allclose([float(value) for value in shown], expected, rtol=0.06, atol=1e-4)


def test_what_is_measured_is_explained(page: Page, report_store: LatentStore) -> None:
    text = page.text.partition("What is measured")[2].partition("More measures")[0]
    result = json.loads((Path(report_store.url) / "evaluation/linearity.json").read_text())
    for one in result["linearity"]["scores"]:
        assert one["metric"].replace("_", " ") in text


def test_what_was_not_measured_names_its_command(tmp_path: Path) -> None:
    store = write_latents(str(tmp_path / "a store"), [40, 50, 60], per_unit=2)
    page = Page(render(store, Budget()))
    for part in ("statistics", "linearity", "reconstruction", "seams"):
        assert f"latentmill evaluate '{store.url}' --only {part}" in page.text


def test_a_result_of_an_earlier_seal_is_marked(report_store: LatentStore, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(report_store.url, tmp_path / "store"))
    path = folder / "evaluation" / "statistics.json"
    path.write_text(path.read_text().replace(report_store.info.seal or "", "0"))
    text = Page(render(lm.open(folder), Budget(), items=0)).text
    assert text.count("The store has changed since this was measured") == 3


def other_channels(statistics: dict[str, Any]) -> None:
    """All lists agree, but not with the store."""
    for name in ("mean", "std", "low", "high", "saturation"):
        statistics[name] = statistics[name][:1]
    statistics["autocorrelation"] = {}


DAMAGED: dict[str, Callable[[dict[str, Any]], None]] = {
    "channels": lambda found: found.update(low=[1.0]),
    "other channels": other_channels,
    "no lag": lambda found: found["autocorrelation"].update(a=found["mean"]),
    "lag zero": lambda found: found["autocorrelation"].update({"0": found["mean"]}),
    "lag twice": lambda found: found["autocorrelation"].update({"01": found["mean"]}),
    "other lists": lambda found: found["autocorrelation"]["1"].append(0.5),
}


@pytest.mark.parametrize("name", ["linearity", "reconstruction", "seams", "statistics", *DAMAGED])
def test_a_damaged_result_is_not_shown(
    name: str, report_store: LatentStore, tmp_path: Path
) -> None:
    """The page gives the reason in its place; everything else is shown."""
    folder = Path(shutil.copytree(report_store.url, tmp_path / "store"))
    path = folder / "evaluation" / f"{name}.json"
    if name in DAMAGED:
        path = folder / "evaluation" / "statistics.json"
        document = json.loads(path.read_text())
        DAMAGED[name](document["statistics"])
        path.write_text(json.dumps(document))
    else:
        path.write_text(path.read_text()[:-9] if path.exists() else "{")
    text = Page(render(lm.open(folder), Budget(), items=1)).text
    assert f"{path.name} is damaged: delete it" in text
    assert ("not mixed here: the result of linearity is damaged" in text) == (name == "linearity")
    for part, shown in {
        "statistics": "Same file same 1 same 2",
        "reconstruction": "decoded and compared with the source",
        "linearity": "Medians over",
    }.items():
        assert (shown in text) == (f"{part}.json" != path.name)


STORES = {
    "not sealed": {"sealed": False},
    "chunks": {"stitch": "none", "latents": [np.ones((2, 4, 16), np.float16)] * 3},
    "webdataset": {"format_name": "webdataset"},
    "codes": {"model": {"output": "codes", "codebook_size": 1024}},
    "one record": {"lengths": [30]},
}


@pytest.mark.filterwarnings("ignore::latentmill.errors.IncompleteStoreWarning")
@pytest.mark.parametrize("kind", STORES)
def test_stores_without_their_model_have_a_report(kind: str, tmp_path: Path) -> None:
    options = {"lengths": [16, 16, 16], **STORES[kind]}
    page = Page(render(write_latents(str(tmp_path / "store"), **options), Budget()))
    assert "No reconstructions, because the model cannot be loaded" in page.text
    assert "without the original: there is no such file" in page.text
    assert len(page.all("img")) == len(options["lengths"])  # the latents
    assert not page.all("audio")


def test_a_store_without_records_has_a_report(tmp_path: Path) -> None:
    store = write_latents(str(tmp_path / "store"), [], sealed=False)
    text = Page(render(store, Budget())).text
    assert "No records to show" in text
    assert "not measured: the store is not complete." in text
    assert "latentmill evaluate" not in text  # it would not be recorded


def test_a_sealed_store_needs_neither_plan_nor_commits(
    report_store: LatentStore, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(report_store.url, tmp_path / "store"))
    shutil.rmtree(folder / "plan")
    shutil.rmtree(folder / "commits")
    page = Page(render(lm.open(folder), Budget(), items=1))
    assert f"encoded {ENCODED} skipped by a filter 1 failed 2" in page.text


def test_a_view_lists_what_was_left_out(report_store: LatentStore, tmp_path: Path) -> None:
    lm.select(report_store, tmp_path / "view", where="duration > 3")
    view = lm.open(tmp_path / "view")
    page = Page(render(view, Budget(), items=1))
    left = sum(record.duration <= 3 for record in report_store)
    assert (
        f"in the view {len(view)} left out {left} in the base stores {len(view) + left}"
        in page.text
    )
    assert "in the plan" not in page.text
    assert sum(view.info.left_out.values()) == left
    wanted = f"Why records were left out Reason Records where: not duration > 3 {left} "
    assert wanted in page.text
    assert ".jpg" not in page.text  # ignored by the source of the base


def test_a_page_has_no_more_than_its_budget(report_store: LatentStore) -> None:
    budget = Budget(bytes=200_000, players=3)
    html = render(report_store, budget, items=4)
    page = Page(html)
    assert len(page.all("audio")) <= 3
    assert sum(len(uri) for uri in re.findall(r'src="(data:[^"]*)"', html)) <= 200_000
    assert budget.left_out > 5
    assert f"{budget.left_out} pictures or sounds left out" in page.text


@pytest.mark.slow
def test_long_names_do_not_make_a_page_too_large(tmp_path: Path) -> None:
    long = {f"field {n}": "x" * 500 for n in range(30)}
    metadata = [{**long, "number": f"{n}é" * 100} for n in range(6000)]
    store = write_latents(
        str(tmp_path / "store"), [9] * 6000, per_unit=500, prefix="k" * 700, metadata=metadata
    )
    html = render(store, Budget(bytes=0))
    assert len(html.encode()) < PAGE_BYTES / 5


def test_the_report_is_written_once(
    report_store: LatentStore, tmp_path: Path, one_sentence, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "page.html"
    written = lm.report(report_store, path, items=1)
    assert written.bytes == path.stat().st_size
    assert [one.name for one in path.parent.iterdir()] == ["page.html"]
    with pytest.raises(ConfigError) as error:
        report(report_store.url, path)
    assert "--overwrite" in one_sentence(error.value)
    done = runs.call(
        capsys, "report", report_store.url, "-o", path, "--overwrite", "--items", 0, "--json"
    )
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["path"], result["bytes"]) == (str(path), path.stat().st_size)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "the output path is empty"),
        ("a\0b.html", "NUL"),
        ("new/", "'new/' is a folder"),
        (".", r"'\.' is a folder"),
        ("folder/..", r"'folder/\.\.' is a folder"),
        ("folder", "folder' is a folder"),
        ("link", "link' is a folder"),
        ("pipe", "pipe is not a regular file"),
        ("link to pipe", "link to pipe is not a regular file"),
        ("STORE/dataset.json", "inside the store"),
        ("STORE/evaluation/new.html", "inside the store"),
        ("link/new.html", "inside the store"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_output_paths_that_are_refused(
    output: str,
    message: str,
    overwrite: bool,
    report_store: LatentStore,
    tmp_path: Path,
    one_sentence,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("link").symlink_to(report_store.url)
    os.mkfifo("pipe")
    Path("link to pipe").symlink_to("pipe")
    path = output.replace("STORE", report_store.url)
    files = sorted(Path(report_store.url).rglob("*"))
    with pytest.raises(ConfigError, match=message) as error:
        lm.report(report_store, path, overwrite=overwrite, items=0)
    one_sentence(error.value)
    assert sorted(Path(report_store.url).rglob("*")) == files
    assert Path("pipe").is_fifo()


def test_fields_without_a_rate_are_shown_without_one(tmp_path: Path) -> None:
    lengths = [7, 40, 12, 90, 33]
    store = write_latents(str(tmp_path / "store"), lengths)
    write_fields(store, lengths, names=["text", "whole"])
    texts = {}
    for name in ("text", "whole"):
        lm.evaluate(store.field(name), only=["statistics"])
        texts[name] = Page(render(store.field(name), Budget(), items=0)).text
    text, frames = texts["text"], texts["whole"]
    assert "numbers in a token 5" in text
    assert "latents float16, tokens of 5 numbers" in text
    assert "Frames mean 10 %" in text  # of correlations
    for name, value in (("frames per second", " 21.53"), (" hop", " 2"), ("Frames time", " mean")):
        assert name + value in frames and name not in text


def test_a_negative_number_of_items(report_store: LatentStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="items"):
        lm.report(report_store, tmp_path / "page.html", items=-1)


def test_the_users_folders_stay(report_store: LatentStore, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    lm.report(report_store, tmp_path / "page.html", items=0)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["page.html", "tmp"]


def test_the_report_can_be_written_to_a_bucket(report_store: LatentStore, s3_bucket: str) -> None:
    import fsspec

    written = lm.report(report_store, f"{s3_bucket}/reports/page.html", items=0)
    data = fsspec.filesystem("s3").cat(f"{s3_bucket}/reports/page.html")
    assert len(data) == written.bytes
    with pytest.raises(ConfigError, match="exists"):
        lm.report(report_store, f"{s3_bucket}/reports/page.html", items=0)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (999.7, 3, "1\N{NARROW NO-BREAK SPACE}000"),
        (1234567.8, 3, "1\N{NARROW NO-BREAK SPACE}234\N{NARROW NO-BREAK SPACE}568"),
        (-1234.5, 3, "-1\N{NARROW NO-BREAK SPACE}234"),
        (12345, 4, "12\N{NARROW NO-BREAK SPACE}345"),
        (0.5, 3, "0.5"),
        (None, 3, "\N{EN DASH}"),
        (float("nan"), 3, "\N{EN DASH}"),
    ],
)
def test_numbers_of_the_page(value: float | None, digits: int, text: str) -> None:
    environment = _template().environment
    assert environment.filters["number"](value, digits) == text


def test_results_from_before_a_change_are_not_those_of_the_records(
    report_store: LatentStore, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(report_store.url, tmp_path / "store"))
    lm.report(str(folder), tmp_path / "a.html")
    current = (tmp_path / "a.html").read_text()
    assert "among the worst reconstructions" in current
    assert ", SNR " in current
    path = folder / "evaluation" / "reconstruction.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"seal": "0" * len(written["seal"])}))
    lm.report(str(folder), tmp_path / "b.html")
    stale = (tmp_path / "b.html").read_text()
    assert "The store has changed since this was measured" in stale
    assert "among the worst reconstructions" not in stale
    assert ", SNR " not in stale
