"""What Prometheus would find on a node where an actor works."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

import ray

from latentmill.run.run import encode
from support import runs


def scraped(port: int) -> dict[str, float]:
    """latentmill's samples by name and tags, summed over actors."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    samples: dict[str, float] = {}
    for line in lines:
        if line.startswith("ray_latentmill"):
            name, value = line.rsplit(" ", 1)
            status = name.partition('status="')[2].partition('"')[0]
            name = name.partition("{")[0] + (f":{status}" if status else "")
            samples[name] = samples.get(name, 0.0) + float(value)
    return samples


def test_actors_tell_rays_metrics(tmp_path: Path, ray_session: Path) -> None:
    songs = runs.write_songs(tmp_path / "songs", 4, 2.0)
    (songs / "album 0" / "broken.wav").write_bytes(b"RIFF")
    (node,) = ray.nodes()
    before = scraped(node["MetricsExportPort"])
    options = {"model": runs.SLOW_MODEL, "model_options": {"seconds": 1.5}}
    encode(str(songs), str(tmp_path / "store"), device="cpu", **options)
    wanted = {"ray_latentmill_items_total:encoded": 4, "ray_latentmill_items_total:failed": 1}
    wanted["ray_latentmill_failures_total"] = 1
    end = time.monotonic() + 60  # they are collected every few seconds
    while True:
        after = scraped(node["MetricsExportPort"])
        new = {name: value - before.get(name, 0.0) for name, value in after.items()}
        if all(new.get(name) == value for name, value in wanted.items()):
            break
        assert time.monotonic() < end, new
        time.sleep(1)
    names = {name.partition(":")[0].removeprefix("ray_latentmill_") for name in after}
    assert {"queued_chunks", "audio_seconds_total", "model_busy_seconds_total"} <= names
    assert {"unit_seconds_count", "model_wait_seconds_total"} <= names
