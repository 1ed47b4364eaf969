"""Google Cloud Storage and Azure with obstore: bytes, versions and errors of gcsfs and adlfs.

The server is that of the tests. The tests that say so run on real emulators as well, whose URLs are
in GCS_EMULATOR (`fake-gcs-server -scheme http -public-host 127.0.0.1:4443`) and AZURE_EMULATOR
(`azurite-blob --skipApiVersionCheck --loose`, then http://127.0.0.1:10000).
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import pickle
import re
import uuid
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import fsspec
import pytest

from latentmill.audio.fetch import fetch
from latentmill.errors import ItemError, SourceError, StorageError
from latentmill.sources.files import Place, current_version
from latentmill.sources.listing import Entry, folders
from latentmill.storage import client_listing, object_azure, object_listing, objects, remote
from latentmill.storage.storage import Storage
from support.cloud_server import ACCOUNT, BUCKET, Cloud, cloud_server, error, reply

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # it sends requests of gRPC
pytest.importorskip("obstore")
gcsfs = pytest.importorskip("gcsfs")
adlfs = pytest.importorskip("adlfs")

DATA = bytes(range(256)) * 8
KEY = base64.b64encode(b"the key of an account").decode()
EMULATED_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
SIGNATURE = "sv=2022-11-02&sp=rl&sig=c2VjcmV0%2Bsecret%3D"
NAMES = ["plain.wav", "a ü ☃ %20 + & # ? = ~ ' (1) [x] {y} *", "a/b/c/.hidden", "é\u0301"]
KINDS = ("gs", "az")
PACKAGES = {"gs": "gcsfs", "az": "adlfs"}


class Site:
    """A bucket on a server; `cloud` is None for an emulator."""

    def __init__(self, kind: str, url: str, cloud: Cloud | None) -> None:
        self.kind, self.endpoint, self._cloud = kind, url, cloud
        self.url = f"{kind}://{BUCKET if cloud is not None else f'b{uuid.uuid4().hex[:12]}'}"

    @property
    def cloud(self) -> Cloud:
        assert self._cloud is not None
        return self._cloud

    def connection(self, key: str) -> str:
        """The connection string of Azure."""
        account = f"AccountName={ACCOUNT};AccountKey={key}"
        return f"DefaultEndpointsProtocol=http;{account};BlobEndpoint={self.endpoint}/{ACCOUNT};"

    def put(self, key: str, data: bytes) -> None:
        if self._cloud is not None:
            self._cloud.data[key] = data
        else:
            fsspec.filesystem(self.kind).pipe_file(f"{self.url}/{key}", data)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    for name in [name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_", "STORAGE_"))]:
        if not name.endswith("_EMULATOR"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    _forget()
    yield
    _forget()


def _forget() -> None:
    for file_system in (gcsfs.GCSFileSystem, adlfs.AzureBlobFileSystem):
        file_system.clear_instance_cache()


def opened(site: Site, patch: pytest.MonkeyPatch) -> Site:
    """The site with the settings that users make for an emulator."""
    if site.kind == "gs":
        patch.setenv("STORAGE_EMULATOR_HOST", site.endpoint)
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    else:
        key = KEY if site._cloud is not None else EMULATED_KEY
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", site.connection(key))
    return site


@pytest.fixture(params=KINDS)
def site(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with cloud_server() as (url, cloud):
        yield opened(Site(request.param, url, cloud), monkeypatch)


@pytest.fixture(params=["gs", "az", "gs emulator", "az emulator"])
def any_site(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    kind, _, emulated = request.param.partition(" ")
    if emulated:
        variable = "GCS_EMULATOR" if kind == "gs" else "AZURE_EMULATOR"
        if variable not in os.environ:
            pytest.skip(f"{variable} has no URL of a running emulator")
        found = opened(Site(kind, os.environ[variable], None), monkeypatch)
        fsspec.filesystem(kind).mkdir(found.url.partition("://")[2])
        yield found
        return
    with cloud_server() as (url, cloud):
        yield opened(Site(kind, url, cloud), monkeypatch)


def read(url: str, start: int = 3, end: int = 9) -> bytes:
    return objects.cat_file(*remote.open_filesystem(url), start, end)


def test_both_clients_read_the_same_bytes(
    any_site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "latentmill")
    ranges = [(0, 1), (5, 700), (0, len(DATA)), (len(DATA) - 1, len(DATA) + 50)]
    starts, ends = zip(*ranges, strict=True)
    wanted = [DATA[start:end] for start, end in ranges]
    for name in NAMES:
        any_site.put(name, DATA)
    for switch in ("1", "0"):
        monkeypatch.setenv(objects.SWITCH, switch)
        for name in NAMES:
            fs, path = remote.open_filesystem(f"{any_site.url}/{name}")
            assert [objects.cat_file(fs, path, *one) for one in ranges] == wanted
            assert objects.cat_ranges(fs, [path] * len(ranges), starts, ends) == wanted
            (bucket,) = vars(fs)[objects._BUCKETS].values()
            assert bucket.answered
            assert not bucket.given_up


def listed(url: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Entry]:
    """What obstore lists; checks that the other client gives the same, in the same order."""
    both = []
    for switch in ("0", "1"):
        monkeypatch.setenv(objects.SWITCH, switch)
        both.append([dict(group) for group in folders(Place(url), Counter())])
    assert both[0] == both[1]
    return {path: entry for group in both[1] for path, entry in group.items()}


def test_a_listing_has_the_versions_that_a_plan_compares(
    any_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_listing, "PAGE", 4)
    monkeypatch.setattr(client_listing, "PAGE", 3)
    names = ["a b.wav", "é/音.wav", "%41+&#.wav", "deep/er/x.wav", "a-.wav", "a/b.wav", "a.wav"]
    for number, name in enumerate(names):
        any_site.put(f"m/{name}", b"x" * (number + 1))
    any_site.put("mm/other.wav", b"x")
    found = listed(f"{any_site.url}/m", monkeypatch)
    bucket = any_site.url.partition("://")[2]
    assert {path: entry.size for path, entry in found.items()} == {
        f"{bucket}/m/{name}": number + 1 for number, name in enumerate(names)
    }
    for path, entry in found.items():
        assert entry.version
        uri = Place(any_site.url).address(path)
        assert current_version(uri) == (entry.size, entry.version)
    assert listed(f"{any_site.url}/nothing", monkeypatch) == {}
    any_site.put("/m/apart.wav", b"x")  # in another folder, whose name begins with a slash
    assert set(listed(f"{any_site.url}//m", monkeypatch)) == {f"{bucket}//m/apart.wav"}


def test_markers_of_folders_are_not_listed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_listing, "PAGE", 2)
    for name in ("a.wav", "b.wav", "c.wav", "n/d.wav", "o/p.wav", "q//r.wav", "z.wav"):
        site.put(f"m/{name}", b"x")
    site.put("m/n/empty.wav", b"")
    wanted = {f"{BUCKET}/{key}" for key in site.cloud.data}
    site.put("m/n/", b"")
    if site.kind == "az":
        site.put("m/n", b"")
        site.cloud.folders.add("m/n")
    assert set(listed(f"{site.url}/m", monkeypatch)) == wanted


def test_a_listing_continues_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_listing, "PAGE", 4)
    with cloud_server() as (url, cloud):
        site = opened(Site("az", url, cloud), monkeypatch)
        for number in range(14):
            site.put(f"m/{number:02}.wav", b"x")
        failed: list[int] = []

        def fail(handler: BaseHTTPRequestHandler, number: int) -> bool:
            bad = "marker=" in handler.path and len(failed) < 3
            if bad:
                failed.append(number)
                reply(handler, 503, error("ServerBusy"))
                if len(failed) == 3 and removed:
                    cloud.data.pop("m/03.wav")
            return bad

        cloud.answer = fail
        removed = False
        fs, path = remote.open_filesystem(f"{site.url}/m")
        names = [one.path for one in object_listing.objects_below(fs, path)]
        assert names == [f"{BUCKET}/m/{number:02}.wav" for number in range(14)]
        assert cloud.clients() == {"obstore"}
        failed.clear()
        removed = True
        with pytest.raises(client_listing.ChangedError, match="run the command again"):
            list(object_listing.objects_below(fs, path))


def test_errors_are_the_same_with_both_clients(
    any_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    any_site.put("a", DATA)
    if any_site._cloud is not None:
        # The clients would retry other statuses themselves.
        any_site.cloud.answer = lambda handler, number: "secret" in handler.path and denied(handler)
    found = []
    for switch in ("1", "0"):
        monkeypatch.setenv(objects.SWITCH, switch)
        _forget()
        assert read(f"{any_site.url}/a") == DATA[3:9]
        errors = []
        for name in ("none", "a", "secret") if any_site._cloud is not None else ("none", "a"):
            fs, path = remote.open_filesystem(f"{any_site.url}/{name}")
            (one,) = objects.cat_ranges(fs, [path], [len(DATA) + 5], [len(DATA) + 9])
            with pytest.raises(remote.storage_errors()) as caught:
                objects.cat_file(fs, path, len(DATA) + 5, len(DATA) + 9)
            for raised in (one, caught.value):
                assert not remote.is_transient(raised)
                missing = remote.is_missing(raised)
                errors.append((missing, None if missing else remote.status_of(raised)))
            if name != "a":
                with pytest.raises(ItemError) as failed:
                    fetch(f"{any_site.url}/{name}", len(DATA))
                errors.append((str(failed.value), None))
        errors.append((Place(f"{any_site.url}no/m").kind(), None))
        found.append(errors)
    assert found[0] == found[1]
    missing, past, forbidden = found[0][:3], found[0][3:5], found[0][5:8]
    assert missing[0][0] and missing[2][0] == "there is no such file"
    assert past[0] == (False, 416)
    assert found[0][-1] == ("nothing", None)
    if any_site._cloud is not None:
        assert forbidden[0] == (False, 403)
        assert forbidden[2][0] == "no permission to read the file"


def denied(handler: BaseHTTPRequestHandler) -> bool:
    reply(handler, 403, error("AuthorizationFailure"), x_ms_error_code="AuthorizationFailure")
    return True


def test_a_listing_that_is_forbidden_is_one_sentence(site: Site) -> None:
    site.put("m/a.wav", DATA)
    site.cloud.answer = lambda handler, number: denied(handler)
    place = Place(f"{site.url}/m")
    with pytest.raises(SourceError) as caught, place.errors():
        list(folders(place, Counter()))
    text = str(caught.value)
    assert re.fullmatch(r"Source \w+://bucket/m cannot be listed: .*AuthorizationFailure.*", text)
    assert "RequestId" not in text
    assert KEY not in text


def test_a_missing_bucket_is_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with cloud_server() as (url, cloud):
        site = opened(Site("gs", url, cloud), monkeypatch)
        place = Place(f"{site.url}no/m")
        with pytest.raises(SourceError, match="there is no such bucket"), place.errors():
            list(folders(place, Counter()))
        with pytest.raises(StorageError, match=r"gs://bucketno/a/b: there is no such bucket\.$"):
            Storage(f"{site.url}no/a").write("b", b"x")


def test_a_bucket_whose_requester_pays_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handler: BaseHTTPRequestHandler, number: int) -> bool:
        text = "Bucket is a requester pays bucket but no user project provided."
        reply(handler, 400, json.dumps({"error": {"code": 400, "message": text}}).encode())
        return True

    with cloud_server() as (url, cloud):
        site = opened(Site("gs", url, cloud), monkeypatch)
        cloud.answer = refuse
        place = Place(f"{site.url}/m")
        with pytest.raises(SourceError, match="Set `requester_pays=True`"):
            place.kind()
        with pytest.raises(SourceError, match="Set `requester_pays=True`"), place.errors():
            list(folders(place, Counter()))


def test_the_account_in_a_url_of_azure_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", SIGNATURE)
    url = "abfs://music@mine.dfs.core.windows.net/a b"
    storage = pickle.loads(pickle.dumps(Storage(url)))
    assert (storage.root, storage.full("c")) == (url, "music/a b/c")
    assert storage._fs.account_name == "mine"
    place = Place(f"{url}/")
    assert (place.uri, place.address("music/a b/c.wav")) == (url, f"{url}/c.wav")
    with pytest.raises(SourceError) as caught:
        Place("az://music/a")
    assert "set AZURE_STORAGE_ACCOUNT_NAME or AZURE_STORAGE_CONNECTION_STRING." in str(caught.value)
    other = f"AccountName=other;AccountKey={KEY};EndpointSuffix=core.windows.net"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", other)
    _forget()
    with pytest.raises(SourceError, match="account mine, but the credentials are those of other"):
        Place(url)


@pytest.mark.parametrize("status", [503, 429, "cut"])
def test_transient_errors_are_retried_and_name_no_url(
    site: Site, status: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put("a", DATA)
    if site.kind == "az":
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "")
        account = f"BlobEndpoint={site.endpoint}/{ACCOUNT};SharedAccessSignature={SIGNATURE}"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", account)

    def fail(handler: BaseHTTPRequestHandler, number: int) -> bool:
        if number not in (2, 3, 4):
            return False
        if isinstance(status, int):
            reply(handler, status, error("ServerBusy"))
        handler.close_connection = True
        return True

    site.cloud.answer = fail
    assert read(f"{site.url}/a") == DATA[3:9]
    with pytest.raises(OSError) as caught:
        read(f"{site.url}/a")
    assert remote.is_transient(caught.value)
    wanted = "the connection failed"
    assert str(caught.value) == (
        f"ServerBusy (HTTP status {status})" if status != "cut" else wanted
    )
    assert remote.retrying(lambda: read(f"{site.url}/a")) == DATA[3:9]
    assert site.cloud.clients() == {"obstore"}
    if site.kind == "az":
        assert all("sig=c2VjcmV0%2Bsecret%3D" in path for path, _ in site.cloud.seen)


def account_file(site: Site, tmp_path: Path) -> str:
    """The key of a service account, whose tokens the server of the test gives."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key = rsa.generate_private_key(65537, 2048)
    text = key.private_bytes(serialization.Encoding.PEM, form, plain).decode()
    found = {"type": "service_account", "private_key": text, "client_email": "a@b.example"}
    found |= {"token_uri": f"{site.endpoint}/token", "project_id": "mine"}
    (tmp_path / "account.json").write_text(json.dumps(found))
    return str(tmp_path / "account.json")


