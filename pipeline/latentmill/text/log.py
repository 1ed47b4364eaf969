"""The loggers of the library: `latentmill.PACKAGE`, as in `latentmill.engine`.

The library sets no level and adds no handler, so Python's default applies: warnings go to stderr,
and a program turns the rest on with `logging.getLogger("latentmill").setLevel(logging.INFO)`.
"""

from __future__ import annotations

import logging

from latentmill.text.printing import printable
from latentmill.text.redact import redact_text

ROOT = "latentmill"


def get_logger(package: str) -> logging.Logger:
    """The logger of a package. It masks secrets and escapes control characters in messages."""
    logger = logging.getLogger(f"{ROOT}.{package}")
    logger.addFilter(_make_safe)  # once, however often it is called
    return logger


def _make_safe(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(redact_text(record.getMessage())), ()
    return True
