"""Copying files in parallel: each is checked against its hash, and progress is displayed."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import xxhash

from latentmill.errors import ConfigError, StorageError
from latentmill.publishing.contents import StoreFile, changed, damaged
from latentmill.storage.storage import Storage, writing
from latentmill.text.log import get_logger
from latentmill.text.printing import size_text

BLOCK = 8 << 20  # bytes per read; each job holds one block
LINE_SECONDS = 10.0
JOBS = 4


def check_jobs(jobs: int) -> None:
    """Raise ConfigError if this is no number of files that can be copied at the same time."""
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, not {jobs}.")


_log = get_logger("publishing")


class Transfer:
    """Bytes done so far. Thread-safe; displayed as a bar in a terminal, else as log messages."""

    def __init__(self, verb: str, total: int) -> None:
        self._verb, self._total, self._done = verb, total, 0
        self._lock = threading.Lock()
        self._next = time.monotonic() + LINE_SECONDS
        self._show: Callable[[int], None] | None = None
        self.stopped = threading.Event()

    def add(self, count: int) -> None:
        """Count bytes. Raises StorageError after another thread has failed."""
        if self.stopped.is_set():
            raise StorageError("Stopped, because another file could not be copied.")
        with self._lock:
            self._done += count
            if self._show is not None:
                self._show(self._done)
            elif time.monotonic() >= self._next:
                self._next = time.monotonic() + LINE_SECONDS
                done, total = size_text(self._done), size_text(self._total)
                _log.info("%s: %s of %s", self._verb, done, total)

    @contextlib.contextmanager
    def displayed(self) -> Iterator[Transfer]:
        """Display a bar, if stderr is a terminal and messages are not suppressed."""
        if not (sys.stderr.isatty() and _log.isEnabledFor(logging.INFO) and self._total):
            yield self
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        columns = (BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(stderr=True), expand=True) as bar:
            task = bar.add_task(self._verb, total=self._total)
            self._show = lambda done: bar.update(task, completed=done)
            yield self

    def run(self, tasks: Iterable[Callable[[], object]], jobs: int) -> None:
        """Run tasks in threads. After an error, the others stop; raises the first one."""
        with ThreadPoolExecutor(jobs, thread_name_prefix="copy") as pool:
            try:
                futures = [pool.submit(task) for task in tasks]
                wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    if future.done():
                        future.result()
            except BaseException:
                self.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def check(source: Storage, file: StoreFile, transfer: Transfer) -> None:
    """Read a file and check that it has its hash; StoreError if not."""
    for _ in _blocks(source, file, transfer):
        pass


def download(source: Storage, file: StoreFile, target: Path, transfer: Transfer) -> None:
    """Write a file of a store to a local path, and check it; StoreError if it is damaged."""
    with target.open("wb") as written:
        for block in _blocks(source, file, transfer):
            with writing(str(target)):
                written.write(block)


def read_checked(source: Storage, file: StoreFile, transfer: Transfer) -> bytes:
    """Read a small file, and check it."""
    return b"".join(_blocks(source, file, transfer))


def _blocks(source: Storage, file: StoreFile, transfer: Transfer) -> Iterator[bytes]:
    digest, size = xxhash.xxh3_128(), 0
    with source.open(file.path) as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
            size += len(block)
            transfer.add(len(block))
            yield block
    if not file.matches(size, digest.hexdigest()):
        raise changed(source) if file.replaced else damaged(source, file.path)
