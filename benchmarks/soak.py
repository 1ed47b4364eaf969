"""Disturbs a run fifty times and checks that the store equals that of an undisturbed run.

    python benchmarks/soak.py [--events 50] [--seed 1] [--limit-minutes 40]

Several real Ray nodes on this machine, one core each, encode a corpus with a model that sleeps. In
random order, an actor is killed, a node is killed (another one joins), a node loses its connection
and returns, the driver is killed, or the head is killed with all nodes. What was killed is
restarted, and the same command continues. If a store is finished before all events have happened,
it is checked and a new one is started.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import ROOT, write_result

sys.path.insert(0, str(ROOT / "tests"))

from support import nodes, runs

WEIGHTS = {"actor": 14, "node": 14, "driver": 10, "cut off": 8, "head": 4}
WORKER_NODES = 2
SONGS = 60
CUT_OFF_SECONDS = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=sum(WEIGHTS.values()))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-minutes", type=float, default=40)
    parser.add_argument("--results", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), arguments.seed)
        try:
            soak.run(arguments.events, arguments.limit_minutes * 60)
        finally:
            soak.close()
    result = {"script": "benchmarks/soak.py", "seed": arguments.seed, **soak.result}
    write_result("soak", result, *([arguments.results] if arguments.results else []))


class Soak:
    """The cluster, the driver, and the store that they encode."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._chance = random.Random(seed)
        self._songs = runs.write_songs(folder / "songs", SONGS, 2.0)
        self._store = folder / "store"
        self._errors = (folder / "errors").open("w+")
        self._cluster = nodes.Nodes()
        self._add_nodes()
        self._driver: subprocess.Popen[str] | None = None
        self._stack = ExitStack()
        self._began = time.monotonic()
        self.result: dict[str, Any] = {}
        self._counts: Counter[str] = Counter()
        self._exits: Counter[str] = Counter()
        self._stores = 0
        self._undisturbed = self._reference(folder / "undisturbed")

    def run(self, events: int, limit: float) -> None:
        kinds = [kind for kind, weight in WEIGHTS.items() for _ in range(weight)]
        self._chance.shuffle(kinds)
        for number, kind in enumerate(kinds[:events]):
            if time.monotonic() - self._began > limit:
                break
            self._working()
            time.sleep(self._chance.uniform(0.0, 3.0))
            print(f"{time.monotonic() - self._began:7.1f} s  {number + 1:3} {kind}", flush=True)
            self._disturb(kind)
            self._counts[kind] += 1
        self._finish()
        self.result = {
            "events": dict(self._counts),
            "events_total": sum(self._counts.values()),
            "minutes": round((time.monotonic() - self._began) / 60, 1),
            "stores_checked": self._stores,
            "items_per_store": SONGS,
            "driver_exits": dict(self._exits),
            "equal_to_undisturbed": True,
        }

    def close(self) -> None:
        self._stack.close()
        self._cluster.shutdown()
        self._errors.close()

    def _reference(self, store: Path) -> dict[str, bytes]:
        result = runs.command(
            *nodes.arguments(self._songs, store, self._cluster.address, 0.0), **nodes.environment()
        )
        assert result.code == 0, result.err
        runs.assert_whole(store)
        return runs.latents(store)

    def _add_nodes(self) -> None:
        while len(self._cluster.workers) < WORKER_NODES:
            self._cluster.add()

    def _start(self) -> None:
        self._driver = self._stack.enter_context(
            runs.started(*nodes.arguments(self._songs, self._store, self._cluster.address, 0.4))
        )

    def _working(self) -> None:
        """Make sure that a driver is running and that units are being committed."""
        before = len(list(self._store.glob("commits/*.json")))
        end = time.monotonic() + 240
        while True:
            if self._driver is None:
                self._start()
            assert self._driver is not None
            if self._driver.poll() is not None:
                self._ended()
                before = 0
            elif len(list(self._store.glob("commits/*.json"))) > before:
                return
            assert time.monotonic() < end, "no unit was committed for four minutes"
            time.sleep(0.2)

    def _ended(self) -> None:
        """Handle the end of the driver: it finished, or it lost the head."""
        assert self._driver is not None
        _, err = self._driver.communicate()
        self._exits[str(self._driver.returncode)] += 1
        if self._driver.returncode == 0:
            self._check()
        elif "head" not in self._counts:
            raise AssertionError(err)
        self._driver = None

    def _check(self) -> None:
        """Check that no item is missing or duplicated, and that bytes and hashes are correct."""
        runs.assert_whole(self._store)
        assert runs.latents(self._store) == self._undisturbed
        shutil.rmtree(self._store)
        self._stores += 1

    def _disturb(self, kind: str) -> None:
        node = self._chance.choice(self._cluster.workers)
        if kind == "actor":
            for pid in self._cluster.actors(node):
                os.kill(pid, signal.SIGKILL)
        elif kind == "node":
            self._cluster.kill_node(node)
            self._cluster.add()
        elif kind == "cut off":
            stopped = self._cluster.cut_off(node)
            time.sleep(CUT_OFF_SECONDS)
            self._cluster.bring_back(stopped)
            time.sleep(1.0)
            self._cluster.forget(node)
            self._add_nodes()
        elif kind == "driver":
            self._kill_driver()
        else:
            self._cluster.kill_head()
            self._kill_driver()  # like a supervisor; it would end by itself after a minute
            self._cluster.start_head()
            self._add_nodes()

    def _kill_driver(self) -> None:
        assert self._driver is not None
        self._driver.kill()
        self._driver.communicate()
        self._exits["killed"] += 1
        self._driver = None

    def _finish(self) -> None:
        """Wait until the last store is finished, without further events."""
        stores = self._stores
        end = time.monotonic() + 600
        while self._stores == stores:
            if self._driver is None:
                self._start()
            assert self._driver is not None
            if self._driver.poll() is not None:
                self._ended()
            assert time.monotonic() < end, "the last run does not end"
            time.sleep(0.2)
        self._stack.close()


if __name__ == "__main__":
    main()
