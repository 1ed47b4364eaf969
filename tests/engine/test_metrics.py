"""What Prometheus would find on a node where an actor works."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import ray

from latentmill.run.run import encode
from support import runs


def scraped(port: int) -> dict[str, float]:
    """latentmill's samples by name and tags, summed over actors."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
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
    names: set[str] = set()

    def collected() -> bool:  # Ray collects them every few seconds
        after = scraped(node["MetricsExportPort"])
        names.update(name.partition(":")[0].removeprefix("ray_latentmill_") for name in after)
        return all(after.get(name, 0.0) - before.get(name, 0.0) == n for name, n in wanted.items())

    runs.until(collected, f"the metrics are {wanted}")
    assert {"queued_chunks", "audio_seconds_total", "model_busy_seconds_total"} <= names
    assert {"unit_seconds_count", "model_wait_seconds_total"} <= names
