"""Lists the objects of S3, Google Cloud Storage and Azure with fsspec's clients, page by page.

Their `find` would collect all objects first.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec.asyn

from latentmill.storage.remote import NO_SUCH_BUCKET, retrying

PAGE = 1000  # objects; S3 and Google return at most as many in a response


@dataclass(frozen=True, slots=True)
class Listed:
    """An object in a listing; `version` is its ETag without quotes."""

    path: str  # with the bucket
    size: int
    version: str


class ChangedError(OSError):
    """The object from which a listing must continue was removed."""

    def __init__(self) -> None:
        super().__init__("objects were removed while it was listed, so run the command again")


def _rest_of_s3(fs: Any, path: str, last: str) -> Iterator[Listed]:
    bucket, _, folder = path.partition("/")
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{folder}/" if folder else ""}
    request |= fs.req_kw  # such as RequestPayer
    if last:
        request["StartAfter"] = last.partition("/")[2]
    while True:
        page = retrying(lambda: fs.call_s3("list_objects_v2", **request))
        for one in page.get("Contents", ()):
            # Some tools create an empty object whose name ends in a slash for each folder.
            if not one["Key"].endswith("/"):
                version = one.get("ETag", "").strip('"')
                yield Listed(f"{bucket}/{one['Key']}", one["Size"], version)
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _all_of_gcs(fs: Any, path: str, _last: str) -> Iterator[Listed]:
    """All objects; obstore has listed none of them, so there is no last one."""
    bucket, _, folder = path.partition("/")
    request = {"prefix": f"{folder}/" if folder else None, "maxResults": PAGE}
    request["fields"] = "nextPageToken,items(name,size,etag)"
    while True:
        try:
            page = retrying(lambda: fs.call("GET", "b/{}/o", bucket, json_out=True, **request))
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, NO_SUCH_BUCKET) from error
        for one in page.get("items", ()):
            if not one["name"].endswith("/"):  # see `_rest_of_s3`
                yield Listed(f"{bucket}/{one['name']}", int(one["size"]), one.get("etag", ""))
        if not page.get("nextPageToken"):
            return
        request["pageToken"] = page["nextPageToken"]


def _rest_of_azure(fs: Any, path: str, last: str) -> Iterator[Listed]:
    container, _, folder = path.partition("/")
    client = fs.service_client.get_container_client(container)
    prefix, token = f"{folder}/" if folder else None, None

    async def page_after(token: str | None) -> tuple[list[tuple[str, Any]], str | None]:
        # Only the metadata tells the marker of a folder from an empty object.
        blobs = client.list_blobs(name_starts_with=prefix, include=["metadata"])
        pages = blobs.by_page(continuation_token=token)
        async for page in pages:
            found = [blob async for blob in page]
            names = [blob.name for blob in found]  # `_details` removes a slash at the end
            return list(zip(names, await fs._details(found), strict=True)), pages.continuation_token
        return [], None

    while True:
        page, token = retrying(lambda: fsspec.asyn.sync(fs.loop, page_after, token))  # noqa: B023
        for name, one in page:
            if last:  # no listing can start after it, and the order is not always that of the names
                last = "" if f"{container}/{name}" == last else last
            elif one["type"] == "file" and not name.endswith("/"):
                version = (one.get("etag") or "").strip('"')
                yield Listed(f"{container}/{name}", one["size"], version)
        if not token:
            break
    if last:
        raise ChangedError


REST: dict[str, Callable[[Any, str, str], Iterator[Listed]]] = {
    "s3": _rest_of_s3,
    "gs": _all_of_gcs,
    "az": _rest_of_azure,
}
"""By protocol: the objects below a folder after the last one that was listed."""
