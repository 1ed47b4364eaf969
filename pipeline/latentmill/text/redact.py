"""Secrets in URLs and texts: the one place that takes them out of what is shown or stored."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

# Names of fields that hold what lets others in: signatures, keys, tokens, policies.
_SECRET = re.compile(
    r"sig|token|secret|pass|pwd|key|auth|cred|polic|hmac|sess|hdn|jwt|bearer", re.I
)
# The same in names of objects, which may hold "?" and ";" themselves, and outside of URLs: words
# that name nothing else.
_SURELY_SECRET = re.compile(
    r"(.*signature|sig|.*token|.*secret.*|.*passw(or)?d|pwd|.*credentials?"
    r"|.*api[-_]?key|.*access[-_]?key(id)?|.*account[-_]?key|sas|jwt|.*session(id)?|authorization)",
    re.I,
)
# Fields of web addresses that let nobody in, and are needed to know what an address stands for.
_HARMLESS = re.compile(
    r"x-(amz|goog)-(algorithm|date|expires|signedheaders)|response-content-(disposition|type)|expires"
    r"|alt|attachment|bitrate|channels?|dl|download|end|ext|export|file(name)?|fmt|format|generation"
    r"|id|index|item|lang|list|name|offset|page|part(number)?|path|q|quality|query|raw|rate|ref|rev"
    r"|revision|s[eprtv]|spr|sr|size|song|start|t|title|track|type|url|v|ver|version(id)?|cell|bytes",
    re.I,
)
_PLAIN_VALUE = re.compile(r"-?[0-9.,:-]{0,16}|true|false|yes|no|\w|[^?&]*\.[a-z0-9]{2,5}", re.I)
_LONGEST_PLAIN = 32  # characters; a longer value may be a token, whatever its name

_NAMES_MAY_HAVE_QUERIES = ("s3", "s3a", "gs", "gcs", "hf", "memory", "file", "local")
_WEB = ("http", "https")
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*):(?P<rest>//.*)", re.I | re.DOTALL)
_NEXT_LINK = re.compile(r"::(?=[a-z][a-z0-9+.-]*(?:://|::))", re.I)
_PORT_OR_ADDRESS = re.compile(r"[^:@]*(:\d{0,5})?|\[[^\]]*\](:\d{0,5})?")
# Texts may be long and hostile: no pattern may look at the same character many times.
_URLS_IN_TEXT = re.compile(r"(?:[a-z][a-z0-9+.-]{0,20}:)?//[^\s'\"<>]+", re.I)
_USER_AND_PASSWORD = re.compile(r"//[^@/:]+:[^@]*@")
_MOST_NESTED = 8  # URLs in a field of a URL
_FIELD_IN_TEXT = re.compile(r"(?<![\w.%-])[\w.%-]+=[^\s&;'\"<>]*[^\s&;'\"<>.,:!?)\]}]")
_HEADER_IN_TEXT = re.compile(
    r"(?P<name>\bauthorization: *(?:bearer|basic|token)?|\bbearer) +(?P<value>[\w.~+/=-]{12,})",
    re.I,
)

MASK = "***"


def redact(url: str) -> str:
    """The URL without passwords, signatures and tokens: each is `***`.

    A path of this machine stays as it is. Of a chain (`zip://a.wav::s3://...`) each link is looked
    at. In a web address every field of the query counts as a secret, unless its name or value is
    known to be harmless.
    """
    return "::".join(map(_redacted_link, _NEXT_LINK.split(url))) if "//" in url else url


def redact_text(text: str) -> str:
    """A text without the secrets of its URLs, and of fields that are named as secrets."""
    if "//" in text:
        text = _URLS_IN_TEXT.sub(_redacted_url, text)
    if "=" in text:
        text = _FIELD_IN_TEXT.sub(_redacted_match, text)
    return _HEADER_IN_TEXT.sub(rf"\g<name> {MASK}", text)


def redact_value(value: Any) -> Any:
    """A JSON value with all its texts redacted, at any depth; lists and dicts change in place."""
    top = [value]
    todo: list[Any] = [top]
    while todo:  # not by recursion, which JSON that Python can read may be too deep for
        parts = todo.pop()
        for key, part in parts.items() if isinstance(parts, dict) else enumerate(parts):
            if isinstance(part, str):
                parts[key] = redact_text(part)
            elif isinstance(part, dict | list):
                todo.append(part)
    return top[0]


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name holds a secret."""
    return _SURELY_SECRET.fullmatch(name) is not None


