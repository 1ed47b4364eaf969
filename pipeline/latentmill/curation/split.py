"""Dividing a store into parts, such as train, valid and test, as views."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentmill.curation.columns import stored_values, values_of
from latentmill.curation.selecting import Selector, hash_of
from latentmill.curation.views import Curated, check_sources, write_view
from latentmill.encoding.stored import parse_json
from latentmill.engine.lock import LOCK_PATH, only_run
from latentmill.errors import ConfigError, StoreError
from latentmill.evaluation.similarity import Groups
from latentmill.plan import PLAN_PATH
from latentmill.storage import scratch
from latentmill.storage.storage import Storage, file_in_store
from latentmill.store.schema import DATASET_PATH
from latentmill.store.store import LatentStore, open_store

SPLIT_PATH = "split.json"
_OUTSIDE = "outside of all shares"


@dataclass(frozen=True)
class Side:
    """One part of a split.

    Attributes:
        name: Its name.
        wanted: The share that was asked for.
        share: Its share of the records.
        store: Its view; None if it has no records.
    """

    name: str
    wanted: float
    share: float
    store: Curated | None


def split(
    store: LatentStore | str | os.PathLike[str],
    dest: str | os.PathLike[str],
    into: Mapping[str, float],
    *,
    by: str | None = None,
    seed: int = 0,
    duplicates_together: bool = False,
    overwrite: bool = False,
) -> tuple[Side, ...]:
    """Write a view for each part of a store, at DEST/NAME.

    Records with the same value of the field `by` are in the same part. The part depends only on
    this value, the seed and the shares, so records that are added to the store later never move
    others to another part: after extending the store, call this again with `overwrite`.

    Args:
        store: A complete store or a view.
        dest: A new folder or URL, or that of an earlier split.
        into: The share of each part, `{"train": 0.9, "valid": 0.1}`. Shares below 1 in total leave
            out the other records.
        by: A stored field or a name in the records' metadata. Default: the group, or the key of
            records without a group.
        seed: Another seed gives another split.
        duplicates_together: Keep near duplicates in the same part, too. This reads all latents. The
            parts are then recorded in DEST/split.json, and kept by later calls; a new record
            that would connect two parts is left out.
        overwrite: Replace the views of an earlier split.

    Raises:
        ConfigError: An option is not valid, or `dest` is in use.
        StoreError: The store or the assignment is damaged.
    """
    _check_shares(into)
    opened = store if isinstance(store, LatentStore) else open_store(store)
    target = os.fspath(dest)
    check_sources([opened], target, copy=False)
    selector = Selector(opened)
    names = _clusters(selector, by)
    settings: dict[str, Any] = {"into": dict(into), "by": by or "group", "seed": seed}
    settings["duplicates_together"] = duplicates_together
    _recorded(Storage(target), settings)  # checked before the lock, which writes a file
    with only_run(Storage(target)) as hold:
        shares, known = _recorded(hold.storage, settings)
        hold.storage.clear_scratch()
        settings["into"] = shares
        assignment = {name: _side(seed, name, shares) for name in dict.fromkeys(names)}
        if duplicates_together:
            assignment = _together(selector, names, assignment, known)
            settings["parts"] = {**known, **assignment}
        parts = _parts(selector, [assignment.get(name) for name in names], into)
        _refuse_emptied(target, parts)
        hold.storage.write(SPLIT_PATH, json.dumps(settings).encode())
        written = []
        for name, part in parts.items():
            view = None
            if len(part.rows):
                view = write_view(f"{target}/{name}", [part.chosen()], overwrite=overwrite)
            share = len(part.rows) / max(1, len(names))
            written.append(Side(name, into[name], share, view))
    return tuple(written)


def _together(
    selector: Selector,
    names: Sequence[str],
    assignment: Mapping[str, str | None],
    known: Mapping[str, str | None],
) -> dict[str, str | None]:
    """The part of each cluster, the same for duplicates; leaves out records of conflicts."""
    connected = _joined(names, selector.groups_of_duplicates())
    found, conflicts = _assigned(assignment, connected, known)
    for row, name in enumerate(names):
        if name in conflicts:
            selector.leave_out([row], f"a duplicate of records in {conflicts[name]}")
    return found


def _refuse_emptied(target: str, parts: Mapping[str, Selector]) -> None:
    """Raise ConfigError if a part had records in an earlier call and has none now."""
    for name, part in parts.items():
        if not len(part.rows) and Storage(f"{target}/{name}").exists(DATASET_PATH):
            raise ConfigError(
                f"{target}/{name} would have no records now: delete it, then run the command again."
            )


def _parts(
    selector: Selector, sides: Sequence[str | None], into: Mapping[str, float]
) -> dict[str, Selector]:
    """The records of each part."""
    parts, of_record = {}, np.array([side or "" for side in sides])
    for name in into:
        parts[name] = selector.copy()
        for other in (*(one for one in into if one != name), ""):
            reason = f"in {other}" if other else _OUTSIDE
            parts[name].leave_out(np.flatnonzero(of_record == other), reason)
    return parts


def _check_shares(into: Mapping[str, float]) -> None:
    for name, share in into.items():
        try:
            file_in_store(name)
            valid = "/" not in name and share > 0 and math.isfinite(share)
        except (ValueError, TypeError):
            valid = False
        if not valid:
            raise ConfigError(
                f"invalid part {name}={share}: write names of letters and digits with shares above "
                "0, as in train=0.9,valid=0.1."
            )
    if not into or sum(into.values()) > 1 + 1e-9:
        raise ConfigError(
            f"the shares of the parts add up to {sum(into.values()):g}: use 1, or less to leave "
            "out records."
        )


def _clusters(selector: Selector, by: str | None) -> list[str]:
    """For each record the name of its cluster: the records that must be in the same part."""
    keys = [f"key {key}" for key in selector.index.keys(np.arange(len(selector.index)))]
    if by == "key":
        return keys
    store = selector.store
    values = stored_values(store, "group") if by is None else values_of(store, by, "by")
    selector.check_unchanged()
    return [
        key if value is None else f"value {_text(value)}"
        for key, value in zip(keys, values, strict=True)
    ]


def _text(value: object) -> str:
    """The text of a value; 5 and 5.0 have the same, because a column of both has floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _side(seed: int, name: str, into: Mapping[str, float]) -> str | None:
    """The part of a cluster: a pure function of its name, the seed and the shares."""
    place, end = hash_of(seed, name) / 2**64, 0.0
    for part, share in into.items():
        end += share
        if place < end:
            return part
    return list(into)[-1] if end > 1 - 1e-9 else None


