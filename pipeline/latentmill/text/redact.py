"""Masks secrets in URLs, error texts and metadata; no other module does.

Two kinds of text are treated differently. In errors and logs (`redact_text`), every value that
follows the name of a secret is masked: `token: ...`, `"password": "..."`, `--api-key ...`. Users
write metadata, and there `token: a small coin` may be a caption. So in metadata
(`redact_metadata`), only URLs, tokens of known formats and values that look random are masked.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

# Query parameters of web addresses that grant access: signatures, keys, tokens, policies.
_SECRET = re.compile(
    r"sig|token|secret|pass|pwd|key|auth|cred|polic|hmac|sess|hdn|jwt|bearer", re.I
)
_PART_OF_SECRET_NAMES = re.compile(r"pass|pwd|key|auth|cook|sig|tok|secret|cred|sas|jwt|sess", re.I)
# Names whose value is always a secret.
_CERTAINLY_SECRET = re.compile(
    r".*passw(or)?d|.*passphrase|pwd|.*api[-_]?key|.*access[-_]?key(id)?|.*account[-_]?key"
    r"|.*(private|secret)[-_]?key|.*client[-_]?secret|.*secret[-_]?access[-_]?key"
    r"|.*(access|auth|bearer|csrf|hf|hub|github|id|oauth|refresh|security|session)[-_]?token"
    r"|(proxy-)?authorization|(set-)?cookie",
    re.I,
)
# Names whose value is usually a secret. In metadata and before a colon, it must also look like one.
_MOSTLY_SECRET = re.compile(
    r"(?!.*(time|key)[-_ .]?signature$)"  # of music
    r"(.*signature|sig|.*token|.*secret.*|.*credentials?|sas|jwt|.*session(id)?)",
    re.I,
)
_FOLDER_NAME = re.compile(r".*session(id)?", re.I)  # `session=3/take.wav`
# Query parameters of web addresses that grant no access and identify the file.
_HARMLESS = re.compile(
    r"x-(amz|goog)-(algorithm|date|expires|signedheaders)|response-content-(disposition|type)|expires"
    r"|alt|attachment|bitrate|channels?|dl|download|end|ext|export|file(name)?|fmt|format|generation"
    r"|id|index|item|lang|list|name|offset|page|part(number)?|path|q|quality|query|raw|rate|ref|rev"
    r"|revision|s[eprtv]|spr|sr|size|song|start|t|title|track|type|url|v|ver|version(id)?|cell|bytes",
    re.I,
)
_PLAIN_VALUE = re.compile(r"-?[0-9.,:-]{0,16}|true|false|yes|no|\w|[^?&]*\.[a-z0-9]{2,5}", re.I)
_LONGEST_PLAIN = 32  # characters; a longer value may be a token, whatever its name
_LONGEST_PATH = (
    4096  # characters; a longer value is not a path, and is not searched for other names
)
# A shorter value may be a token if it switches between letters and digits more often than words do.
_WITHOUT_SEPARATORS = re.compile(r"[A-Za-z0-9+/]{16,}={0,2}")
_SWITCH = re.compile(r"(?=[a-z][A-Z0-9]|[A-Z][0-9]|[0-9][A-Za-z])")
_MOST_SWITCHES, _MOST_SWITCHES_OF_WORDS = 2, 4
_WORDS = re.compile(r"file(name)?|item|list|name|path|q|query|song|title|track|url", re.I)
_FIXED_VALUE = re.compile(
    r"AWS4-HMAC-SHA256|GOOG4-RSA-SHA256|\d{4}-?\d\d-?\d\d(T[0-9:.]+)?Z?", re.I
)

# Patterns of well-known tokens, masked anywhere in a text; each key is a part of every match.
_SHAPES = {
    "hf_": r"hf_(?:[A-Za-z0-9]{20,}|(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{10,})",
    **{f"gh{kind}_": rf"gh{kind}_[A-Za-z0-9]{{16,}}" for kind in "pousr"},
    "github_pat_": r"github_pat_\w{20,}",
    "glpat-": r"glpat-[\w-]{16,}",
    "AKIA": r"AKIA[A-Z0-9]{12,}",
    "ASIA": r"ASIA[A-Z0-9]{12,}",
    "xox": r"xox[abeoprs]-[\w-]{10,}",
    "sk-": r"sk-(?=[a-z-]*[A-Z0-9])[\w-]{20,}",
    "sk_live_": r"sk_live_\w{16,}",
    "AIza": r"AIza[\w-]{30,}",
    "ya29.": r"ya29\.[\w-]{20,}",
    "eyJ": r"eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?",
    "npm_": r"npm_[A-Za-z0-9]{30,}",
    "pypi-": r"pypi-[\w-]{30,}",
    "PRIVATE KEY": r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END [A-Z ]*-----)?",
}
_SHAPE = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(_SHAPES.values())})")
# Metadata that contains a secret contains at least one of these, in lower case.
_MARKS: tuple[str, ...] = (
    "//",
    "=",
    "passw",
    "_key",
    "-key",
    "apikey",
    "accesskey",
    "authoriz",
    "bearer",
    "cookie",
)
_MARKS += ("token", "secret")
_MARKS += tuple(mark.lower() for mark in _SHAPES)
# The same by a rare character that they contain, because planning checks millions of texts: most
# texts have few of these characters, so few marks are searched.
_MARKS_BY_CHARACTER: dict[str, list[str]] = {}
for _mark in _MARKS:
    _rare = next((character for character in "=/_-9zjxwk" if character in _mark), "")
    _MARKS_BY_CHARACTER.setdefault(_rare, []).append(_mark)

_NAMES_MAY_HAVE_QUERIES = ("s3", "s3a", "gs", "gcs", "hf", "memory", "file", "local")
_WEB = ("http", "https")
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*):(?P<rest>//.*)", re.I | re.DOTALL)
_NEXT_LINK = re.compile(r"::(?=[a-z][a-z0-9+.-]*(?:://|::))", re.I)
_PORT_OR_ADDRESS = re.compile(r"[^:@]*(:\d{0,5})?|\[[^\]]*\](:\d{0,5})?")
# Texts may be long and hostile: no pattern may scan the same character many times.
_URLS_IN_TEXT = re.compile(r"(?:[a-z][a-z0-9+.-]{0,20}:)?//[^\s'\"<>]+", re.I)
_USER_AND_PASSWORD = re.compile(r"//[^@/:]+:[^@]*@")
_MOST_NESTED = 8  # URLs nested in a parameter of a URL
# `--name `, `name=`, `"name": ` or `<name>`, and the value that follows.
_NAME_IN_TEXT = re.compile(
    r"(?<![\w.%-])(?:--(?P<flag>[\w-]{1,80})[\t ]|<(?P<tag>[\w.:-]{1,80})>"
    r"|(?P<name>[\w.%-]{1,80})\\?[\"']?[\t ]{0,2}(?P<mark>[:=]))[\t ]{0,2}"
)
_VALUE_IN_TEXT = re.compile(
    r"\\?\"(?P<double>[^\"]*)|\\?'(?P<single>[^']*)"
    r"|(?P<bare>[^\s&;'\"<>]*[^\s&;'\"<>.,:!?)\]}])"
)
_COOKIE = re.compile(r"(?P<bare>[^\s;'\"]+(?:; *[^\s;'\"]+)*)")
_SCHEME_OF_HEADER = re.compile(r"[\"']?(?:bearer|basic|token|digest|negotiate|aws4-[\w-]+) +", re.I)
_BEARER_IN_TEXT = re.compile(r"(?P<name>\bbearer) +(?=[^\s\d]{0,99}\d|\S{24})[\w.~+/=-]{12,}", re.I)

MASK = "***"


def redact(url: str) -> str:
    """Replace passwords, signatures and tokens in a URL by `***`.

    A local path stays unchanged. Each link of a chain (`zip://a.wav::s3://...`) is redacted. In a
    web address, every query parameter is treated as a secret unless its name or value is known to
    be harmless. A URL after other text (`url=https://...`) is redacted, too.
    """
    if "//" not in url:
        return url
    if not url.startswith("//") and not _URL.match(url) and "://" in url:
        return _URLS_IN_TEXT.sub(_redacted_url, url)
    return "::".join(map(_redacted_link, _NEXT_LINK.split(url)))


def redact_text(text: str) -> str:
    """Mask secrets in an error or log text: in URLs, known token formats and named secrets."""
    return _redacted_text(text, stored=False)


def redact_metadata(text: str) -> str:
    """Mask secrets in a user's text before it is stored; a text without secrets stays unchanged."""
    return _redacted_text(text, stored=True) if may_hold_secrets(text) else text


