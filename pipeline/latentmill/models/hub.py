"""Files of a repository on the Hugging Face hub, from its cache or downloaded into it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from latentmill.errors import ModelError
from latentmill.storage.remote import cause_of
from latentmill.text.log import get_logger
from latentmill.text.printing import one_line

HUB_SECONDS = 3.0  # how long to retry while the hub does not answer
_COMMIT = re.compile(r"[0-9a-f]{40}")

_log = get_logger("models")


@dataclass(frozen=True)
class Repo:
    """Where a model's files are.

    Attributes:
        location: `owner/name` on the hub, or an absolute local path.
        revision: Branch, tag or commit on the hub; None: `main`, or a local path.
    """

    location: str
    revision: str | None = None

    @property
    def local(self) -> Path | None:
        """The path, if the location is one."""
        return Path(self.location) if Path(self.location).is_absolute() else None

    @property
    def text(self) -> str:
        """The location and the revision, for messages."""
        return f"{self.location} (revision {self.revision})" if self.revision else self.location


def find_on_hub(
    model: str,
    repo: Repo,
    candidates: Sequence[str],
    wanted: Mapping[str, Sequence[str]],
    optional: bool,
) -> tuple[str, Path] | None:
    """Name and path of the first of a role's files that exists; it is downloaded if necessary.

    None if an optional file does not exist. Raises ModelError with the command that downloads the
    files of all roles (`wanted`).
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    )

    if optional:
        found = hub.try_to_load_from_cache(repo.location, candidates[0], revision=repo.revision)
        if found is not None and not isinstance(found, str):  # the hub said so for this commit
            return None
    # The bases are the HTTP client's errors; which client it is depends on huggingface_hub.
    hub_errors: tuple[type[Exception], ...] = (
        OSError,
        ValueError,
        HfHubHTTPError,
        *HfHubHTTPError.__bases__,
    )
    failure: Exception | None = None
    for name in candidates:
        cached = _cached(repo, name)
        if cached is not None:
            return name, cached
        try:
            with _turn(model, repo):
                return name, _download(repo, name, hub_errors)
        except EntryNotFoundError as error:  # missing in the repository or in an offline cache
            failure = failure or error
        except hub_errors as error:
            failure = error
            break
    assert failure is not None, "there is at least one candidate"
    if optional and isinstance(failure, EntryNotFoundError):
        local = isinstance(failure, LocalEntryNotFoundError)
        # Every repository has this file, and only a download of the whole repository includes it.
        mark = hub.try_to_load_from_cache(repo.location, ".gitattributes", revision=repo.revision)
        if not local or isinstance(mark, str):
            return None
    if optional and hub.constants.HF_HUB_OFFLINE:
        raise _unknown_while_offline(model, repo, candidates[0]) from failure
    folder = os.path.isdir(repo.location)  # noqa: PTH112  which raises no error
    here = f"; the folder here is ./{repo.location}" if folder else ""
    why = _why(repo, wanted, candidates, failure)
    raise ModelError(f"Model {model}: {why}{here}.") from failure


def _unknown_while_offline(model: str, repo: Repo, name: str) -> ModelError:
    revision = f" --revision {repo.revision}" if repo.revision else ""
    return ModelError(
        f"Model {model}: the cache does not record whether {repo.location} has the optional file "
        f"{name}, and HF_HUB_OFFLINE is set: run `hf download {repo.location} {name}{revision}` "
        "once with network access (if there is no such file, the cache records that, too), or "
        "download the whole repository."
    )


@contextlib.contextmanager
def one_at_a_time(model: str, repository: str) -> Iterator[None]:
    """Let only one process of this machine look for the files of a repository at a time.

    When the actors of a node start together, the first one downloads the files, and the others find
    them in the cache without a request to the hub, which limits the rate of requests.
    """
    name = hashlib.sha256(repository.encode()).hexdigest()[:16]
    path = f"latentmill-weights-{os.getuid()}-{name}.lock"
    with contextlib.ExitStack() as stack:
        try:
            path = f"{tempfile.gettempdir()}/{path}"
            _lock(stack.enter_context(Path(path).open("ab")), repository)
        except OSError as error:
            raise ModelError(
                f"Model {model}: cannot lock {path} ({cause_of(error)}): delete this file, or set "
                "TMPDIR to a folder that you can write to."
            ) from error
        yield


