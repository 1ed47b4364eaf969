"""Results measured on the audio of a store: evaluation/NAME.json, beside dataset.json.

They are separate files so that measuring needs no lock, even if a run seals the store meanwhile.
Each records the seal that it was measured on, because the store may change afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal

from latentmill import __version__
from latentmill.errors import LatentmillError
from latentmill.storage.storage import Storage
from latentmill.store.results import (
    LinearityEntry,
    Measurement,
    ModelOption,
    ReconstructionEntry,
    SeamEntry,
    StoreStatistics,
)
from latentmill.store.schema import DatasetInfo, parse_document
from latentmill.text.log import get_logger

Name = Literal["linearity", "reconstruction", "seams", "statistics"]
Result = LinearityEntry | ReconstructionEntry | SeamEntry | StoreStatistics
EVALUATION = "evaluation"
NAMES: dict[type[Result], Name] = {
    LinearityEntry: "linearity",
    ReconstructionEntry: "reconstruction",
    SeamEntry: "seams",
    StoreStatistics: "statistics",
}
IN_INFO: tuple[Name, ...] = ("seams", "linearity")  # shown by `info`

_log = get_logger("evaluation")


def write_measurement(
    storage: Storage,
    info: DatasetInfo,
    result: Result,
    model_options: Mapping[str, ModelOption] | None = None,
) -> None:
    """Write a result measured on a sealed store; `info` is its dataset.json at the start.

    `model_options` are those that differ from the options in the store.
    """
    name = NAMES[type(result)]
    measurement = _measurement(info, {name: result})
    if model_options:
        measurement = measurement.model_copy(update={"model_options": dict(model_options)})
    file = str(name)
    if isinstance(result, LinearityEntry) and result.protocol != "latentmill":
        file += f"-{result.protocol}"  # beside the card that arithmetic relies on
    text = measurement.model_dump_json(indent=2, exclude_none=True)
    storage.clear_scratch()  # of a measurement that was killed
    storage.write(f"{EVALUATION}/{file}.json", text.encode())


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Log a warning if a result cannot be written, for example because the store is read-only."""
    try:
        yield
    except LatentmillError as error:
        _log.warning("not recorded: %s", error)


def read_measurement(storage: Storage, info: DatasetInfo, name: Name) -> Measurement | None:
    """Read the last result for these latents; None if there is none with this fingerprint.

    It is current if its `seal` equals the store's. Raises StoreError if the file is damaged.
    """
    path = f"{EVALUATION}/{name}.json"
    data = storage.read_if_exists(path)
    if data is None:  # in format version 1, dataset.json contains the results
        return _measurement(info, {one: getattr(info, one) for one in IN_INFO})
    where, hint = f"{storage.root}/{path}", "delete it and run `latentmill evaluate` again"
    measurement = parse_document(Measurement, data, where, hint)
    return measurement if measurement.fingerprint == info.fingerprint else None


def current_result(storage: Storage, info: DatasetInfo, name: Name) -> Result | None:
    """Read the result measured on the current seal; None if there is none."""
    measured = read_measurement(storage, info, name)
    if measured is None or measured.seal != info.seal:
        return None
    result: Result | None = getattr(measured, name)
    return result


def with_measurements(storage: Storage, info: DatasetInfo) -> DatasetInfo:
    """Return `info` with the main results measured on the current seal."""
    current: dict[str, object] = {}
    for name in IN_INFO:
        if (result := current_result(storage, info, name)) is not None:
            brief: dict[str, object] = {"scores": []} if isinstance(result, LinearityEntry) else {}
            current[name] = result.model_copy(update=brief)
    return info.model_copy(update=current)


def _measurement(info: DatasetInfo, results: Mapping[str, Result | None]) -> Measurement:
    return Measurement(
        latentmill_version=__version__,
        fingerprint=info.fingerprint,
        seal=info.seal,
        **results,
    )
