"""An MDCT like a model from a package and the hub, both of which may change.

For `python:support.hub_model:build`. The weights of a commit are a scale factor.
"""

from __future__ import annotations

from dataclasses import replace

from latentmill.errors import ModelError
from latentmill.models.base import ModelHandle
from latentmill.models.registry import resolve

OLD, NEW = "a" * 40, "b" * 40  # commits
# `absent` is a commit that cannot be downloaded; NEW: the commit that has the same weights.
now = {"main": OLD, "package_version": "4.57.1", "absent": "", NEW: NEW}


def build(revision: str | None = None, repo: str = "owner/name") -> ModelHandle:
    """The model of a revision; a local `repo` has none."""
    local = repo.startswith("/")
    assert not (local and revision)
    commit = {None: now["main"], "main": now["main"]}.get(revision, revision)
    if commit == now["absent"]:
        raise ModelError(f"Commit {commit} is not on this machine: download it.")
    handle = resolve("mdct", {"hop": 64, "sample_rate": 44100})
    spec = replace(
        handle.spec,
        identity={
            **handle.spec.identity,
            "package": "some-package",
            "package_version": now["package_version"],
            "sha256_weights": (OLD if local else now.get(str(commit), str(commit))) + "0" * 24,
        },
        provenance={"repo": repo, "revision": None if local else commit},
    )
    return replace(handle, spec=spec)  # type: ignore[type-var]
