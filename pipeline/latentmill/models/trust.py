"""Models that a store names: a store is data, and may not choose which code runs.

Anyone can write a store, and its dataset.json names the model that decodes it. Built-in families
only read weights, which execute nothing. Every other name stands for a Python function, which is
imported and called only with the user's consent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentmill.errors import ModelError
from latentmill.models import registry
from latentmill.models.base import ModelHandle
from latentmill.text.printing import printable

_log = logging.getLogger("latentmill")

CONSENT = "if you trust it, add --trust-model (trust_model=True in Python)"
# A store has one of these: `store.schema` and `plan` define them, but come later in the imports.
_STORE_FILES = ("dataset.json", "plan/plan.json")


def resolve_stored(
    name: object, options: object, channels: str | None, *, store: str, trusted: bool
) -> ModelHandle:
    """Find the model that a store names; see `registry.resolve`.

    Args:
        name: The model's name, as the store has it.
        options: Its options, as the store has them.
        channels: As of `registry.resolve`.
        store: The store, for messages.
        trusted: Whether the user consented to run code that the store names.

    Raises:
        ModelError: The model is not built in and not trusted, or `registry.resolve` fails.
    """
    if not isinstance(name, str) or not isinstance(options, Mapping):
        raise ModelError(f"The store {store} does not name its model: restore its dataset.json.")
    check_named(name, options, by=f"store {store}", trusted=trusted)
    return registry.resolve(name, options, channels)


def check_named(name: str, options: Mapping[str, Any], *, by: str, trusted: bool) -> None:
    """Refuse a model that would run code; log where a built-in one takes its weights from.

    Args:
        name: The model's name.
        options: Its options.
        by: What names it, for messages.
        trusted: Whether the user consented.

    Raises:
        ModelError: It is not built in and not trusted.
    """
    code = registry.code_of(name)
    if code is not None and not trusted:
        arguments = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise ModelError(
            f"The {by} names the model {printable(name)}, which is not built in and would run "
            f"{printable(code)}({printable(arguments)}): {CONSENT}."
        )
    weights = registry.weights_of(name, options)
    if weights is not None:
        _log.warning("%s", printable(f"latentmill: loading {weights}, named by the {by}"))


def store_of(file: Path) -> Path | None:
    """The store that a local file lies in, if it lies in one."""
    folders = [*file.absolute().parents, *file.resolve().parents]
    return next((f for f in folders if any((f / name).exists() for name in _STORE_FILES)), None)
