"""`lm.report`: a store as one HTML page that needs no network."""

from __future__ import annotations

import base64
import datetime
import hashlib
import math
import os
import posixpath
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from latentmill import __version__
from latentmill.encoding.timings import COUNTERS
from latentmill.errors import ConfigError, LatentmillError, StoreError
from latentmill.reporting import card, charts, listening
from latentmill.reporting.columns import RecordColumns, read_columns
from latentmill.reporting.contents import StoreCounts, contents
from latentmill.reporting.corpus_map import MAX_POINTS, CorpusMap, corpus_map
from latentmill.reporting.excerpts import Excerpts
from latentmill.reporting.media import PAGE_BYTES, PLAYERS, Budget
from latentmill.reporting.settings import DEFAULT_NAME, ITEMS
from latentmill.storage.scratch import check_replaceable, partial_file
from latentmill.storage.storage import Storage, writing
from latentmill.store.measurement import Name, read_measurement
from latentmill.store.results import StoreStatistics
from latentmill.store.store import LatentStore, open_store
from latentmill.text.log import get_logger
from latentmill.text.printing import clock_time, counted, number_text, printable, size_text

MAX_CHANNELS = 1024  # that the table lists
MAX_LISTED = 20
MAP_BYTES = 2_000_000  # of the table of the map
NONE = "\N{EN DASH}"
LONGEST = 300  # characters of a text from the store

_log = get_logger("report")


@dataclass(frozen=True)
class ReportFile:
    """A report that was written.

    Attributes:
        path: Where it is.
        bytes: Its size.
        players: Number of sounds in it.
        left_out: Number of pictures and sounds that were left out.
    """

    path: str
    bytes: int
    players: int
    left_out: int


@dataclass(frozen=True)
class EvaluationResult:
    """A result of the evaluation.

    Attributes:
        stale: Whether the store has changed since.
        options: Options of the model that were given, as text.
    """

    result: Any
    stale: bool
    options: str = ""


def report(
    store: LatentStore | str | os.PathLike[str],
    path: str | os.PathLike[str] = DEFAULT_NAME,
    *,
    items: int = ITEMS,
    overwrite: bool = False,
    remote_sources: bool = False,
) -> ReportFile:
    """Write a report of a store: one HTML page with pictures and players, under 15 MB.

    Args:
        store: A store, or its folder or URL.
        path: File or URL to write, such as `s3://bucket/report.html`.
        items: Number of records that are shown with pictures and players.
        overwrite: Whether to replace an existing file.
        remote_sources: Whether to read source audio from other addresses than this machine and the
            bucket or server of the store. Use it only for stores that you trust.

    Raises:
        ConfigError: The file exists, its name is not valid, or it is inside the store.
        StorageError: The file cannot be written.
    """
    if items < 0:
        raise ConfigError(f"items is {items}: use 0 or more.")
    opened = store if isinstance(store, LatentStore) else open_store(store)
    target, name = _target(os.fspath(path), opened, overwrite)
    budget = Budget()
    page = render(opened, budget, items=items, remote_sources=remote_sources).encode()
    if len(page) > PAGE_BYTES:
        raise ConfigError(
            f"The report of {opened.url} would have {size_text(len(page))}, more than "
            f"{size_text(PAGE_BYTES)}: show fewer items with --items."
        )
    if target.local:
        file = Path(target.full(name))
        with writing(str(file)), partial_file(file) as partial:
            partial.write_bytes(page)
            partial.replace(file)
    else:
        target.write(name, page)
    return ReportFile(os.fspath(path), len(page), PLAYERS - budget.players, budget.left_out)


def _target(path: str, store: LatentStore, overwrite: bool) -> tuple[Storage, str]:
    """The folder and the name of the file to write."""
    if not path:
        raise ConfigError("the output path is empty: give the name of a file such as report.html.")
    if "\0" in path:
        raise ConfigError(f"{path!r} is not a valid path because it contains NUL: remove it.")
    folder, name = posixpath.split(path)
    target = Storage(folder or ".")
    target.refuse_read_only()
    if name in ("", ".", ".."):
        raise ConfigError(f"{path!r} is a folder: give the name of a file in it.")
    if target.local:
        check_replaceable(Path(target.full(name)))
    if _is_inside(target, store.storage):
        raise ConfigError(f"{path} is inside the store: choose another output path.")
    if not overwrite and target.exists(name):
        raise ConfigError(
            f"{path} exists: choose another output path, or add --overwrite "
            "(overwrite=True in Python)."
        )
    return target, name


