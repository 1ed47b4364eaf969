"""A dataset repository on the Hugging Face hub: its URL, and the errors of the hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from urllib.parse import unquote

from latentmill.errors import ConfigError, LatentmillError, StorageError, StoreError
from latentmill.storage.remote import cause_of, status_of, storage_errors

_URL = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^\s@]+))?/?", re.ASCII)


@dataclass(frozen=True)
class Repository:
    """A dataset repository on the hub, and the revision to write or read."""

    name: str
    revision: str = "main"

    @classmethod
    def parse(cls, url: str, revision: str | None = None) -> Repository:
        """Parse `hf://datasets/USER/NAME` or `...@REVISION`; ConfigError for other URLs."""
        match = _URL.fullmatch(url)
        if match is None:
            raise ConfigError(
                f"{url} is not a dataset on the Hugging Face hub: use hf://datasets/USER/NAME."
            )
        own = match[2] and unquote(match[2].rstrip("/"))  # feature/x is feature%2Fx in a URL
        if own and revision not in (None, own):
            raise ConfigError(
                f"the URL already has a revision (@{own}): use either @{own} or --revision."
            )
        return cls(match[1], revision or own or "main")

    @property
    def url(self) -> str:
        revision = self.revision.replace("%", "%25").replace("/", "%2F")
        at = "" if revision == "main" else f"@{revision}"
        return f"hf://datasets/{self.name}{at}"


@contextlib.contextmanager
def hub_errors(repository: Repository) -> Iterator[None]:
    """Turn errors of the hub into errors for users."""
    from huggingface_hub.errors import (
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except LatentmillError:
        raise
    except OfflineModeIsEnabled as error:
        raise ConfigError(
            f"HF_HUB_OFFLINE is set, so {repository.url} cannot be reached: unset it."
        ) from error
    except storage_errors(ValueError) as error:
        status = status_of(error)
        if status == 412:  # parent_commit is not the head
            raise StoreError(
                f"Someone else has changed {repository.url}: run the same command again."
            ) from error
        if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
            raise StorageError(
                f"{repository.url} does not exist or access is denied: check the name, and log in "
                "with `hf auth login` or set HF_TOKEN to a token that has access."
            ) from error
        if isinstance(error, RevisionNotFoundError):
            raise StorageError(
                f"{repository.url} has no revision {repository.revision}: check its name."
            ) from error
        raise StorageError(f"Cannot access {repository.url}: {cause_of(error)}.") from error


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Without the progress bars of huggingface_hub: there is one for all files."""
    utils: Any = import_module("huggingface_hub.utils")
    disabled = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            utils.enable_progress_bars()
