"""Compares a run's settings with the store that it would resume, in terms of the CLI options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from latentmill.config import RunConfig, fingerprint_document, item_settings, settings_of
from latentmill.encoding.chunks import Chunking
from latentmill.errors import ConfigError, StoreError
from latentmill.models.base import ROWS, ModelSpec, Stitch
from latentmill.models.identity import VERSION
from latentmill.plan import PLAN_PATH, Plan
from latentmill.sources.files import Place
from latentmill.sources.settings import SourceSettings, option

_HASH = "sha256"
_HASH_DIGITS = 8
_LISTED = 5
# A model's name, options and weights determine these.
_SHAPE = ("name", "sample_rate", "channels", "latent_channels", "hop", "scale_factor")
_GRID = ("name", "sample_rate", "hop")
_CHUNKING = ("stitch", "chunk_seconds", "chunk_samples", "overlap")
_WEIGHTS = "weights"
_UNIT_SIZE = ("unit_seconds", "shard_size")


@dataclass(frozen=True)
class ChangedSetting:
    """A setting whose value differs from the store's.

    Attributes:
        setting: Name in `RunConfig`, or `weights`, or empty if no option sets it.
        label: The option, such as `--chunk-seconds`.
        was: Value in the store.
        now: Value in this run.
    """

    setting: str
    label: str
    was: str
    now: str

    @property
    def place(self) -> int:
        """Sort key: settings in the order of the options, settings without an option, hashes."""
        fields = list(RunConfig.model_fields)
        if self.setting in fields:
            return fields.index(self.setting)
        return len(fields) + (self.setting == _WEIGHTS)


def default_stitch(plan: Plan | None, spec: ModelSpec) -> Stitch:
    """The way to stitch if none is given: the model's, but `trim` in a store planned with it.

    `trim` was the default before models could continue from a state, and a store continues as it
    was planned.
    """
    planned = None if plan is None else plan.fingerprint["chunking"]["stitch"]
    return "trim" if spec.stitch == "state" and planned == "trim" else spec.stitch


def with_planned(config: RunConfig, plan: Plan | None) -> RunConfig:
    """The settings of a run, with the planned value of each that selects items and is not given.

    The maximum size of a unit keeps its planned value, too. These settings do not count as given.
    """
    if plan is None or plan.source != Place(config.source).uri:  # another source is refused
        return config
    stored = {"extensions": plan.extensions, **plan.source_settings}
    names = set(settings_of("items")) - config.model_fields_set
    try:
        planned = SourceSettings.model_validate(
            {"source": config.source, **{name: stored[name] for name in names & set(stored)}}
        )
    except ValidationError as error:
        raise StoreError(
            f"Store {config.out}: {PLAN_PATH} is damaged: restore it from a backup, or encode into "
            "a new output folder."
        ) from error
    values = {
        **dict(config),
        **{name: getattr(planned, name) for name in names},
        **{name: getattr(plan, name) for name in _UNIT_SIZE if getattr(config, name) is None},
    }
    return RunConfig.model_construct(config.model_fields_set, **values)


def differences(
    plan: Plan, config: RunConfig, spec: ModelSpec, chunking: Chunking, source: str
) -> list[ChangedSetting]:
    """The settings that differ between a store's plan and a run, in the order of the options."""
    stored, wanted = plan.fingerprint, fingerprint_document(config, spec, chunking)
    found = [
        *_model(plan, config, spec, wanted["model"]),
        *_chunking(stored, wanted, config, spec),
        *_planning(plan, config, source),
    ]
    for section in sorted({*stored, *wanted} - {"model", "chunking"}):
        old, new = stored.get(section, {}), wanted.get(section, {})
        for name in _changed(old, new):
            label = None if name in RunConfig.model_fields else f"{section} {name}"
            found.append(_difference(name, old.get(name), new.get(name), label))
    return sorted(found, key=lambda one: one.place)


