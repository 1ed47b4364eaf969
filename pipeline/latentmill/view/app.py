"""The answers of the server: the page, JSON about records, pictures, audio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from latentmill import reporting
from latentmill.errors import ConfigError, LatentmillError
from latentmill.pictures.drawing import spectrogram, waveform
from latentmill.store.store import LatentStore
from latentmill.text.log import get_logger
from latentmill.view.access import Access, App
from latentmill.view.catalog import Catalog
from latentmill.view.desk import Desk, Side, wav
from latentmill.view.facts import facts
from latentmill.view.query import (
    MAX_PAGE,
    Channel,
    MixRequest,
    Search,
    mix_of,
    parsed,
    parsed_json,
)
from latentmill.view.recipe import python_lines
from latentmill.view.waiting import BusyError, GoneError, Queue

_log = get_logger("view")

_STATIC = Path(__file__).parent / "static"
_STYLE = Path(reporting.__file__).parent / "style.css"
FILES = {  # the only files that are sent: name in the address, file, type
    "": (_STATIC / "index.html", "text/html; charset=utf-8"),
    "static/style.css": (_STYLE, "text/css; charset=utf-8"),
    "static/view.css": (_STATIC / "view.css", "text/css; charset=utf-8"),
    "static/icon.svg": (_STATIC / "icon.svg", "image/svg+xml"),
    **{
        f"static/{name}.js": (_STATIC / f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("main", "dom", "api", "search", "record", "desk", "player", "strip")
    },
}
_SIDES: tuple[Side, ...] = ("latent", "decoded", "original")
_PICTURE_SECONDS = 60.0

Answer = Callable[[Request], Awaitable[Response]]


class Viewer:
    """The requests that a page makes. Decoding and reading of a store each have one thread."""

    def __init__(
        self, store: LatentStore, *, options: str = "", remote_sources: bool = False
    ) -> None:
        """`options` are the arguments of `lm.open` after the path, in the Python lines."""
        self._url, self._options = store.url, options
        self._catalog = Catalog(store)
        self._index = store.index
        self._facts = facts(store, self._catalog)
        self._desk = Desk(
            store, remote_sources=remote_sources
        )  # only used in the thread of `_decoding`
        self._decoding, self._searching = Queue(), Queue()
        self._files = {name: (path.read_bytes(), kind) for name, (path, kind) in FILES.items()}

    def app(self, token: str) -> App:
        """The ASGI application."""
        answers: dict[str, Answer] = {
            "api/store": self._store_facts,
            "api/search": self._search,
            "api/values": self._values,
            "api/record": self._record,
            "api/python": self._python,
            "picture": self._picture,
            "audio": self._audio,
        }
        routes = [Route(f"/{name}", _answered(one)) for name, one in answers.items()]
        routes += [Route(f"/{name}", self._file(name)) for name in self._files]
        return Access(Starlette(routes=routes), token)

    def _file(self, name: str) -> Answer:
        data, kind = self._files[name]

        async def answer(request: Request) -> Response:
            return Response(data, headers={"content-type": kind})

        return answer

    async def _store_facts(self, request: Request) -> Response:
        return JSONResponse(self._facts)

    async def _search(self, request: Request) -> Response:
        values = _only(request, "key", "where", "sort", "descending", "offset", "limit")
        offset = _whole(values, "offset", 0, 2**31)
        limit = _whole(values, "limit", 50, MAX_PAGE)
        search = parsed(
            Search,
            {
                "key": values.get("key", ""),
                "where": parsed_json(values.get("where", "[]"), "where"),
                "sort": values.get("sort", "key"),
                "descending": values.get("descending") == "1",
            },
        )

        def work(check: Callable[[], None]) -> dict[str, Any]:
            found = self._catalog.search(search, check)
            rows = self._catalog.listed(found[offset : offset + limit].tolist())
            return {"total": len(found), "offset": offset, "records": rows}

        return JSONResponse(await self._searching.run(request, work))

    async def _values(self, request: Request) -> Response:
        name = _only(request, "field").get("field", "")
        found = await self._searching.run(request, lambda check: self._catalog.values(name, check))
        return JSONResponse({"values": [{"value": v, "count": n} for v, n in found]})

    async def _record(self, request: Request) -> Response:
        position = self._position(_only(request, "key").get("key", ""))
        found = await self._searching.run(request, lambda check: self._catalog.record(position))
        return JSONResponse(found)

    async def _python(self, request: Request) -> Response:
        mix = self._mix(_only(request, "mix"))

        def work(check: Callable[[], None]) -> dict[str, Any]:
            part = self._desk.part(mix)
            lines = python_lines(self._desk, mix, url=self._url, options=self._options)
            return {"lines": lines, "seconds": part.seconds, "total": part.total}

        return JSONResponse(await self._decoding.run(request, work))

    async def _picture(self, request: Request) -> Response:
        values = _only(request, "key", "of")
        key, of = values.get("key", ""), values.get("of", "")
        self._position(key)
        data = await self._decoding.run(request, lambda check: self._drawn(key, of, check))
        return Response(data, media_type="image/png")

    def _drawn(self, key: str, of: str, check: Callable[[], None]) -> bytes:
        if of == "latent":
            return self._desk.latent_picture(key, _PICTURE_SECONDS)
        if of not in ("waveform", "spectrogram"):
            raise ConfigError("invalid parameter 'of': use waveform, spectrogram or latent.")
        rate = self._desk.spec.sample_rate
        audio = self._desk.audio(self._excerpt(key), "decoded", check)
        audio = audio[:, : round(_PICTURE_SECONDS * rate)]  # overlapping chunks are decoded whole
        return waveform(audio).data if of == "waveform" else spectrogram(audio, rate).data

    def _excerpt(self, key: str) -> MixRequest:
        """The start of a record, which its pictures show."""
        frames = None
        if not self._desk.chunked:
            frames = self._desk.spec.frames(round(_PICTURE_SECONDS * self._desk.spec.sample_rate))
        return MixRequest(channels=(Channel(key=key),), frames=frames)

    async def _audio(self, request: Request) -> Response:
        values = _only(request, "mix", "of", "name")
        mix, side = self._mix(values), values.get("of", "latent")
        if side not in _SIDES:
            raise ConfigError(f"invalid parameter 'of': use one of {', '.join(_SIDES)}.")

        def work(check: Callable[[], None]) -> bytes:
            audio = self._desk.audio(mix, side, check)
            return wav(audio, self._desk.spec.sample_rate)

        data = await self._decoding.run(request, work)
        headers = {"content-type": "audio/wav"}
        if "name" in values:
            safe = "".join(c if c.isascii() and c.isalnum() else "-" for c in values["name"][:80])
            headers["content-disposition"] = f'attachment; filename="{safe or "mix"}.wav"'
        return Response(data, headers=headers)

    def _mix(self, values: dict[str, str]) -> MixRequest:
        mix = mix_of(values.get("mix", ""))
        for channel in mix.channels:
            self._position(channel.key)
        return mix

    def _position(self, key: str) -> int:
        position = self._index.find(key)
        if position is None:
            raise UnknownKeyError("The store has no record with this key: search for it again.")
        return position


class UnknownKeyError(ConfigError):
    """A key that is not in the index."""


_STATUS = {UnknownKeyError: 404, BusyError: 503}


def _answered(answer: Answer) -> Answer:
    """Answer errors as JSON with one sentence."""

    async def safe(request: Request) -> Response:
        try:
            return await answer(request)
        except LatentmillError as error:
            status = _STATUS.get(type(error), 400)
            return JSONResponse({"error": str(error)}, status)
        except GoneError:
            return Response(status_code=499)
        except Exception as error:  # noqa: BLE001  a bug: the terminal shows where
            _log.error("%s failed", request.scope["path"], exc_info=error)
            return JSONResponse({"error": "Internal error: see the terminal."}, 500)

    return safe


def _only(request: Request, *names: str) -> dict[str, str]:
    """The parameters of a request; ConfigError if it has others, or one twice."""
    pairs = request.query_params.multi_items()
    values = dict(pairs)
    if len(values) != len(pairs) or not values.keys() <= set(names):
        raise ConfigError(f"invalid parameters: use each of {', '.join(names)} at most once.")
    return values


def _whole(values: dict[str, str], name: str, default: int, most: int) -> int:
    text = values.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= most):
        raise ConfigError(f"invalid {name}: use a whole number from 0 to {most}.")
    return int(text)
