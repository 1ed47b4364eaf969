"""Small corpora, runs of the command line, and what is compared of a store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile

from latentmill.cli import entry
from latentmill.plan import iter_keys
from latentmill.store.schema import parse_name
from latentmill.store.store import LatentStore, open_store
from latentmill.store.verify import verify

TESTS = Path(__file__).parents[1]
SLOW_MODEL = "python:support.slow_model:build"
PATIENCE_SECONDS = 240  # for what takes a second or two if the machine is idle


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


def write_songs(
    folder: Path, count: int, seconds: float = 1.0, *, peak: float = 0.3, first: int = 0
) -> Path:
    """Write WAV files of noise, each of its own length about `seconds`, and give the folder."""
    for number in range(first, first + count):
        random = np.random.default_rng(number)
        length = round(seconds * 44100) + 997 * (number % 7)
        audio = random.uniform(-peak, peak, length)
        audio[0] = peak
        path = folder / f"album {number % 3}" / f"song {number:02d}.wav"
        if path.exists():  # a FLOAT file holds the time at which it was written
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, audio, 44100, subtype="FLOAT")
    return folder


def call(capsys: pytest.CaptureFixture[str], *args: object) -> Result:
    """Run a command in this process."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(sys, "argv", ["latentmill", *map(str, args)])
        try:
            entry.main()
        finally:
            signal.signal(signal.SIGTERM, before)
    captured = capsys.readouterr()
    assert isinstance(exit_.value.code, int)
    return Result(exit_.value.code, captured.out, captured.err)


@contextmanager
def started(*args: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, with an embedded Ray; it does not outlive this.

    After a kill Ray's own agents may live for another minute; its workers do not.
    """
    paths = [TESTS, TESTS.parent / "pipeline", os.environ.get("PYTHONPATH", "")]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path))}
    process = subprocess.Popen(
        [sys.executable, "-m", "latentmill", *map(str, args)],
        env=env | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()


def command(*args: object, **environment: str) -> Result:
    """Run a command in a process of its own, with an embedded Ray."""
    with started(*args, **environment) as process:
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        return Result(process.returncode, out, err)


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition; fail if it does not come true, also on a machine that is very busy."""
    end = (began := time.monotonic()) + PATIENCE_SECONDS
    while not condition():
        now = time.monotonic()
        assert now < end, f"waited {PATIENCE_SECONDS} s in vain: {what}"
        time.sleep(max(0.02, 4 * (now - began)))  # looking through /proc takes a while
        began = time.monotonic()


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int) -> dict[int, str]:
    """The processes that a process has started, and those have, with their command lines."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                names[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(folder.name)] = int(stat[1])
    found: dict[int, str] = {}
    todo = [pid]
    while todo:
        parent = todo.pop()
        children = [child for child, of in parents.items() if of == parent]
        found |= {child: names[child] for child in children}
        todo += children
    return found


def actors(pid: int) -> list[int]:
    """The processes of the actors of a driver with an embedded Ray."""
    return [child for child, name in descendants(pid).items() if name.startswith("ray::Encode")]


def half_written(store: Path) -> list[str]:
    """Shards that are being written: more than the first bytes of a Parquet file are there."""
    scratch = store / "tmp"
    try:
        return [
            path.name
            for path in scratch.iterdir()
            if ".shards." in path.name and path.stat().st_size > 4
        ]
    except FileNotFoundError:
        return []


def latents(store: Path) -> dict[str, bytes]:
    """Every latent by key, and its shape."""
    return {
        record.key: repr(record.latent.shape).encode() + record.latent.tobytes()
        for record in open_store(str(store))
    }


def damage(store: LatentStore, key: str) -> None:
    """Change one byte of a record's latent."""
    entry = store.entry(key)
    with Path(store.storage.full(entry.shard)).open("r+b") as file:
        file.seek(entry.offset)
        (byte,) = file.read(1)
        file.seek(entry.offset)
        file.write(bytes([byte ^ 255]))


def commits(store: Path) -> dict[str, bytes]:
    """The commit files as they are; a unit that is encoded again gets other timings."""
    return {path.name: path.read_bytes() for path in (store / "commits").glob("*.json")}


def assert_whole(store: Path) -> None:
    """Every item is accounted for once, and there is nothing else."""
    assert verify(open_store(str(store))).faults == []
    assert not (store / "tmp").exists()
    assert (store / "dataset.json").exists()
    opened = open_store(str(store))
    entries = Counter(item.key for commit in opened.commits.values() for item in commit.items)
    assert entries == Counter(iter_keys(opened.storage, opened.plan))
    assert set(entries.values()) == {1}
    shards = {path.name for path in (store / "shards").iterdir()}
    named = {str(c.shard).removeprefix("shards/") for c in opened.commits.values() if c.shard}
    assert named <= shards
    for name in shards - named:  # superseded: it stays until the next run
        unit, revision = parse_name(name) or ("", 0)
        assert revision < opened.commits[unit].revision, name


def outcome(result: Result) -> dict[str, object]:
    """What `--json` printed."""
    parsed: dict[str, object] = json.loads(result.out)
    return parsed
