"""`lm.evaluate`: measures the parts of an evaluation and records each in the store."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, get_args

import numpy as np

from latentmill.errors import ConfigError, ModelError
from latentmill.evaluation.compat import PROTOCOL, measure_linear_cae
from latentmill.evaluation.linearity import LinearityReport, measure_linearity
from latentmill.evaluation.reconstruction import measure_reconstruction
from latentmill.evaluation.seams import SeamReport, measure_seams
from latentmill.evaluation.statistics import measure_statistics
from latentmill.store.remote_sources import sources_near
from latentmill.store.results import ReconstructionEntry, StoreStatistics
from latentmill.store.store import LatentStore, open_store
from latentmill.text.log import get_logger

Part = Literal["linearity", "reconstruction", "statistics", "seams"]
PARTS: tuple[Part, ...] = get_args(Part)
DECODED: tuple[Part, ...] = ("linearity", "reconstruction")  # measured on decoded sounds
LEAST_GAIN, MOST_GAIN = 0.01, 100.0
LEAST_SECONDS = 0.1

_log = get_logger("evaluation")


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        linearity: The error of latent arithmetic.
        reconstruction: The quality of decoded records, compared with their sources.
        statistics: The contents of the store.
        seams: The error that chunking introduces.
        unavailable: The parts that cannot be measured on this store, with the reason.
    """

    linearity: LinearityReport | None = None
    reconstruction: ReconstructionEntry | None = None
    statistics: StoreStatistics | None = None
    seams: SeamReport | None = None
    unavailable: Mapping[Part, str] = field(default_factory=dict)


assert {f.name for f in fields(Evaluation)} == {*PARTS, "unavailable"}


def evaluate(
    store: LatentStore | str | os.PathLike[str],
    *,
    only: Sequence[str] | None = None,
    items: int | None = None,
    max_seconds: float | None = None,
    gains: Sequence[float] = (),
    compat: str | None = None,
    address: str | None = None,
    record: bool = True,
    remote_sources: bool = False,
) -> Evaluation:
    """Evaluate a store on its own audio.

    Args:
        store: A store, or its folder or URL.
        only: The parts to measure, of `PARTS`; None for all.
        items: Number of items, spread evenly over the store; None for the default of each part.
        max_seconds: Maximum length that is used of an item; None for the default of each part.
        gains: Gains of the linearity card beside 0.25, 0.5, 0.75 and 1.1; from 0.01 to 100.
        compat: `linear-cae` to measure linearity by the protocol of the linear-cae authors, in
            evaluation/linearity-linear-cae.json.
        address: Address of a Ray cluster whose nodes read the shards for `statistics`; the other
            parts are measured in this process. None for RAY_ADDRESS, or no cluster.
        record: Whether to write the results to evaluation/*.json of a sealed store. If that is not
            possible, for example because it is read-only, a warning is logged.
        remote_sources: Whether to read source audio from other addresses than this machine and the
            bucket or server of the store.

    Returns:
        The results. Without `only`, a part that cannot be measured on this store, for example
        because its source is gone or its model cannot be loaded, is in `unavailable`.

    Raises:
        ConfigError: A part of `only` does not exist or cannot be measured on this store, a number
            is out of range, the device does not exist, or the store has no records.
        ModelError: A part of `only` needs the model, which cannot be loaded or cannot decode.
    """
    _check(only or (), compat, gains)
    _check_amount(items, max_seconds)
    opened = store if isinstance(store, LatentStore) else open_store(store)
    if not len(opened):
        raise ConfigError(
            f"{opened.url} has no records: run `latentmill status {opened.url}` to see why."
        )
    if not only or set(only) != {"statistics"}:
        _log.debug("evaluate: the model runs on %s", opened.device)  # an error if it cannot
    options: dict[str, Any] = {"max_seconds": max_seconds, "record": record}
    if items is not None:
        options["items"] = items
    linearity = measure_linear_cae if compat else measure_linearity
    measures: dict[Part, Callable[..., Any]] = {
        "linearity": partial(linearity, gains=gains),
        "reconstruction": measure_reconstruction,
        "statistics": partial(measure_statistics, address=address),
        "seams": measure_seams,
    }
    results: dict[Part, Any] = {}
    unavailable: dict[Part, str] = {}
    with sources_near(opened, remote_sources=remote_sources):
        for part in PARTS:
            if only and part not in only:
                continue
            _log.info("evaluate: %s", part)
            try:
                if part in DECODED:
                    opened.decoder()
                results[part] = measures[part](opened, **options)
            except (ConfigError, ModelError) as error:
                if only:
                    raise
                unavailable[part] = str(error)
    return Evaluation(**results, unavailable=unavailable)


def _check(only: Sequence[str], compat: str | None, gains: Sequence[float]) -> None:
    """Raise ConfigError if a setting is not valid."""
    for name in only:
        if name not in PARTS:
            raise ConfigError(f"invalid part {name!r} of an evaluation: use {', '.join(PARTS)}.")
    if compat not in (None, PROTOCOL):
        raise ConfigError(f"invalid compat {compat!r}: use {PROTOCOL}, or leave it out.")
    if only and "linearity" not in only and (gains or compat):
        given = "--gain" if gains else "--compat"
        raise ConfigError(
            f"{given} changes only the part linearity, which is not measured: add --only "
            f"linearity, or remove {given}."
        )
    for gain in gains:
        if math.isnan(gain) or not LEAST_GAIN <= gain <= MOST_GAIN:
            raise ConfigError(
                f"invalid gain {gain:g}: use a factor from {LEAST_GAIN:g} to {MOST_GAIN:g}."
            )


def _check_amount(items: int | None, max_seconds: float | None) -> None:
    """Raise ConfigError if nothing would be measured."""
    whole = isinstance(items, int | np.integer) and not isinstance(items, bool)
    if items is not None and not (whole and items >= 1):
        raise ConfigError(f"invalid items {items!r}: use a whole number of at least 1.")
    if max_seconds is not None and not LEAST_SECONDS <= max_seconds < math.inf:
        raise ConfigError(
            f"invalid max_seconds {max_seconds:g}: use a number of at least {LEAST_SECONDS:g}."
        )