def explain(found: list[ChangedSetting]) -> str:
    """The differences as one sentence that starts with an option."""
    first, *others = found
    text = (
        f"{first.label} changed: this store was encoded with {first.was}, "
        f"this run would use {first.now}"
    )
    return "; ".join([text, *(f"{one.label}: {one.was}, now {one.now}" for one in others)])


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def _model(
    plan: Plan, config: RunConfig, spec: ModelSpec, new: Mapping[str, Any]
) -> Iterator[ChangedSetting]:
    old = plan.fingerprint.get("model", {})
    changed = _changed(old, new)
    hashes = [name for name in changed if name.startswith(_HASH)]
    if "name" in changed:  # the other differences follow from this one
        same = plan.model == config.model  # a custom factory returned another model
        names = (old.get("name"), spec.name) if same else (plan.model, config.model)
        yield _difference("model", *names)
        return
    if hashes and plan.model != config.model:
        yield _difference("model", plan.model, config.model)
    options = _options(plan, config, spec, changed)
    for name in options:
        # If an option was not given, its default may be in the model's identity.
        was = plan.model_options.get(name, old.get(name))
        now = config.model_options.get(name, new.get(name))
        label = "--revision" if name == "revision" else f"--model-option {name}"
        yield _difference("model_options", was, now, label)
    if "split" in changed:
        channels = ["split" if model.get("split") else "mono" for model in (old, new)]
        yield _difference("channels", *channels)
    explained = {*hashes, *options, "split"}
    if explained & set(changed):
        explained.add(ROWS)  # follows from the channels and the posterior
    follows = set(_SHAPE) if explained & set(changed) else set()
    for name in changed:
        if name not in explained | follows:
            label = f"--model {name.replace('_', ' ')}"
            was = old.get(name)
            if name == VERSION and was and "package" in new:
                was = f"{was} (`pip install {new['package']}=={was}`)"
            yield _difference("", was, new.get(name), label)
    if hashes:
        digests = _weights(hashes, old, plan.provenance), _weights(hashes, new, spec.provenance)
        yield _difference(_WEIGHTS, *digests, "--model weights")


def _options(plan: Plan, config: RunConfig, spec: ModelSpec, changed: list[str]) -> list[str]:
    """The model options that explain why the model's identity has changed."""
    stored, asked = plan.model_options, config.model_options
    names = [*stored, *(name for name in asked if name not in stored)]
    different = [name for name in names if stored.get(name) != asked.get(name)]
    # Some options are not in the identity by name: `revision` chooses the weights.
    open_questions = set(changed) - {*_SHAPE, *names, "split", ROWS}
    unnamed = set(different) - set(plan.fingerprint.get("model", {})) - set(spec.identity)
    unnamed -= set(spec.provenance) - {"revision"}  # only decoding depends on these
    return [name for name in different if name in changed or (open_questions and name in unnamed)]


def _weights(names: list[str], model: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    digests = [str(model.get(name) or "none")[:_HASH_DIGITS] for name in names]
    revision = origin.get("revision")
    return " ".join(digests) + (f" (--revision {revision})" if revision else "")


def _chunking(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], config: RunConfig, spec: ModelSpec
) -> Iterator[ChangedSetting]:
    old, new = stored.get("chunking", {}), wanted["chunking"]
    changed = _changed(old, new)
    # Another model has other defaults. Then only the user's own settings count as different.
    other_model = bool(set(_changed(stored.get("model", {}), wanted["model"])) & set(_GRID))
    asked = {name for name in _CHUNKING if getattr(config, name) is not None or not other_model}
    if "skew" in changed and "stitch" not in changed and not other_model:  # no option changes it
        label = "--model context, left minus right"
        yield _difference("", old.get("skew"), new["skew"], label)
        return
    found: list[ChangedSetting] = []
    if "stitch" in changed and "stitch" in asked:
        found.append(_difference("stitch", old.get("stitch"), new["stitch"]))
    if "samples" in changed and {"chunk_seconds", "chunk_samples"} & asked:
        found.append(_length(stored, new, config, spec))
    was, now = _overlap(old, stored), _overlap(new, wanted)
    if "overlap" in asked and was != now and _other_overlap(old, config, spec):
        found.append(_difference("overlap", was, config.overlap or now))
    if not found and not other_model:
        labels = {name: f"--stitch {new['stitch']}: {name}" for name in changed}
        found += [_difference("", old.get(one), new.get(one), labels[one]) for one in changed]
    yield from found