def may_hold_secrets(text: str) -> bool:
    """Quick check: False if the text certainly contains no secret."""
    lower = text.lower()
    for character, marks in _MARKS_BY_CHARACTER.items():
        if character in lower:
            for mark in marks:
                if mark in lower:
                    return True
    return False


def redact_value(value: Any) -> Any:
    """Redact all strings in JSON metadata, at any depth; changes lists and dicts in place."""
    top = [value]
    todo: list[Any] = [top]
    while todo:  # not recursive: JSON may be nested deeper than Python's recursion limit
        parts = todo.pop()
        for key, part in parts.items() if isinstance(parts, dict) else enumerate(parts):
            if isinstance(part, str):
                named = isinstance(key, str) and _CERTAINLY_SECRET.fullmatch(key)
                parts[key] = MASK if named and part else redact_metadata(part)
            elif isinstance(part, dict | list):
                todo.append(part)
    return top[0]


def is_secret_name(name: str) -> bool:
    """Whether a setting with this name contains a secret."""
    return bool(_CERTAINLY_SECRET.fullmatch(name) or _MOSTLY_SECRET.fullmatch(name))


def _redacted_text(text: str, *, stored: bool) -> str:
    if "//" in text:
        text = _URLS_IN_TEXT.sub(_redacted_url, text)
    text = _SHAPE.sub(MASK, text)
    text = _BEARER_IN_TEXT.sub(rf"\g<name> {MASK}", text)
    parts, done = [], 0
    name = _NAME_IN_TEXT.search(text)
    while name is not None:
        value = _value_of(name, text, stored=stored)
        if value is not None:
            parts += [text[done : value[0]], MASK]
            done = value[1]
        name = _NAME_IN_TEXT.search(text, max(name.end(), done))
    return "".join([*parts, text[done:]])


