"""The examples that the modules of protocols open with."""

from __future__ import annotations

import re
import textwrap
from typing import Any


def example(module: Any) -> str:
    """The first indented block of a module's docstring."""
    block = re.search(r"\n\n((?:    .*\n|\n)+)", module.__doc__)
    assert block is not None
    return textwrap.dedent(block[1])
