"""A hub on 127.0.0.1 that datasets are written to and read from, as huggingface_hub does it.

Repositories with branches and commits, uploads of large files (LFS, also in parts), listings in
pages, files by ranges, large ones behind a redirect. Whatever is private or written needs `TOKEN`.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from support.hub import serving

TOKEN = "hf_" + "t" * 34
LARGE = (".parquet", ".tar", ".arrow", ".npy", ".png")
PAGE = 7  # entries of a listing
PART = 300_000  # bytes of an upload in parts; for twice as many
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"

Files = dict[str, str]  # sha256 by path


@dataclass
class Dataset:
    """A repository: for each branch the commits, the newest last."""

    private: bool
    branches: dict[str, list[tuple[str, Files, str]]]

    def files(self, revision: str) -> tuple[str, Files] | None:
        """The commit and the files of a branch or commit."""
        if revision in self.branches:
            return self.branches[revision][-1][:2]
        commits = itertools.chain.from_iterable(self.branches.values())
        return next(((oid, files) for oid, files, _ in commits if oid == revision), None)


@dataclass
class HubServer:
    """The state of the hub.

    Attributes:
        requests: Those so far, as `METHOD path`.
        before: Called with each request before it is carried out; may give a status to answer.
        after: Called after a request was carried out; may give a status to answer instead.
    """

    endpoint: str = ""
    datasets: dict[str, Dataset] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    authorised: list[bool] = field(default_factory=list)
    before: Callable[[str], int | None] = lambda request: None
    after: Callable[[str], int | None] = lambda request: None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def create(self, repo: str, *, private: bool = True, readme: str | None = None) -> Dataset:
        files = {".gitattributes": self.keep(b"*.parquet filter=lfs\n")}
        if readme is not None:
            files["README.md"] = self.keep(readme.encode())
        self.datasets[repo] = Dataset(private, {"main": [(_oid(), files, "initial commit")]})
        return self.datasets[repo]

    def keep(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def content(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository."""
        found = self.datasets[repo].files(revision)
        assert found is not None
        return {path: self.blobs[digest] for path, digest in found[1].items()}

    def write(self, repo: str, path: str, data: bytes | None) -> None:
        """Commit a file, as a user does in a browser; None removes it."""
        commits = self.datasets[repo].branches["main"]
        files = dict(commits[-1][1])
        if data is None:
            del files[path]
        else:
            files[path] = self.keep(data)
        commits.append((_oid(), files, f"change {path}"))

    def head(self, repo: str) -> str:
        return self.datasets[repo].branches["main"][-1][0]


_numbers = itertools.count(1)


