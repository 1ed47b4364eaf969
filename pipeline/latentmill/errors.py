"""The errors of latentmill and the exit code that the command line returns for each.

Exit codes: 0 every item was encoded or skipped; 1 a bug in latentmill; 2 an invalid option or
config; 3 the run is complete, but items failed; 4 the source cannot be used; 5 the store does not
match the run; 6 storage failed (disk full, no permission); 7 the model cannot be loaded;
8 `verify` or `probe` found faults; 9 units failed, so their items have no result yet, or a
worker process died; 10 training cannot continue; 130 interrupted.
"""

from __future__ import annotations

import re

from latentmill.text.redact import redact_text


class LatentmillError(Exception):
    """Base class of all errors for the user: one sentence with what is wrong and what to do.

    Secrets in the message are masked.
    """

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact_text(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(LatentmillError):
    """An option, a config value or a file name is invalid."""

    exit_code = 2


class SourceError(LatentmillError):
    """The source is missing, empty or cannot be read."""

    exit_code = 4


class StoreError(LatentmillError):
    """The store does not match this run (fingerprint or plan), is damaged, or does not exist."""

    exit_code = 5


class StorageError(LatentmillError):
    """Reading or writing failed, for example because the disk is full or access is denied."""

    exit_code = 6


class DamagedShardError(StorageError):
    """A shard was read, but its bytes are not those that were written."""


class LoadTaskError(StorageError):
    """No node of the cluster can load audio in tasks, for example because their disks are full."""


class ModelError(LatentmillError):
    """The model is unknown, cannot be loaded or does not work, or its options are invalid."""

    exit_code = 7


class VerifyError(LatentmillError):
    """`verify` found faults in a store, or `probe` found that a model fails a check."""

    exit_code = 8


class UnitsFailedError(LatentmillError):
    """Units could not be encoded because their workers died; rerunning tries them again."""

    exit_code = 9


class HeadGoneError(UnitsFailedError):
    """The head node of the Ray cluster is gone; rerunning on another cluster resumes."""


class TrainingError(LatentmillError):
    """Training an autoencoder cannot continue, for example because the loss is NaN."""

    exit_code = 10


class WorkerError(LatentmillError):
    """A worker process of a training loader or of a cluster died; run again."""

    exit_code = UnitsFailedError.exit_code


class ItemError(LatentmillError):
    """One item cannot be encoded; the message, one line, is recorded as the item's reason."""

    exit_code = 3


class IncompleteStoreWarning(UserWarning):
    """The store was opened before all items of its plan were encoded."""


class FieldBehindWarning(UserWarning):
    """A store has changed since the values of one of its fields were computed."""


class RepeatedEpochWarning(UserWarning):
    """A `LatentStream` reads the same epoch again, probably by mistake."""


def requirement(kind: str, message: str) -> str:
    """What a value must be, from the type and the message of pydantic's error."""
    for known in (kind, kind.partition("_")[0]):
        if known in _EXPECTED:
            return _EXPECTED[known]
    text = message.removeprefix("Value error, ").replace(" after validation", "")
    return re.sub(r"^[A-Z][a-z]+ should ", "it must ", text).rstrip(".")


_EXPECTED = {
    "bool": "expected true or false",
    "int": "expected a whole number",
    "float": "expected a number",
    "string_type": "expected text",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "dict_type": "expected a mapping (NAME: VALUE)",
    "model_type": "expected a mapping (NAME: VALUE)",
    "model_attributes_type": "expected a mapping (NAME: VALUE)",
    "extra_forbidden": "unknown name",
    "missing": "it is missing",
}


ITEMS_FAILED_EXIT_CODE = ItemError.exit_code


def is_damaged_shard(error: Exception) -> bool:
    """Whether a shard is damaged or missing, so that the records of others can still be read."""
    missing = isinstance(error, StorageError) and isinstance(error.__cause__, FileNotFoundError)
    return missing or isinstance(error, DamagedShardError)


def restore_hint(what: str) -> str:
    """What to do about a damaged shard or commit."""
    return (
        f"restore {what} from a copy of the store, or delete it and run again (items whose audio "
        "is gone then lose their latents)"
    )
