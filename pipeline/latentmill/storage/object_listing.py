"""Lists the objects of S3 with obstore, with a tenth of the CPU time of s3fs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec

from latentmill.storage.objects import UnknownError, bucket_of
from latentmill.storage.remote import retrying

PAGE = 1000  # objects; S3 returns at most as many in a response


@dataclass(frozen=True, slots=True)
class Listed:
    """An object in a listing; `version` is its ETag without quotes."""

    path: str  # with the bucket
    size: int
    version: str


class UnlistedError(Exception):
    """s3fs must list the rest."""


def list_pages(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[list[Listed]]:
    """Yield the objects below a folder of S3 in order, in pages.

    Raises:
        UnlistedError: Objects after those that were yielded must be listed with s3fs: obstore does
            not support the bucket, or failed, or the next page has an object without content. Such
            an object may be the marker of a folder, of which obstore does not return the slash.
    """
    name, _, folder = path.partition("/")
    bucket = bucket_of(fs, name)
    if bucket is None:
        raise UnlistedError
    after: str | None = None
    pages: Iterator[Any] | None = None

    def next_page() -> Any:
        nonlocal pages
        import obstore

        with bucket.errors(path):
            if pages is None:
                pages = iter(
                    obstore.list(bucket.store(None), folder or None, offset=after, chunk_size=PAGE)
                )
            try:
                return next(pages, None)
            except Exception:
                pages = None
                raise

    while True:
        try:
            page = retrying(next_page)
        except (UnknownError, FileNotFoundError):
            raise UnlistedError from None
        if page is None:
            return
        if not all(one["size"] for one in page):
            raise UnlistedError
        after = page[-1]["path"]
        yield [
            Listed(f"{name}/{one['path']}", one["size"], (one["e_tag"] or "").strip('"'))
            for one in page
        ]
