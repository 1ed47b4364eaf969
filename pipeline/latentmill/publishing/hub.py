"""Publishing a store as a dataset on the Hugging Face hub, and copying it from there."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from latentmill.errors import ConfigError, StorageError
from latentmill.plan import load
from latentmill.publishing.card import PICTURE_PATH, hub_card, picture
from latentmill.publishing.contents import StoreFile, StoreFiles, contents_of
from latentmill.publishing.difference import CopyDifference, difference
from latentmill.publishing.repository import Repository, hub_errors, without_bars
from latentmill.publishing.sync import SyncSummary, sync
from latentmill.publishing.transfer import JOBS, Transfer, check, check_jobs, download, read_checked
from latentmill.publishing.views import StagedView
from latentmill.storage import remote
from latentmill.storage.remote import cause_of, is_transient
from latentmill.storage.storage import Storage
from latentmill.store.field_view import warn_of_fields
from latentmill.store.schema import CARD_PATH, COMMITS, DATASET_PATH
from latentmill.store.store import LatentStore
from latentmill.text.log import get_logger
from latentmill.text.printing import counted, size_text

# Files of one commit of the repository, at most. A killed push continues after the last commit.
BATCH_UNITS = 50
FOLDER_FILES = 10_000  # the hub refuses a commit after which a folder has more
BATCH_BYTES = 16 << 30
# Files that a repository may have before the first push.
_ALLOWED = {".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt"}
_ATTEMPTS = 5  # without a commit in between

_log = get_logger("publishing")


@dataclass(frozen=True)
class PushSummary:
    """Result of a push.

    Attributes:
        store: The store.
        url: The repository.
        private: Whether only its owner can read it.
        uploaded: Paths of the files that were written.
        bytes: Their size.
        kept: Number of files that the repository had already.
        removed: Paths of superseded files that were removed.
        commit: The last commit of the repository.
    """

    store: str
    url: str
    private: bool
    uploaded: tuple[str, ...]
    bytes: int
    kept: int
    removed: tuple[str, ...]
    commit: str


def push(
    store: str | os.PathLike[str],
    url: str,
    *,
    public: bool = False,
    revision: str | None = None,
    message: str | None = None,
    license: str | None = None,  # noqa: A002  the name of the field in the card
    jobs: int = JOBS,
) -> PushSummary:
    """Publish a complete store as a dataset on the Hugging Face hub, or update it there.

    Uploads what is missing, in several commits, of which the last one has dataset.json. If it is
    interrupted, the same call continues. The token is that of `hf auth login` or `HF_TOKEN`.

    Args:
        store: The store or view: a folder or fsspec URL. Of a view, the latents of its records are
            published as a store. Shards of a view or a remote store are in the folder for temporary
            files while they are uploaded, `jobs` at a time.
        url: `hf://datasets/USER/NAME`. The repository is created if it does not exist.
        public: Whether everyone may read a new repository. Writing to a repository that is public
            already needs it, too.
        revision: The branch; created if it does not exist. Default: main.
        message: Message of the commits.
        license: License for the dataset card, e.g. `cc-by-4.0`.
        jobs: Number of files uploaded at the same time.

    Raises:
        StoreError: The store is incomplete or damaged; someone else changed the repository.
        ConfigError: The repository has something else, or another visibility.
        StorageError: Reading or uploading failed, or access was denied.
    """
    check_jobs(jobs)
    repository = Repository.parse(url, revision)
    opened = LatentStore(os.fspath(store))
    contents = None if opened.bases else contents_of(os.fspath(store))
    warn_of_fields(opened, "the published store")
    uploaded: list[StoreFile] = []
    failures, before = 0, 0
    while True:
        try:
            with hub_errors(repository), without_bars():
                hub = _Hub(repository, message, jobs, uploaded)
                hub.open(public=public)
                if contents is None:
                    return hub.push_view(opened, license)
                return hub.push(contents, license)
        except StorageError as error:
            failures = failures + 1 if len(uploaded) == before else 1
            before = len(uploaded)
            if failures == _ATTEMPTS or not is_transient(error.__cause__ or error):
                raise
            _log.warning("%s: trying again", str(error).rstrip("."))
            time.sleep(remote.FIRST_PAUSE * 2 ** (failures + 2))


def pull(
    url: str, dest: str | os.PathLike[str], *, jobs: int = JOBS, dry_run: bool = False
) -> SyncSummary:
    """Copy a store from the Hugging Face hub, or update a copy; see `sync`.

    The files are those of one commit, even if the repository changes meanwhile.

    Args:
        url: `hf://datasets/USER/NAME`, or with `@REVISION`.
        dest: A new folder or URL, or an earlier copy of this store.
        jobs: Number of files copied at the same time.
        dry_run: Report what would be copied, and write nothing.
    """
    check_jobs(jobs)
    repository = Repository.parse(url)
    with hub_errors(repository):
        commit = _Hub(repository, None, jobs, []).commit_of_revision()
    return sync(Repository(repository.name, commit).url, dest, jobs=jobs, dry_run=dry_run)


class _Hub:
    """A repository that is written to."""

    def __init__(
        self, repository: Repository, message: str | None, jobs: int, uploaded: list[StoreFile]
    ) -> None:
        from huggingface_hub import HfApi

        fs, _ = remote.open_filesystem(repository.url)  # has what fsspec's configuration sets
        self._repository, self._jobs, self._uploaded = repository, jobs, uploaded
        self._message = message or "Upload latents with latentmill"
        self._api = HfApi(endpoint=fs.endpoint, token=fs.token)
        self._named: dict[str, Any] = {"repo_id": repository.name, "repo_type": "dataset"}
        self._at = {**self._named, "revision": repository.revision}
        self._head = ""
        self._private = True

    def commit_of_revision(self) -> str:
        return str(self._api.repo_info(**self._at).sha)

    def open(self, *, public: bool) -> None:
        """Find or create the repository and the branch."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            found = self._api.repo_info(**self._named)
        except RepositoryNotFoundError:
            self._api.create_repo(**self._named, private=not public, exist_ok=True)
            found = self._api.repo_info(**self._named)
        self._private = bool(found.private)
        if self._private is public:
            raise ConfigError(
                f"{self._repository.url} is private: make it public in its settings, or leave out "
                "--public."
                if public
                else f"{self._repository.url} is public: add --public to publish the store there."
            )
        try:
            self._head = self.commit_of_revision()
        except RevisionNotFoundError:
            self._api.create_branch(**self._named, branch=self._repository.revision)
            self._head = self.commit_of_revision()

    def push_view(self, view: LatentStore, license_: str | None) -> PushSummary:
        """Publish a store with the records of a view, a few shards in each commit."""
        dest = Storage(self._repository.url)
        existing = load(dest)
        if existing is None:
            self._check_new(dest)
        with tempfile.TemporaryDirectory(prefix="latentmill-") as folder:
            staged = StagedView(view, folder, dest, existing)
            transfer = Transfer("uploading", int(view.index.column("length").sum()))
            with transfer.displayed():
                for number, batch in enumerate(staged.batches(self._jobs), start=1):
                    operations = self._upload(staged.storage, batch, transfer)
                    self._commit(operations, f"{self._message} (part {number})", batch)
            result = self.push(staged.sealed(), license_, shown=view)
        return replace(result, store=view.url)

    def push(
        self, contents: StoreFiles, license_: str | None, *, shown: LatentStore | None = None
    ) -> PushSummary:
        """Publish a store. The picture has latents of `shown`, by default of the store itself."""
        _check_folders(contents)
        dest = Storage(self._repository.url)
        found = difference(contents, dest, self._check_new)
        last = self._documents(contents, found, dest, license_, shown or contents.store)
        transfer = Transfer("uploading", sum(file.size for file in found.files()))
        with transfer.displayed():
            for number, batch in enumerate(_batches(found)):
                operations = self._upload(contents.storage, batch, transfer)
                self._commit(operations, f"{self._message} (part {number + 1})", batch)
            rest = [file for file in found.last if file.path != CARD_PATH]
            operations = [
                *self._upload(contents.storage, rest, transfer),
                *map(_added, last.items()),
            ]
            if operations or found.remove:
                operations += [_deleted(path) for path in found.remove]
                documents = [StoreFile(path, len(data), "") for path, data in last.items()]
                self._commit(operations, self._message, [*rest, *documents])
        total = sum(1 for _ in contents.files()) + 1
        own = {file.path for file in contents.files()} | {DATASET_PATH}
        paths = tuple(file.path for file in self._uploaded)
        return PushSummary(
            store=contents.storage.root,
            url=self._repository.url,
            private=self._private,
            uploaded=paths,
            bytes=sum(file.size for file in self._uploaded),
            kept=total - len(own & {*paths}),
            removed=found.remove,
            commit=self._head,
        )

    def _check_new(self, dest: Storage) -> None:
        """Refuse a repository that has other files."""
        for entry in self._api.list_repo_tree(**self._at):
            if entry.path not in (*_ALLOWED, PICTURE_PATH):
                raise ConfigError(
                    f"{self._repository.url} has other files ({entry.path}): use a new repository."
                )

    def _documents(
        self,
        contents: StoreFiles,
        found: CopyDifference,
        dest: Storage,
        license_: str | None,
        shown: LatentStore,
    ) -> dict[str, bytes]:
        """The content of the card, its picture and dataset.json, if they differ."""
        documents: dict[str, bytes] = {}
        existing, new = dest.read_if_exists(CARD_PATH), not dest.exists(DATASET_PATH)
        text = None if existing is None else existing.decode(errors="replace")
        card = hub_card(contents, self._repository.url, text, new=new, license_=license_).encode()
        if card != existing:
            documents[CARD_PATH] = card
        if (found.seal or not dest.exists(PICTURE_PATH)) and (made := picture(shown)):
            documents[PICTURE_PATH] = made.data
        if found.seal:
            documents[DATASET_PATH] = contents.seal
        return documents

    def _upload(self, source: Storage, files: Sequence[StoreFile], transfer: Transfer) -> list[Any]:
        """Upload the content of files, a few at a time; return the operations of their commit."""
        from huggingface_hub import CommitOperationAdd

        operations: list[Any] = []
        large = [file for file in files if not _is_small(file)]
        for file in files:
            if _is_small(file):
                data = read_checked(source, file, transfer)
                operations.append(CommitOperationAdd(file.path, data))
        for start in range(0, len(large), self._jobs):
            some = large[start : start + self._jobs]
            with _on_disk(source, some, transfer) as paths:
                additions = [
                    CommitOperationAdd(file.path, str(path))
                    for file, path in zip(some, paths, strict=True)
                ]
                self._send(additions)
                if not source.local:
                    # Those that are sent with the commit, because the hub wants them in git.
                    for number, addition in enumerate(additions):
                        if isinstance(addition.path_or_fileobj, str):
                            data = Path(addition.path_or_fileobj).read_bytes()
                            additions[number] = CommitOperationAdd(addition.path_in_repo, data)
                operations += additions
        return operations

    def _send(self, additions: list[Any]) -> None:
        try:
            self._api.preupload_lfs_files(
                additions=additions, num_threads=self._jobs, free_memory=True, **self._at
            )
        except (RuntimeError, ValueError) as error:  # how the package reports a failed upload
            raise StorageError(
                f"Cannot upload to {self._repository.url}: {cause_of(error)}."
            ) from (error.__cause__ or error)

    def _commit(self, operations: list[Any], message: str, files: Sequence[StoreFile]) -> None:
        made = self._api.create_commit(
            operations=operations,
            commit_message=message,
            parent_commit=self._head,
            num_threads=self._jobs,
            **self._at,
        )
        self._head = str(made.oid)
        self._uploaded.extend(files)
        size = size_text(sum(file.size for file in files))
        _log.info("%s: %s committed (%s)", self._repository.url, counted(len(files), "file"), size)


