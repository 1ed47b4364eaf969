"""Finding models by name.

`catalogue.py` lists the built-in models. A factory is a function that returns a `ModelHandle` or an
`EmbedderHandle`; its keyword arguments are the model's options, with types and defaults. A user's
own factory is `python:package.module:factory`, or an entry point of the group `latentmill.models`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, NamedTuple, Union

from latentmill.errors import ModelError
from latentmill.models.base import Channels, ModelHandle, ModelSpec
from latentmill.models.catalogue import BUILT_IN, EMBEDDERS, ENCODERS, FAMILIES, BuiltIn
from latentmill.models.embedder import EmbedderHandle, EmbedderSpec

ENTRY_POINT_GROUP = "latentmill.models"
PYTHON_PREFIX = "python:"
MEASURED = "measured"  # name of an option, and in the identity: what a factory has measured

Factory = Callable[..., ModelHandle]


class ModelEntry(NamedTuple):
    """A model that can be used by name.

    Attributes:
        name: The name that `--model` takes.
        description: One line.
        requirement: The command that installs what it needs.
        kind: `autoencoder`, `audio encoder`, `text embedder`, or `custom` for a model of another
            package.
    """

    name: str
    description: str
    requirement: str
    kind: str


def available() -> list[ModelEntry]:
    """List the models that can be used by name: the built-in ones, then the entry points.

    Families are listed as `family:REPO`, where REPO is a hub repository or a local path, or as
    `trained:PATH`.
    """
    named = [(name, model, "autoencoder") for name, model in BUILT_IN.items()]
    for families, kind in ((FAMILIES, "autoencoder"), (EMBEDDERS, "text embedder")):
        for family, model in families.items():
            own = "audio encoder" if model in ENCODERS.values() else kind
            named.append((f"{family}:{model.placeholder}", model, own))
    listed = [ModelEntry(name, m.description, m.requirement, kind) for name, m, kind in named]
    for name, point in sorted(_entry_points().items()):
        package = point.dist.name if point.dist else point.module
        listed.append(ModelEntry(name, f"from {package} ({point.value})", "", "custom"))
    return listed


def resolve(
    name: str,
    options: Mapping[str, Any] | None = None,
    channels: str | None = None,
    *,
    stored: Mapping[str, Any] | None = None,
) -> ModelHandle:
    """Find a model's weights and its spec by the model's name, without loading it.

    The name is one that `available` lists (with a repository or path in place of REPO or PATH) or
    `python:package.module:factory`; the options are the factory's keyword arguments. With channels
    `split` a mono model runs on each channel of stereo audio; `mono` requires a mono model.
    `stored` is the description of a model in a store: if the factory has an option `measured`, it
    gets the measured values from there, so that a store is continued with the ones that it was
    planned with. Raises `ModelError` if a name, option, package or file is missing or wrong.
    """
    if channels not in (None, *typing.get_args(Channels)):
        raise ModelError(f"Invalid channels {channels!r}: use mono or split.")
    factory = _find(name, FAMILIES)
    handle = _made(name, factory, {**_measured(factory, stored), **(options or {})})
    if isinstance(getattr(handle, "spec", None), EmbedderSpec):
        raise _other_input(name, handle.spec.input)
    if not isinstance(getattr(handle, "spec", None), ModelSpec) or not hasattr(handle, "load"):
        raise ModelError(
            f"Model {name}: its factory returned a {type(handle).__name__}, but must return an "
            "object with a `spec` of type ModelSpec and a method `load(device)`; see "
            "latentmill.models.base.ModelHandle."
        )
    if channels is not None and handle.spec.channels != 1:
        raise ModelError(
            f"Model {name} takes {handle.spec.channels} channels: leave out channels {channels}, "
            "which is for mono models."
        )
    model: ModelHandle = handle
    if channels != "split":
        return model
    from latentmill.models.inference.split import SplitHandle  # imports torch

    return SplitHandle(model)


def resolve_embedder(name: str, options: Mapping[str, Any] | None = None) -> EmbedderHandle:
    """Find the model of texts or latents with this name, as `resolve` finds one of audio."""
    family = name.partition(":")[0]
    if family not in EMBEDDERS and _is_built_in(name):
        raise ModelError(
            f"Model {name} encodes audio: leave out --from to run it on the audio of the items."
        )
    handle = _made(name, _find(name, EMBEDDERS), options)
    if isinstance(getattr(handle, "spec", None), ModelSpec):
        raise ModelError(
            f"Model {name} encodes audio: leave out --from to run it on the audio of the items."
        )
    if not isinstance(getattr(handle, "spec", None), EmbedderSpec) or not hasattr(handle, "load"):
        raise ModelError(
            f"Model {name}: its factory returned a {type(handle).__name__}, but must return an "
            "object with a `spec` of type EmbedderSpec and a method `load(device)`; see "
            "latentmill.models.embedder.EmbedderHandle."
        )
    embedder: EmbedderHandle = handle
    return embedder


def embeds_only(name: str) -> bool:
    """Whether a name is that of a built-in model that does not take audio."""
    family = name.partition(":")[0]
    return family in EMBEDDERS and family not in FAMILIES


def only_encodes(name: object) -> bool:
    """Whether a name is that of a built-in model of audio without a decoder."""
    return isinstance(name, str) and name.partition(":")[0] in ENCODERS


def _made(name: str, factory: Factory, options: Mapping[str, Any] | None) -> Any:
    checked = dict(options or {})
    _check_options(name, factory, checked)
    return factory(**checked)


def _measured(factory: Factory, stored: Mapping[str, Any] | None) -> dict[str, str]:
    """What a store's model was measured with, if the factory takes it."""
    value = (stored or {}).get(MEASURED)
    takes = isinstance(value, str) and MEASURED in inspect.signature(factory).parameters
    return {MEASURED: str(value)} if takes else {}