def _turn(model: str, repo: Repo) -> contextlib.AbstractContextManager[None]:
    """`one_at_a_time`, which is not necessary to read the cache."""
    import huggingface_hub as hub

    if hub.constants.HF_HUB_OFFLINE:
        return contextlib.nullcontext()
    return one_at_a_time(model, repo.location)


def _lock(file: IO[bytes], repository: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.info("waiting for another process that downloads files of %s", repository)
        fcntl.flock(file, fcntl.LOCK_EX)


def _cached(repo: Repo, name: str) -> Path | None:
    """The path of a file that is in the cache, if the hub cannot have another version of it."""
    import huggingface_hub as hub

    if repo.revision is None or not _COMMIT.fullmatch(repo.revision):
        return None
    found = hub.try_to_load_from_cache(repo.location, name, revision=repo.revision)
    return Path(found) if isinstance(found, str) else None


def _download(repo: Repo, name: str, hub_errors: tuple[type[Exception], ...]) -> Path:
    """Return the path of a file in the cache; download it if it is missing."""
    import huggingface_hub as hub

    file: dict[str, Any] = {
        "repo_id": repo.location,
        "filename": name,
        "revision": repo.revision,
    }
    cached = isinstance(hub.try_to_load_from_cache(**file), str)
    if not cached and not hub.constants.HF_HUB_OFFLINE:
        _reach(hub.hf_hub_url(**file), hub_errors)
    return Path(hub.hf_hub_download(**file))


def _reach(url: str, hub_errors: tuple[type[Exception], ...]) -> None:
    """Retry for `HUB_SECONDS` until the hub answers; raise the last error if it does not.

    Without an answer huggingface_hub would retry for half a minute, or for six if a firewall drops
    its packets, and print each attempt. After the first answer, which may be an error, its own
    retries apply.
    """
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError

    until = time.monotonic() + HUB_SECONDS
    while True:
        try:
            get_hf_file_metadata(url)
        except HfHubHTTPError:
            return
        except hub_errors:
            if time.monotonic() > until:
                raise
            time.sleep(1)
        else:
            return


def _why(
    repo: Repo, wanted: Mapping[str, Sequence[str]], candidates: Sequence[str], failure: Exception
) -> str:
    """Why a file is not available, and what to do."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    where, endpoint = repo.location, hub.constants.ENDPOINT
    if isinstance(failure, errors.GatedRepoError):
        page = f"{endpoint}/{where}"
        return f"{where} requires a login: accept its terms at {page}, then run `hf auth login`"
    if isinstance(failure, errors.RepositoryNotFoundError):
        return (
            f"repository {where} not found at {endpoint}: correct the name or, if the repository "
            "is private, run `hf auth login`"
        )
    if isinstance(failure, errors.RevisionNotFoundError):
        return f"{where} has no revision {repo.revision}: set the option revision to main"
    local = isinstance(failure, errors.LocalEntryNotFoundError)
    if isinstance(failure, errors.EntryNotFoundError) and not local:
        return (
            f"{repo.text} has no {' or '.join(candidates)}: it is not a model of this "
            "family, use another repository"
        )
    if hub.constants.HF_HUB_OFFLINE:
        cause = "HF_HUB_OFFLINE is set"
    else:
        message = str(failure.__cause__ or failure).strip().partition("\n")[0]
        cause = f"cannot be downloaded from {endpoint} ({one_line(OSError(message))})"
    files = [candidates[0] for candidates in wanted.values()]
    folders = {str(PurePosixPath(file).parent) for file in files}
    chosen = " ".join(files) if "." in folders else f"--include '{folders.pop()}/*'"
    revision = f" --revision {repo.revision}" if repo.revision else ""
    command = f"hf download {repo.location} {chosen}{revision}"
    return (
        f"its weights are not on this machine, and {cause}: run `{command}` with network access, "
        "here or on a machine from which you can copy the cache"
    )
