"""Decoding in Ray tasks gives what decoding in this process does, whatever becomes of the tasks."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import soundfile as sf
from ray.exceptions import NodeDiedError
from ray.util.placement_group import placement_group, remove_placement_group

import latentmill
from latentmill.encoding.chunks import Chunk, Chunking
from latentmill.encoding.loading import EncodeSettings, Event, Facts, Loading, Opened
from latentmill.encoding.timings import Timings
from latentmill.encoding.unit_audio import LocalAudio, UnitAudio
from latentmill.engine import node_trouble, remote_audio
from latentmill.engine import parcels as parcels_module
from latentmill.engine.actor import ActorShape, audio_opener
from latentmill.engine.cluster import Cluster
from latentmill.engine.launch import _check_spare_cores, _Resources
from latentmill.engine.node_trouble import AvoidedNodes, NodeTrouble, label_selector
from latentmill.engine.parcels import PARCEL_BYTES, Parcel, packed, parcels, unpacked
from latentmill.engine.remote_audio import PARCELS_UNREAD, RemoteAudio
from latentmill.engine.worker import Job
from latentmill.errors import ConfigError, StorageError
from latentmill.models.families import mdct
from latentmill.record import Outcome
from latentmill.sources.base import ByteRange, Item
from latentmill.sources.folder import FolderSource
from support import nodes, runs
from support.in_process import in_process
from support.open_files import no_more_files
from support.recordings import noise

SPEC = mdct.build(hop=64, sample_rate=8000).spec
SEGFAULT, HANG = 22051, 22053  # see support/deadly
LOADING = Loading(SPEC, Chunking.for_model(SPEC, seconds=0.5), EncodeSettings())


def items_of(folder: Path) -> list[Item]:
    found = FolderSource(str(folder), ("wav", "flac", "ogg", "mp3", "aiff")).items()
    return sorted(found, key=lambda item: item.key)


def all_events(audio: UnitAudio) -> list[tuple[int, str, Event]]:
    with contextlib.closing(audio):
        return [(index, item.key, event) for index, item, event in audio]


def decoding_processes() -> list[int]:
    """Ray names a process by the task that it runs."""
    found = runs.descendants(os.getpid()).items()
    return [pid for pid, name in found if name.startswith("ray::_load")]


def assert_equal(
    one: Sequence[tuple[int, str, Event]], other: Sequence[tuple[int, str, Event]]
) -> None:
    assert [(index, key) for index, key, _ in one] == [(index, key) for index, key, _ in other]
    for (_, _, event), (_, _, expected) in zip(one, other, strict=True):
        if isinstance(expected, Chunk):
            assert isinstance(event, Chunk)
            assert event.frame == expected.frame
            assert event.audio.dtype == np.float32
            assert np.array_equal(event.audio, expected.audio)
        else:
            assert event == expected


@pytest.mark.parametrize("tasks", [1, 3])
def test_tasks_yield_the_events_of_threads(
    corpus: Path, tmp_path: Path, ray_session: Path, tasks: int
) -> None:
    (tmp_path / "broken.wav").write_bytes(b"RIFF, but no more than that")
    sf.write(tmp_path / "long.flac", noise(40, 8000), 8000)
    items = [*items_of(corpus), *items_of(tmp_path)]
    decoding = replace(LOADING, refused={items[1].key: "not this one"})
    expected = all_events(LocalAudio(items, decoding, Timings()))
    assert {type(event) for _, _, event in expected} == {Opened, Chunk, Facts, Outcome}
    timings = Timings()
    assert_equal(all_events(RemoteAudio(items, decoding, timings, tasks=tasks)), expected)
    assert timings.decode_seconds > 0


def test_an_item_that_ends_or_hangs_its_process_fails_alone(
    tmp_path: Path, ray_session: Path
) -> None:
    rates = {"a": 8000, "b": SEGFAULT, "c": 8000, "d": HANG}  # one task loads b and d
    reasons = {
        SEGFAULT: "loading it kills the process (SIGSEGV)",
        HANG: "loading it hangs: no progress for 0.7 s",
    }
    for name, rate in rates.items():
        sf.write(tmp_path / f"{name}.wav", noise(1.0, rate), rate)
    items = items_of(tmp_path)
    audio = RemoteAudio(items, LOADING, Timings(), tasks=2, hang_seconds=0.7)
    found = all_events(audio)
    ends = {key: event for _, key, event in found if not isinstance(event, Chunk | Opened)}
    assert ends.keys() == rates.keys()
    for name, rate in rates.items():
        end = ends[name]
        if rate == 8000:
            assert isinstance(end, Facts)
        else:
            assert getattr(end, "reason", "") == reasons[rate]
    good = [item for item in items if rates[item.key] == 8000]
    expected = all_events(LocalAudio(good, LOADING, Timings()))
    for name in ("a", "c"):
        left, right = (
            [(0, *one[1:]) for one in events if one[1] == name] for events in (found, expected)
        )
        assert_equal(left, right)


def test_trial_loads_of_a_task_have_the_limit_of_the_run() -> None:
    model = mdct.build(hop=64, sample_rate=8000)
    job = Job(model, LOADING.chunking, LOADING.settings, "/store", "parquet", "", {}, "cpu", 1)
    audio = audio_opener(replace(job, load_tasks=2, hang_seconds=20.0))([], LOADING, Timings())
    assert isinstance(audio, RemoteAudio)
    assert audio._hang_seconds == 20.0
    assert audio_opener(job) is LocalAudio


def test_a_killed_task_is_started_again(tmp_path: Path, ray_session: Path) -> None:
    # More than the parcels ahead hold, so that the task cannot end before it is killed.
    seconds = 3 * PARCELS_UNREAD * PARCEL_BYTES / (4 * 8000)
    sf.write(tmp_path / "long.wav", noise(seconds, 8000), 8000)
    items = items_of(tmp_path)
    expected = all_events(LocalAudio(items, LOADING, Timings()))
    found = []
    with contextlib.closing(RemoteAudio(items, LOADING, Timings(), tasks=1)) as audio:
        for index, item, event in audio:
            if len(found) == 20:
                runs.until(decoding_processes, "Ray has named the process by its task")
                (pid,) = decoding_processes()
                os.kill(pid, signal.SIGKILL)
            found.append((index, item.key, event))
    assert_equal(found, expected)


@contextlib.contextmanager
def all_cores_taken() -> Iterator[None]:
    cores = ray.cluster_resources()["CPU"]
    group = placement_group([{"CPU": cores}])
    try:
        assert group.wait(runs.PATIENCE_SECONDS)
        yield
    finally:
        remove_placement_group(group)


def test_waiting_for_a_core_is_progress_and_is_reported(
    tmp_path: Path,
    ray_session: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(remote_audio, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(remote_audio, "NO_CORE_SECONDS", 0.2)
    sf.write(tmp_path / "a.wav", noise(1.0, 8000), 8000)
    items, timings = items_of(tmp_path), Timings(parent=Timings())
    audio = RemoteAudio(items, LOADING, timings, tasks=2)
    assert timings.parent is not None
    with ThreadPoolExecutor(1) as pool:
        with all_cores_taken():
            found = pool.submit(all_events, audio)
            runs.until(lambda: timings.parent.steps >= 10, "waiting counts as progress")
            runs.until(lambda: len(caplog.records) >= 2, "it is reported again and again")
            assert not found.done()
        assert_equal(found.result(), all_events(LocalAudio(items, LOADING, Timings())))
    for record in caplog.records:
        assert re.fullmatch(
            r"no load task has had a CPU core for \d+ s: add CPU cores, lower --workers or "
            "--threads, or stop the run and resume it without --load-tasks",
            record.getMessage(),
        )


def copied(folder: Path, seconds: float, count: int = 4) -> list[Item]:
    """Items that are copied before they are loaded, as from a tar or a bucket."""
    for number in range(count):
        sf.write(folder / f"{number}.wav", noise(seconds, 8000, seed=number), 8000)
    return [replace(item, version="", place=ByteRange(0, item.size)) for item in items_of(folder)]


def test_a_node_without_space_is_named(
    tmp_path: Path,
    ray_session: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_sentence: Callable[[BaseException], str],
) -> None:
    monkeypatch.setattr(remote_audio, "other_nodes", lambda avoided: [])
    full = ray_session / "full"
    items = copied(tmp_path, 1.0)
    full.touch()
    try:
        with pytest.raises(StorageError) as caught:
            all_events(RemoteAudio(items, LOADING, Timings(), tasks=1))
    finally:
        full.unlink()
    assert one_sentence(caught.value) == (
        f"Load tasks cannot work on {socket.gethostname()}, and no other node has CPU cores for "
        f"them: Cannot write temporary files to {tempfile.gettempdir()}: No space left on device; "
        "free some space there, or set TMPDIR to another folder."
    )


def test_a_task_without_open_files_reports_its_node(tmp_path: Path, ray_session: Path) -> None:
    items = copied(tmp_path, 1.0, count=1)
    load = partial(remote_audio._load._function, [[(0, items[0])]], LOADING)
    assert isinstance(events_of(load(None))[-1], Facts)  # and what it needs is imported
    with no_more_files():
        found = [*load(None)]
    node = ray.get_runtime_context().get_node_id()
    reason = "Cannot open more files: Too many open files; raise the limit with `ulimit -n`"
    assert found == [Parcel(), Parcel(trouble=NodeTrouble(node, socket.gethostname(), reason))]


def test_a_task_that_cannot_load_on_trial_reports_its_node(
    tmp_path: Path, ray_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = copied(tmp_path, 1.0, count=1)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    *_, last = remote_audio._load._function([[(0, items[0])]], LOADING, 60.0)
    assert last.trouble is not None
    assert last.trouble.reason == (
        "the process that loads items on trial does not start; fix this, or remove the node from "
        "the cluster"
    )


def events_of(found: Iterable[Parcel]) -> list[Event]:
    return [event for parcel in found for _, event in parcel.events]


class FakeTask:
    """A task that loads in this process, once it has a core."""

    def __init__(self, lanes: Any, selector: dict[str, str], loaded: Iterator[Parcel]) -> None:
        self.keys = [item.key for ((_, item), *_) in lanes]
        self.selector = selector
        self.loaded = loaded
        self.node: str | None = None

    def __next__(self) -> Parcel:
        return next(self.loaded)


class FakeTasks:
    """Tasks on two nodes A and B. The first one, on A, fails after some parcels.

    Attributes:
        started: All tasks.
        cores: The number of free cores of each node.
    """

    def __init__(self, patch: pytest.MonkeyPatch, failing: Iterable[Parcel], cores: int) -> None:
        self.started: list[FakeTask] = []
        self.cores = {"A": 1, "B": cores}
        self._failing = failing
        self.before = 0  # parcels of the first task before it fails
        patch.setattr(remote_audio, "_load", SimpleNamespace(options=self._options))
        patch.setattr(remote_audio, "ray", self)
        for module in (remote_audio, node_trouble):
            patch.setattr(module, "other_nodes", lambda avoided: self.cores.keys() - avoided)
        for name in ("START_SECONDS", "REPLACE_SECONDS"):
            patch.setattr(remote_audio, name, 0.0)

    def _options(self, *, label_selector: Any = None, **_: object) -> SimpleNamespace:
        def remote(lanes: Any, *given: Any) -> FakeTask:
            loaded = parcels(lanes, *given)
            if not self.started:
                loaded = itertools.chain(itertools.islice(loaded, self.before), self._failing)
            self.started.append(FakeTask(lanes, label_selector or {}, loaded))
            return self.started[-1]

        return SimpleNamespace(remote=remote)

    def wait(self, waiting: list[FakeTask], **_: object) -> tuple[list[FakeTask], list[FakeTask]]:
        for task in waiting:
            free = [node for node, cores in self.cores.items() if cores]
            allowed = [node for node in free if task.selector != label_selector([node])]
            if task.node is None and allowed:
                task.node = allowed[0]
                self.cores[task.node] -= 1
        return [task for task in waiting if task.node], []

    def get(self, parcel: Parcel) -> Parcel:
        return parcel

    def cancel(self, task: FakeTask) -> None:
        if task.node in self.cores:
            self.cores[task.node] += 1


TROUBLE = NodeTrouble("A", "a-host", "No space left on device; free some")


@pytest.mark.parametrize("before", [0, 1, 2, 4])
def test_another_node_continues_with_what_is_missing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    before: int,
) -> None:
    monkeypatch.setattr(parcels_module, "PARCEL_BYTES", 20_000)
    items = copied(tmp_path, 3.0)
    expected = all_events(LocalAudio(items, LOADING, Timings()))
    fake = FakeTasks(monkeypatch, [Parcel(trouble=TROUBLE)], cores=2)
    fake.before = before
    avoided = AvoidedNodes()
    audio = RemoteAudio(items, LOADING, Timings(), tasks=2, avoided=avoided)
    assert_equal(all_events(audio), expected)
    tasks = [(task.keys, task.node) for task in fake.started]
    assert tasks == [(["0", "2"], "A"), (["1", "3"], "B"), (["0", "2"], "B")]
    assert [record.getMessage() for record in caplog.records] == [
        "load tasks cannot work on a-host, so other nodes continue: No space left on device; free "
        "some"
    ]
    fake.cores = {"A": 1, "B": 1}
    following = RemoteAudio(items, LOADING, Timings(), tasks=1, avoided=avoided)
    assert_equal(all_events(following), expected)
    assert fake.started[-1].node == "B"


@pytest.mark.parametrize("dies", [False, True])
def test_if_no_core_is_free_the_other_tasks_load_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    """The other task keeps its core until the lanes of the first one are loaded."""
    monkeypatch.setattr(parcels_module, "PARCEL_BYTES", 20_000)
    items = copied(tmp_path, 3.0)
    expected = all_events(LocalAudio(items, LOADING, Timings()))

    def died() -> Iterator[Parcel]:
        del fake.cores["A"]
        raise NodeDiedError("its node has died")
        yield

    fake = FakeTasks(monkeypatch, died() if dies else [Parcel(trouble=TROUBLE)], cores=1)
    fake.before = 3
    assert_equal(all_events(RemoteAudio(items, LOADING, Timings(), tasks=2)), expected)
    tasks = [(sorted(task.keys), task.node) for task in fake.started]
    assert tasks == [
        (["0", "2"], "A"),
        (["1", "3"], "B"),
        (["0", "2"], None),
        (["0", "1", "2", "3"], "B"),
    ]


ON_CLUSTER = """
import logging, sys
from pathlib import Path
import ray
import test_remote_audio as tests
from latentmill.engine import remote_audio

