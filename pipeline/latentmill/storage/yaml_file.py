"""Settings in YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from latentmill.errors import ConfigError


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The settings in a YAML file; ConfigError if it cannot be read or is not a mapping."""
    try:
        loaded = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"Cannot read config {file} ({error.strerror}): check the path."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        cause = " ".join(str(error).split())
        raise ConfigError(f"Config {file} is not valid YAML: {cause}.") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"Config {file} must contain lines of the form `setting: value`.")
    return loaded
