"""What may reach the page, checked before any of Gradio's routes sees a request.

A web page elsewhere must not reach it, also where its name is made to lead to this machine: `Host` must be the page's
own address, `Origin` the same. And no request may name a file or an address but the uploads: whichever field or route
it is for, and whether or not there is such a file, the answer is the same. Nothing here imports Gradio.
"""

import ipaddress
import json
import re
import socket
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from pathlib import Path
from typing import Any

ELSEWHERE = "this page answers only at its own address; open the one that dymoe play printed"
ONLY_UPLOADS = "a picture is read only from this page's own uploads"
NOT_JSON = "a request that is no upload has a body of JSON, of at most 1 MiB"

UPLOAD = "/gradio_api/upload"
FILE = re.compile(r"/gradio_api/(?:file|proxy)[=/](.*)", re.DOTALL)
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::(\d{1,5}))?")
BODY_BYTES = 2**20  # a question has 4000 characters; pictures come as uploads

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Uploads:
    """The files that came to a page through it: what visitors sent, and the pictures of its own examples.

    Args:
        room: the folder that they lie in.

    Attributes:
        names: their paths as the page's server hands them out, in sets that it keeps up to date.
    """

    def __init__(self, room: Path) -> None:
        self._room = room.resolve()
        self.names: tuple[Collection[str], ...] = ()

    def find(self, name: Any) -> Path | None:
        """The file that a client names; None for every other path, be there a file or not."""
        if not isinstance(name, str) or not any(name in names for names in self.names):
            return None
        path = Path(name).resolve()
        return path if path.is_relative_to(self._room) and path.is_file() else None


class Guard:
    """The page's server, for requests of its own address that name no file but uploads.

    Args:
        app: the server (ASGI).
        host: the address it listens on. A loopback address goes by every name of the loopback; one that stands for
            all of the machine's (0.0.0.0) by the machine's name and by any address written in numbers, which no name
            server can make another.
        port: of that address.
        uploads: the files that may be named.
    """

    def __init__(self, app: Any, host: str, port: int, uploads: Uploads) -> None:
        self._app, self._port, self._uploads = app, port, uploads
        address = _address(host)
        self._any_address = address is not None and address.is_unspecified
        self._names = {f"[{host}]" if ":" in host else host.lower()}
        if host == "localhost" or (address is not None and (address.is_loopback or address.is_unspecified)):
            self._names |= {"localhost", "127.0.0.1", "[::1]"}
        if self._any_address:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        origin = self._origin(scope)
        if origin is None:
            await _refuse(scope, send, 403, ELSEWHERE)
            return
        names = FILE.fullmatch(scope["path"])
        if names is not None and self._uploads.find(names[1]) is None:
            await _refuse(scope, send, 403, ONLY_UPLOADS)
            return
        if scope.get("method") not in (None, "GET", "HEAD", "OPTIONS") and scope["path"] != UPLOAD:
            body = await _read(receive)
            try:
                values = None if body == b"" else json.loads(body)
            except (TypeError, ValueError, RecursionError):
                await _refuse(scope, send, 400, NOT_JSON)
                return
            if not all(self._is_upload(file, origin) for file in _files(values)):
                await _refuse(scope, send, 403, ONLY_UPLOADS)
                return
            receive = _again(body, receive)
        await self._app(scope, receive, send)

    def _origin(self, scope: Message) -> str | None:
        """The page's own origin as the request calls it; None for a request that another page makes or is made for."""
        headers: dict[str, list[str]] = {}
        for key, value in scope["headers"]:
            headers.setdefault(key.decode("latin-1").lower(), []).append(value.decode("latin-1").lower())
        (host, *more) = headers.get("host", [""])
        parts = HOST.fullmatch(host)
        if more or parts is None or int(parts[2] or 80) != self._port:
            return None
        if parts[1] not in self._names and not (self._any_address and _address(parts[1].strip("[]"))):
            return None
        origin = f"http://{host}"
        if any(other != origin for other in headers.get("origin", ())):
            return None
        # A picture, script or frame of another page comes without an origin; a link that a person follows may.
        near = headers.get("sec-fetch-site", ["none"]) in (["none"], ["same-origin"])
        link = scope.get("method") == "GET" and headers.get("sec-fetch-dest") == ["document"]
        return origin if near or link else None

    def _is_upload(self, file: dict[str, Any], origin: str) -> bool:
        """Whether a request's object that names a file names an upload, and no address but this page's."""
        url = file.get("url")
        here = url is None or (isinstance(url, str) and url.startswith(("/gradio_api/file=", f"{origin}/gradio_api/")))
        return here and self._uploads.find(file.get("path")) is not None


def _files(value: Any) -> list[dict[str, Any]]:
    """Every object within a JSON value that names a file, by path or address, as Gradio's fields do."""
    left, files = [value], []
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
            if "path" in value or "url" in value:
                files.append(value)
        elif isinstance(value, list):
            left += value
    return files


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


async def _read(receive: Receive) -> Any:
    """The request's body, bytes; None where it is larger than any body of the page's own, or breaks off."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or len(body) > BODY_BYTES:
            return None
        more = message.get("more_body", False)
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out the body that was read."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


async def _refuse(scope: Message, send: Send, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": text}).encode()})
