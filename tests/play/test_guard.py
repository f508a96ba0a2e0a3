"""What reaches the page and what does not: a stand-in for its server, which says that it was reached."""

import asyncio
import json
import socket
from typing import NamedTuple

import pytest

from dymoe.play.guard import BODY_BYTES, ELSEWHERE, NOT_JSON, ONLY_UPLOADS, Guard, Uploads

PORT = 7860
HERE = {"Host": f"127.0.0.1:{PORT}"}
META = {"meta": {"_type": "gradio.FileData"}}


class Answer(NamedTuple):
    status: int
    headers: dict[bytes, bytes]
    body: bytes


async def server(scope, receive, send):
    """Answers with the body that it got, and with the header that lets every other page read it."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    assert (await receive())["type"] == "http.disconnect"
    headers = [(b"access-control-allow-origin", b"*")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def uploads(tmp_path):
    room = tmp_path / "room"
    room.mkdir()
    (room / "mine.png").write_bytes(b"mine")
    (room / "not sent.png").write_bytes(b"secret")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (room / "link.png").symlink_to(tmp_path / "secret.png")
    (room / "folder").mkdir()
    found = Uploads(room)
    found.names = ({str(room / name) for name in ("mine.png", "link.png", "folder", "gone.png")},)
    return found


def request(uploads, headers, method="GET", path="/", body=b"", host="127.0.0.1", port=PORT):
    """The answer to one request with exactly these headers (a list may have one twice)."""
    pairs = list(headers.items()) if isinstance(headers, dict) else headers
    scope = {
        "type": "http", "method": method, "path": path,
        "headers": [(name.lower().encode(), value.encode()) for name, value in pairs],
    }  # fmt: skip
    half = len(body) // 2
    incoming = [
        {"type": "http.request", "body": body[:half], "more_body": True},
        {"type": "http.request", "body": body[half:], "more_body": False},
        {"type": "http.disconnect"},
    ]
    sent = []

    async def receive():
        return incoming.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(server, host, port, uploads)(scope, receive, send))
    start, rest = sent
    return Answer(start["status"], dict(start["headers"]), rest["body"])


def refused(answer, status, text):
    assert (answer.status, json.loads(answer.body)) == (status, {"detail": text})
    assert not [name for name in answer.headers if name.startswith(b"access-control")]
    return True


@pytest.mark.parametrize(
    "listens, port, names",
    [
        ("127.0.0.1", PORT, [f"127.0.0.1:{PORT}", f"localhost:{PORT}", f"LocalHost:{PORT}", f"[::1]:{PORT}"]),
        ("localhost", PORT, [f"127.0.0.1:{PORT}", f"localhost:{PORT}"]),
        ("127.0.0.2", PORT, [f"127.0.0.2:{PORT}", f"localhost:{PORT}"]),
        ("::1", PORT, [f"[::1]:{PORT}", f"localhost:{PORT}"]),
        ("127.0.0.1", 80, ["localhost", "127.0.0.1", "localhost:80", "[::1]"]),
        ("192.0.2.7", PORT, [f"192.0.2.7:{PORT}"]),
        ("fe80::7", PORT, [f"[fe80::7]:{PORT}"]),
        ("box.lan", PORT, [f"box.lan:{PORT}"]),
        ("0.0.0.0", PORT, ["192.0.2.7:7860", "[fe80::7]:7860", "localhost:7860", f"{socket.gethostname()}:7860"]),
    ],
)  # fmt: skip
def test_the_names_that_an_address_goes_by(uploads, listens, port, names):
    for name in names:
        for headers in ({"Host": name}, {"Host": name, "Origin": f"http://{name}"}):
            assert request(uploads, headers, host=listens, port=port).status == 200, name
    others = [
        "evil.example",
        "127.0.0.1", "localhost", "localhost:1", "evil.example:7860", "localhost.:7860", "10.1.2.3:7860",
        "127.0.0.1.evil.example:7860", "localhost:7860.evil.example", "evil.example:80", "7860", "", ":7860", "[::1]",
        "user@localhost:7860", "localhost:07860x", "[evil]:7860", "2130706433:7860", "localhost:99999",
    ]  # fmt: skip
    for name in others:
        if name in names or (listens == "0.0.0.0" and name == "10.1.2.3:7860"):
            continue
        assert refused(request(uploads, {"Host": name}, host=listens, port=port), 403, ELSEWHERE), name


def test_one_host_and_no_other_origin(uploads):
    for headers in (
        {},
        [("Host", HERE["Host"]), ("Host", "evil.example")],
        [("Host", HERE["Host"]), ("Origin", f"http://{HERE['Host']}"), ("Origin", "http://evil.example")],
        *(
            {**HERE, "Origin": origin}
            for origin in (
                "null", "", "http://evil.example", f"http://evil.example:{PORT}", "http://127.0.0.1", "http://127.0.0.1:8888",
                f"http://localhost:{PORT}", f"https://127.0.0.1:{PORT}", f"http://127.0.0.1:{PORT}.evil.example", "file://",
            )
        ),
        # What browsers tell of requests that carry no origin: a picture, a script, a frame of another page.
        {**HERE, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
        {**HERE, "Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    ):  # fmt: skip
        for method in ("GET", "POST", "OPTIONS"):
            assert refused(request(uploads, headers, method), 403, ELSEWHERE), headers
    link = {**HERE, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert request(uploads, link).status == 200  # a person follows it
    assert refused(request(uploads, link, "POST"), 403, ELSEWHERE)


def test_a_websocket_from_elsewhere_is_closed(uploads):
    def opened(headers):
        sent = []

        async def send(message):
            sent.append(message["type"])

        scope = {"type": "websocket", "path": "/", "headers": [(k.encode(), v.encode()) for k, v in headers]}
        asyncio.run(Guard(server, "127.0.0.1", PORT, uploads)(scope, None, send))
        return sent

    host = ("host", HERE["Host"])
    assert opened([host, ("origin", f"http://{HERE['Host']}")]) == ["websocket.accept"]
    assert opened([host, ("origin", "http://evil.example")]) == ["websocket.close"]


def test_a_body_names_uploads_alone_wherever_in_it(uploads, tmp_path):
    room = tmp_path / "room"
    mine = {"path": str(room / "mine.png"), **META}
    wrong = [
        *(str(room / name) for name in ("not sent.png", "link.png", "folder", "gone.png", "folder/../mine.png")),
        str(tmp_path / "secret.png"), str(tmp_path), "/etc/passwd", "/dev/zero", "mine.png", "", "\0", "x" * 100_000,
        "http://127.0.0.1:9/a.png", "file:///etc/passwd", None, 7, ["a"], {"path": str(room / "mine.png")},
    ]  # fmt: skip
    bad = [{"path": path, **more} for path in wrong for more in ({}, META)]
    urls = [
        "http://127.0.0.1:9/", "https://evil.example/a.png", "data:image/png;base64,AAAA", "//evil.example/a.png", 7,
        "/etc/passwd", f"http://{HERE['Host']}.evil.example/gradio_api/file=x", "http://[::1]:1/gradio_api/file=x",
    ]  # fmt: skip
    bad += [{**mine, "url": url} for url in urls] + [{"url": url} for url in urls]
    for file in bad:
        for value in (
            file,
            [file],
            {"picture": file},
            [mine, [{"deep": [file]}]],
            {"path": mine["path"], "more": file},
        ):
            body = json.dumps({"data": ["run", value], "session_hash": "a"}).encode()
            for path in ("/gradio_api/call/ask", "/gradio_api/queue/join", "/gradio_api/anything", "/"):
                assert refused(request(uploads, HERE, "POST", path, body), 403, ONLY_UPLOADS), file
    for value in (
        mine,
        [mine],
        None,
        "/etc/passwd",
        {**mine, "url": f"http://{HERE['Host']}/gradio_api/file={mine['path']}"},
    ):
        body = json.dumps({"data": ["run", value]}).encode()
        answer = request(uploads, HERE, "POST", "/gradio_api/queue/join", body)
        assert (answer.status, answer.body) == (200, body)


def test_a_body_is_small_and_json(uploads):
    for body in (b"{", b"\xff\xfe", b"[" * 100_000, b'"' + b"a" * BODY_BYTES + b'"', b"--x\r\n", b"9" * 5000):
        for method in ("POST", "PUT", "DELETE"):
            assert refused(request(uploads, HERE, method, "/gradio_api/queue/join", body), 400, NOT_JSON)
    assert request(uploads, HERE, "POST", "/gradio_api/reset").body == b""
    assert request(uploads, HERE, "POST", "/gradio_api/upload", b"\xff" * 2 * BODY_BYTES).status == 200


def test_files_that_are_read_by_their_address(uploads, tmp_path):
    room = tmp_path / "room"
    assert request(uploads, HERE, "GET", f"/gradio_api/file={room / 'mine.png'}").status == 200
    for name in (
        tmp_path / "secret.png",
        room / "link.png",
        room / "gone.png",
        "/etc/passwd",
        "http://evil.example/a",
        "",
    ):
        for route in ("file=", "file/", "proxy="):
            for method in ("GET", "HEAD"):
                assert refused(request(uploads, HERE, method, f"/gradio_api/{route}{name}"), 403, ONLY_UPLOADS)
