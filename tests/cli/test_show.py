"""What the commands print, from values that are made here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from latentmill.cli import show
from latentmill.models.registry import available
from latentmill.run.prepare import Extension
from latentmill.run.run import RunSummary
from latentmill.store.entries import ShardEntry
from latentmill.store.schema import DatasetInfo
from latentmill.store.verify import Decoded, VerifyReport


def info(**changes: Any) -> DatasetInfo:
    values: dict[str, Any] = {
        "latentmill_version": "1",
        "format": "parquet",
        "layout": "time-major",
        "dtype": "float16",
        "model": {
            "name": "mdct",
            "sample_rate": 44100,
            "channels": 1,
            "latent_channels": 2,
            "hop": 441,
            "scale_factor": 1.0,
        },
        "chunking": {"stitch": "trim", "samples": 44100, "step": 100, "overlap": 2},
        "fingerprint": "f" * 32,
        "source": "/songs",
        "items": 30,
        "encoded": 4,
        "skipped": 1,
        "failed": 25,
        "hours": 0.5,
        "frames": 180_000,
        "mean": [1.0, 3.0],
        "std": [3.0, 4.0],
        "origin": "origin.npy",
        "shards": [ShardEntry(path="shards/000000.parquet", rows=4, bytes=1_500_000, hash="00")],
    }
    return DatasetInfo(**{**values, **changes})


def run(**changes: Any) -> RunSummary:
    values: dict[str, Any] = {
        "store": "/latents",
        "info": info(),
        "failures": tuple((f"song {i}", "the file is cut short") for i in range(25)),
        "skipped": (("short", "min_seconds: 0.2 s"),),
        "ignored": {".jpg": 3, ".ape": 12},
        "units": 4,
        "resumed_units": 1,
        "seconds": 18.0,
        "encoded_seconds": 900.0,
        "stages": {"model_seconds": 9.0, "wait_seconds": 1.0},
    }
    return RunSummary(**{**values, **changes})


def test_the_summary_accounts_for_every_item() -> None:
    lines = show.summary(run()).splitlines()
    assert lines[0] == (
        "/latents: 4 encoded, 1 skipped, 25 failed of 30 items; 0.500 h of audio, 1.5 MB in 1 shard"
    )
    assert lines.count("  failed: song 3: the file is cut short") == 1
    assert sum(line.startswith("  failed: ") for line in lines) == show.MAX_LISTED
    assert "  ... and 5 more (failed); `latentmill status STORE --json` lists all" in lines
    assert "  skipped: short: min_seconds: 0.2 s" in lines
    assert "this run: 3 of 4 units, 0.250 h in 18.0 s (50.0 x real time)" in lines
    assert lines[-1] == "bound by the model: it was busy 90% of the time"


def test_the_summary_of_a_run_with_nothing_to_do() -> None:
    text = show.summary(run(failures=(), skipped=(), ignored={}, resumed_units=4, stages={}))
    assert text.splitlines()[1:] == [
        "nothing to encode: every unit is committed already (to add new files of the source, use "
        "--extend)"
    ]


def test_the_summary_of_an_extension() -> None:
    keys = tuple(f"song {number}" for number in range(20))
    found = Extension(3, 25, 1, False, keys[:3], keys, keys[:1])
    text = show.summary(run(failures=(), skipped=(), ignored={}, resumed_units=4, extension=found))
    lines = text.splitlines()
    assert lines[1] == "  new items added to the plan: 3"
    assert lines[2].startswith(
        "  25 items changed since planning (--retry-changed encodes them again): song 0, song 1,"
    )
    assert lines[2].endswith("song 19, ...")
    assert lines[3] == "  1 item no longer in the source (their latents are kept): song 0"
    assert "--extend" not in text
    none = run(extension=Extension(0, 0, 0, False))
    assert "  no new files in the source" in show.summary(none).splitlines()
    retried = run(extension=Extension(0, 1, 0, True, (), ("a",)))
    assert "changed since planning (encoded again): " in show.summary(retried)


def test_the_summary_lists_latents_that_were_kept() -> None:
    kept = tuple((f"song {number}", "there is no such file") for number in range(25))
    lines = show.summary(run(kept=kept, fields={"second": run(kept=kept[:1])})).splitlines()
    first = lines.index(
        "  25 items not encoded again, the earlier latents are kept (--retry-failed tries again):"
    )
    assert lines[first + 1] == "  kept: song 0: there is no such file"
    assert lines[first + 20].startswith("  kept: song 19: ")
    assert lines[first + 21] == (
        "  ... and 5 more (kept); `latentmill status STORE --json` lists all"
    )
    assert lines[first + 22].startswith("  1 item not encoded again in second, ")
    assert lines[first + 23] == "  kept in second: song 0: there is no such file"


def test_the_summary_names_the_files_that_are_no_items_and_the_cure_of_failures() -> None:
    lines = show.summary(run()).splitlines()
    assert "  ignored (not audio): 12 .ape, 3 .jpg" in lines
    assert any("--retry-failed" in line for line in lines)
    assert "--retry-failed" not in show.summary(run(failures=()))


@pytest.mark.parametrize(
    ("stages", "verdict"),
    [
        ({"model_seconds": 2.0, "wait_seconds": 6.0}, "bound by loading: the model waited 75%"),
        ({"model_seconds": 9.0, "wait_seconds": 1.0}, "bound by the model: it was busy 90%"),
        ({"model_seconds": 2.0, "wait_seconds": 1.0}, "most of this time went into starting Ray"),
    ],
)
def test_what_a_run_was_bound_by(stages: dict[str, float], verdict: str) -> None:
    assert verdict in show.summary(run(stages=stages))


def test_info_gives_rates_and_statistics() -> None:
    text = show.info(info())
    assert "2 channels at 100.000 Hz, float16, time-major" in text
    assert "trim, chunks of 1.00 s" in text
    assert "mean 2, std 3.54 over all channels" in text
    assert "f" * 32 in text


def test_info_leaves_standard_deviations_out_of_the_statistics() -> None:
    """Of latents of means and standard deviations, mean and std are those of the means."""
    whole = info()
    model = {**whole.model, "latent_channels": 4, "posterior": "mean+std"}
    values = {"mean": [*whole.mean, 50.0, 60.0], "std": [*whole.std, 7.0, 8.0]}
    text = show.info(whole.model_copy(update={"model": model, **values}))
    assert "mean 2, std 3.54 over all means" in text


def test_verification() -> None:
    report = VerifyReport(units=2, committed=2, items=4, records=4)
    report.decoded = [Decoded("a", 2.0, -0.01, 61.23), Decoded("b", 1.0, None, None)]
    assert show.verification(report).splitlines() == [
        "2 of 2 units, 4 records of 4 items: no faults",
        "decoded a: 2.00 s, level -0.01 dB, SNR 61.2 dB against its source",
        "decoded b: 1.00 s, silence",
    ]
    report.faults.append("shards/000000.parquet does not match the hash in its commit")
    assert "FAULTS FOUND" in show.verification(report)
    assert "fault: shards/000000.parquet does not match" in show.verification(report)


def test_everything_is_plain_json() -> None:
    for value in (run(), info(), VerifyReport(decoded=[Decoded("a", 1.0, 0.0, None)]), available()):
        assert json.loads(json.dumps(show.plain(value)))
    plain = show.plain(run())
    assert plain["exit_code"] == 3
    assert plain["info"]["hours"] == 0.5
    assert len(plain["failures"]) == 25
    assert "mdct" in [model["name"] for model in show.plain(available())]


def test_closest_helps_with_typing_errors() -> None:
    keys = ["album/song", "album/other", "x"]
    assert show.closest("album/sonk", keys) == "album/song"
    assert show.closest("qqqq", keys) is None


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_234_567, "1.235 MB"), (5 * 10**15, "5000 TB")],
)
def test_sizes(count: int, text: str) -> None:
    shards = [ShardEntry(path="s", rows=1, bytes=count, hash="")]
    assert f"{text} in 1 shard" in show.summary(run(info=info(shards=shards)))
