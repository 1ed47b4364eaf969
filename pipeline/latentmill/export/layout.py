"""What a folder of files for another tool is: one class for each tool, see `Layout`."""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import quote

import numpy as np

from latentmill.errors import ConfigError, ItemError
from latentmill.fields.values import text_of
from latentmill.record import FloatArray, Record
from latentmill.store.store import LatentStore

# Metadata fields that may contain a caption; the first one that exists is used.
PROMPT_FIELDS = ("prompt", "caption", "text", "description", "title")


@dataclass(frozen=True)
class Role:
    """What a field of the store can be in a layout.

    Attributes:
        kinds: The kinds of fields that it takes.
        required: Whether the tool cannot read a sample without it.
    """

    kinds: tuple[str, ...]
    required: bool = False


class Layout(ABC):
    """The files that one tool reads, for one store.

    Args:
        store: The store.
        root: The folder or URL of the export.
        fields: The chosen fields, by role.
        frames: The length to which shorter latents are extended, if `takes_frames`.

    Raises:
        ConfigError: The tool cannot be trained on this store or with these fields.

    Attributes:
        tool: Its name in messages.
        roles: What fields can be, by role. A field without a role gets the first that takes its
            kind.
        takes_frames: Whether `frames` has an effect.
        hashed: Whether the last file of a sample has a hash of the others.
    """

    tool: ClassVar[str]
    roles: ClassVar[Mapping[str, Role]] = {}
    takes_frames: ClassVar[bool] = False
    hashed: ClassVar[bool] = False

    def __init__(
        self,
        store: LatentStore,
        root: str,
        fields: Mapping[str, LatentStore],
        frames: int | None = None,
    ) -> None:
        self.store, self.root, self.fields, self.frames = store, root, fields, frames
        if store.chunking.stitch == "none" or store.codes:
            what = "codes" if store.codes else "overlapping chunks (stitch none)"
            raise ConfigError(
                f"{store.url} contains {what}, but {self.tool} trains on one latent per item: "
                "export another store."
            )
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Raise ConfigError if the tool cannot be trained on this store or with these fields."""

    @staticmethod
    def name(key: str) -> str:
        """The path of an item without folder and extension; `urllib.parse.unquote` restores it."""
        return escaped(key)

    @abstractmethod
    def paths(self, name: str) -> Sequence[str]:
        """The files of a sample, in the order in which they are written."""

    @abstractmethod
    def contents(self, record: Record, values: Mapping[str, FloatArray]) -> Sequence[bytes]:
        """What the files of a sample contain, in the order of `paths`.

        Args:
            record: The record.
            values: Its values of the fields, by role, `[D, n]`.

        Raises:
            ItemError: The tool cannot read this sample.
        """

    def last(self, names: Sequence[str]) -> Mapping[str, bytes]:
        """Files about all samples, which are written last, by path. `names` are the samples'."""
        return {}

    def means(self, latent: Any) -> FloatArray:
        """The latent, or the means of a posterior, float32 `[C, T]`."""
        found: FloatArray = latent[: len(latent) - self.store.origin.deviations].astype(np.float32)
        return found


def caption_of(metadata: Mapping[str, Any]) -> str:
    """The first of `PROMPT_FIELDS` of an item that is a text, number or list of texts, or ""."""
    given = (name for name in PROMPT_FIELDS if metadata.get(name) != [])
    texts = (text_of(metadata.get(name), name) for name in given)
    return next((text for text in texts if isinstance(text, str)), "")


def escaped(key: str) -> str:
    """Convert a key to a relative path without extension; `urllib.parse.unquote` restores the key.

    `%`, control characters, leading whitespace, hidden names, `..`, and empty names of folders are
    escaped, which no tool reads or which lead out of the folder.
    """
    name = key.replace("%", "%25")
    name = re.sub(r"(?<=/)/|^/|/$", "%2F", name)
    name = re.sub(r"[\x00-\x1f\x7f]|^\s", lambda match: quote(match[0]), name)
    return re.sub(r"(?<![^/])\.", "%2E", name)


def with_first_escaped(name: str) -> str:
    """A path whose last name is reserved, with the first character of that name escaped."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}%{ord(last[0]):02X}{last[1:]}"


def torch_bytes(values: Mapping[str, Any]) -> bytes:
    """A dict of arrays and plain values as `torch.save` writes it, with tensors for the arrays.

    `torch.load(weights_only=True)` reads it. Equal values give equal bytes.
    """
    import torch  # slow, and other formats do not need it

    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, np.ndarray)
        else value
        for name, value in values.items()
    }
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def same_length(what: str, found: int, frames: int) -> None:
    """Raise ItemError unless a field has one value for each frame of the latent."""
    if found != frames:
        raise ItemError(f"{what} has {found} frames, the latent {frames}")
