"""Stores that are published on a hub of our own, killed half-way, and read back."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import yaml

import latentmill as lm
from latentmill.curation import copying
from latentmill.errors import ConfigError, LatentmillError, StorageError, StoreError
from latentmill.publishing import hub as hub_module
from latentmill.publishing.hub import Repository, pull, push
from latentmill.store.measurement import write_measurement
from latentmill.store.results import SeamEntry
from latentmill.store.verify import verify
from support import hub_server, runs
from support.hub_server import HubServer
from support.latent_store import latent_of, write_again, write_latents

LENGTHS = [5, 9, 17, 30, 12, 7, 21]
SHARD_SIZE = 200  # of copies of views
REPO = "me/songs"
URL = f"hf://datasets/{REPO}"
OneSentence = Callable[[BaseException], str]
ROOT = Path(__file__).parents[2]


def files(url: str) -> dict[str, bytes]:
    """Every file of a store."""
    fs, root = fsspec.core.url_to_fs(url)
    found = {path.removeprefix(root).lstrip("/"): fs.cat_file(path) for path in fs.find(root)}
    return {name: data for name, data in found.items() if name not in (".lock", ".lease")}


def published(hub: HubServer, revision: str = "main") -> dict[str, bytes]:
    """The files of the store in the repository."""
    own = ("README.md", "latents.png", ".gitattributes")
    return {path: data for path, data in hub.content(REPO, revision).items() if path not in own}


def without_card(found: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in found.items() if path != "README.md"}


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store of three units, with a result of an evaluation."""
    store = write_latents(str(tmp_path / "store"), LENGTHS, per_unit=3)
    write_measurement(store.storage, store.info, SeamEntry(items=1, median=0.1, largest=0.2))
    return store.url


