"""The options of `encode` and `plan`, generated from the settings in config.py.

An option that is not given is None, so that it does not override the config file.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from latentmill.config import FIELD_SETTINGS, RunConfig, setting
from latentmill.sources.settings import option

Command = Callable[..., Any]

ModelOption = Annotated[
    list[str] | None,
    typer.Option(
        help=RunConfig.model_fields["model_options"].description,
        rich_help_panel=setting("model_options").group,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        help="Branch, tag or commit of the weights' Hugging Face repository. \\[default: main]",
        rich_help_panel=setting("model_options").group,
    ),
]
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="NAME=MODEL",
        help=RunConfig.model_fields["with_fields"].description,
        rich_help_panel=setting("with_fields").group,
    ),
]
AddedModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Model that computes the values, e.g. dac:descript/dac_44khz; `latentmill models` "
        "lists them. Required unless --from is a file.",
        rich_help_panel=setting("model").group,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="YAML file of settings, e.g. run.yaml. Options on the command line override it."
    ),
]


def encode_options() -> dict[str, Any]:
    """Annotations of all options and arguments of `encode`, by Python name."""
    options: dict[str, Any] = {}
    for name in RunConfig.model_fields:
        if name == "with_fields":
            options["with_"] = With
        elif name == "model_options":
            options |= {"model_option": ModelOption, "revision": Revision}
        else:
            options[name] = annotation(name)
    first = {"source": options.pop("source"), "out": options.pop("out"), "config": Config}
    return first | {name: options[name] for name in sorted(options, key=_group)}


def add_options() -> dict[str, Any]:
    """Annotations of the options of `add` that are settings, by Python name."""
    options = encode_options()
    taken = {*FIELD_SETTINGS, "model_option", "revision"}
    return {name: kind for name, kind in options.items() if name in taken} | {"model": AddedModel}


def _group(name: str) -> int:
    groups = list(dict.fromkeys(setting(one).group for one in RunConfig.model_fields))
    special = "with_fields" if name == "with_" else "model_options"
    known = name if name in RunConfig.model_fields else special
    return groups.index(setting(known).group)


def annotation(name: str) -> Any:
    """The typer annotation of one setting's option or argument."""
    field = RunConfig.model_fields[name]
    text, typed = str(field.description), option(name)
    if not typed.startswith("-"):
        return Annotated[str | None, typer.Argument(metavar=typed, help=text)]
    kind = _option_type(field)
    if kind is bool and field.default is None:
        typed += f"/--no-{typed.removeprefix('--')}"
    if field.default not in (None, False, ()) and "[default:" not in text:
        text += f" [default: {_shown(field.default)}]"
    text = text.replace("[", "\\[")  # in rich markup, [word] is a style
    panel = setting(name).group or None
    return Annotated[kind | None, typer.Option(typed, help=text, rich_help_panel=panel)]


def _shown(default: Any) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)


def _option_type(field: FieldInfo) -> Any:
    """The type that typer parses; RunConfig validates the value."""
    kind = field.annotation
    if isinstance(kind, types.UnionType):  # `int | None`
        kind = next(one for one in get_args(kind) if one is not types.NoneType)
    if get_origin(kind) is tuple:
        return list[str]
    return kind if kind in (bool, int, float) else str


def model_options() -> dict[str, Any]:
    """Annotations of the options that name a model's variant."""
    return {
        "model_option": ModelOption,
        "revision": Revision,
        "channels": annotation("channels"),
    }


def with_options(command: Command, kinds: Mapping[str, tuple[Any, Any]]) -> Command:
    """Give a command keyword arguments, each with an annotation and a default for typer."""

    def called(**options: Any) -> Any:
        return command(**options)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in kinds.items()
    ]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {name: kind for name, (kind, _) in kinds.items()}
    return called
