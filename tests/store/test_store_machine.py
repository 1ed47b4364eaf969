"""Random walks over a source and its store, compared with a dict of what is to be in it.

A walk adds, changes, removes and breaks files, encodes, extends, retries, damages what a run can
repair, and verifies. The model is three dicts: the files, what the plan holds of them, and what
was encoded. Small in the everyday tests; `pytest -m slow` walks longer.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from operation_scenarios import RATE, SETTINGS

from latentmill import LatentDataset
from latentmill.errors import ITEMS_FAILED_EXIT_CODE
from latentmill.run.run import RunSummary, encode
from latentmill.store.store import LatentStore, open_store
from latentmill.store.verify import verify
from support.in_process import in_process

NAMES = [f"{folder}{name}" for folder in ("", "x/") for name in "abc"]
names = st.sampled_from(NAMES)


def write(path: Path, samples: int) -> None:
    """Write a sound whose length tells which one it is; 0: a file that is no audio."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if samples == 0:
        path.write_text("this is no audio")
    else:
        noise = np.random.default_rng(samples).uniform(-0.3, 0.3, samples)
        soundfile.write(path, noise, RATE, subtype="PCM_16")


class StoreMachine(RuleBasedStateMachine):
    """What a store must hold after any sequence of commands."""

    format: ClassVar[str] = "parquet"

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.songs, self.out = self.folder / "songs", self.folder / "out"
        self.files: dict[str, int] = {}  # samples of each file, 0 if it is no audio
        self.planned: dict[str, int] = {}  # what each item's file was when it was planned
        self.stored: dict[str, int] = {}  # what was encoded of it, 0 if it failed
        self.kept: set[str] = set()  # items that could not be encoded again
        self.reader: LatentStore | None = None
        self.seen: dict[str, int] = {}
        self.count = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def fresh(self) -> int:
        """A length that no file had before: a changed file is another one for sure."""
        self.count += 1
        return 300 + 7 * self.count

    def put(self, name: str, samples: int) -> None:
        write(self.songs / f"{name}.wav", samples)
        self.files[name] = samples

    @initialize(first=st.lists(names, min_size=1, max_size=3, unique=True))
    def begin(self, first: list[str]) -> None:
        for name in first:
            self.put(name, self.fresh())

    @rule(name=names)
    def add_or_change(self, name: str) -> None:
        self.put(name, self.fresh())

    @rule(name=names)
    def break_file(self, name: str) -> None:
        assume(name in self.files and self.files[name])
        self.put(name, 0)

    @rule(name=names)
    def remove(self, name: str) -> None:
        rest = self.files.keys() - {name}
        assume(name in self.files and rest & (self.planned or self.files).keys())
        (self.songs / f"{name}.wav").unlink()
        del self.files[name]

    def run(self, **options: bool) -> RunSummary:
        with in_process():
            summary = encode(
                str(self.songs), str(self.out), format=self.format, **SETTINGS, **options
            )
        failed = {name for name, samples in self.stored.items() if samples == 0}
        assert {key for key, _ in summary.failures} == failed
        assert summary.exit_code == (ITEMS_FAILED_EXIT_CODE if failed else 0)
        return summary

    def encode_missing(self, again: set[str], *, allow_changed: bool = False) -> None:
        """What becomes of the items of units that are encoded: those of `again`."""
        for name in again:
            there, before = self.files.get(name), self.stored.get(name, 0)
            same = there == self.planned[name] or (allow_changed and not before)
            found = there if there is not None and same else 0
            self.stored[name] = found or before
            (self.kept.add if before and not found else self.kept.discard)(name)

    def unit_mates(self, of: set[str]) -> set[str]:
        """All items of the units that these items belong to."""
        store = open_store(str(self.out), device="cpu")
        units = [{item.key for item in commit.items} for commit in store.commits.values()]
        return set().union(*(unit for unit in units if unit & of))

    @rule()
    def encode(self) -> None:
        if not self.planned:
            self.planned = dict(self.files)
            self.encode_missing(set(self.planned))
        self.run()

    @precondition(lambda self: self.planned)
    @rule()
    def retry_failed(self) -> None:
        failed = {name for name, samples in self.stored.items() if samples == 0} | self.kept
        self.encode_missing(self.unit_mates(failed) if failed else set(), allow_changed=True)
        self.run(retry_failed=True)

    @precondition(lambda self: self.planned)
    @rule(retry=st.booleans())
    def extend(self, retry: bool) -> None:
        new = self.files.keys() - self.planned.keys()
        changed = {
            name
            for name, samples in self.files.items()
            if name in self.planned and self.planned[name] != samples
        }
        again = self.unit_mates(changed) if retry and changed else set()
        self.planned |= {name: self.files[name] for name in new | (changed if retry else set())}
        self.encode_missing(new | again)
        summary = self.run(extend=True, retry_changed=retry)
        assert summary.extension is not None
        assert summary.extension.new == len(new)
        assert summary.extension.changed == len(changed)

    @precondition(lambda self: self.stored)
    @rule(what=st.sampled_from(["shard", "index", "dataset.json", "card"]), data=st.data())
    def damage(self, what: str, data: st.DataObject) -> None:
        """What the same command repairs. A reader that maps the damaged file is no help."""
        if what in ("shard", "index"):
            self.reader = None
        if what == "dataset.json":
            (self.out / what).unlink()
        elif what == "shard":
            store = open_store(str(self.out), device="cpu")
            shards = sorted({c.shard for c in store.commits.values() if c.shard})
            assume(shards)
            shard = self.out / data.draw(st.sampled_from(shards))
            lost = {
                item.key
                for commit in store.commits.values()
                if commit.shard == shard.relative_to(self.out).as_posix()
                for item in commit.items
            }
            shard.unlink()
            self.stored |= dict.fromkeys(lost, 0)
            self.encode_missing(lost)
        else:
            for path in self.out.glob("index*.arrow" if what == "index" else "README.md"):
                path.write_bytes(path.read_bytes()[:100])
        self.run()

    @precondition(lambda self: self.stored)
    @rule()
    def open_reader(self) -> None:
        self.reader = open_store(str(self.out), device="cpu")
        self.seen = {name: samples for name, samples in self.stored.items() if samples}

    @invariant()
    def holds_what_it_should(self) -> None:
        if not self.stored:
            return
        store = open_store(str(self.out), device="cpu")
        assert verify(store).faults == []
        expected = {name: samples for name, samples in self.stored.items() if samples}
        assert {record.key: record.num_samples for record in store} == expected
        assert store.info.failed == len(self.stored) - len(expected)
        assert not (self.out / "tmp").exists()
        if expected:
            dataset = LatentDataset(store, crop=2)
            assert len(dataset) == len(expected)
        if self.reader is not None:  # what it has opened, or what is there now
            for name, samples in self.seen.items():
                if name in expected:
                    assert self.reader[name].num_samples in (samples, expected[name])


def walks(format_name: str, examples: int, steps: int) -> type:
    machine = type("Walk", (StoreMachine,), {"format": format_name})
    test = machine.TestCase
    test.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    return test


TestAFewWalks = walks("webdataset", 2, 10)
TestManyWalks = pytest.mark.slow(walks("parquet", 40, 30))