def test_a_store_is_published_and_updated(
    hub: HubServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "BATCH_UNITS", 1)
    result = push(url, URL, license="cc-by-4.0", message="First")
    assert published(hub) == without_card(files(url))
    assert set(result.uploaded) == {*files(url), "latents.png"}
    assert (result.private, result.kept, result.commit) == (True, 0, hub.head(REPO))
    assert hub.datasets[REPO].private
    commits = hub.datasets[REPO].branches["main"]
    messages = [message for _, _, message in commits[1:]]
    assert messages == ["First (part 1)", "First (part 2)", "First (part 3)", "First"]
    assert ["dataset.json" in found for _, found, _ in commits] == [False] * 4 + [True]
    for _, found, _ in commits:
        listed = {path.split("/")[1].split(".")[0] for path in found if path.startswith("commits")}
        assert listed == {path[7:13] for path in found if path.startswith("shards")}

    again = push(url, URL)
    assert (again.uploaded, again.kept, again.removed) == ((), len(files(url)), ())
    assert hub.head(REPO) == result.commit

    reader = lm.open(URL)
    latents = [latent_of(number + 1, length) for number, length in enumerate(LENGTHS)]
    np.testing.assert_array_equal(reader["item/00000"].latent, latent_of(0, LENGTHS[0]))
    write_again(url, [1], latents)
    updated = push(url, URL)
    assert published(hub) == without_card(files(url))
    assert set(updated.removed) > {"shards/000001.parquet", "commits/000001.json"}
    assert not [path for path in updated.uploaded if "000000" in path or "000002" in path]
    np.testing.assert_array_equal(reader["item/00004"].latent, latents[4])
    card = hub.content(REPO)["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "cc-by-4.0"


def test_more_files_in_a_folder_than_the_hub_accepts_are_refused_at_once(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_sentence: OneSentence
) -> None:
    store = write_latents(str(tmp_path / "store"), LENGTHS, per_unit=1)
    monkeypatch.setattr(hub_module, "FOLDER_FILES", 7)
    push(store.url, URL)
    monkeypatch.setattr(hub_module, "FOLDER_FILES", 6)
    before = hub.content(REPO, "main")
    with pytest.raises(ConfigError, match=r"7 files in (commits|shards), but the ") as caught:
        push(store.url, URL)
    assert "push a view of it" in one_sentence(caught.value)
    assert hub.content(REPO, "main") == before


def test_the_token_is_nowhere(
    hub: HubServer, url: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    push(url, URL)
    assert all(hub.authorised[: len(hub.requests)][3:9])
    shown = caplog.text + "".join(capfd.readouterr())
    assert hub_server.TOKEN not in shown
    assert not [
        path for path, data in hub.content(REPO).items() if hub_server.TOKEN.encode() in data
    ]


def test_a_remote_store_is_staged_a_few_shards_at_a_time(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    memory = f"memory://{uuid.uuid4().hex}"
    write_latents(memory, LENGTHS, per_unit=1)
    staged = []

    def count(request: str) -> None:
        if request.startswith("PUT"):
            staged.append(sum(path.is_file() for path in tmp_path.rglob("*")))

    hub.before = count
    push(memory, URL, jobs=2)
    assert published(hub) == without_card(files(memory))
    assert 1 <= max(staged) <= 2
    assert not list(tmp_path.iterdir())


def test_large_files_are_sent_in_parts(hub: HubServer, tmp_path: Path) -> None:
    latent = np.random.default_rng(0).normal(size=(64, 8000)).astype(np.float16)
    url = write_latents(str(tmp_path / "s"), [8000], channels=64, latents=[latent]).url
    push(url, URL)
    assert published(hub) == without_card(files(url))
    assert any(re.match(r"PUT /lfs/\w+/3", request) for request in hub.requests)


def test_a_public_repository(hub: HubServer, url: str, one_sentence: OneSentence) -> None:
    result = push(url, URL, public=True)
    assert not result.private
    assert not hub.datasets[REPO].private
    with pytest.raises(ConfigError, match="is public: add --public") as caught:
        push(url, URL)
    one_sentence(caught.value)
    hub.datasets[REPO].private = True
    with pytest.raises(ConfigError, match="is private: make it public") as caught:
        push(url, URL, public=True)
    one_sentence(caught.value)


def test_access_to_a_private_store(
    hub: HubServer, url: str, monkeypatch: pytest.MonkeyPatch, one_sentence: OneSentence
) -> None:
    push(url, URL)
    constants = pytest.importorskip("huggingface_hub.constants")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set") as offline:
            push(url, URL)
    one_sentence(offline.value)
    fsspec.config.conf["hf"]["token"] = False
    with pytest.raises(StoreError, match="log in with `hf auth login` if it is private") as caught:
        lm.open(URL)
    one_sentence(caught.value)


def test_a_branch(hub: HubServer, url: str) -> None:
    hub.create(REPO)
    result = push(url, URL, revision="v1/beta")
    assert result.url == f"{URL}@v1%2Fbeta"
    assert published(hub, "v1/beta") == without_card(files(url))
    assert published(hub) == {}
    assert len(lm.open(result.url)) == len(LENGTHS)
    copy = f"{url}-copy"
    pull(result.url, copy)
    assert without_card(files(copy)) == without_card(files(url))
    assert pull(f"{URL}@v1/beta", copy).copied == ()


def other_files(hub: HubServer, url: str) -> None:
    hub.create(REPO)
    hub.write(REPO, "train.csv", b"x")


def other_store(hub: HubServer, url: str) -> None:
    other = write_latents(f"{url}-other", LENGTHS, per_unit=2).url
    push(other, URL)


def no_access(hub: HubServer, url: str) -> None:
    fsspec.config.conf["hf"]["token"] = "hf_" + "x" * 34


def moved(hub: HubServer, url: str) -> None:
    def change(request: str) -> None:
        if "commit" in request:
            hub.before = lambda request: None
            hub.write(REPO, "README.md", b"changed")

    hub.before = change  # type: ignore[assignment]


def damaged(hub: HubServer, url: str) -> None:
    shard = Path(url, "shards/000001.parquet")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")


def unsealed(hub: HubServer, url: str) -> None:
    Path(url, "dataset.json").unlink()


REFUSED: list[tuple[Callable[[HubServer, str], None], type[LatentmillError], str]] = [
    (other_files, ConfigError, r"has other files \(train\.csv\): use a new repository"),
    (other_store, ConfigError, "but another store"),
    (no_access, StorageError, "access is denied: check the name, and log in with `hf auth login`"),
    (moved, StoreError, "Someone else has changed"),
    (damaged, StoreError, r"shards/000001\.parquet is damaged"),
    (unsealed, StoreError, "is not complete"),
]


@pytest.mark.filterwarnings("ignore:.* is not complete")
@pytest.mark.parametrize(("make", "kind", "says"), REFUSED, ids=[c[0].__name__ for c in REFUSED])
def test_what_is_refused(
    make: Callable[[HubServer, str], None],
    kind: type[LatentmillError],
    says: str,
    hub: HubServer,
    url: str,
    one_sentence: OneSentence,
) -> None:
    make(hub, url)
    before = dict(published(hub)) if REPO in hub.datasets else {}
    with pytest.raises(kind, match=says) as caught:
        push(url, URL)
    one_sentence(caught.value)
    after = dict(published(hub)) if REPO in hub.datasets else {}
    assert after == before


@pytest.mark.parametrize(
    "address", ["hf://me/songs", "hf://datasets/me", "s3://a/b", "hf://datasets/me/songs/in"]
)
def test_addresses_that_are_no_datasets(address: str, one_sentence: OneSentence) -> None:
    for call in (lambda: push("store", address), lambda: pull(address, "dest")):
        with pytest.raises(ConfigError, match="is not a dataset on the Hugging Face hub") as caught:
            call()
        one_sentence(caught.value)


def test_revisions_of_addresses() -> None:
    assert Repository.parse(f"{URL}@v1") == Repository(REPO, "v1")
    assert Repository.parse(URL, "v1").url == f"{URL}@v1"
    for name in ("feature/x", "100%", "a%2Fb", "refs/pr/1"):
        branch = Repository(REPO, name)
        assert Repository.parse(branch.url) == Repository.parse(branch.url, name) == branch
    wanted = r"the URL already has a revision \(@v1\): use either @v1 or --revision\."
    with pytest.raises(ConfigError, match=wanted):
        Repository.parse(f"{URL}@v1", "v2")


@pytest.mark.parametrize("lost", [False, True])
def test_a_hub_that_fails_for_a_while(hub: HubServer, url: str, lost: bool) -> None:
    """Each kind of request fails once, before it is carried out or after that."""
    failed: set[str] = set()

    def fail(request: str) -> int | None:
        kind = re.sub(r"\w{40,}|\d{6}", "", request)
        if kind in failed or not request.startswith(("POST", "PUT")):
            return None
        failed.add(kind)
        return 503

    setattr(hub, "after" if lost else "before", fail)
    push(url, URL)
    assert published(hub) == without_card(files(url))
    assert any("commit" in kind for kind in failed)


class Child:
    """A process that pushes, and is killed at a request."""

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        self.pid = 0
        paths = os.pathsep.join([str(ROOT / "pipeline"), str(ROOT / "tests")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.push_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )

    def push(self, url: str, kill_at: int | None, when: str) -> int:
        """Push; kill the process at this request, before or after it is carried out."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        hub, seen = self.hub, len(self.hub.requests)

        def kill(request: str) -> None:
            if kill_at is not None and len(hub.requests) - seen > kill_at and self.pid:
                os.kill(self.pid, signal.SIGKILL)
                self.pid = 0

        hub.before = hub.after = lambda request: None
        setattr(hub, when, kill)
        given = {"endpoint": hub.endpoint, "token": hub_server.TOKEN, "units": 1, "jobs": 1}
        given["shard_size"] = SHARD_SIZE
        print(json.dumps({**given, "store": url, "url": URL}), file=self.process.stdin, flush=True)
        self.pid = int(self.process.stdout.readline())
        return int(self.process.stdout.readline())


@pytest.fixture
def child(hub: HubServer) -> Iterator[Child]:
    made = Child(hub)
    yield made
    assert made.process.stdin is not None
    assert made.process.stdout is not None
    made.process.stdin.close()
    made.process.wait(60)
    made.process.stdout.close()


@pytest.mark.parametrize("kills", [2, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_push_that_is_killed_continues(
    kills: int, hub: HubServer, url: str, child: Child
) -> None:
    """At every request of a first push and of an update; at some of them without the slow tests."""
    assert child.push(url, None, "before") == 0
    count = len(hub.requests)
    first = {**hub.datasets}, {**hub.blobs}
    latents = [latent_of(number + 1, length) for number, length in enumerate(LENGTHS)]
    before = files(url)
    for update in (False, True):
        if update:
            write_again(url, [1], latents)
        wanted = without_card(files(url))
        for at in range(count // kills // 2, count, max(1, count // kills)):
            hub.datasets, hub.blobs = ({**first[0]}, {**first[1]}) if update else ({}, {})
            if update:
                dataset = first[0][REPO]
                branches = {name: list(commits) for name, commits in dataset.branches.items()}
                hub.datasets[REPO] = type(dataset)(dataset.private, branches)
            status = child.push(url, at, ("before", "after")[at % 2])
            assert status in (0, -signal.SIGKILL)
            hub.before = hub.after = lambda request: None
            there = published(hub) if REPO in hub.datasets else {}
            if "dataset.json" in there:
                seals = [before["dataset.json"], wanted["dataset.json"]]
                assert there["dataset.json"] in seals
                assert len([record.latent for record in lm.open(URL)]) == len(LENGTHS)
            sent = len(hub.requests)
            assert child.push(url, None, "before") == 0
            assert published(hub) == wanted
            puts = [request for request in hub.requests[sent:] if request.startswith("PUT")]
            sums = {hashlib.sha256(data).hexdigest() for data in there.values()}
            assert not {put.split("/")[2] for put in puts} & sums


@pytest.fixture
def view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A view of two stores, with an annotation of its own. Copies of it have several shards."""
    monkeypatch.setattr(copying, "SHARD_SIZE", SHARD_SIZE)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    bases = tmp_path / "secret-place"
    facts = [{"number": n, "odd": "x" if n == 1 else n} for n in range(len(LENGTHS))]
    write_latents(str(bases / "one"), LENGTHS, per_unit=3, metadata=facts)
    write_latents(str(bases / "two"), [6, 31, 8], per_unit=2)
    url = str(tmp_path / "view")
    lm.merge([bases / "one", bases / "two"], f"{url}-all", prefix=True)
    lm.select(f"{url}-all", url, where="number > 1")
    (tmp_path / "a.csv").write_text("key,mood\none/item/00004,calm\n")
    lm.annotate(url, str(tmp_path / "a.csv"))
    return url


def records(url: str) -> dict[str, tuple[object, ...]]:
    return {
        one.key: (one.latent.tobytes(), one.metadata, one.group, one.duration, one.source_uri)
        for one in lm.open(url)
    }


def test_a_view_is_published_as_a_store(hub: HubServer, view: str, tmp_path: Path) -> None:
    staged = []

    def count(request: str) -> None:
        if request.startswith("PUT"):
            staged.append(len(list((tmp_path / "temporary").rglob("shards/*"))))

    hub.before = count
    result = push(view, URL, jobs=2)
    assert 1 <= max(staged) <= 2
    assert not list((tmp_path / "temporary").iterdir())
    assert result.store == view
    assert records(URL) == records(view)
    assert len(records(view)) == 6
    commits = hub.datasets[REPO].branches["main"]
    shards = [sum(path.startswith("shards/") for path in found) for _, found, _ in commits]
    assert max(np.diff(shards)) == 2
    assert shards[-1] == 3
    assert ["dataset.json" in found for _, found, _ in commits][-2:] == [False, True]

    copy = str(tmp_path / "copy")
    pull(URL, copy)
    assert verify(lm.open(copy)).faults == []
    assert lm.open(copy).bases is None
    there = hub.content(REPO)
    assert not [path for path, data in there.items() if b"secret-place" in data]
    line = "| selection | view: 6 of 10 records of one, two; left out: 4 where: not number > 1 |"
    assert line in there["README.md"].decode()
    assert "latents.png" in there

    again = push(view, URL)
    assert (again.uploaded, again.removed, again.commit) == ((), (), result.commit)
    lm.select(f"{view}-all", view, where="number > 2", overwrite=True)
    changed = "has another store, or an earlier version of this view (its records or metadata have"
    with pytest.raises(ConfigError, match=re.escape(changed)):
        push(view, URL)
    assert hub.head(REPO) == result.commit


def test_a_view_of_tars_with_a_card_by_hand(hub: HubServer, tmp_path: Path) -> None:
    write_latents(str(tmp_path / "s"), LENGTHS, per_unit=3, format_name="webdataset")
    lm.select(tmp_path / "s", tmp_path / "view", sample=4)
    Path(tmp_path, "view", "README.md").write_text("---\nlicense: mit\n---\nMy songs.\n")
    push(tmp_path / "view", URL)
    assert records(URL) == records(str(tmp_path / "view"))
    pull(URL, tmp_path / "copy")
    assert verify(lm.open(tmp_path / "copy")).faults == []
    assert "My songs." in hub.content(REPO)["README.md"].decode()


def test_a_push_of_a_view_continues_after_each_commit(hub: HubServer, view: str) -> None:
    def refuse(number: int, request: str) -> int | None:
        return 403 if "/commit/" in request and len(commits()) == number else None

    def commits() -> list[tuple[str, dict[str, str], str]]:
        return hub.datasets[REPO].branches["main"]

    hub.create(REPO)
    for number in range(1, 5):
        hub.before = partial(refuse, number)
        with pytest.raises(StorageError, match="access is denied"):
            push(view, URL, jobs=1)
    hub.before = lambda request: None
    push(view, URL, jobs=1)
    assert records(URL) == records(view)
    shards = [sum(path.startswith("shards/") for path in found) for _, found, _ in commits()]
    assert shards == [0, 1, 2, 3, 3]


@pytest.mark.slow  # a push continues after each commit, and a killed push of a store, are not
def test_a_push_of_a_view_that_is_killed_continues(hub: HubServer, view: str, child: Child) -> None:
    assert child.push(view, None, "before") == 0
    count, wanted = len(hub.requests), records(view)
    for at in range(count // 24, count, max(1, count // 12)):  # twelve kills
        hub.datasets, hub.blobs = {}, {}
        assert child.push(view, at, ("before", "after")[at % 2]) in (0, -signal.SIGKILL)
        hub.before = hub.after = lambda request: None
        there = hub.content(REPO) if REPO in hub.datasets else {}
        if "dataset.json" in there:
            assert records(URL) == wanted
        sent = len(hub.requests)
        assert child.push(view, None, "before") == 0
        assert records(URL) == wanted
        kept = {path for path in there if path.startswith(("shards/", "commits/"))}
        assert {path: hub.content(REPO)[path] for path in kept} == {p: there[p] for p in kept}
        puts = [request for request in hub.requests[sent:] if request.startswith("PUT")]
        sums = {hashlib.sha256(data).hexdigest() for data in there.values()}
        assert not {put.split("/")[2] for put in puts} & sums


def test_a_store_is_pulled(hub: HubServer, url: str, tmp_path: Path) -> None:
    first = push(url, URL)
    copy = str(tmp_path / "copy")
    result = pull(URL, copy)
    assert result.source == f"{URL}@{first.commit}"
    assert without_card(files(copy)) == without_card(files(url))
    assert Path(copy, "README.md").read_bytes() == hub.content(REPO)["README.md"]
    assert verify(lm.open(copy)).faults == []
    assert pull(URL, copy).copied == ()

    write_again(url, [1], [latent_of(3, length) for length in LENGTHS])
    push(url, URL)
    planned = pull(URL, copy, dry_run=True)
    assert pull(URL, copy).copied == planned.copied
    assert without_card(files(copy)) == without_card(files(url))
    old = str(tmp_path / "old")
    pull(f"{URL}@{first.commit}", old)
    np.testing.assert_array_equal(lm.open(old)["item/00004"].latent, latent_of(4, LENGTHS[4]))


def test_what_is_pulled_is_checked(
    hub: HubServer, url: str, tmp_path: Path, one_sentence: OneSentence
) -> None:
    push(url, URL)
    shard = hub.content(REPO)["shards/000001.parquet"]
    hub.write(REPO, "shards/000001.parquet", shard[:-1] + b"x")
    with pytest.raises(StoreError, match=r"shards/000001\.parquet is damaged") as caught:
        pull(URL, tmp_path / "copy")
    one_sentence(caught.value)
    hub.write(REPO, "shards/000001.parquet", shard)
    seal = hub.content(REPO)["dataset.json"].replace(b"shards/000001", b"../x/000001")
    hub.write(REPO, "dataset.json", seal)
    with pytest.raises(StoreError, match="refers to a file outside of the store"):
        pull(URL, tmp_path / "copy")
    with pytest.raises(StorageError, match="does not exist or access is denied"):
        pull("hf://datasets/me/nothing", tmp_path / "copy")
    with pytest.raises(StorageError, match="has no revision v9"):
        pull(f"{URL}@v9", tmp_path / "copy")


def test_reading_over_the_network(hub: HubServer, tmp_path: Path) -> None:
    """Only the bytes that are needed are read, those of a batch at the same time."""
    url = write_latents(str(tmp_path / "s"), [400] * 12, per_unit=4).url
    push(url, URL)
    store, local = lm.open(URL), lm.open(url)
    for key in list(local.keys()):
        np.testing.assert_array_equal(store[key].latent, local[key].latent)
    sizes: list[int] = []
    answer = hub_server._Handler.content

    def counted(self: Any, *args: Any, **named: Any) -> Any:
        found = answer(self, *args, **named)
        sizes.append(len(found[1]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_server._Handler, "content", counted)
        routes = [
            (method, path, counted if function is answer else function)
            for method, path, function in hub_server._ROUTES
        ]
        patch.setattr(hub_server, "_ROUTES", routes)
        np.testing.assert_array_equal(
            store.crop("item/00003", 100, 32), local.crop("item/00003", 100, 32)
        )
        assert sum(sizes) == 4 * 2 * 32
        samples = list(lm.Loader(lm.LatentDataset(store, crop=16), batch_size=4))
    assert len(samples) == 3


def test_the_commands(
    hub: HubServer, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed = runs.call(capsys, "push", url, URL, "--license", "mit", "--message", "One")
    assert pushed.code == 0
    line, commit = pushed.out.splitlines()
    assert re.fullmatch(rf"{URL} \(private\): uploaded 16 files \(.* kB\); 0 are the same", line)
    assert commit == f"  commit {hub.head(REPO)}"
    again = runs.outcome(runs.call(capsys, "push", url, URL, "--json"))
    assert (again["uploaded"], again["kept"], again["private"]) == ([], 15, True)
    pulled = runs.call(capsys, "pull", URL, tmp_path / "copy")
    assert pulled.out.startswith(f"{tmp_path}/copy: copied 15 files (")
    info = runs.call(capsys, "info", URL)
    assert (info.code, "made-up" in info.out) == (0, True)
    refused = runs.call(capsys, "push", url, URL, "--public")
    assert (refused.code, refused.out) == (2, "")