def _length(
    stored: Mapping[str, Any], new: Mapping[str, Any], config: RunConfig, spec: ModelSpec
) -> ChangedSetting:
    was, now = stored.get("chunking", {}).get("samples"), new["samples"]
    rate = stored.get("model", {}).get("sample_rate")
    if config.chunk_samples is not None or not rate or was is None:
        return _difference("chunk_samples", was, now)
    wanted = _seconds(now, spec.sample_rate)
    if config.chunk_seconds is not None:
        wanted = f"{config.chunk_seconds:g} s"
    return _difference("chunk_seconds", _seconds(was, rate), wanted)


def _seconds(samples: int, rate: int) -> str:
    return f"{_shortest(samples / rate, lambda seconds: round(seconds * rate) == samples)} s"


def _overlap(chunking: Mapping[str, Any], document: Mapping[str, Any]) -> str | None:
    """The share of a chunk that the next chunk repeats, as a value of `--overlap`."""
    try:
        whole, step, shared = (chunking[name] for name in ("samples", "step", "overlap"))
        if chunking["stitch"] == "none":
            shared = whole - step
            return _shortest(shared / whole, lambda share: int(whole * share) == shared)
        whole = shared + step // document["model"]["hop"]
        return _shortest(shared / whole, lambda share: round(whole * share) == shared)
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def _shortest(value: float, fits: Callable[[float], bool]) -> str:
    """The value with the fewest digits that still `fits`."""
    texts = [f"{value:.{digits}g}" for digits in range(2, 17)]
    return next((text for text in texts if fits(float(text))), texts[-1])


def _other_overlap(old: Mapping[str, Any], config: RunConfig, spec: ModelSpec) -> bool:
    """Whether the overlap differs even with the store's stitch and chunk length."""
    try:
        same = Chunking.for_model(
            spec, stitch=old["stitch"], samples=old["samples"], overlap=config.overlap
        )
    except (ConfigError, KeyError, TypeError):
        return False  # the store's chunking is not valid for this model
    return (same.step, same.overlap) != (old.get("step"), old.get("overlap"))


def _planning(plan: Plan, config: RunConfig, source: str) -> Iterator[ChangedSetting]:
    """Differences in settings of the plan that are not part of the fingerprint."""
    if plan.source != source:
        yield _difference("source", plan.source, source, "SOURCE")
    if plan.format != config.format:
        yield _difference("format", plan.format, config.format)
    for name in _UNIT_SIZE:
        was, now = getattr(plan, name), getattr(config, name)
        if now not in (None, was):
            yield _difference(name, was, now)
    # A setting that is not given now keeps its planned value: see `with_planned`.
    given = item_settings(config)
    for name in sorted(set(given) | set(plan.source_settings)):
        was, now = plan.source_settings.get(name), given.get(name)
        if name in config.model_fields_set and was != now:
            yield _difference(name, was, now)
    if "extensions" in config.model_fields_set and config.extensions != plan.extensions:
        yield _difference("extensions", plan.extensions, config.extensions)


def _difference(setting: str, was: Any, now: Any, label: str | None = None) -> ChangedSetting:
    label = label or option(setting)
    return ChangedSetting(setting, label, _shown(was), _shown(now))


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "no value"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        shown, rest = " ".join(map(str, value[:_LISTED])), len(value) - _LISTED
        return (f"{shown} and {rest} more" if rest > 0 else shown) or "no value"
    return str(value)
