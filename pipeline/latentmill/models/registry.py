"""Models by name.

A new family is one file with a factory and one line in `_BUILT_IN`. A factory is a function whose
keyword arguments are the model's options, with types and defaults, and that returns a
`ModelHandle`. A user's own factory needs no line here: `python:package.module:factory`, or an
entry point of the group `latentmill.models`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, NamedTuple, Union

from latentmill.errors import ModelError
from latentmill.models.base import ModelHandle, ModelSpec

ENTRY_POINT_GROUP = "latentmill.models"
PYTHON_PREFIX = "python:"

Factory = Callable[..., ModelHandle]


class ModelEntry(NamedTuple):
    """A model that can be asked for: its name, one line about it, and what it needs installed."""

    name: str
    description: str
    requirement: str


class _BuiltIn(NamedTuple):
    factory: str  # module:attribute, imported when the model is asked for
    description: str
    requirement: str = ""


_LINEAR_CAE = "pip install 'latentmill[linear-cae]'"
_BUILT_IN = {
    "mdct": _BuiltIn(
        "latentmill.models.mdct:build",
        "exactly linear and invertible transform, no weights (demo, tests, baseline)",
    ),
    "lin-cae": _BuiltIn(
        "latentmill.models.linear_cae:lin_cae",
        "linear consistency autoencoder, 44.1 kHz mono, 64 channels at 10.8 frames/s",
        _LINEAR_CAE,
    ),
    "lin-cae-2": _BuiltIn(
        "latentmill.models.linear_cae:lin_cae_2",
        "second linear consistency autoencoder, the same architecture, scale factor 40",
        _LINEAR_CAE,
    ),
    "m2l": _BuiltIn(
        "latentmill.models.linear_cae:m2l",
        "their baseline without linearity training, the same architecture, scale factor 15",
        _LINEAR_CAE,
    ),
}


def available() -> list[ModelEntry]:
    """List the models that `resolve` knows by name: the built-in ones, then entry points."""
    listed = [ModelEntry(name, m.description, m.requirement) for name, m in _BUILT_IN.items()]
    for name, point in sorted(_entry_points().items()):
        package = point.dist.name if point.dist else point.module
        listed.append(ModelEntry(name, f"from {package} ({point.value})", ""))
    return listed


def resolve(name: str, options: Mapping[str, Any] | None = None) -> ModelHandle:
    """Find a model by name: its weights are located and its spec is known, nothing is loaded.

    Args:
        name: A name that `available` lists, or `python:package.module:factory`.
        options: The factory's keyword arguments.

    Raises:
        ModelError: The name or an option is unknown, an option has the wrong type, or the
            model's package or weights are missing.
    """
    factory = _find(name)
    checked = dict(options or {})
    _check_options(name, factory, checked)
    handle = factory(**checked)
    if not isinstance(getattr(handle, "spec", None), ModelSpec) or not hasattr(handle, "load"):
        raise ModelError(
            f"Model {name}: its factory gave a {type(handle).__name__}, which has no `spec` of "
            "type ModelSpec and no `load(device)`; see latentmill.models.base.ModelHandle."
        )
    return handle


def _entry_points() -> dict[str, EntryPoint]:
    """The entry points that do not take a built-in model's name."""
    points = entry_points(group=ENTRY_POINT_GROUP)
    return {point.name: point for point in points if point.name not in _BUILT_IN}


def _find(name: str) -> Factory:
    if name.startswith(PYTHON_PREFIX):
        return _import(name, name.removeprefix(PYTHON_PREFIX))
    if name in _BUILT_IN:
        return _import(name, _BUILT_IN[name].factory)
    points = _entry_points()
    if name in points:
        return _import(name, f"{points[name].module}:{points[name].attr}")
    known = [*_BUILT_IN, *sorted(points)]
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ModelError(
        f"Unknown model {name!r}; {hint}known are {', '.join(known)} and "
        "python:package.module:factory."
    )


def _import(name: str, target: str) -> Factory:
    """Import `package.module:attribute`."""
    module, separator, attribute = target.partition(":")
    if not (module and separator and attribute):
        raise ModelError(f"Model {name}: write it as python:package.module:factory.")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"Model {name}: cannot import {target}: {error}.") from error
    if not callable(found):
        raise ModelError(f"Model {name}: {target} is no function, but a {type(found).__name__}.")
    factory: Factory = found
    return factory


def _check_options(name: str, factory: Factory, options: Mapping[str, Any]) -> None:
    """Compare options with the factory's signature, so that no model checks types itself."""
    parameters = _signature(factory).parameters
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


def _signature(factory: Factory) -> inspect.Signature:
    try:
        return inspect.signature(factory, eval_str=True)
    except NameError:  # annotations that exist for the type checker alone are not checked
        return inspect.signature(factory)


def _fits(value: object, hint: Any) -> bool:
    """Whether `value` is of the annotated type; annotations that say nothing fit everything."""
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
