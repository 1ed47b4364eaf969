"""The options of the command `probe`, and what it prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

import typer

from latentmill.text.printing import counted, number_text

if TYPE_CHECKING:  # they import torch
    from latentmill.evaluation.probe import Probe
    from latentmill.models.base import ModelSpec

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model to measure, e.g. python:my_module:factory.")
]
Audio = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Folder or other source of recordings to measure with. \\[default: synthesised music]",
    ),
]


def shown(result: Probe) -> str:
    """The text that `probe` prints."""
    mark = {"passed": "ok", "failed": "FAILED", "not measured": "-"}
    rows = [("check", "", "claimed", "measured")]
    rows += [(one.name, mark[one.status], one.claimed, one.measured) for one in result.checks]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{result.model} on {result.device}, measured with {result.audio}", ""]
    for *cells, last in rows:
        padded = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{padded}  {last}".rstrip())
    if (values := result.latents) is not None:
        lines += [
            "",
            f"latents: {number_text(values.minimum)} to {number_text(values.maximum)}, "
            f"mean {number_text(values.mean)}, standard deviation {number_text(values.std)}",
        ]
    passed = sum(one.status == "passed" for one in result.checks)
    lines += ["", *result.failed] if result.failed else ["", f"{counted(passed, 'check')} passed"]
    return "\n".join([*lines, "", "the spec with measured values:", _source(result.spec)])


def _source(spec: ModelSpec) -> str:
    """Python source of a spec, with one argument on each line."""
    lines = []
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name == "provenance" or value == field.default:
            continue
        text = repr(dict(value) if isinstance(value, Mapping) else value)
        lines.append(f"    {field.name}={text},")
    return "\n".join(["ModelSpec(", *lines, ")"])
