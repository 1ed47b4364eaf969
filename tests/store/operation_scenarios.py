"""The commands that write a store, each with a state that it starts from, for three items."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import soundfile

from latentmill.config import load_config
from latentmill.curation.annotate import annotate
from latentmill.curation.select import select
from latentmill.errors import LatentmillError, StorageError
from latentmill.evaluation.linearity import measure_linearity
from latentmill.evaluation.seams import measure_seams
from latentmill.evaluation.statistics import measure_statistics
from latentmill.evaluation.vectors import StoredVectors
from latentmill.export.export import Target, export_store
from latentmill.publishing.sync import sync
from latentmill.run.add import run_add
from latentmill.run.drop import drop
from latentmill.run.forecast import forecast
from latentmill.run.run import run
from latentmill.storage.storage import Storage
from latentmill.store.commit import SealHash, iter_commits
from latentmill.store.field_layout import field_names
from latentmill.store.measurement import current_result
from latentmill.store.store import LatentStore, open_store
from latentmill.store.verify import verify
from support.in_process import in_process

RATE = 3200
SETTINGS = {
    "model_options": {"hop": 32, "sample_rate": RATE},
    "chunk_seconds": 0.1,
    "unit_seconds": 0.4,
    "device": "cpu",
    "load_threads": 1,
}
FIELD = "second"
BROKEN = b"this is no audio"

Content = tuple[Any, ...]


def sound(path: Path, seed: int, seconds: float = 0.2) -> None:
    """Write a file of noise."""
    noise = np.random.default_rng(seed).uniform(-0.3, 0.3, round(seconds * RATE))
    soundfile.write(path, noise, RATE, subtype="PCM_16")


@dataclass(frozen=True)
class Place:
    """Where a trial works: a folder that holds `store` and perhaps `dest`, or a prefix in a bucket.

    Attributes:
        root: A path or URL.
        source: The audio, which all trials of a command share.
    """

    root: str
    source: Path

    @property
    def store(self) -> str:
        return f"{self.root}/store"

    @property
    def dest(self) -> str:
        return f"{self.root}/dest"

    def encode(self, **settings: Any) -> None:
        """Encode the source into the store."""
        options = {"source": str(self.source), "out": self.store, **SETTINGS, **settings}
        with in_process():
            run(load_config(None, options))

    def plan(self) -> None:
        """Plan it."""
        options = {"source": str(self.source), "out": self.store, **SETTINGS}
        forecast(load_config(None, options), calibrated=False)

    def sync(self) -> None:
        """Copy the store."""
        sync(self.store, self.dest, jobs=1)

    def add(self, **options: Any) -> None:
        """Add a field to the store, of half its rate."""
        given = {name: SETTINGS[name] for name in ("device", "load_threads", "chunk_seconds")}
        model = {"model": "mdct", "model_options": {"hop": 64, "sample_rate": RATE}}
        with in_process():
            run_add(self.store, FIELD, {**given, **model, **options})

    def drop(self) -> None:
        """Remove the field, unless it is gone already."""
        if FIELD in field_names(Storage(self.store)):
            drop(self.store, field=FIELD)

    def export(self, to: Target) -> None:
        """Export the store."""
        export_store(open_store(self.store, device="cpu"), self.dest, to)


@dataclass(frozen=True)
class Scenario:
    """A command, and what was there before it.

    Attributes:
        begin: Makes the audio, and the state that the command starts from.
        command: The command.
        change: Changes the audio between the two.
        written: The store that it writes, by its name in the place.
        atomic: Whether readers see all records before it or all records after it.
        check: What holds beside the store that it writes, given whether the command succeeded.
    """

    begin: Callable[[Place], None]
    command: Callable[[Place], Any]
    change: Callable[[Place], None] = lambda place: None
    written: str = "store"
    atomic: bool = False
    check: Callable[[Place, bool], None] = lambda place, completed: None


def three(place: Place) -> None:
    """Three sounds, in two units."""
    for number, name in enumerate("abc"):
        if not (place.source / f"{name}.wav").exists():
            sound(place.source / f"{name}.wav", number)
    (place.source / "a.json").write_text(json.dumps({"prompt": "été", "n": 1}))


def two(place: Place) -> None:
    """Two of the three are there and encoded."""
    three(place)
    (place.source / "c.wav").unlink()
    place.encode()


def broken(place: Place) -> None:
    """Of the first unit one item fails, of the second unit the only one."""
    three(place)
    for name in "bc":
        (place.source / f"{name}.wav").write_bytes(BROKEN)
    place.encode()


def fix(place: Place) -> None:
    for number, name in enumerate("abc"):
        if name != "a":
            sound(place.source / f"{name}.wav", number)


def change(place: Place) -> None:
    """Another sound under an old name: of another length, so that it is another file anyhow."""
    sound(place.source / "b.wav", 7, 0.15)


def whole(place: Place) -> None:
    three(place)
    place.encode()


def annotated(place: Place) -> None:
    """The store has annotations, and the next ones are in a file."""
    whole(place)
    annotate_with(place, [{"key": "a", "n": 5}, {"key": "b", "tag": "x"}])
    write_values(place, [{"key": "b", "n": 6, "tag": "y"}, {"key": "c", "tag": "z"}])


def annotate_with(place: Place, rows: Sequence[Mapping[str, Any]]) -> None:
    write_values(place, rows)
    annotate(place.store, place.source / "values.jsonl")


def write_values(place: Place, rows: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (place.source / "values.jsonl").write_text(text)


def refreshed(place: Place) -> None:
    """A caption has been refreshed since its item was encoded."""
    whole(place)
    describe(place, "second")
    place.encode(extend=True, refresh_metadata=True)


def describe(place: Place, caption: str) -> None:
    (place.source / "b.json").write_text(json.dumps({"prompt": caption}))


def change_both(place: Place) -> None:
    change(place)
    describe(place, "third")


def with_field(place: Place) -> None:
    whole(place)
    place.add()


def behind(place: Place) -> None:
    """The store has a field, of which an item is out of date and another one is missing."""
    three(place)
    (place.source / "c.wav").unlink()
    place.encode()
    place.add()
    sound(place.source / "c.wav", 2)
    change(place)
    place.encode(extend=True, retry_changed=True)


def base_is_whole(place: Place, completed: bool) -> None:
    """What is done to a field changes nothing in its base store."""
    assert_whole(place.store)
    assert len(open_store(place.store)) == 3


def field_is_whole_or_gone(place: Place, completed: bool) -> None:
    """No reader finds a part of the records."""
    base_is_whole(place, completed)
    try:
        field = open_store(f"{place.store}/fields/{FIELD}", device="cpu")
    except LatentmillError:
        pass
    else:
        assert not completed
        assert len(field) == 3
    if completed:
        assert field_names(Storage(place.store)) == []


def unsealed(place: Place) -> None:
    whole(place)
    delete(place.store, "dataset.json")


def exported(to: Target) -> Callable[[Place], None]:
    """A finished export of a store that has changed since."""

    def begin(place: Place) -> None:
        broken(place)
        place.export(to)
        fix(place)
        place.encode(retry_failed=True)

    return begin


def synced(place: Place) -> None:
    """A copy of a store that has changed since."""
    broken(place)
    place.sync()
    fix(place)
    place.encode(retry_failed=True)


def delete(store: str, name: str) -> None:
    fs, path = fsspec.core.url_to_fs(f"{store}/{name}")
    fs.rm_file(path)


def measuring(measure: Callable[..., Any]) -> Callable[[Place], Any]:
    """Measure a store; an error if the result is only printed, which a warning reports."""

    def command(place: Place) -> None:
        warnings: list[logging.LogRecord] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = warnings.append  # type: ignore[method-assign]
        logger = logging.getLogger("latentmill.evaluation")
        logger.addHandler(handler)
        try:
            measure(open_store(place.store, device="cpu"), items=2)
        finally:
            logger.removeHandler(handler)
        for warning in warnings:
            raise StorageError(warning.getMessage())

    return command


def chosen(**options: Any) -> Callable[[Place], Any]:
    """Select two of the three."""
    return lambda place: select(place.store, place.dest, **{"keys": ["a", "c"], **options})


SCENARIOS = {
    "plan": Scenario(three, Place.plan),
    "encode": Scenario(three, Place.encode),
    "extend": Scenario(
        two, lambda p: p.encode(extend=True), lambda p: sound(p.source / "c.wav", 2)
    ),
    "retry-failed": Scenario(broken, lambda p: p.encode(retry_failed=True), fix),
    "retry-changed": Scenario(whole, lambda p: p.encode(extend=True, retry_changed=True), change),
    "retry-changed after refresh": Scenario(
        refreshed,
        lambda p: p.encode(extend=True, retry_changed=True),
        change_both,
    ),
    "seal": Scenario(unsealed, Place.encode),
    "export": Scenario(whole, lambda p: p.export(Target.WEBDATASET), written="dest"),
    "export again": Scenario(
        exported(Target.WEBDATASET), lambda p: p.export(Target.WEBDATASET), written="dest"
    ),
    "sync": Scenario(whole, Place.sync, written="dest"),
    "sync again": Scenario(synced, Place.sync, written="dest"),
    "annotate": Scenario(
        annotated, lambda p: annotate(p.store, p.source / "values.jsonl"), atomic=True
    ),
    "select": Scenario(whole, chosen(), written="dest"),
    "select again": Scenario(
        lambda p: (whole(p), chosen(keys=["a"])(p)), chosen(overwrite=True), written="dest"
    ),
    "select a copy": Scenario(whole, chosen(copy=True), written="dest"),
    "add": Scenario(whole, Place.add, written=f"store/fields/{FIELD}", check=base_is_whole),
    "add again": Scenario(behind, Place.add, written=f"store/fields/{FIELD}", check=base_is_whole),
    "drop": Scenario(with_field, Place.drop, check=field_is_whole_or_gone),
    "seams": Scenario(whole, measuring(measure_seams)),
    "linearity": Scenario(whole, measuring(measure_linearity)),
    "statistics": Scenario(whole, measuring(measure_statistics)),
}


def contents(store: LatentStore) -> dict[str, Content]:
    """Everything of every record, by key."""
    found = {}
    for record in store:
        left_out = ("latent", "_decode_start")
        fields = {name: value for name, value in vars(record).items() if name not in left_out}
        fields["metadata"] = json.dumps(fields["metadata"], sort_keys=True)
        data = (record.latent.shape, record.latent.tobytes())
        found[record.key] = (*data, *(fields[name] for name in sorted(fields)))
    return found


@dataclass
class Outcome:
    """What a store holds, compared item by item; the layout of its files is not looked at."""

    items: dict[str, tuple[str, str | None]]
    records: dict[str, Content]
    numbers: dict[str, Any]
    measured: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, url: str) -> Outcome | None:
        """That of a store; None where nothing was encoded yet."""
        store = open_store(url, device="cpu")
        commits = store.commits.values()
        entries = [item for commit in commits for item in commit.items]
        counts = Counter(item.key for item in entries)
        assert set(counts.values()) <= {1}, counts
        info = store.info
        described = getattr(store, "described", info)
        names = ("items", "encoded", "skipped", "failed", "hours", "frames", "fingerprint")
        return cls(
            items={item.key: (item.status, item.reason) for item in entries},
            records=contents(store),
            numbers={name: getattr(info, name) for name in names}
            | {"mean": np.round(info.mean, 9).tolist(), "sealed": store.sealed},
            measured={name: str(getattr(described, name)) for name in ("seams", "linearity")}
            | {"statistics": statistics_of(store)},
        )


def statistics_of(store: LatentStore) -> str:
    """The statistics of a store with their vectors, which are a file of their own."""
    found = current_result(store.storage, store.info, "statistics") if store.sealed else None
    if found is None:
        return ""
    vectors = b"".join(block.tobytes() for _, block in StoredVectors(store).blocks())
    return f"{found} {hashlib.sha256(vectors).hexdigest()}"


def assert_whole(url: str) -> None:
    """Nothing is missing, damaged or left over."""
    store = open_store(url, device="cpu")
    if store.sealed:
        assert verify(store).faults == []
    if store.storage.local:
        assert not Path(store.url, "tmp").exists()
    if store.storage.local and store.bases is None:
        parts = [(part.items_file, part.units_file) for part in store.plan.parts]
        named = {"plan/plan.json", *(path for pair in parts for path in pair)}
        assert {f"plan/{path.name}" for path in Path(store.url, "plan").iterdir()} == named
    if url.startswith("s3://"):
        assert open_uploads(url) == []


def state_of(place: Place) -> str:
    """A hash of all files of a place, less what differs between two runs that do the same.

    That is who wrote a commit, when, and how long it took, and so the hash in the seal, unless it
    is that of other commits than those that are there.
    """
    if place.root.startswith("s3://"):
        return uuid.uuid4().hex  # uploads belong to the state too: taken for a new one
    fs, root = fsspec.core.url_to_fs(place.root)
    digest = hashlib.sha256()
    for path in sorted(fs.find(root, withdirs=True)):
        name = re.sub(r"[0-9a-f]{32}", "*", path.removeprefix(root))  # a temporary file
        data = b"" if fs.isdir(path) or name.endswith("/.lease") else fs.cat_file(path)
        with contextlib.suppress(ValueError, LatentmillError):  # torn, or damaged
            if "/commits/" in name:
                data = _less(data, "timings", "worker", "finished")
            elif name.endswith("/dataset.json"):
                seal = SealHash()
                for commit in iter_commits(Storage(f"{place.root}{name.rpartition('/')[0]}")):
                    seal.add(commit)
                data = data.replace(seal.hexdigest().encode(), b"of these commits")
        digest.update(f"{name}\n{len(data)}\n".encode() + data)
    return digest.hexdigest()


def _less(data: bytes, *names: str) -> bytes:
    values = json.loads(data)
    return json.dumps({name: values[name] for name in values if name not in names}).encode()


def open_uploads(url: str) -> list[str]:
    """The keys of uploads that are neither completed nor aborted."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    found = fsspec.filesystem("s3").call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
    return [upload["Key"] for upload in found.get("Uploads", [])]


@contextmanager
def copied(begin: Place, root: str) -> Iterator[Place]:
    """The state that a command starts from, for one trial."""
    fs, path = fsspec.core.url_to_fs(root)
    local = "://" not in root
    if local:
        shutil.copytree(begin.root, root)
    else:
        fs.invalidate_cache()
        start = fs._strip_protocol(begin.root)
        for name in fs.find(start):
            fs.copy(name, f"{path}{name.removeprefix(start)}")
    try:
        yield Place(root, begin.source)
    finally:
        if local:
            shutil.rmtree(root)
        else:
            fs.invalidate_cache()
            for name in fs.find(path):
                fs.rm_file(name)