def _value_of(name: re.Match[str], text: str, *, stored: bool) -> tuple[int, int] | None:
    """Start and end of the secret that follows a name; None if there is none."""
    word = unquote(name["flag"] or name["tag"] or name["name"]).lstrip("-")
    if not _PART_OF_SECRET_NAMES.search(word):
        return None
    certain = _CERTAINLY_SECRET.fullmatch(word) is not None
    if not certain and not _MOSTLY_SECRET.fullmatch(word):
        return None
    begin, pattern = name.end(), _VALUE_IN_TEXT
    if word.lower().endswith("authorization") and (scheme := _SCHEME_OF_HEADER.match(text, begin)):
        begin = scheme.end()
    elif word.lower().endswith("cookie"):
        pattern = _COOKIE
    found = pattern.match(text, begin)
    if found is None or found.lastgroup is None:
        return None
    value = found[found.lastgroup]
    if not value or value.startswith(MASK):
        return None
    spoken = name["mark"] == ":" and found.lastgroup == "bare" and "-" not in word
    is_path = text[max(0, name.start() - 1) : name.start()] in ("/", "\\")  # `/etc/passwd: ...`
    doubtful = stored or (spoken and (is_path or not certain))
    short = found.lastgroup != "bare" or len(value) <= _LONGEST_PATH
    if short and ((doubtful and not _looks_random(value)) or _may_be_folder(word, value)):
        return None
    return found.span(found.lastgroup)


