"""Opens buckets of Google Cloud Storage with the configuration of gcsfs."""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from latentmill.storage.object_client import OpenStore, has_proxy, options, refuse

if TYPE_CHECKING:
    from obstore.store import GCSCredential


def opener(fs: Any, bucket: str) -> OpenStore:
    """Return the function that opens a bucket; UnsupportedError if gcsfs must read it."""
    from obstore.store import GCSStore

    endpoint = fs._location.rstrip("/")  # with STORAGE_EMULATOR_HOST and `endpoint_url`
    parts = urlsplit(endpoint)
    refuse(
        {
            "version_aware": fs.version_aware,
            "session_kwargs": fs.session_kwargs,
            "requests_timeout": fs.requests_timeout,
            "a client certificate": getattr(fs, "_use_client_cert", False),
            "a zonal bucket": _is_zonal(fs, bucket),
            "an endpoint with a path": parts.path or parts.query,
            "proxies": has_proxy(parts.scheme),
        }
    )
    google = fs.credentials
    project = getattr(google.credentials, "quota_project_id", None)
    if fs.requester_pays:
        project = fs.requester_pays if isinstance(fs.requester_pays, str) else fs.project
    headers = {"x-goog-user-project": project} if project else None

    def provide() -> GCSCredential:  # called in a thread of obstore
        if google.credentials is None:
            return {"token": "", "expires_at": None}
        google.maybe_refresh()
        expiry = google.credentials.expiry  # in UTC
        aware = expiry.replace(tzinfo=UTC) if expiry is not None else None
        return {"token": google.credentials.token, "expires_at": aware}

    def open_store(seconds: float) -> Any:
        return GCSStore(
            # All of them are given, because obstore would take others from the environment.
            config={
                "bucket": bucket,
                "base_url": endpoint,
                "skip_signature": google.credentials is None,
            },
            credential_provider=provide,
            **options(endpoint, seconds, headers=headers),
        )

    return open_store


def _is_zonal(fs: Any, bucket: str) -> bool:
    """Whether gcsfs knows that a bucket is zonal; it reads such a bucket with gRPC."""
    known = getattr(fs, "_storage_layout_cache", {}).get(bucket)
    return getattr(known, "value", "") == "ZONAL_HIERARCHICAL"