def _is_inside(folder: Storage, store: Storage) -> bool:
    if folder.local and store.local:
        return Path(folder.root).resolve().is_relative_to(Path(store.root).resolve())
    return f"{folder.root}/".startswith(f"{store.root}/")


def render(
    store: LatentStore, budget: Budget, *, items: int = ITEMS, remote_sources: bool = False
) -> str:
    """The page; `budget` has afterwards what is left of it."""
    _log.info("report: reading the commits and the fields of the records")
    excerpts = Excerpts(store, remote_sources=remote_sources)
    measured: dict[Name, EvaluationResult | None] = {}
    damaged: dict[Name, str] = {}
    for name in _PARTS:
        try:
            measured[name] = _measured(store, name)
        except StoreError as error:
            measured[name], damaged[name] = None, str(error)
            _log.warning("report: %s", error)
    facts: dict[str, Any] = {
        "store": store,
        "info": store.info,
        "name": store.url.rstrip("/").rpartition("/")[2] or store.url,
        "complete": _complete(store),
        "contents": contents(store),
        "measured": measured,
        "damaged": damaged,
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__,
        "excerpts": excerpts,
        "options": _listed(store.model_options),
        "budget": budget,
    }
    facts["speed"] = _speed(facts["contents"])
    facts |= _latents(store, measured["statistics"])
    if measured["linearity"]:
        facts["panels"] = card.panels(measured["linearity"].result)
        facts["poor"] = card.verdict(measured["linearity"].result)
        facts["definitions"] = card.definitions(measured["linearity"].result)
    if len(store):
        columns = read_columns(store, MAX_POINTS)
        facts |= _records(store, columns)
        _log.info("report: excerpts of records")
        group = None if "linearity" in damaged else columns.group  # mixing reads the card
        facts |= _sounds(excerpts, budget, group, measured, items)
        facts["group"] = columns.group
    return _page(facts)


_PARTS: tuple[Name, ...] = ("linearity", "reconstruction", "seams", "statistics")


def _measured(store: LatentStore, name: Name) -> EvaluationResult | None:
    if not store.sealed:
        return None
    found = read_measurement(store.storage, store.info, name)
    result = None if found is None else getattr(found, name)
    if found is None or result is None:
        return None
    if isinstance(result, StoreStatistics) and len(result.mean) != len(store.info.mean):
        raise StoreError(
            f"{store.url}/evaluation/{name}.json is damaged: delete it and run `latentmill "
            "evaluate` again."
        )
    return EvaluationResult(result, found.seal != store.info.seal, _listed(found.model_options))


def _listed(options: Mapping[str, Any] | None) -> str:
    """Options as on the command line."""
    return ", ".join(f"{name}={value}" for name, value in (options or {}).items())


def _complete(store: LatentStore) -> bool:
    try:
        return store.complete
    except LatentmillError:  # a sealed store can be read without its plan
        return store.sealed


def _speed(found: StoreCounts) -> dict[str, Any] | None:
    """Where the time of the workers went; None if it was not measured."""
    seconds = {name: found.stages.get(name, 0.0) for name in COUNTERS}
    busy = {name: seconds[f"{name}_seconds"] for name in ("model", "wait", "idle")}
    total = sum(busy.values())
    if not total:
        return None
    return {
        "busy": {name: (value, value / total) for name, value in busy.items()},
        "total": total,
        "x_real_time": seconds["audio_seconds"] / total,
        "read": seconds["read_seconds"],
        "load": seconds["decode_seconds"],
        "write": seconds["write_seconds"],
    }


def _latents(store: LatentStore, statistics: EvaluationResult | None) -> dict[str, Any]:
    """Charts of the channels; their range is known if the statistics were measured."""
    info = store.info
    if not info.frames or store.codes:
        return {"channels": None}
    found: StoreStatistics | None = statistics.result if statistics else None
    chart = charts.channel_chart(info.mean, info.std)
    reach = None if found is None else charts.range_chart(found.low, found.high)
    table = [
        (n, info.mean[n], info.std[n])
        + (() if found is None else (found.low[n], found.high[n], found.saturation[n]))
        for n in range(min(len(info.mean), MAX_CHANNELS))
    ]
    over_time = (
        None if found is None else charts.correlation(found.autocorrelation, info.frame_rate)
    )
    return {
        "channels": chart,
        "reach": reach,
        "channel_table": table,
        "correlation": over_time,
    }


