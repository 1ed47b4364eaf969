"""The state of a store's fields, compared with the store as it is now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from latentmill.errors import LatentmillError
from latentmill.fields.inputs import unit_states
from latentmill.plan import PLAN_PATH, Plan, load
from latentmill.storage.storage import Storage
from latentmill.store.commit import iter_commits
from latentmill.store.field_layout import field_names, field_storage, has_parts
from latentmill.store.seal import read_seal


@dataclass(frozen=True)
class FieldStatus:
    """State of a field: counts over its commits.

    Attributes:
        name: Its name.
        problem: Why its state is not known: it is damaged, or was dropped only in part. Then the
            other values are empty.
        kind: What its arrays are.
        source: What its values are computed from.
        model: The setting `model` of the field.
        sealed: Whether it has a dataset.json.
        items: Number of items of the store.
        encoded: Number of encoded items; likewise `skipped` and `failed`.
        behind: Number of items that the same `add` command computes or updates: new ones, and those
            whose input has changed.
        waiting: Number of items that it computes once the store has them: its run has not encoded
            them yet.
        bytes: Size of the shards.
        failures: (key, reason) of each failed item.
        kept: (key, reason) of each item whose earlier record was kept.
    """

    name: str
    problem: str | None = None
    kind: str = ""
    source: str = ""
    model: str = ""
    sealed: bool = False
    items: int = 0
    encoded: int = 0
    skipped: int = 0
    failed: int = 0
    behind: int = 0
    waiting: int = 0
    bytes: int = 0
    failures: tuple[tuple[str, str], ...] = ()
    kept: tuple[tuple[str, str], ...] = ()

    @property
    def complete(self) -> bool:
        """Whether it has a current value, or the reason why not, for every item of the store."""
        return self.sealed and not (self.behind or self.waiting or self.problem)


def field_states(base: Storage, plan: Plan) -> Iterator[FieldStatus]:
    """The state of every field of a store. `plan` is the plan of the store."""
    for name in field_names(base):
        try:
            storage = field_storage(base, name)
            if has_parts(storage):
                yield _state(base, plan, name, storage)
        except LatentmillError as error:
            yield FieldStatus(name, problem=str(error).rstrip("."))


def _state(base: Storage, plan: Plan, name: str, storage: Storage) -> FieldStatus:
    own = load(storage)
    if own is None or own.field is None:
        what = "no plan" if own is None else f"no entry `field` in {PLAN_PATH}"
        hint = f"remove it with `latentmill drop {base.root} --field {name}`"
        return FieldStatus(name, problem=f"it has {what}: {hint}")
    counts: Counter[str] = Counter()
    failures: list[tuple[str, str]] = []
    kept: list[tuple[str, str]] = []
    behind = waiting = size = 0
    for state in unit_states(base, plan, base, own.field.source, iter_commits(storage)):
        known = state.known
        behind += len(state.stale)
        waiting += state.unit.items if state.waiting else 0
        if known is not None:
            size += known.bytes
            counts.update(one.status for one in known.items)
            failures += [(o.key, o.reason or "") for o in known.items if o.status == "failed"]
            kept += [(o.key, o.reason or "") for o in known.items if o.kept]
    return FieldStatus(
        name,
        kind=own.field.kind,
        source=own.field.source,
        model=own.model,
        sealed=read_seal(storage) is not None,
        items=plan.num_items,
        encoded=counts["encoded"],
        skipped=counts["skipped"],
        failed=counts["failed"],
        behind=behind,
        waiting=waiting,
        bytes=size,
        failures=tuple(failures),
        kept=tuple(kept),
    )