def takes_option(name: str, option: str) -> bool:
    """Whether a model of audio has an option with this name. Imports its factory."""
    return option in inspect.signature(_find(name, FAMILIES)).parameters


def _other_input(name: str, taken: str) -> ModelError:
    what, where = ("texts", "metadata:NAME") if taken == "text" else ("latents", "latents")
    return ModelError(
        f"Model {name} does not take audio but {what}: use `latentmill add STORE --field NAME "
        f"--from {where} --model {name}`."
    )


def code_of(name: str) -> str | None:
    """The function that `resolve` would import and call for a name; None for built-in models."""
    if name.startswith(PYTHON_PREFIX):
        return name.removeprefix(PYTHON_PREFIX)
    if _is_built_in(name):
        return None
    point = _entry_points().get(name)
    return None if point is None else f"{point.module}:{point.attr}"


def weights_of(name: str, options: Mapping[str, Any]) -> str | None:
    """Describe a model's weights and where they come from; None if it has no weights."""
    family, _, repo = name.partition(":")
    has_weights = name in BUILT_IN and bool(BUILT_IN[name].requirement)
    if not has_weights and family not in FAMILIES | EMBEDDERS:
        return None
    where = options.get("repo", repo) or "its default repository"
    revision = f" (revision {options['revision']})" if options.get("revision") else ""
    return f"the weights of {family} from {where}{revision}"


def _entry_points() -> dict[str, EntryPoint]:
    """Entry points by name, without those that have a built-in model's name."""
    points = entry_points(group=ENTRY_POINT_GROUP)
    return {point.name: point for point in points if not _is_built_in(point.name)}


def _is_built_in(name: str) -> bool:
    return name in BUILT_IN or name.partition(":")[0] in FAMILIES | EMBEDDERS


def _find(name: str, families: Mapping[str, BuiltIn]) -> Factory:
    """The factory of a name. `families` are those with repositories that it may belong to."""
    if name.startswith(PYTHON_PREFIX):
        return _import(name, name.removeprefix(PYTHON_PREFIX))
    if name in BUILT_IN:
        return _import(name, BUILT_IN[name].factory)
    family, _, repo = name.partition(":")
    if family in families:
        model = families[family]
        if repo in ("", model.placeholder):
            raise ModelError(
                f"Model {family} needs a repository or a local path: write "
                f"{family}:{model.placeholder}, as in {family}:{model.example}."
            )
        return partial(_import(name, model.factory), repo)
    points = _entry_points()
    if name in points:
        return _import(name, f"{points[name].module}:{points[name].attr}")
    if families is FAMILIES and family in EMBEDDERS:
        raise _other_input(name, "text")
    own = {} if families is EMBEDDERS else BUILT_IN
    known = [*own, *(f"{f}:{model.placeholder}" for f, model in families.items()), *sorted(points)]
    near = {each.partition(":")[0]: each for each in known}
    close = difflib.get_close_matches(family.lower(), near, n=1)
    hint = f"did you mean {near[close[0]]}? " if close else ""
    raise ModelError(
        f"Unknown model {name!r}; {hint}known models are {', '.join(known)} and "
        "python:package.module:factory."
    )


def _import(name: str, target: str) -> Factory:
    """Import an attribute given as `package.module:attribute`."""
    module, _, attribute = target.partition(":")
    if not (attribute and all(part.isidentifier() for part in module.split("."))):
        raise ModelError(
            f"Model {name}: write it as python:package.module:factory; a file models.py is the "
            "module `models` if its folder is in PYTHONPATH."
        )
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ModelError(f"Model {name}: cannot import {target}: {error}.") from error
    if not callable(found):
        raise ModelError(
            f"Model {name}: {target} is not a function but of type {type(found).__name__}; write "
            "the name of the factory."
        )
    factory: Factory = found
    return factory


def _check_options(name: str, factory: Factory, options: Mapping[str, Any]) -> None:
    """Check options against the factory's signature, so that models need not check types."""
    try:
        parameters = inspect.signature(factory, eval_str=True).parameters
    except NameError:  # types that are imported for the type checker only are not checked
        parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {
        n: p for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    }
    listed = ", ".join(_describe(p) for p in named.values()) or "none"
    for option, value in options.items():
        if option not in named:
            if takes_any:
                continue
            close = difflib.get_close_matches(option, named, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ModelError(
                f"Model {name}: unknown option {option!r}; {hint}options are {listed}."
            )
        if not _fits(value, named[option].annotation):
            raise ModelError(
                f"Model {name}: option {option} must be {_type_name(named[option].annotation)}, "
                f"not {value!r}; options are {listed}."
            )
    missing = [n for n, p in named.items() if p.default is p.empty and n not in options]
    if missing:
        raise ModelError(
            f"Model {name}: option {', '.join(missing)} is required; options are {listed}."
        )


def _fits(value: object, hint: Any) -> bool:
    """Whether `value` has the annotated type; annotations of other kinds accept all values."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is None or hint is types.NoneType:
        return value is None
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    return True


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _describe(parameter: inspect.Parameter) -> str:
    kind = (
        "" if parameter.annotation is parameter.empty else f": {_type_name(parameter.annotation)}"
    )
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{parameter.name}{kind}{default}"
