"""Dividing a store into parts, such as train, valid and test, as views."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from latentmill.curation.columns import values_of
from latentmill.curation.selecting import Selector, hash_of
from latentmill.curation.views import Curated, check_sources, write_view
from latentmill.encoding.stored import parse_json
from latentmill.errors import ConfigError, StoreError
from latentmill.storage.storage import Storage, file_in_store
from latentmill.store.store import LatentStore, open_store

ASSIGNMENT_PATH = "assignment.json"
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
    out: str | os.PathLike[str],
    into: Mapping[str, float],
    *,
    by: str | None = None,
    seed: int = 0,
    duplicates_together: bool = False,
    overwrite: bool = False,
) -> tuple[Side, ...]:
    """Write a view for each part of a store, at OUT/NAME.

    Records with the same value of the field `by` are in the same part. The part depends only on
    this value, the seed and the shares, so records that are added to the store later never move
    others to another part: after extending the store, call this again with `overwrite`.

    Args:
        store: A complete store or a view.
        out: A new folder or URL, or that of an earlier split.
        into: The share of each part, `{"train": 0.9, "valid": 0.1}`. Shares below 1 in total leave
            out the other records.
        by: A stored field or a name in the records' metadata. Default: the group, or the key of
            records without a group.
        seed: Another seed gives another split.
        duplicates_together: Keep near duplicates in the same part, too. This reads all latents. The
            parts are then recorded in OUT/assignment.json, and kept by later calls; a new record
            that would connect two parts is left out.
        overwrite: Replace the views of an earlier split.

    Raises:
        ConfigError: An option is not valid, or `out` is in use.
        StoreError: The store or the assignment is damaged.
    """
    _check_shares(into)
    opened = store if isinstance(store, LatentStore) else open_store(store)
    target = os.fspath(out)
    check_sources([opened], target)
    selector = Selector(opened)
    names = _units(opened, by)
    assignment = {name: _side(seed, name, into) for name in dict.fromkeys(names)}
    if duplicates_together:
        settings = {"into": dict(into), "by": by or "group", "seed": seed}
        known = _recorded(Storage(target), settings)
        joined = _joined(names, selector.groups_of_duplicates())
        assignment, conflicts = _assigned(assignment, joined, known)
        Storage(target).write(
            ASSIGNMENT_PATH, json.dumps(settings | {"parts": assignment}).encode()
        )
        for row, name in enumerate(names):
            if name in conflicts:
                selector.leave_out([row], f"a duplicate of records in {conflicts[name]}")
    sides = np.array([assignment.get(name) or "" for name in names])
    written = []
    for name, wanted in into.items():
        part = selector.copy()
        for other in (*(one for one in into if one != name), ""):
            reason = f"in {other}" if other else _OUTSIDE
            part.leave_out(np.flatnonzero(sides == other), reason)
        share = len(part.rows) / max(1, len(opened))
        view = None
        if len(part.rows):
            view = write_view(f"{target}/{name}", [part.chosen()], overwrite=overwrite)
        written.append(Side(name, wanted, share, view))
    return tuple(written)


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


def _units(store: LatentStore, by: str | None) -> list[str]:
    """For each record a text that is equal for records that belong together."""
    alone = [f"key {key}" for key in store.index.keys(np.arange(len(store)))]
    if by == "key":
        return alone
    values = values_of(store, by or "group", "by")
    return [
        one if value is None else f"value {value}" for one, value in zip(alone, values, strict=True)
    ]


def _side(seed: int, name: str, into: Mapping[str, float]) -> str | None:
    """The part of a unit: a pure function of its name, the seed and the shares."""
    place, end = hash_of(seed, name) / 2**64, 0.0
    for part, share in into.items():
        end += share
        if place < end:
            return part
    return list(into)[-1] if end > 1 - 1e-9 else None


def _joined(names: Sequence[str], groups: Sequence[Sequence[int]]) -> list[set[str]]:
    """Sets of units that are connected by duplicates."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    for group in groups:
        for row in group[1:]:
            leader[find(names[row])] = find(names[group[0]])
    sets: dict[str, set[str]] = defaultdict(set)
    for name in leader:
        sets[find(name)].add(name)
    return [some for some in sets.values() if len(some) > 1]


def _assigned(
    assignment: Mapping[str, str | None],
    joined: Sequence[set[str]],
    known: Mapping[str, str | None],
) -> tuple[dict[str, str | None], dict[str, str]]:
    """The part of each unit, and the new units that would connect two parts, with their names.

    Units that are known keep their part. Others get that of the known ones that they are connected
    to, or else that of the unit whose name is first.
    """
    found = {**assignment, **{name: known[name] for name in assignment if name in known}}
    conflicts: dict[str, str] = {}
    for some in joined:
        new = [name for name in some if name not in known]
        parts = {known[name] for name in some if name in known}
        if len(parts) > 1:
            conflicts |= dict.fromkeys(new, " and ".join(sorted(str(part) for part in parts)))
        else:
            part = next(iter(parts)) if parts else assignment[min(some)]
            found |= dict.fromkeys(new, part)
    for name in conflicts:
        del found[name]  # decided again by the next call
    return found, conflicts


def _recorded(storage: Storage, settings: Mapping[str, object]) -> dict[str, str | None]:
    """The parts of an earlier call; empty if there was none."""
    data = storage.read_if_exists(ASSIGNMENT_PATH)
    if data is None:
        return {}
    where = f"{storage.root}/{ASSIGNMENT_PATH}"
    try:
        document = parse_json(data)
        parts = document["parts"]
        valid = all(isinstance(part, str | None) for part in parts.values())
    except (ValueError, TypeError, LookupError, AttributeError):
        valid = False
    if not valid:
        raise StoreError(f"{where} is damaged: restore it, or write the split to another folder.")
    if {name: document.get(name) for name in settings} != settings:
        raise ConfigError(
            f"{where} is that of a split with other shares, fields or seed: use the same, or "
            "another folder."
        )
    return dict(parts)
