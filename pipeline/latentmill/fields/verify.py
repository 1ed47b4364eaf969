"""Checking the fields of a store."""

from __future__ import annotations

from collections.abc import Mapping

from latentmill.errors import LatentmillError
from latentmill.storage.storage import Storage
from latentmill.store.field_layout import field_names, field_storage, has_parts
from latentmill.store.store import LatentStore
from latentmill.store.verify import VerifyReport, verify


def verify_fields(base: Storage) -> dict[str, VerifyReport]:
    """Check each field of a store as a store of its own. Fields that are behind have no fault."""
    reports = {name: _verified(base, name) for name in field_names(base)}
    return {name: report for name, report in reports.items() if report is not None}


def _verified(base: Storage, name: str) -> VerifyReport | None:
    """The report on a field; None if its folder has no part of one."""
    try:
        storage = field_storage(base, name)
        if not has_parts(storage):
            return None
        report = verify(LatentStore(storage.root))
    except LatentmillError as error:
        return VerifyReport(faults=[str(error).rstrip(".")])
    # The faults of a store tell its user to encode again.
    report.faults = [fault.replace("encode command", "add command") for fault in report.faults]
    return report


def field_faults(reports: Mapping[str, VerifyReport]) -> list[str]:
    """The faults of all fields, each with the name of its field."""
    return [f"field {name}: {fault}" for name, one in reports.items() for fault in one.faults]
