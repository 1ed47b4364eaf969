"""What can go wrong, in the user's words, each with the exit code of the command line.

Exit codes: 0 every item encoded or skipped; 1 a bug in latentmill; 2 a wrong option or config;
3 the run is complete, but items failed; 4 the source cannot be used; 5 the store refuses the run;
6 the storage failed (disk full, no permission); 7 the model cannot be loaded; 8 verification found
a fault; 9 units failed, their items are not accounted for yet; 130 interrupted.
"""

from __future__ import annotations

from latentmill.text.redact import redact_text


class LatentmillError(Exception):
    """Base of all errors meant for the user: one sentence, what is wrong and what to do.

    Secrets in the URLs of its text are masked.
    """

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact_text(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(LatentmillError):
    """An option, a config value or a file name is wrong."""

    exit_code = 2


class SourceError(LatentmillError):
    """The source is missing, empty or cannot be read."""

    exit_code = 4


class StoreError(LatentmillError):
    """The store does not fit this run: another fingerprint, another plan, or no store at all."""

    exit_code = 5


class StorageError(LatentmillError):
    """Reading from or writing to the storage failed: disk full, no permission, gone."""

    exit_code = 6


class ModelError(LatentmillError):
    """The model is unknown, its package or weights are missing, or it refuses its options."""

    exit_code = 7


class VerifyError(LatentmillError):
    """The store does not hold what its commits promise."""

    exit_code = 8


class UnitsFailedError(LatentmillError):
    """Units could not be encoded (their workers died); running again tries them again."""

    exit_code = 9


class HeadGoneError(UnitsFailedError):
    """The head of the Ray cluster went away; running again on another cluster resumes."""


class ItemError(LatentmillError):
    """One item cannot be encoded. Its text becomes the item's recorded reason: one clear line."""

    exit_code = 3


class IncompleteStoreWarning(UserWarning):
    """A store is read that does not hold all of its plan yet."""


class RepeatedEpochWarning(UserWarning):
    """A stream gives the same epoch a second time, although nobody asked for that."""


ITEMS_FAILED_EXIT_CODE = ItemError.exit_code
