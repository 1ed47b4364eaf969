"""Checks whether the source of a plan can be read: a folder without its mount has no files."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from latentmill.audio.media import is_remote, path_of_file_url
from latentmill.errors import SourceError
from latentmill.plan.files import load, read_items
from latentmill.plan.plan import Plan, Unit
from latentmill.record import Outcome
from latentmill.sources.base import Item
from latentmill.sources.open import has_any, is_there
from latentmill.storage.remote import cause_of, open_filesystem, storage_errors
from latentmill.storage.storage import Storage
from latentmill.text.printing import counted

LOOKED_UP = 8  # units, and items of each, whose files must not all be missing
LOOK_UP_SECONDS = 60.0  # after which no further file is looked up

_Value = TypeVar("_Value")


def check_source(storage: Storage, plan: Plan, todo: Sequence[Unit]) -> None:
    """Raise SourceError if the source is missing or, as a folder without its mount, has no files.

    Files that a manifest or a table refers to are not looked up: only the workers may have access
    to them, which also look them up. The same is true of a copy of records: it has no source.
    """
    if plan.is_copy:
        return
    if not is_there(plan.source):
        why = "does not exist"
    elif not has_any(plan.source, _examples(storage, plan, todo)):
        why = "has none of the planned files that were looked up"
    else:
        return
    # Resuming opens the planned paths, also through a link.
    link = "" if "://" in plan.source else ", or make a link to it at this path if it was moved"
    raise SourceError(
        f"Source {plan.source} {why}, but {counted(len(todo), 'unit')} of {storage.root} must "
        f"still be encoded: mount or restore the source{link}."
    )


def checked(outcomes: Iterable[Outcome], storage: Storage, unit: Unit) -> Iterator[Outcome]:
    """Yield a unit's outcomes. If items failed, check then that this machine reads the source.

    Raises SourceError if it cannot read any of the planned files that it looks up, because it
    lacks a mount or a permission: then the items have not failed.
    """
    loaded: list[str] = []
    failed = False
    for outcome in outcomes:
        if outcome.reason is None:
            loaded.append(outcome.key)
        elif outcome.status != "skipped":
            failed = True
        yield outcome
    if failed:
        _check_readable(storage, unit, frozenset(loaded))


def _check_readable(storage: Storage, unit: Unit, loaded: frozenset[str]) -> None:
    known = [item for item in read_items(storage, unit) if item.key in loaded]
    if any(_read_error(item.uri) is None for item in _few(known)):
        return
    plan = load(storage)
    if plan is None:  # the run has lost its store, which is reported where the unit is written
        return
    reason = None
    end = time.monotonic() + LOOK_UP_SECONDS
    for item in _examples(storage, plan, [unit]):
        if (error := _read_error(item.uri)) is None:
            return
        reason = reason or f"{item.uri}: {error}"
        if time.monotonic() > end:
            break
    raise SourceError(
        f"Host {socket.gethostname()} cannot read any of the planned files of {plan.source} that "
        f"were looked up ({reason}): mount the source there or renew its credentials, then run the "
        "same command again."
    )


def _read_error(uri: str) -> str | None:
    """Why a file cannot be opened, or None. Its audio is not read."""
    try:
        if is_remote(uri):
            fs, path = open_filesystem(uri)
            fs.invalidate_cache(path)
            fs.info(path)
        else:
            path = path_of_file_url(uri) if uri.startswith("file://") else uri
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # a named pipe would block
    except storage_errors(ValueError, ImportError) as error:
        return cause_of(error)
    return None


def _examples(storage: Storage, plan: Plan, todo: Sequence[Unit]) -> Iterator[Item]:
    """A few items of a few units: first of `todo`, whose files may all have been deleted."""
    for units in (todo, plan.units):
        for unit in _few(units):
            yield from _few(read_items(storage, unit))


def _few(values: Sequence[_Value]) -> Sequence[_Value]:
    """At most `LOOKED_UP` of some values, at equal distances."""
    return values[:: -(-len(values) // LOOKED_UP) or 1]