def _joined(names: Sequence[str], groups: Sequence[Sequence[int]]) -> list[set[str]]:
    """Sets of clusters that are connected by duplicates."""
    number = {name: place for place, name in enumerate(dict.fromkeys(names))}
    own = list(number)
    pairs = [(number[names[group[0]]], number[names[row]]) for group in groups for row in group[1:]]
    first, second = np.array(pairs, np.int64).reshape(-1, 2).T
    connected = Groups(len(own))
    connected.connect(first, second)
    return [{own[place] for place in places} for places, _ in connected.found()]


def _assigned(
    assignment: Mapping[str, str | None],
    joined: Sequence[set[str]],
    known: Mapping[str, str | None],
) -> tuple[dict[str, str | None], dict[str, str]]:
    """The part of each cluster; and the new clusters that would connect two parts, with these.

    Known clusters keep their part. Others get that of the known ones that they are connected to,
    or else that of the cluster whose name is first.
    """
    found = {**assignment, **{name: known[name] for name in assignment if name in known}}
    conflicts: dict[str, str] = {}
    for some in joined:
        new = [name for name in some if name not in known]
        parts = {known[name] for name in some if name in known}
        if len(parts) > 1:
            conflicts |= dict.fromkeys(
                new, " and ".join(sorted(part or "no part" for part in parts))
            )
        else:
            part = next(iter(parts)) if parts else assignment[min(some)]
            found |= dict.fromkeys(new, part)
    for name in conflicts:
        del found[name]  # decided again by the next call
    return found, conflicts


def _recorded(
    storage: Storage, settings: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, str | None]]:
    """The shares in the order of an earlier call, which decides about the parts, and its parts.

    Without an earlier call, the shares of the settings and no parts. Refuses a folder of anything
    else.
    """
    data = storage.read_if_exists(SPLIT_PATH)
    if data is None:
        names = set(storage.list("")) - {".lease"}
        if storage.local:
            names = scratch.entries(Path(storage.root)) - {LOCK_PATH}
        if names or storage.exists(PLAN_PATH):
            raise ConfigError(f"{storage.root} is not empty: use another output folder.")
        return settings["into"], {}
    where = f"{storage.root}/{SPLIT_PATH}"
    try:
        document = parse_json(data)
        parts = document.get("parts", {})
        valid = all(isinstance(part, str | None) for part in parts.values())
    except (ValueError, TypeError, LookupError, AttributeError):
        valid = False
    if not valid:
        raise StoreError(f"{where} is damaged: restore it, or write the split to another folder.")
    if {name: document.get(name) for name in settings} != settings:
        raise ConfigError(
            f"{storage.root} was written with a different --into, --by, --seed or "
            "--duplicates-together: use the same values or another output folder."
        )
    return document["into"], dict(parts)