def _may_be_folder(name: str, value: str) -> bool:
    """Whether `name=value` may be the name of a folder: `session=3`."""
    return bool(_FOLDER_NAME.fullmatch(name)) and ("/" in value or not _looks_random(value))


def _looks_random(value: str) -> bool:
    """Whether a value may be a secret because it is not a word, a number or a file name."""
    if _PLAIN_VALUE.fullmatch(value) or " " in value:
        return False
    mixed = re.search(r"\d", value) is not None and re.search(r"[a-zA-Z]", value) is not None
    return (mixed and len(value) >= 6) or len(value) >= 20


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
    path = re.sub(r"(?<=[;/])[^/;]*", lambda one: _redacted_field(one[0], strict=True), path)
    query = re.sub(r"[^&;]+", lambda one: _redacted_field(one[0], strict=named), query)
    fragment = re.sub(r"[^&;]+", lambda one: _redacted_field(one[0], strict=True), fragment)
    shown = f"{scheme}{':' if scheme else ''}{path}{question}{query}{hash_}{fragment}"
    return _SHAPE.sub(MASK, shown)


def _without_user(rest: str, web: bool) -> str:
    """Mask the user and password in `//user:password@host/...`.

    A password may contain `/`, `?` or `@`. An `@` in the path does not end a user name.
    """
    host = re.split(r"[/?#]", rest[2:], maxsplit=1)[0]
    user, at, _ = host.rpartition("@")
    if at:  # a lone user is a container or an account, except in a web address: there, a token
        secret = web or not {":", ";"}.isdisjoint(unquote(user))
        return f"//{MASK}@{rest[len(user) + 3 :]}" if secret else rest
    if _PORT_OR_ADDRESS.fullmatch(host) or "@" not in rest:
        return rest
    return f"//{MASK}@{rest.partition('@')[2]}"


def _redacted_url(match: re.Match[str]) -> str:
    """Redact a URL in a text; trailing punctuation is not part of the URL.

    A match without a scheme counts as a URL only if it has a user and a password.
    """
    url = match[0].rstrip(".,:;!?)]}")
    begin = 0
    if url.startswith("//"):
        user = _USER_AND_PASSWORD.search(url, 0, url.rfind("@") + 1)
        if user is None:
            return match[0]
        begin = user.start()
    return url[:begin] + redact(url[begin:]) + match[0][len(url) :]


def _redacted_field(field: str, *, strict: bool) -> str:
    """Return `name=***` for `name=value`, or `***` for a bare value, if it may be a secret.

    With `strict`, only a name that is certainly a secret's is masked.
    """
    name, equals, value = field.partition("=")
    name, plain = unquote(name), unquote(value)
    if value.startswith(MASK) or field == MASK:
        return field
    if "://" in plain:
        secret = plain.count("://") > _MOST_NESTED or redact_text(plain) != plain
    elif strict:
        secret = bool(equals) and is_secret_name(name)
        secret = secret and not _may_be_folder(name, plain)
    elif not equals:
        secret = len(name) >= _LONGEST_PLAIN
    else:
        most = _MOST_SWITCHES_OF_WORDS if _WORDS.fullmatch(name) else _MOST_SWITCHES
        random = _WITHOUT_SEPARATORS.fullmatch(plain) and len(_SWITCH.findall(plain)) > most
        random = random and not _FIXED_VALUE.fullmatch(plain)
        known = _HARMLESS.fullmatch(name) and len(plain) < _LONGEST_PLAIN and not random
        file = _PLAIN_VALUE.fullmatch(plain) is not None
        secret = not (known or file) or (_SECRET.search(name) is not None and not known)
    if not secret or not (name or value):
        return field
    return f"{field.partition('=')[0]}={MASK}" if equals else MASK
