"""The folder in which Ray runs a job, which it deletes afterwards."""

from __future__ import annotations

import os
from pathlib import Path

from latentmill.errors import ConfigError

RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of a job


def refuse_job_folder(name: str, path: str, use: str = "an absolute path") -> None:
    """Raise ConfigError if a Ray job is about to write to a relative path."""
    relative = "://" not in path and not Path(path).expanduser().is_absolute()
    if relative and RAY_JOB_VARIABLE in os.environ:
        raise ConfigError(
            f"{name} {path} is a relative path, and Ray deletes a job's folder after the job: "
            f"use {use}."
        )