def _check_folders(contents: StoreFiles) -> None:
    """Refuse a store that the hub would refuse after hours of uploading."""
    folders = Counter(file.path.rpartition("/")[0] for file in contents.files())
    for folder, count in folders.items():
        if count > FOLDER_FILES:
            raise ConfigError(
                f"{contents.storage.root} has {count} files in {folder}, but the Hugging Face Hub "
                f"accepts at most {FOLDER_FILES}: push a view of it (`latentmill select`), which "
                "is copied in shards of 1 GiB."
            )


def _batches(found: CopyDifference) -> Iterator[list[StoreFile]]:
    """The files of each commit but the last: the plan and whole units."""
    batch, units = list(found.first), 0
    for unit in found.units:
        size = sum(file.size for file in itertools.chain(batch, unit))
        if units and (units == BATCH_UNITS or size > BATCH_BYTES):
            yield batch
            batch, units = [], 0
        batch += unit
        units += 1
    if batch:
        yield batch


def _is_small(file: StoreFile) -> bool:
    return file.replaced or file.path.startswith(f"{COMMITS}/")


@contextlib.contextmanager
def _on_disk(
    source: Storage, files: Sequence[StoreFile], transfer: Transfer
) -> Iterator[list[Path]]:
    """Check files of a store; give their paths, in a temporary folder if the store is remote."""
    jobs = max(1, len(files))
    if source.local:
        transfer.run([partial(check, source, file, transfer) for file in files], jobs)
        yield [Path(source.full(file.path)) for file in files]
        return
    with tempfile.TemporaryDirectory(prefix="latentmill-") as folder:
        paths = [Path(folder, str(number)) for number in range(len(files))]
        pairs = zip(files, paths, strict=True)
        transfer.run([partial(download, source, *pair, transfer) for pair in pairs], jobs)
        yield paths


def _added(document: tuple[str, bytes]) -> Any:
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(*document)


def _deleted(path: str) -> Any:
    from huggingface_hub import CommitOperationDelete

    return CommitOperationDelete(path)
