"""The command `decode`."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentmill.cli.entry import interrupted, interrupts_raise
from latentmill.cli.listing import pairs_listed
from latentmill.cli.log import Commands
from latentmill.cli.read import (
    AsJson,
    Device,
    ModelOption,
    Overwrite,
    Seed,
    Store,
    TrustModel,
    check_key,
    check_target,
    open_to_decode,
    print_value,
    write_decoded,
)
from latentmill.errors import (
    ITEMS_FAILED_EXIT_CODE,
    ConfigError,
    LatentmillError,
    ModelError,
    StorageError,
    is_damaged_shard,
)
from latentmill.text.log import get_logger
from latentmill.text.printing import counted
from latentmill.text.redact import redact_text

if TYPE_CHECKING:
    from latentmill.store.store import LatentStore

MOST_IN_A_ROW = 20
"""Failures in a row, none of a damaged shard, after which nothing more is tried."""

_log = get_logger("cli")
app = Commands()  # app.py adds its command to the main app


@dataclass(frozen=True)
class DecodedFiles:
    """Result of decoding records to files.

    Attributes:
        files: Paths of the files that were written.
        skipped: Paths of the files that existed and were kept.
        failures: Keys of the records that could not be decoded, with the reasons.
    """

    files: tuple[str, ...]
    skipped: tuple[str, ...]
    failures: tuple[tuple[str, str], ...]


@app.command()
def decode(
    url: Store,
    folder: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the audio files; created if missing.")
    ],
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY...", help="Keys or globs of the records to decode, e.g. 'album/*'."
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Decode all records, instead of KEY.")
    ] = False,
    format: Annotated[
        str, typer.Option(help="File format: wav (float32) or flac (24 bit).")
    ] = "wav",
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            help="Keep existing files and decode only the other records, for example to resume "
            "after an interruption. Files that were decoded with another seed or model option "
            "are kept, too.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    device: Device = "auto",
    trust_model: TrustModel = False,
    model_option: ModelOption = None,
    as_json: AsJson = False,
) -> int:
    """Decode records to audio files named FOLDER/KEY.wav. Names are cut to 255 bytes.

    A file appears when it is complete. If a record cannot be decoded, the others are, and the exit
    code is 3.
    """
    from latentmill.decoding.files import FILE_TYPES, file_name

    if f".{format}" not in FILE_TYPES:
        raise ConfigError(f"invalid --format {format!r}: use wav or flac.")
    if skip_existing and overwrite:
        raise ConfigError("--skip-existing and --overwrite cannot be combined: use one of them.")
    store = open_to_decode(url, device, trust_model, model_option)
    if bool(keys) == everything:
        raise ConfigError("decode needs either keys of records or --all.")
    chosen = list(store.keys()) if everything else _matching(store, keys or [])
    targets = {key: folder / file_name(key, f".{format}") for key in chosen}
    _check_distinct(targets)
    advice = "add --skip-existing to decode only the other records, or --overwrite"
    for key, path in targets.items():
        check_target(path, store, overwrite or skip_existing, [key], advice)
    existing = {key: str(path) for key, path in targets.items() if skip_existing and path.exists()}
    interrupts_raise()
    rest = {key: path for key, path in targets.items() if key not in existing}
    files, failures = _decode(store, rest, seed)
    result = DecodedFiles(tuple(files), tuple(existing.values()), tuple(failures))
    print_value(as_json, result, _text)
    return ITEMS_FAILED_EXIT_CODE if failures else 0


def _decode(
    store: LatentStore, targets: Mapping[str, Path], seed: int
) -> tuple[list[str], list[tuple[str, str]]]:
    """Decode records to files; return the paths, and the keys that failed with the reasons."""
    files: list[str] = []
    failures: list[tuple[str, str]] = []
    in_a_row = 0
    if targets:
        store.decoder()  # without the model, no record can be decoded
    for key, path in targets.items():
        try:
            source = store.source(key)  # may read a new seal, so read the length afterwards
            samples = store.entry(key).num_samples
            files.append(write_decoded(path, store, source, samples, seed))
            in_a_row = 0
        except Exception as error:  # the model may be the user's code
            if interrupted() or not _is_of_one_record(store, error):
                raise
            in_a_row += not is_damaged_shard(error)
            if in_a_row == MOST_IN_A_ROW:
                raise ModelError(
                    f"{in_a_row} records in a row cannot be decoded; correct the cause, and add "
                    f"--skip-existing to decode only the rest: {_reason(error)}"
                ) from error
            _log.debug("%s cannot be decoded", key, exc_info=True)
            failures.append((key, _reason(error)))
    return files, failures


def _is_of_one_record(store: LatentStore, error: Exception) -> bool:
    """Whether other records can probably be decoded: not if the disk is full, for example."""
    from latentmill.store.describe import is_there

    if is_damaged_shard(error):
        return is_there(store)
    return not isinstance(error, StorageError | ModelError)


def _reason(error: Exception) -> str:
    if isinstance(error, LatentmillError):
        return str(error)
    return redact_text(f"{type(error).__name__}: {error}")


def _text(value: DecodedFiles) -> str:
    """Paths of the written files, one per line, and what was skipped and what failed."""
    lines = list(value.files)
    if value.skipped:
        lines.append(
            f"skipped {counted(len(value.skipped), 'existing file')}, whatever options they were "
            "decoded with (--overwrite decodes them again)"
        )
    if value.failures:
        lines.append(pairs_listed("failed", value.failures, all_with="--json"))
    return "\n".join(lines)


def _matching(store: LatentStore, patterns: Sequence[str]) -> list[str]:
    """Return each key once that equals a pattern or matches it as a glob; `*` also matches `/`."""
    found: dict[str, None] = {}
    for pattern in patterns:
        if pattern in store:
            found[pattern] = None
            continue
        if not any(sign in pattern for sign in "*?["):
            check_key(store, pattern)
        matches = fnmatch.filter(store.keys(), pattern)
        if not matches:
            raise ConfigError(
                f"no record of {store.url} matches {pattern}: check the pattern, or decode all "
                f"records with --all."
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def _check_distinct(targets: Mapping[str, Path]) -> None:
    """Different keys can give the same path, because a safe path leaves out some characters."""
    taken: dict[Path, str] = {}
    for key, path in targets.items():
        if (other := taken.setdefault(path, key)) != key:
            raise ConfigError(
                f"records {other!r} and {key!r} would both be written to {path}: "
                "decode them into different folders."
            )
    folders: set[Path] = set()
    for key, path in targets.items():
        folder = path.parent
        while folder not in folders:
            folders.add(folder)
            if folder in taken:
                raise ConfigError(
                    f"record {taken[folder]!r} would be written to {folder}, which is the folder "
                    f"of {key!r}: decode them into different folders."
                )
            folder = folder.parent
