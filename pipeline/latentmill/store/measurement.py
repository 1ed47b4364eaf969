"""What was measured on a store's own audio: evaluation/NAME.json, beside dataset.json.

The files are their own, so that measuring needs no lock: a run seals the store meanwhile or not.
Each tells the seal that it was measured on, because a store may change after it.
"""

from __future__ import annotations

from typing import Literal

from latentmill import __version__
from latentmill.storage.storage import Storage
from latentmill.store.schema import (
    DatasetInfo,
    LinearityEntry,
    Measurement,
    SeamEntry,
    parse_document,
)

Name = Literal["seams", "linearity"]
EVALUATION = "evaluation"
MEASURED: tuple[Name, ...] = ("seams", "linearity")


def write_measurement(
    storage: Storage, info: DatasetInfo, result: SeamEntry | LinearityEntry
) -> None:
    """Record a result that was measured on a sealed store.

    Args:
        storage: The store.
        info: What its dataset.json said when the measurement began.
        result: The result.
    """
    seams = result if isinstance(result, SeamEntry) else None
    linearity = result if isinstance(result, LinearityEntry) else None
    measurement = _measurement(info, seams, linearity)
    name: Name = "linearity" if seams is None else "seams"
    text = measurement.model_dump_json(indent=2, exclude_none=True)
    storage.clear_scratch()  # of a measurement that was killed
    storage.write(f"{EVALUATION}/{name}.json", text.encode())


def read_measurement(storage: Storage, info: DatasetInfo, name: Name) -> Measurement | None:
    """The last result on these latents; None if there is none, or it is of another fingerprint.

    It is current if its `seal` is the store's.

    Raises:
        StoreError: The file is damaged.
    """
    path = f"{EVALUATION}/{name}.json"
    data = storage.read_if_exists(path)
    if data is None:  # dataset.json of format version 1 has the results itself
        return _measurement(info, info.seams, info.linearity)
    where, cure = f"{storage.root}/{path}", f"delete it and run `latentmill {name}` again"
    measurement = parse_document(Measurement, data, where, cure)
    return measurement if measurement.fingerprint == info.fingerprint else None


def with_measurements(storage: Storage, info: DatasetInfo) -> DatasetInfo:
    """`info` with what was measured on the store as it is now."""
    current: dict[str, object] = {}
    for name in MEASURED:
        measured = read_measurement(storage, info, name)
        if measured is not None and measured.seal == info.seal:
            current[name] = getattr(measured, name)
    return info.model_copy(update=current)


def _measurement(
    info: DatasetInfo, seams: SeamEntry | None, linearity: LinearityEntry | None
) -> Measurement:
    return Measurement(
        latentmill_version=__version__,
        fingerprint=info.fingerprint,
        seal=info.seal,
        seams=seams,
        linearity=linearity,
    )