def _redacted_link(url: str) -> str:
    match = _URL.match(url)
    scheme, rest = (match["scheme"], match["rest"]) if match else ("", url)
    if not rest.startswith("//"):
        return url
    web = scheme.lower() in _WEB or not scheme
    named = not web and scheme.lower() in _NAMES_MAY_HAVE_QUERIES
    rest = _without_user(rest, web)
    address, hash_, fragment = rest.partition("#")
    if named:  # a "#" or "?" may belong to the name
        address, hash_, fragment = rest, "", ""
    path, question, query = address.partition("?")
    path = re.sub(r"(?<=;)[^/;]*", lambda one: _redacted_field(one[0], strict=True), path)
    query = re.sub(r"[^&;]+", lambda one: _redacted_field(one[0], strict=named), query)
    fragment = re.sub(r"[^&;]+", lambda one: _redacted_field(one[0], strict=True), fragment)
    return f"{scheme}{':' if scheme else ''}{path}{question}{query}{hash_}{fragment}"


def _without_user(rest: str, web: bool) -> str:
    """Take the user's name and password out of `//user:password@host/...`.

    A password may hold `/`, `?` or `@`. The `@` of a path is none of a user's.
    """
    host = re.split(r"[/?#]", rest[2:], maxsplit=1)[0]
    user, at, _ = host.rpartition("@")
    if at:  # without a password it may be a container or an account, but in a web address a token
        secret = web or not {":", ";"}.isdisjoint(unquote(user))
        return f"//{MASK}@{rest[len(user) + 3 :]}" if secret else rest
    if _PORT_OR_ADDRESS.fullmatch(host) or "@" not in rest:
        return rest
    return f"//{MASK}@{rest.partition('@')[2]}"


def _redacted_url(match: re.Match[str]) -> str:
    """A URL in a text; the punctuation behind it is the text's.

    What has no scheme is a URL only if it has a user and a password.
    """
    url = match[0].rstrip(".,:;!?)]}")
    begin = 0
    if url.startswith("//"):
        user = _USER_AND_PASSWORD.search(url, 0, url.rfind("@") + 1)
        if user is None:
            return match[0]
        begin = user.start()
    return url[:begin] + redact(url[begin:]) + match[0][len(url) :]


def _redacted_match(match: re.Match[str]) -> str:
    return _redacted_field(match[0], strict=True)


def _redacted_field(field: str, *, strict: bool) -> str:
    """`name=value` or a bare value, as `name=***` or `***` if it may be a secret.

    Args:
        field: The field.
        strict: Whether only names count that surely name secrets.
    """
    name, equals, value = field.partition("=")
    name, plain = unquote(name), unquote(value)
    if value.startswith(MASK) or field == MASK:
        return field
    if "://" in plain:
        secret = plain.count("://") > _MOST_NESTED or redact_text(plain) != plain
    elif strict:
        secret = bool(equals) and is_secret_name(name)
    elif not equals:
        secret = len(name) >= _LONGEST_PLAIN
    else:
        known = _HARMLESS.fullmatch(name) and len(plain) < _LONGEST_PLAIN
        file = _PLAIN_VALUE.fullmatch(plain) is not None
        secret = not (known or file) or (_SECRET.search(name) is not None and not known)
    if not secret or not (name or value):
        return field
    return f"{field.partition('=')[0]}={MASK}" if equals else MASK
