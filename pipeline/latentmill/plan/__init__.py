"""The plan: the frozen, ordered list of items and the unit that each belongs to.

A plan consists of files: `plan/items.parquet` has a row for each item, in order,
`plan/units.parquet` a row for each unit, and `plan/plan.json`, written last, lists both with their
hashes. Only the units are kept in memory; a unit's items are read from the store when they are
needed. An extension adds `items-0001.parquet` and `units-0001.parquet`, and replaces plan.json.
"""

from latentmill.plan.drafting import DEFAULT_SHARD_SIZE, Draft, UnitLimits, draft
from latentmill.plan.files import (
    check_items,
    copy,
    extend,
    freeze,
    iter_keys,
    iter_units,
    load,
    read_items,
)
from latentmill.plan.items import estimated_seconds
from latentmill.plan.plan import (
    BATCH_PATH,
    ITEMS_PATH,
    PLAN,
    PLAN_PATH,
    UNITS_PATH,
    FieldEntry,
    Plan,
    PlanPart,
    Unit,
)

__all__ = [
    "BATCH_PATH",
    "DEFAULT_SHARD_SIZE",
    "ITEMS_PATH",
    "PLAN",
    "PLAN_PATH",
    "UNITS_PATH",
    "Draft",
    "FieldEntry",
    "Plan",
    "PlanPart",
    "Unit",
    "UnitLimits",
    "check_items",
    "copy",
    "draft",
    "estimated_seconds",
    "extend",
    "freeze",
    "iter_keys",
    "iter_units",
    "load",
    "read_items",
]
