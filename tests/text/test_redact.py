"""Secrets stay out of what is shown and what is stored, in every form in which URLs carry them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from latentmill.config import load_config
from latentmill.errors import ConfigError, ItemError, LatentmillError, SourceError, StoreError
from latentmill.sources.columns import as_json
from latentmill.sources.folder import FolderSource
from latentmill.sources.manifest import ManifestSource
from latentmill.sources.metadata import parse_sidecar
from latentmill.storage.remote import refuse_secrets
from latentmill.storage.storage import Storage
from latentmill.text import redact as redact_module
from latentmill.text.redact import (
    may_hold_secrets,
    redact,
    redact_metadata,
    redact_text,
    redact_value,
)

LONG = "q" * 40
S = "hunter2"  # the secret in every form

SECRETS = [  # with a secret, and as it is shown
    (f"s3://key:{S}@bucket/a.wav", "s3://***@bucket/a.wav"),
    (f"s3://KEY:{S}/x@bucket/a.wav", "s3://***@bucket/a.wav"),
    (f"s3://KEY:{S}@x@bucket/a.wav", "s3://***@bucket/a.wav"),
    (f"s3://KEY:{S}?x@bucket/a.wav", "s3://***@bucket/a.wav"),
    (f"s3://KEY%3A{S}@bucket/a.wav", "s3://***@bucket/a.wav"),
    (f"https://user:{S}@host/a.wav", "https://***@host/a.wav"),
    (f"https://{S}@host/a.wav", "https://***@host/a.wav"),
    (f"HTTPS://user:{S}@[::1]:80/a", "HTTPS://***@[::1]:80/a"),
    (f"//user:{S}@host/a.wav", "//***@host/a.wav"),
    (f"smb://user;pw={S}@host/a.wav", "smb://***@host/a.wav"),
    (f"sftp://user:{S}@host:22/a.wav", "sftp://***@host:22/a.wav"),
    (f"zip://x.wav::s3://key:{S}@bucket/a.zip", "zip://x.wav::s3://***@bucket/a.zip"),
    (f"simplecache::https://user:{S}@host/a", "simplecache::https://***@host/a"),
    (f"filecache::zip://a::https://h/z?token={S}", "filecache::zip://a::https://h/z?token=***"),
    (f"s3://bucket/a.wav?Signature={S}", "s3://bucket/a.wav?Signature=***"),
    (f"s3://b/a.wav?x=1&X-Amz-Signature={S}", "s3://b/a.wav?x=1&X-Amz-Signature=***"),
    (f"gs://b/a?X-Goog-Signature={S}&b=1", "gs://b/a?X-Goog-Signature=***&b=1"),
    (f"s3://b/a.wav?AWSAccessKeyId={S}", "s3://b/a.wav?AWSAccessKeyId=***"),
    (f"https://h/a?X-Amz-Expires=9&X-Amz-Signature={S}", "https://h/a?X-Amz-Expires=9&X-Amz-Signature=***"),
    (f"https://h/a?X%2DAmz%2DSignature={S}", "https://h/a?X%2DAmz%2DSignature=***"),
    (f"https://h/a.wav;token={S}", "https://h/a.wav;token=***"),
    (f"https://h/a;jsessionid={S}/b.wav?c=1", "https://h/a;jsessionid=***/b.wav?c=1"),
    (f"s3://bucket/a.wav;token={S}", "s3://bucket/a.wav;token=***"),
    (f"https://host/a.wav?a={S}", "https://host/a.wav?a=***"),
    (f"https://host/a.wav?{LONG}", "https://host/a.wav?***"),
    (f"https://host/a?x={LONG}", "https://host/a?x=***"),
    (f"https://host/a?id={LONG}", "https://host/a?id=***"),
    (f"https://host/a?access_token={S}", "https://host/a?access_token=***"),
    (f"https://host/a?n=1;pass={S}", "https://host/a?n=1;pass=***"),
    (f"https://h.blob.core/a?sv=2022-11-02&sr=b&sig={S}%3D", "https://h.blob.core/a?sv=2022-11-02&sr=b&sig=***"),
    (f"az://container/a?sv=2022-11-02&sig={S}", "az://container/a?sv=2022-11-02&sig=***"),
    (f"https://host/a#access_token={S}", "https://host/a#access_token=***"),
    (f"https://host/get?url=https%3A%2F%2Fu%3A{S}%40h%2Fa", "https://host/get?url=***"),
    (f"https://[bad/a?key={S}", "https://[bad/a?key=***"),
    ("https://h/a.wav?id=Zx81kQp0Lm29TrYu", "https://h/a.wav?id=***"),
    ("https://h/a.wav?t=9f86d081884c7d65", "https://h/a.wav?t=***"),
    ("https://h/a?v=abcd1234efgh5678", "https://h/a?v=***"),
    (f"https://h/Signature={S}/a.wav", "https://h/Signature=***/a.wav"),
    (f"https://h/a?session={S}", "https://h/a?session=***"),
]  # fmt: skip

HARMLESS = [
    "/music/a.wav",
    "/music/a?b=c;token=d.wav",
    "s3://bucket/a b?c=token#1.wav",
    "s3://bucket/a@b:c.wav",
    "s3://bucket/mail me@home.wav",
    "hf://datasets/owner/name@main/a.wav",
    "abfs://container@account.dfs.core.windows.net/a",
    "sftp://user@host/a.wav",
    "https://host:8080/a.wav",
    "https://host:8080/@artist/a.wav",
    "https://[::1]:8080/a::b.wav",
    "https://host/a.wav?download=1&name=x&id=song-17",
    "https://host/get?file=music/a%20song.wav&v=2",
    "https://host/a.tar#bytes=0-17&t=1.5,2",
    "https://host/a.parquet#cell=0,17,audio",
    "file:///music/a.wav",
    "s3://bucket/session=12/time_signature=4-4/a.wav",
    "https://h/a?X-Amz-Date=20130524T000000Z&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Expires=60",
    "https://h.blob.core/a?sv=2022-11-02&se=2024-01-01T00:00:00Z&sp=r",
    "https://host/a?name=summer2019recording&id=song-17-of-2021-live&v=dQw4w9WgXcQ",
]


@pytest.mark.parametrize(("url", "shown"), SECRETS)
def test_secrets_are_masked(url: str, shown: str) -> None:
    assert redact(url) == shown
    assert redact(shown) == shown
    if "q" not in url or " " in url:
        assert S not in shown
    text = f"Cannot read '{url}' and {url}: no."
    assert redact_text(text) == text.replace(url, shown)
    assert str(ItemError(text)) == text.replace(url, shown)
    assert redact_value({"a": [url, 1]}) == {"a": [shown, 1]}
    with pytest.raises(SourceError, match="carries credentials") as caught:
        refuse_secrets("Source", url, SourceError)
    assert S not in str(caught.value)
    assert LONG not in str(caught.value)


@pytest.mark.parametrize("url", HARMLESS)
def test_what_is_no_secret_stays(url: str) -> None:
    assert redact(url) == url
    if " " not in url and "://" in url:
        assert redact_text(f"at '{url}'.") == f"at '{url}'."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"GET /a.wav?Signature={S}&x=1 failed", "GET /a.wav?Signature=***&x=1 failed"),
        (f"Authorization: Bearer {S}{S}", "Authorization: Bearer ***"),
        (f"sent bearer {LONG}", "sent bearer ***"),
        (f"AccountName=a;AccountKey={S};x=1", "AccountName=a;AccountKey=***;x=1"),
        (f"AWS_SECRET_ACCESS_KEY={S}", "AWS_SECRET_ACCESS_KEY=***"),
        ("a basic beat // at 2:00 @home, key=Am, tokens=3.", None),
    ],
)
def test_secrets_of_texts_without_a_url(text: str, shown: str | None) -> None:
    assert redact_text(text) == (shown or text)


HF = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567"
TOKENS = [
    HF,
    "hf_" + "abcdefghijklmnopqrstuvwxyzabcdefgh",
    "ghp_" + "16C7e42F292c6912E7710c838347Ae178B4a",
    "github_pat_" + "11ABCDEFG0aBcDeFgHiJk_LmNoPqRsTuVwXyZ",
    "glpat-" + "aB3dE5gH7jK9mN1pQ3s",
    "AKIA" + "IOSFODNN7EXAMPLE",
    "ASIA" + "IOSFODNN7EXAMPLE",
    "xoxb-" + "123456789012-abcDEF",
    "sk-" + "proj-aB3dE5gH7jK9mN1pQ3s",
    "AIza" + "SyA1234567890abcdefghijklmnopqrstuv",
    "ya29." + "a0AfH6SMBx1234567890abcdef",
    "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSMeK",
]


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_are_known_by_their_shape(token: str) -> None:
    for before, after in [("", ""), ("Bad token ", "."), ("('", "')"), ("s3://b/", "/a.wav")]:
        text = f"{before}{token}{after}"
        assert redact_text(text) == f"{before}***{after}"
        assert redact_metadata(text) == f"{before}***{after}"
    assert redact(f"https://host/{token}/a.wav") == "https://host/***/a.wav"
    assert redact_value({"a": [token]}) == {"a": ["***"]}
    assert token not in str(LatentmillError(f"No such user: {token}"))
    assert parse_sidecar("a.cls", token.encode()) == {"cls": "***"}


IN_TEXTS = [  # what stands for the secret is §
    '{"token": "§"}',
    '{"token":"§","x":1}',
    "{'password': '§', 'x': 1}",
    r"{\"api_key\": \"§\"}",
    '{"token": "§',
    "password: §",
    "Password:§",
    "passphrase : §",
    "token: §",
    "secret: §, x: 1",
    "db_password=§",
    'export HF_TOKEN="§"',
    "HF_TOKEN='§'",
    "run --token § -x",
    "run --token=§ -x",
    "--api-key §",
    "--password '§'",
    "X-Auth-Token: §",
    "x-amz-security-token: §",
    "X-Api-Key: §",
    "Authorization: Bearer §",
    "Authorization: Basic §",
    "authorization: §",
    '{"Authorization": "Bearer §"}',
    "{'headers': {'Authorization': 'token §'}}",
    "Proxy-Authorization: Basic §",
    "Cookie: §; b=§",
    "Set-Cookie: id=§; Path=/",
    "bearer 0123456789§",
    "AWS4-HMAC-SHA256 Credential=§/20130524/us-east-1, SignedHeaders=host, Signature=§",
    "<AWSSecretAccessKey>§</AWSSecretAccessKey><Code>x</Code>",
    "error: 'password: §'",
    "error: see (https://u:§@host/a)",
    "url=https://u:§@host/a",
    "<https://host/a?token=§>",
    '"https://host/a?token=§"',
    "[https://host/a?token=§]",
    " https://u:§@host/a",
    "https://host/token=§/a",
]


@pytest.mark.parametrize("text", IN_TEXTS)
def test_secrets_are_known_by_their_name(text: str) -> None:
    shown = redact_text(text.replace("§", S))
    assert S not in shown
    assert shown == redact_text(shown)
    assert S not in str(ItemError(text.replace("§", S)))
    if "://" in text:
        assert S not in redact(text.replace("§", S))
        with pytest.raises(SourceError, match="carries credentials"):
            refuse_secrets("Source", text.replace("§", S), SourceError)


CAPTIONS = [
    "token: a small coin",
    "a token=3, secret: whispers, session: late night",
    "password: open sesame",
    "time_signature=4/4; key_signature=Cmajor; time signature: 12/8",
    "The Secret: My Love, Signature: Blue",
    "ring bearer of the lord of the rings",
    "hf_drums, gh_loop, sk-8 board, task-force, AKIAI, Asia, eyJ",
    "session=12/take2.wav",
    "a=b & c=d // e",
    "night: light, key: Am, tokens: 1024, bass=on",
    '{"token": "coin"}',
    "cookie: chocolate",
]


@pytest.mark.parametrize("text", CAPTIONS)
def test_what_users_wrote_is_stored_as_it_is(text: str) -> None:
    assert redact_metadata(text) == text
    assert parse_sidecar("a.txt", text.encode()) == {"text": text}
    data = {"caption": text, "token": "coin", "signature": "4/4", "session": "one"}
    assert json.loads(as_json(data)) == data
    assert parse_sidecar("a.json", json.dumps(data).encode()) == data


@pytest.mark.parametrize(
    "text",
    [
        "Cannot read /music/session=1/take2: no such file.",
        "Cannot read /music/time_signature=4/4/a.wav: no such file.",
        "Cannot read 'The Secret: My Love.wav'.",
        "dataset.json refers to a file outside of the store, '../../etc/passwd': do not use it.",
        "Cannot read /etc/passwd: no such file.",
        "Cannot read C:\\keys\\access_token: no such file.",
        "token: a small coin",
        "Manifest m.csv has no key in line 7.",
        "--token-column x: no such option.",
        "2 session: 3, signature: 4/4",
    ],
)
def test_errors_name_files_as_they_are(text: str) -> None:
    assert redact_text(text) == text


@pytest.mark.parametrize("name", ["password", "api_key", "Authorization", "X-Auth-Token"])
def test_secret_fields_of_metadata_are_not_stored(name: str) -> None:
    assert json.loads(as_json({"a": {"b": [{name: S}]}})) == {"a": {"b": [{name: "***"}]}}
    assert parse_sidecar("a.json", json.dumps({name: S}).encode()) == {name: "***"}


@given(st.lists(st.sampled_from([*redact_module._MARKS, *"=/_-9zjxwk", "a", "é "])).map("".join))
@example("Bearer")
@example("TO\u212aEN")  # a Kelvin sign, whose lower case is k
def test_the_quick_check_finds_every_mark(text: str) -> None:
    for version in (text, text.upper(), text[1:]):
        expected = any(mark in version.lower() for mark in redact_module._MARKS)
        assert may_hold_secrets(version) == expected


LARGE = {
    "a long word": "see http://host/a " + "a" * 200_000,
    "colons": "//a" + ":a" * 100_000,
    "half addresses": "me@home " + "//a:" * 50_000,
    "names": "a:b=token:" * 20_000,
    "quotes": 'token "token: ' * 20_000,
    "cookies": "cookie: " * 20_000,
    "names of folders": "session=1/" * 200_000,
    "names before a file": "token=a/" * 100_000 + "a.wav",
    "URLs in URLs": "http://host/a?b=" * 10_000,
}


@pytest.mark.parametrize("kind", LARGE)
def test_large_texts_take_time_in_proportion(kind: str) -> None:
    """Time that grows with the square of the length would be minutes to hours."""
    text = LARGE[kind]
    if kind == "URLs in URLs":
        assert redact_text(text) == "http://host/a?b=***"
    else:
        assert len(redact_text(text)) <= len(text)
        redact_metadata(text)


@pytest.mark.parametrize("levels", [2, 450])
def test_secrets_at_any_depth(levels: int) -> None:
    text = '{"a": [' * levels + f'"s3://k:{S}@bucket/a"' + "]}" * levels
    assert S not in json.dumps(redact_value(json.loads(text)))


@pytest.mark.parametrize("url", [url for url, _ in SECRETS if not url.startswith("//")])
def test_a_store_or_a_source_whose_url_has_credentials_is_refused(url: str) -> None:
    with pytest.raises(StoreError) as store:
        Storage(url)
    with pytest.raises(SourceError) as source:
        FolderSource(url, ["wav"])
    assert S not in f"{store.value} {source.value}"


@pytest.mark.parametrize(("url", "shown"), SECRETS)
def test_signed_urls_in_other_columns_and_sidecars(url: str, shown: str, tmp_path: Path) -> None:
    row = {"path": "a.wav", "cover": url, "more": {"urls": [url]}}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    (tmp_path / "m.csv").write_text(f'path,cover\na.wav,"{url}"\n')
    for name in ("m.jsonl", "m.csv"):
        (item,) = ManifestSource(str(tmp_path / name)).items()
        metadata = json.loads(item.metadata)
        assert metadata["cover"] == shown
        assert S not in item.metadata
    assert parse_sidecar("a.json", json.dumps(row).encode())["more"] == {"urls": [shown]}
    assert S not in parse_sidecar("a.txt", f"from {url}".encode())["text"]


@pytest.mark.parametrize(("url", "shown"), SECRETS)
def test_a_secret_in_a_manifests_path_is_refused_without_it(
    url: str, shown: str, tmp_path: Path
) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": url}))
    with pytest.raises(LatentmillError) as caught:
        list(ManifestSource(str(tmp_path / "m.jsonl")).items())
    assert S not in str(caught.value)


@pytest.mark.parametrize("name", ["hf_token", "api_key", "password", "aws_secret_access_key"])
def test_a_model_option_that_is_a_secret_is_refused(name: str) -> None:
    options = {"source": "a", "out": "b", "model_options": {name: S}}
    with pytest.raises(ConfigError, match=f"Model option {name} looks like a secret") as caught:
        load_config(None, options)
    assert S not in str(caught.value)