logging.basicConfig(format="%(message)s")
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
remote_audio.REPLACE_SECONDS = 1.0
items = tests.copied(Path(sys.argv[2]), 20.0)
expected = tests.all_events(tests.LocalAudio(items, tests.LOADING, tests.Timings()))
found = tests.RemoteAudio(items, tests.LOADING, tests.Timings(), tasks=2)
tests.assert_equal(tests.all_events(found), expected)
print("equal")
"""


@pytest.mark.slow  # test_another_node_continues_with_what_is_missing: without a cluster
def test_on_a_cluster_another_node_continues(tmp_path: Path, ray_session: Path) -> None:
    (tmp_path / "full").touch()
    deadly = runs.TESTS / "support" / "deadly"
    paths = os.pathsep.join(map(str, [deadly, runs.TESTS, runs.TESTS.parent / "pipeline"]))
    cluster = nodes.Nodes()

    def load(folder: str) -> list[str]:
        (tmp_path / folder).mkdir()
        here = os.pathsep.join([str(Path(__file__).parent), paths])
        ended = subprocess.run(
            [sys.executable, "-c", ON_CLUSTER, cluster.address, str(tmp_path / folder)],
            env={**os.environ, "PYTHONPATH": here},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.stdout == "equal\n", ended.stderr
        return ended.stderr.splitlines()

    moved = f"load tasks cannot work on {socket.gethostname()}, so other nodes continue: "
    try:
        cluster.add(PYTHONPATH=paths, FULL_DISK=str(tmp_path / "full"))
        cluster.add()
        (warning,) = load("two nodes")  # the second one has no core for a second task
        assert warning.startswith(moved)
        cluster.add()
        (warning,) = load("three nodes")
        assert warning.startswith(moved)
    finally:
        cluster.shutdown()


def test_closing_ends_the_tasks(tmp_path: Path, ray_session: Path) -> None:
    for name in "ab":
        sf.write(tmp_path / f"{name}.wav", noise(100, 44100), 44100)
    audio = RemoteAudio(items_of(tmp_path), LOADING, Timings(), tasks=2)
    next(iter(audio))
    audio.close()
    assert not audio._thread.is_alive()
    runs.until(lambda: not decoding_processes(), "the tasks are gone")


def test_a_run_with_tasks_makes_what_a_run_without_makes(
    corpus: Path, tmp_path: Path, ray_session: Path
) -> None:
    songs = tmp_path / "songs"
    shutil.copytree(corpus, songs)
    for number in range(4):  # more tasks than cores, each with more than it may send ahead
        sf.write(songs / f"long {number}.wav", noise(150, 22050, seed=number), 22050)
    common = {"device": "cpu", "workers": 1, "threads": 1, "unit_seconds": 320.0}
    for name, tasks in [("threads", 0), ("tasks", 4)]:
        with contextlib.nullcontext() if tasks else in_process():
            latentmill.encode(songs, tmp_path / name, load_tasks=tasks, **common)
        runs.assert_whole(tmp_path / name)
    assert runs.latents(tmp_path / "tasks") == runs.latents(tmp_path / "threads")


def test_tasks_that_would_never_get_a_core_are_refused() -> None:
    resources = _Resources(2, ActorShape(cpus=2, gpus=0), threads=2)
    _check_spare_cores(Cluster(True, (4, 1), (0, 0)), resources, 2)
    _check_spare_cores(Cluster(False, (4,), (0,)), resources, 2)  # which may add nodes
    for embedded, workers in [(True, 2), (False, None)]:
        with pytest.raises(ConfigError, match="use all 4: lower --workers"):
            _check_spare_cores(Cluster(embedded, (4,), (0,)), resources, workers)


def delivered(*attempts: Sequence[Event]) -> list[Event]:
    """What is passed on of one item whose task is started again and again."""
    audio = RemoteAudio([Item("a", "/a", 1, "")], LOADING, Timings(), tasks=1)
    (lane,) = audio._lanes
    for events in attempts:
        task = remote_audio._Task([lane], None)
        for event in events:
            audio._deliver(task, Parcel(((0, event),)))
    return [event for _, event in lane.received]


def test_a_restarted_item_has_one_end_whatever_it_is_now() -> None:
    chunks = [Chunk(frame, np.full((1, 4), frame, np.float32)) for frame in range(3)]
    facts = Facts(8000, 1, "xxh3:0", 4, 0.1, 0.2, b"", {})
    gone = Outcome("a", "failed", "there is no such file")
    begun = [Opened(3), *chunks[:2]]
    same = delivered(begun, [Opened(3), *chunks, facts])
    assert same == [*begun, chunks[2], facts]
    assert delivered(begun, [Opened(0), gone]) == [*begun, gone]
    shorter = delivered(begun, [Opened(1), facts])
    assert shorter[:-1] == begun
    assert isinstance(shorter[-1], Outcome)
    assert shorter[-1].reason == "the file became shorter between two attempts to load it"


def test_an_error_of_the_other_thread_is_raised_here(
    tmp_path: Path, ray_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: RemoteAudio, task: object) -> None:
        raise TypeError("nobody thought of this")

    monkeypatch.setattr(RemoteAudio, "_receive", broken)
    sf.write(tmp_path / "a.wav", noise(1.0, 8000), 8000)
    with pytest.raises(TypeError, match="nobody thought of this"):
        all_events(RemoteAudio(items_of(tmp_path), LOADING, Timings(), tasks=1))


def test_samples_of_16_bits_travel_so_and_others_as_they_are() -> None:
    generator = np.random.default_rng(0)
    whole = generator.integers(-32768, 32768, (2, 4096)).astype(np.float32) / 32768
    for audio, dtype in [
        (whole, np.int16),
        (whole * np.float32(0.3), np.float32),
        (np.concatenate([whole, whole * np.float32(0.3)], axis=1), np.float32),  # it starts well
        (np.full((1, 300), 1.0, np.float32), np.float32),  # beyond 32767
        (np.zeros((1, 0), np.float32), np.int16),
    ]:
        sent = packed(Chunk(7, audio))
        assert isinstance(sent, Chunk)
        assert sent.audio.dtype == dtype
        back = unpacked(sent)
        assert isinstance(back, Chunk)
        assert back.frame == 7
        assert back.audio.dtype == np.float32
        assert np.array_equal(back.audio, audio)
    assert packed(Opened(3)) == Opened(3)