def _records(store: LatentStore, columns: RecordColumns) -> dict[str, Any]:
    """Histograms of all records, and the map of a sample."""
    found: dict[str, Any] = {
        "histograms": {
            "Duration": charts.durations(columns.seconds),
            "Level (RMS, dBFS)": charts.loudness(columns.rms_db),
            "Silent share of a record": charts.silence(columns.silence),
        },
        "map": None,
    }
    placed = corpus_map(store, columns.sample)
    if placed is not None:
        found["map"] = placed
        found["map_fields"] = columns.fields
        found["map_default"] = columns.first_field
        found["map_rows"] = _map_rows(store, columns, placed)
    return found


def _map_rows(
    store: LatentStore, columns: RecordColumns, placed: CorpusMap
) -> list[tuple[str, float, float, list[Any]]]:
    """Key, position and fields of the records; fewer of them if their texts are very long."""
    rows = [
        (
            store.index.key(position),
            round(float(x), 3),
            round(float(y), 3),
            [field.values[number] for field in columns.fields],
        )
        for number, (position, (x, y)) in enumerate(
            zip(columns.sample.tolist(), placed.points, strict=True)
        )
    ]
    cell, row = len("<td></td>"), 150  # of the page's markup, with the circle
    size = sum(
        row + len(key[:LONGEST].encode()) + sum(cell + len(str(v).encode()) for v in values)
        for key, _, _, values in rows
    )
    return rows[:: max(1, math.ceil(size / MAP_BYTES))]


def _sounds(
    excerpts: Excerpts,
    budget: Budget,
    group: tuple[str, list[str]] | None,
    measured: dict[Name, EvaluationResult | None],
    count: int,
) -> dict[str, Any]:
    quality, statistics = measured["reconstruction"], measured["statistics"]
    current = quality.result if quality and not quality.stale else None
    shown = listening.items(excerpts, budget, count, current)
    mixed = listening.stem_mix(excerpts, budget, *group) if group else None
    found: dict[str, Any] = {"items": shown, "mix": mixed}
    if statistics is not None:
        found["repeats"] = listening.repeats(excerpts, budget, statistics.result)
        found["outliers"] = listening.outliers(excerpts, budget, statistics.result)
    return found


def _page(facts: dict[str, Any]) -> str:
    """Render the template; the page's policy allows no network and only its own script."""
    folder = files("latentmill.reporting")
    style, script = (folder.joinpath(name).read_text("utf-8") for name in ("style.css", "page.js"))
    policy = (
        "default-src 'none'; img-src data:; media-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    )
    given = {"style": Markup(style), "script": Markup(script), "policy": policy}  # noqa: S704
    defaults: dict[str, Any] = dict.fromkeys(_SECTIONS)
    return _template().render(defaults | facts | given | {"max_listed": MAX_LISTED})


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("latentmill.reporting", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {
        "size": size_text,
        "clock": lambda seconds: f"{seconds:.3g} s" if seconds < 60 else clock_time(seconds),
        "counted": counted,
        "number": _number,
        "quoted": shlex.quote,
    }
    return environment.get_template("page.html")


_SECTIONS = (
    "histograms",
    "map",
    "items",
    "group",
    "mix",
    "repeats",
    "outliers",
    "panels",
    "poor",
    "definitions",
    "reach",
    "channel_table",
    "correlation",
)


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _shown(value: Any) -> Any:
    """Texts of a store on one line, without control characters, and not too long."""
    if isinstance(value, str) and not isinstance(value, Markup):
        text = printable(value[: LONGEST + 1])
        return text if len(value) <= LONGEST else f"{text[:LONGEST]}…"
    return NONE if value is None else value


def _number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits; a large one whole, with thin spaces."""
    if value is None or not math.isfinite(value):
        return NONE
    text = number_text(value, digits)
    if text.lstrip("-").isdecimal():
        return f"{int(text):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return text
