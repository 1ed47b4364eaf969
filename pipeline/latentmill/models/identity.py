"""Whether a model is the one that has encoded a store, for decoding its latents."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from latentmill.errors import ModelError
from latentmill.models.base import ModelSpec
from latentmill.text.log import get_logger

_log = get_logger("models")

VERSION = "package_version"  # in the identity of a model whose code is in another package
_SHAPE = ("sample_rate", "channels", "latent_channels", "hop", "scale_factor")
_HASH, _HASH_DIGITS = "sha256", 8
_SAFE_VERSION = re.compile(r"[\w.+!-]{1,40}")


def check_decoder(
    stored: Mapping[str, Any], spec: ModelSpec, store: str, given: Mapping[str, Any]
) -> None:
    """Raise `ModelError` if a model is not the one that a store describes.

    If only the version of its package differs, that is a warning: the weights are the same.

    Args:
        stored: The description of the model in dataset.json.
        spec: The model.
        store: The URL of the store.
        given: The model options that the user has given.
    """
    current = {**spec.identity, **{name: getattr(spec, name) for name in _SHAPE}}
    changed = [name for name, value in current.items() if stored.get(name) != value]
    if changed == [VERSION]:
        _log.warning(
            "%s was encoded with %s %s and is decoded with version %s",
            store,
            spec.identity.get("package", "package"),
            stored.get(VERSION),
            current[VERSION],
        )
    elif changed:
        differences = "; ".join(
            f"{name} {_shown(name, stored.get(name))} in the store, {_shown(name, current[name])} "
            "here"
            for name in changed
        )
        raise ModelError(
            f"{stored.get('asked')} is not the model that encoded {store} ({differences}): "
            f"{_advice(stored, spec, changed, given)}."
        )


def _shown(name: str, value: object) -> str:
    return str(value)[:_HASH_DIGITS] if name.startswith(_HASH) and value else str(value)


def _advice(
    stored: Mapping[str, Any], spec: ModelSpec, changed: list[str], given: Mapping[str, Any]
) -> str:
    """What the user can do. A store comes from anyone, so it does not name the package."""
    origin = stored.get("provenance")
    commit = origin.get("revision") if isinstance(origin, Mapping) else None
    version, package = str(stored.get(VERSION)), spec.identity.get("package")
    if "revision" in given and commit:
        return f"use --model-option revision={commit}"
    if given:
        return (
            f"leave out the model options {', '.join(given)}, or use options that change only "
            "decoding, such as diffusion_steps"
        )
    if VERSION in changed and package and _SAFE_VERSION.fullmatch(version):
        return f"run `pip install {package}=={version}`"
    if commit and isinstance(origin, Mapping):
        return f"use the weights of {origin.get('repo')} at commit {commit}"
    return "install or download the model that encoded it"
