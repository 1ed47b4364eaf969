"""Models that are named in a store: a store is data and must not choose which code runs.

A store may come from anyone, and its dataset.json names the model that decodes it. Built-in
families only read weights and execute nothing. Every other name refers to a Python function, which
is imported and called only with the user's consent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentmill.errors import ModelError
from latentmill.models import registry
from latentmill.models.base import ModelHandle
from latentmill.text.log import get_logger
from latentmill.text.printing import printable

_log = get_logger("models")

CONSENT = "if you trust it, add --trust-model (trust_model=True in Python)"
# A store has one of these files. `store.schema` and `plan` define them, but import this package.
_STORE_FILES = ("dataset.json", "plan/plan.json")


def resolve_stored(
    name: object,
    options: object,
    channels: str | None,
    *,
    store: str,
    trusted: bool,
    given: Mapping[str, Any],
    stored: Mapping[str, Any] | None = None,
) -> ModelHandle:
    """Find the model of a store from the name and options in the store; see `registry.resolve`.

    Options that the user has given replace those in the store. Without the option `revision`, the
    weights are those of the commit that the store records, not of a branch, which may have moved.

    Raises `ModelError` if the model is not built in and the user has not consented (`trusted`).
    """
    if not isinstance(name, str) or not isinstance(options, Mapping):
        raise ModelError(
            f"The dataset.json of the store {store} does not have a valid model: restore the file."
        )
    options = {**options, **given}
    check_named(name, options, by=f"store {store}", trusted=trusted)
    recorded = (stored or {}).get("provenance")
    commit = recorded.get("revision") if isinstance(recorded, Mapping) else None
    chosen = {"repo", "revision"} & set(given)
    if commit and not chosen and registry.takes_option(name, "revision"):
        pinned = {**options, "revision": commit}
        try:
            return registry.resolve(name, pinned, channels, stored=stored)
        except ModelError as error:  # another commit, which is here, may have the same weights
            try:
                return registry.resolve(name, options, channels, stored=stored)
            except ModelError:
                raise error from None
    return registry.resolve(name, options, channels, stored=stored)


def check_named(name: str, options: Mapping[str, Any], *, by: str, trusted: bool) -> None:
    """Raise `ModelError` if a model would run code and the user has not consented (`trusted`).

    Logs where the weights of a built-in model come from. `by` is the file or store that names the
    model.
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
        _log.warning("loading %s, as set in the %s", weights, by)


def store_of(file: Path) -> Path | None:
    """The store that contains a local file; None if there is none."""
    folders = [*file.absolute().parents, *file.resolve().parents]
    return next((f for f in folders if any((f / name).exists() for name in _STORE_FILES)), None)
