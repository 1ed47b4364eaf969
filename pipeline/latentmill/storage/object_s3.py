"""Opens buckets of S3 with the configuration of s3fs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from latentmill.storage.object_client import OpenStore, UnsupportedError, has_proxy, options, refuse

if TYPE_CHECKING:
    from obstore.store import S3Credential

# obstore asks again five minutes before the end; botocore keeps credentials valid for ten minutes.
_CREDENTIALS_LAST = timedelta(minutes=8)

_AWS = re.compile(r"https://s3(\.[a-z]{2}(-[a-z]+)+-\d)?\.amazonaws\.com(\.cn)?/?")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def opener(fs: Any, bucket: str) -> OpenStore:
    """Return the function that opens a bucket; UnsupportedError if s3fs must read it."""
    from botocore import UNSIGNED
    from obstore.store import S3Store

    client = fs.s3  # connects, with the errors of s3fs
    config, anonymous = client.meta.config, client.meta.config.signature_version is UNSIGNED
    endpoint, virtual = _endpoint(client, bucket)
    refuse(
        {
            "this bucket's name": not _BUCKET.fullmatch(bucket) or "--" in bucket,
            "version_aware": fs.version_aware,
            "cache_regions": fs.cache_regions,
            "s3_additional_kwargs": fs.s3_additional_kwargs,
            "a session": not fs._session_is_owned,
            "this signature version": not anonymous and config.signature_version != "s3v4",
            "these options for S3": set(config.s3 or ()) - {"addressing_style"},
            "FIPS or dual-stack endpoints": config.use_fips_endpoint
            or config.use_dualstack_endpoint,
            "a client certificate": config.client_cert,
            "these connector_args": set(config.connector_args or ())
            - {"keepalive_timeout", "limit", "use_dns_cache", "force_close"},
            "proxies": config.proxies or has_proxy(urlsplit(endpoint).scheme),
        }
    )
    provider = None if anonymous else _provider(client, fs.loop)

    def open_store(seconds: float) -> Any:
        return S3Store(
            # All of them are given, because obstore would take others from the environment.
            config={
                "bucket": bucket,
                "region": client.meta.region_name.replace("aws-global", "us-east-1"),
                "aws_endpoint_url_s3": endpoint,
                "virtual_hosted_style_request": virtual,
                "skip_signature": anonymous,
                "request_payer": fs.requester_pays,
                "s3_express": False,
            },
            credential_provider=provider,
            **options(endpoint, seconds, connect=config.connect_timeout, read=config.read_timeout),
        )

    return open_store


def _endpoint(client: Any, bucket: str) -> tuple[str, bool]:
    """The URL to which the client sends requests, and whether it contains the bucket's name."""
    url, style = client.meta.endpoint_url, (client.meta.config.s3 or {}).get("addressing_style")
    parts = urlsplit(url)
    verify = getattr(client._endpoint.http_session, "_verify", None)
    refuse(
        {
            "an endpoint with a path": parts.path not in ("", "/") or parts.query,
            "other certificates": parts.scheme != "http" and verify is not True,
        }
    )
    if _AWS.fullmatch(url):
        if style != "path" and "." not in bucket:
            return f"https://{bucket}.{parts.netloc}", True
    else:
        refuse({"addressing style virtual": style == "virtual"})
    return f"{parts.scheme}://{parts.netloc}", False


def _provider(client: Any, loop: asyncio.AbstractEventLoop) -> Callable[[], S3Credential]:
    """Ask botocore for credentials, which looks in all places and refreshes them."""
    credentials: Any = getattr(getattr(client, "_request_signer", None), "_credentials", None)
    if credentials is None:
        raise UnsupportedError("missing credentials")

    def provide() -> S3Credential:  # called in a thread of obstore
        asked = asyncio.run_coroutine_threadsafe(credentials.get_frozen_credentials(), loop)
        frozen = asked.result()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_LAST,
        }

    return provide
