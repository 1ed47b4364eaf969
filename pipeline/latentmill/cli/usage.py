"""One-sentence errors for a wrong command line."""

from __future__ import annotations

import difflib
import re
from typing import Any

from latentmill.errors import requirement
from latentmill.text.printing import printable_lines
from latentmill.text.redact import redact_text


def explain(error: Any) -> str:
    """The sentence for an error of typer's parser. Its classes depend on the version of typer."""
    context, kind, text = error.ctx, type(error).__name__, str(error.format_message())
    command = context.command_path if context is not None else "latentmill"
    if kind == "BadParameter" and hasattr(error.__cause__, "errors"):
        cause = error.__cause__.errors()[0]
        value = str(cause["input"])
        shown = value if re.fullmatch(r"[-+.\d]+", value) else repr(value)
        text = f"invalid {_name(text)} {shown}: {requirement(cause['type'], cause['msg'])}."
    elif kind == "MissingParameter":
        text = f"{_name(text)} is missing: `{command} --help` shows how to use it."
    elif kind == "NoSuchOption":
        known = [name for one in context.command.get_params(context) for name in one.opts]
        hint = _hint(error.option_name, known, f"`{command} --help` lists the options.")
        text = f"unknown option {error.option_name}: {hint}"
    elif kind == "BadOptionUsage" and text.endswith("requires an argument."):
        text = f"{error.option_name} needs a value: write {error.option_name} VALUE."
    elif kind == "BadOptionUsage" and text.endswith("does not take a value."):
        text = f"{error.option_name} takes no value: write only {error.option_name}."
    elif found := re.fullmatch(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", text):
        text = f"unexpected argument {found[1]}: `{command} --help` shows the arguments."
    elif found := re.match(r"No such command '(.*?)'\.", text):
        hint = _hint(found[1], list(context.command.commands), "`latentmill --help` lists them.")
        text = f"unknown command {found[1]}: {hint}"
    return printable_lines(redact_text(text))


def _name(message: str) -> str:
    """The name of an argument, or the longest name of an option, in a message of the parser."""
    names: list[str] = re.findall(r"'([^']+)'", message.partition(": ")[0])
    return max(names, key=len)


def _hint(word: str, known: list[str], otherwise: str) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else otherwise
