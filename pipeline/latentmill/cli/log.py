"""Log messages on the command line: the options -v and -q, and the handler that prints to stderr.

Results go to stdout and are not log messages.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from latentmill.text.log import ROOT
from latentmill.text.printing import printable_json, printable_lines
from latentmill.text.redact import redact_text

Function = TypeVar("Function", bound=Callable[..., Any])
LEVEL = f"{ROOT}.level"  # key in click's `ctx.meta`, which a command shares with its group


def _set_level(level: int) -> Any:
    def callback(context: typer.Context, given: bool) -> None:
        if given:
            context.meta[LEVEL] = level

    return callback


Verbose = Annotated[
    bool,
    typer.Option(
        "-v",
        "--verbose",
        help="Also print what each worker does, and requests that are retried.",
        callback=_set_level(logging.DEBUG),
        expose_value=False,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "-q",
        "--quiet",
        help="Print only results and errors, without progress and warnings.",
        callback=_set_level(logging.ERROR),
        expose_value=False,
    ),
]


@functools.cache
def _verbosity() -> Any:
    """The two options as typer makes them from their annotations."""

    def command(_verbose: Verbose = False, _quiet: Quiet = False) -> None: ...

    app = typer.Typer(add_completion=False)
    app.command()(command)
    return typer.main.get_command(app).params


class Command(TyperCommand):
    """A command with the options -v and -q, whose log messages are printed on stderr."""

    def __init__(self, *args: Any, help: str | None = None, **options: Any) -> None:  # noqa: A002
        # A docstring's lines are longer than those of a terminal, and Typer would keep both breaks.
        text = None if help is None else re.sub(r"(?<!\n)\n(?!\n)", " ", help)
        super().__init__(*args, help=text, **options)

    def get_params(self, ctx: Any) -> Any:
        *params, help_option = super().get_params(ctx)
        return [*params, *_verbosity(), help_option]

    def invoke(self, ctx: Any) -> Any:
        with messages_on_stderr(ctx.meta.get(LEVEL, logging.INFO)):
            return super().invoke(ctx)


class Commands(typer.Typer):
    """A Typer app of such commands."""

    def command(self, *args: Any, **options: Any) -> Callable[[Function], Function]:
        return super().command(*args, **{"cls": Command, **options})


class _Handler(logging.Handler):
    """Prints to the current sys.stderr: a progress bar replaces it, to print above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)  # noqa: T201
        except Exception:  # noqa: BLE001  as all handlers of the standard library
            self.handleError(record)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"{ROOT}: {record.levelname.lower()}: {text}"
        if record.exc_info:
            text += "\n" + printable_lines(redact_text(self.formatException(record.exc_info)))
        if logging.getLogger(ROOT).isEnabledFor(logging.DEBUG):
            moment = datetime.datetime.fromtimestamp(record.created)
            text = f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d} {text}"
        return text


class _Json(logging.Formatter):
    """One object per line, like the other events of `--log-format json`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        values = {
            "time": moment.isoformat(timespec="milliseconds"),
            "event": "note",
            "level": record.levelname.lower(),
            "logger": record.name,
            "text": record.getMessage(),
        }
        if record.exc_info:
            values["traceback"] = redact_text(self.formatException(record.exc_info))
        return printable_json(values)


_handler = _Handler()
_no_handler = logging.NullHandler()


def set_format(log_format: str) -> None:
    """Print the messages of the current command as `text` or `json`."""
    _handler.setFormatter(_Json() if log_format == "json" else _Text())


@contextlib.contextmanager
def messages_on_stderr(level: int) -> Iterator[None]:
    """Print the log messages of at least `level`, until the command ends."""
    # gcsfs logs a traceback for each request that it gives up, which is then retried or reported.
    logging.getLogger("gcsfs").addHandler(_no_handler)
    logger = logging.getLogger(ROOT)
    before = logger.level, logger.propagate
    set_format("text")
    logger.addHandler(_handler)
    logger.setLevel(level)
    logger.propagate = False  # a package that the model imports may add a handler to the root
    try:
        yield
    finally:
        logger.setLevel(before[0])
        logger.propagate = before[1]
        logger.removeHandler(_handler)
