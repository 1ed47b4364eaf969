"""Measures how long the mixing desk of `latentmill view` takes for a mix of music, with mdct.

    python benchmarks/desk.py [--audio FILE ...] [--seconds 10] [--rounds 9]

Recordings are encoded with mdct into a store, which a server in a process of its own shows. Each
round asks for a mix over HTTP as the page does: another part of the records with other gains, so
that nothing is in the server's memory. `cpu_seconds` is the CPU time of the server. The figures are
medians of all rounds; the first mix, which loads the model, is given alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import latentmill as lm
from common import RESULTS, recordings, write_result

CHANNELS = (1, 2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--audio", type=Path, nargs="+", help="recordings of at least a minute")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "audio").mkdir()
        for number, file in enumerate(recordings(arguments.audio)):
            (Path(folder) / "audio" / f"{number}{file.suffix}").symlink_to(file.resolve())
        lm.encode(f"{folder}/audio", f"{folder}/store", model="mdct", device="cpu")
        result = viewing(f"{folder}/store", arguments.seconds, arguments.rounds)
    write_result("desk", result, arguments.results)


def viewing(url: str, seconds: float, rounds: int) -> dict[str, Any]:
    store = lm.open(url)
    keys, frames = list(store.keys()), round(seconds * 44100 / 512)
    last = min(store[key].latent.shape[1] for key in keys) - frames
    command = [sys.executable, "-m", "latentmill", "view", url, "--no-browser", "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["url"]
        first = asked(address, server.pid, mix(keys, 2, 0, frames))
        result: dict[str, Any] = {"records": len(keys), "seconds": seconds, "first": first}
        for count in CHANNELS:
            parts = [
                asked(address, server.pid, mix(keys, count, n * last // rounds, frames))
                for n in range(rounds)
            ]
            medians = {k: statistics.median(one[k] for one in parts) for k in first}
            result[f"{count} channels"] = {k: round(v, 3) for k, v in medians.items()}
    finally:
        server.terminate()
        server.wait()
    return result | {"load": [round(one, 1) for one in os.getloadavg()]}


def mix(keys: list[str], count: int, start: int, frames: int) -> dict[str, Any]:
    """Channels with gains and offsets of their own."""
    channels = [
        {"key": keys[n % len(keys)], "gain_db": -3.0 - n - start % 7, "offset": n}
        for n in range(count)
    ]
    return {"channels": channels, "start": start, "frames": frames}


def asked(address: str, server: int, wanted: dict[str, Any]) -> dict[str, float]:
    """Seconds until the mix has arrived, and CPU seconds of the server."""
    query = urllib.parse.urlencode({"mix": json.dumps(wanted), "of": "latent"})
    cpu, begin = cpu_seconds(server), time.perf_counter()
    with urllib.request.urlopen(f"{address}audio?{query}", timeout=600) as answer:
        answer.read()
    return {
        "wall_seconds": time.perf_counter() - begin,
        "cpu_seconds": cpu_seconds(server) - cpu,
    }


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