GOOGLE: dict[str, tuple[dict[str, Any], dict[str, str], str, str]] = {
    "anonymous": ({"token": "anon"}, {}, "", ""),
    "option": ({"token": "ACCOUNT"}, {}, "Bearer FROMACCOUNT", ""),
    "environment": ({}, {"GOOGLE_APPLICATION_CREDENTIALS": "ACCOUNT"}, "Bearer FROMACCOUNT", ""),
    "token": ({"token": "raw"}, {"FETCH_RAW_TOKEN_EXPIRY": "false"}, "Bearer raw", ""),
    "requester": ({"token": "anon", "requester_pays": "payer"}, {}, "", "payer"),
}


@pytest.mark.parametrize("case", GOOGLE)
def test_the_configuration_of_gcsfs_is_carried_over(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options, variables, authorization, project = GOOGLE[case]
    with cloud_server() as (url, cloud):
        site = Site("gs", url, cloud)
        site.put("a", DATA)
        account = account_file(site, tmp_path)
        if options.get("token") == "ACCOUNT":
            options = {**options, "token": account}
        for name, value in variables.items():
            monkeypatch.setenv(name, account if value == "ACCOUNT" else value)
        # Variables that only obstore knows.
        monkeypatch.setenv("GOOGLE_BASE_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
        if case == "anonymous":
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        else:
            options = {**options, "endpoint_url": url}
        monkeypatch.setitem(fsspec.config.conf, "gs", options)
        for _ in range(3):
            assert read("gs://bucket/a") == DATA[3:9]
        assert len(cloud.seen) == 3
        for path, headers in cloud.seen:
            assert path == "/bucket/a"
            assert headers.get("authorization", "") == authorization
            assert headers.get("x-goog-user-project", "") == project


AZURE: dict[str, tuple[dict[str, Any], str]] = {
    "connection string": ({}, f"SharedKey {ACCOUNT}:"),
    "signature": ({}, ""),
    "anonymous": ({"anon": True}, ""),
}


@pytest.mark.parametrize("case", AZURE)
def test_the_configuration_of_adlfs_is_carried_over(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, authorization = AZURE[case]
    with cloud_server() as (url, cloud):
        site = Site("az", url, cloud)
        site.put("a", DATA)
        account = {
            "connection string": site.connection(KEY),
            "signature": f"BlobEndpoint={url}/{ACCOUNT};SharedAccessSignature={SIGNATURE}",
            "anonymous": f"BlobEndpoint={url}/{ACCOUNT};AccountName={ACCOUNT};",
        }[case]
        if case == "connection string":
            options = {"connection_string": account}
        else:
            monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", account)
        # Variables that only obstore knows.
        for name in ("CLIENT_ID", "CLIENT_SECRET", "TENANT_ID", "STORAGE_TOKEN", "ENDPOINT"):
            monkeypatch.setenv(f"AZURE_{name}", "http://127.0.0.1:9")
        monkeypatch.setenv("AZURE_SKIP_SIGNATURE", "true")
        monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
        monkeypatch.setitem(fsspec.config.conf, "az", options)
        assert read("az://bucket/a") == DATA[3:9]
        ((path, headers),) = cloud.seen
        assert path == f"/{ACCOUNT}/bucket/a" + (f"?{SIGNATURE}" if case == "signature" else "")
        assert headers.get("authorization", "").startswith(authorization)
        assert bool(authorization) == ("authorization" in headers)
        assert cloud.clients() == {"obstore"}


def test_tokens_of_azure_come_from_its_own_client() -> None:
    from azure.core.credentials import AccessToken

    class Credential:
        async def get_token(self, *scopes: str, **more: Any) -> AccessToken:
            await asyncio.sleep(0)
            return AccessToken(f"token for {scopes[0]}", 4_000_000_000)

        async def close(self) -> None:
            pass

    fs = adlfs.AzureBlobFileSystem(account_name="mine", credential=Credential())
    given = object_azure._provider(fs)()
    assert given["token"] == "token for https://storage.azure.com/.default"
    assert given["expires_at"].timestamp() == 4_000_000_000


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "switched off": {},
    "a proxy": {},
    "version_aware": {"version_aware": True},
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_the_other_client_reads_where_an_option_is_not_supported(
    case: str, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put("a", DATA)
    if case == "switched off":
        monkeypatch.setenv(objects.SWITCH, "0")
    elif case == "a proxy":
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    conf = fsspec.config.conf.get(site.kind, {})
    monkeypatch.setitem(fsspec.config.conf, site.kind, {**conf, **UNSUPPORTED[case]})
    assert read(f"{site.url}/a") == DATA[3:9]
    assert site.cloud.clients() == {PACKAGES[site.kind]}


@pytest.mark.parametrize("status", [404, 501, 200])
def test_an_emulator_without_the_xml_api_is_read_with_gcsfs(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handler: BaseHTTPRequestHandler, number: int) -> bool:
        refused = not handler.path.startswith(("/storage", "/download"))
        if refused:
            reply(handler, status, b"")
        return refused

    with cloud_server() as (url, cloud):
        site = opened(Site("gs", url, cloud), monkeypatch)
        site.put("a", DATA)
        cloud.answer = refuse
        for _ in range(3):
            assert read("gs://bucket/a") == DATA[3:9]
        agents = ["object_store" in headers["user-agent"] for _, headers in cloud.seen]
        assert agents == [True, False, False, False]
