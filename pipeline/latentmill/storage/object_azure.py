"""Opens containers of Azure Blob Storage with the configuration of adlfs."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from latentmill.storage.object_client import OpenStore, UnsupportedError, has_proxy, options, refuse

if TYPE_CHECKING:
    from obstore.store import AzureCredential

_SCOPE = "https://storage.azure.com/.default"  # of tokens for Azure Storage


def opener(fs: Any, container: str) -> OpenStore:
    """Return the function that opens a container; UnsupportedError if adlfs must read it."""
    from obstore.store import AzureStore

    client = fs.service_client
    endpoint = f"{client.scheme}://{client.primary_hostname}".rstrip("/")
    refuse(
        {
            "version_aware": fs.version_aware,
            "location_mode": client.location_mode != "primary",
            "an unknown account": not client.account_name,
            "AZURE_ENCRYPTION_KEY": os.environ.get("AZURE_ENCRYPTION_KEY"),
            "proxies": has_proxy(urlsplit(endpoint).scheme),
        }
    )
    provide = _provider(fs)
    limits = fs._timeout_kwargs
    seconds_of = {
        name: limits[key]
        for name, key in (("connect", "connection_timeout"), ("read", "read_timeout"))
        if key in limits
    }

    def open_store(seconds: float) -> Any:
        return AzureStore(
            # All of them are given, because obstore would take others from the environment.
            config={
                "container_name": container,
                "account_name": client.account_name,
                "endpoint": endpoint,
                "skip_signature": provide is None,
                "use_emulator": False,
                "use_fabric_endpoint": False,
            },
            credential_provider=provide,
            **options(endpoint, seconds, **seconds_of),
        )

    return open_store


def _provider(fs: Any) -> Any:
    """Return what gives obstore the client's credentials; None for anonymous access."""
    client = fs.service_client
    credential, signature = client.credential, client._query_str.lstrip("?")
    if credential is None and not signature:
        return None
    key = getattr(credential, "account_key", None)
    if credential is not None and key is None and not hasattr(credential, "get_token"):
        raise UnsupportedError("this kind of credential")

    def provide() -> AzureCredential:  # called in a thread of obstore
        if key is not None:
            return {"access_key": key, "expires_at": None}
        if signature:
            return {"sas_token": signature, "expires_at": None}
        asked = asyncio.run_coroutine_threadsafe(credential.get_token(_SCOPE), fs.loop)
        token = asked.result()
        return {"token": token.token, "expires_at": datetime.fromtimestamp(token.expires_on, UTC)}

    return provide