def _oid() -> str:
    return hashlib.sha1(str(next(_numbers)).encode()).hexdigest()


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _RefusedError(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        self.status, self.code = status, code


@contextmanager
def serve() -> Iterator[HubServer]:
    """Run a hub without repositories until the block ends."""
    hub = HubServer()

    class Handler(_Handler):
        server_state = hub

    with serving(Handler) as endpoint:
        hub.endpoint = endpoint
        yield hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet: otherwise each waits 40 ms for an acknowledgement
    server_state: HubServer

    def handle_any(self) -> None:
        hub = self.server_state
        url = urlsplit(self.path)
        path = unquote(url.path)
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        request = f"{self.command} {path}"
        with hub.lock:
            hub.requests.append(request)
            hub.authorised.append(self.headers.get("Authorization") == f"Bearer {TOKEN}")
        try:
            if status := hub.before(request):
                raise _RefusedError(status)
            with hub.lock:
                answer = self._answer(url.path, parse_qs(url.query), body)
            if refused_status := hub.after(request):
                raise _RefusedError(refused_status)
            status, data, headers = answer
        except _RefusedError as refused:
            status, data = refused.status, b'{"error": "refused"}'
            headers = {"X-Error-Code": refused.code} if refused.code else {}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def _answer(
        self, path: str, query: dict[str, list[str]], body: bytes
    ) -> tuple[int, bytes, dict[str, str]]:
        for method, pattern, function in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and (self.command == method or (self.command, method) == ("HEAD", "GET")):
                names = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                found = function(self, query=query, body=body, **names)
                if isinstance(found, tuple):
                    return found
                return HTTPStatus.OK, json.dumps(found).encode(), {}
        raise _RefusedError(404, "EntryNotFound")

    def _may(self, *, write: bool = False, repo: str = "") -> Dataset:
        hub = self.server_state
        token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if write and not token:
            raise _RefusedError(401)
        if not repo:
            return Dataset(True, {})
        dataset = hub.datasets.get(repo)
        if dataset is None or (dataset.private and not token):
            raise _RefusedError(404 if token else 401, "RepoNotFound")
        return dataset

    def _files(self, repo: str, revision: str) -> tuple[str, Files]:
        found = self._may(repo=repo).files(revision)
        if found is None:
            raise _RefusedError(404, "RevisionNotFound")
        return found

    def create(self, body: bytes, **_: object) -> object:
        self._may(write=True)
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.server_state.datasets:
            raise _RefusedError(409)
        assert asked["type"] == "dataset"
        private = asked.get("private", asked.get("visibility") == "private")
        self.server_state.create(repo, private=private)
        return {"url": f"{self.server_state.endpoint}/datasets/{repo}", "id": repo}

    def branch(self, repo: str, name: str, **_: object) -> object:
        dataset = self._may(write=True, repo=repo)
        if name in dataset.branches:
            raise _RefusedError(409)
        dataset.branches[name] = dataset.branches["main"][-1:]
        return {}

    def info(self, repo: str, revision: str | None = None, **_: object) -> object:
        oid, files = self._files(repo, revision or "main")
        private = self.server_state.datasets[repo].private
        siblings = [{"rfilename": path} for path in files]
        return {"id": repo, "sha": oid, "private": private, "tags": [], "siblings": siblings}

    def _entry(self, path: str, digest: str) -> dict[str, object]:
        data = self.server_state.blobs[digest]
        entry = {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
        return entry

    def tree(
        self, repo: str, revision: str, folder: str, query: dict[str, list[str]], **_: object
    ) -> tuple[int, bytes, dict[str, str]]:
        _, files = self._files(repo, revision)
        prefix = f"{folder.strip('/')}/".lstrip("/")
        entries: dict[str, dict[str, object]] = {}
        for path in sorted(files):
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                name = prefix + "/".join(parts[:depth])
                if depth == 1 or query.get("recursive") == ["true"]:
                    entries[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            if len(parts) == 1 or query.get("recursive") == ["true"]:
                entries[path] = self._entry(path, files[path])
        if prefix and not entries:
            raise _RefusedError(404, "EntryNotFound")
        start = int(query.get("cursor", ["0"])[0])
        listed = list(entries.values())
        headers = {}
        if start + PAGE < len(listed):
            query = {**query, "cursor": [str(start + PAGE)]}
            text = "&".join(f"{name}={value[0]}" for name, value in query.items())
            address = f"{self.server_state.endpoint}{urlsplit(self.path).path}?{text}"
            headers["Link"] = f'<{address}>; rel="next"'
        return HTTPStatus.OK, json.dumps(listed[start : start + PAGE]).encode(), headers

    def paths_info(self, repo: str, revision: str, body: bytes, **_: object) -> object:
        _, files = self._files(repo, revision)
        if "json" in self.headers["Content-Type"]:
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body.decode()).get("paths", [])
        return [self._entry(path, files[path]) for path in paths if path in files]

    def resolve(
        self, repo: str, revision: str, file: str, **_: object
    ) -> tuple[int, bytes, dict[str, str]]:
        oid, files = self._files(repo, revision)
        if file not in files:
            raise _RefusedError(404, "EntryNotFound")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{files[file]}"'}
        if file.endswith(LARGE):
            size = len(self.server_state.blobs[files[file]])
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(size)}
            elsewhere = self.server_state.endpoint.replace("127.0.0.1", "localhost")
            return HTTPStatus.FOUND, b"", {**headers, "Location": f"{elsewhere}/cdn/{files[file]}"}
        return self.content(files[file], headers)

    def content(
        self, digest: str, headers: dict[str, str] | None = None, **_: object
    ) -> tuple[int, bytes, dict[str, str]]:
        data = self.server_state.blobs[digest]
        headers = {**(headers or {}), "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match:
            return HTTPStatus.OK, data, headers
        first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return HTTPStatus.PARTIAL_CONTENT, data[first : last + 1], headers

    def preupload(self, repo: str, revision: str, body: bytes, **_: object) -> object:
        self._may(write=True, repo=repo)
        _, files = self._files(repo, revision)
        answers = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            large = path.endswith(LARGE)
            known = files.get(path)
            data = self.server_state.blobs[known] if known else b""
            oid = None if known is None else known if large else _git(data)
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": oid,
                }
            )
        return {"files": answers}

    def batch(self, repo: str, body: bytes, **_: object) -> object:
        self._may(write=True, repo=repo)
        hub, objects = self.server_state, []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in hub.blobs:
                href = f"{hub.endpoint}/lfs/{asked['oid']}"
                upload: dict[str, object] = {"href": href}
                if asked["size"] > 2 * PART:
                    count = -(-asked["size"] // PART)
                    parts = {f"{n:05d}": f"{href}/{n}" for n in range(1, count + 1)}
                    upload["header"] = {"chunk_size": str(PART), **parts}
                verify = {"href": f"{hub.endpoint}/verify/{asked['oid']}"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def put(self, digest: str, body: bytes, number: str | None = None, **_: object) -> object:
        hub = self.server_state
        if number is not None:
            hub.parts[digest, int(number)] = body
            return HTTPStatus.OK, b"", {"ETag": f'"{number}"'}
        if hub.keep(body) != digest:
            raise _RefusedError(400)
        return {}

    def joined(self, digest: str, body: bytes, **_: object) -> object:
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        hub = self.server_state
        if hub.keep(b"".join(hub.parts[digest, number] for number in numbers)) != digest:
            raise _RefusedError(400)
        return {}

    def verify(self, digest: str, **_: object) -> object:
        if digest not in self.server_state.blobs:
            raise _RefusedError(404)
        return {}

    def validate(self, body: bytes, **_: object) -> object:
        text = json.loads(body)["content"]
        if text.startswith("---\n"):
            assert isinstance(yaml.safe_load(text.split("---\n")[1]), dict)
        return {"errors": [], "warnings": []}

    def commit(self, repo: str, revision: str, body: bytes, **_: object) -> object:
        dataset = self._may(write=True, repo=repo)
        hub = self.server_state
        head, files = self._files(repo, revision)
        files, message = dict(files), ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    raise _RefusedError(412)
            elif entry["key"] == "file":
                files[value["path"]] = hub.keep(base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                if value["oid"] not in hub.blobs:
                    raise _RefusedError(400)
                files[value["path"]] = value["oid"]
            else:
                assert entry["key"] == "deletedFile", entry["key"]
                del files[value["path"]]
        oid = _oid()
        dataset.branches[revision] = [*dataset.branches[revision], (oid, files, message)]
        return {"commitUrl": f"{hub.endpoint}/datasets/{repo}/commit/{oid}", "commitOid": oid}

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Print nothing."""


_DATASET = f"/api/datasets/{_REPO}"
_ROUTES: list[tuple[str, str, Callable[..., object]]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", rf"{_DATASET}/branch/(?P<name>.+)", _Handler.branch),
    ("GET", rf"{_DATASET}(?:/revision/(?P<revision>.+))?", _Handler.info),
    ("GET", rf"{_DATASET}/tree/(?P<revision>[^/]+)(?P<folder>.*)", _Handler.tree),
    ("POST", rf"{_DATASET}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    ("POST", rf"{_DATASET}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"{_DATASET}/commit/(?P<revision>.+)", _Handler.commit),
    ("GET", rf"/datasets/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    ("GET", r"/cdn/(?P<digest>\w+)", _Handler.content),
    ("POST", rf"/datasets/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<digest>\w+)(?:/(?P<number>\d+))?", _Handler.put),
    ("POST", r"/lfs/(?P<digest>\w+)", _Handler.joined),
    ("POST", r"/verify/(?P<digest>\w+)", _Handler.verify),
]
