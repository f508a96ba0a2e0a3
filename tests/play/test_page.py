"""The page as it is served, asked through Gradio's own client and looked at in a real browser."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dymoe import images
from dymoe.cli import main
from dymoe.cli import play as command
from dymoe.errors import DymoeError
from dymoe.evaluation.generate import generate
from tests.test_images import png_header

HOSTILE = "<img src=x onerror=window.hacked=1> ${window.hacked=1} {{window.hacked=1}} <script>window.hacked=1</script>"
LONGEST = 8


def pretend_gradio(monkeypatch, version: str) -> None:
    """The words of a command line are read without Gradio, which the default test suite does not install."""
    monkeypatch.setattr(command, "require_extra", lambda extra, use: None)
    monkeypatch.setattr(command, "version", lambda name: version)


def test_without_gradio_it_says_how_to_get_it(monkeypatch, capsys):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "gradio", None)
        code = main(["play", "runs/x"])
    assert code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "play: needs gradio, which is not installed; pip install dymoe[play]" in told
    pretend_gradio(monkeypatch, "5.49.1")
    assert main(["play", "runs/x"]) == 2
    assert "needs Gradio 6 or newer, here is 5.49.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--port", "70000"], "play: --port: expected a whole number from 1 to 65535, got '70000'"),
        (["x", "--prot", "1"], "play: --prot: unknown option; did you mean --port?"),
        (["--port", "7000"], "play: expected RUN (one or more), got 0 words"),
        (["nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys, monkeypatch):
    pretend_gradio(monkeypatch, "6.0")
    assert main(["play", *words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert message in told[-1]
    assert all(line.startswith(("dymoe: ", "loading ")) for line in told)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("room")


@pytest.fixture(scope="module")
def address(runs, room):
    """The page with a small limit of bytes, so that a test need not send 64 MiB."""
    pytest.importorskip("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "GRADIO_TEMP_DIR", str(room))
        patch.setitem(os.environ, "GRADIO_ANALYTICS_ENABLED", "False")
        patch.setattr(images, "MAX_BYTES", 100_000)
        from dymoe.play.serve import serve

        with serve(runs, "127.0.0.1", None, room) as where:
            yield where


@pytest.fixture(scope="module")
def client(address):
    from gradio_client import Client

    return Client(address, verbose=False)


def ask(client, run="routed", stage=2, question="What is it?", picture=None, layer=1):
    """(answer, routing) as the page gives them."""
    from gradio_client import handle_file

    file = None if picture is None else handle_file(str(picture))
    return client.predict(run, stage, question, file, LONGEST, layer, "v_proj", api_name="/ask")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_page_answers_as_evaluation_does(client, runs, tmp_path, stage):
    sample = runs.examples("routed")[0]
    (tmp_path / "picture.png").write_bytes(sample.image)
    answer, routing = ask(client, "routed", stage, sample.question, tmp_path / "picture.png")
    learned = runs["routed"]
    with runs._at("routed", stage):
        assert [answer] == generate(learned.lvlm, learned.collator, [sample], LONGEST, 1, "float32")
    if stage:
        assert routing.count('class="patches ') == (2 if stage == 2 else 1)  # by group and by type
        assert routing.count("The picture, 2 by 2 patches.") == (2 if stage == 2 else 1)
    else:
        assert routing == "<p>before learning there are no experts, so no token is routed</p>"


def test_markup_is_escaped(client):
    _, routing = ask(client, question=HOSTILE)
    assert "&lt;" in routing
    assert "<img" not in routing
    assert "<script" not in routing
    _, routing = ask(client, "plain", 1, "What is it?")
    assert "method lora routes nothing" in routing


def test_what_cannot_be_asked_is_one_line_of_text(client, tmp_path):
    from gradio_client.exceptions import AppError

    def told(**values):
        with pytest.raises(AppError) as caught:
            ask(client, **values)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no question" in told(question="")
    assert "special token &lt;image&gt;" in told(question="<image>")
    (tmp_path / "many.png").write_bytes(png_header(12_000, 12_000))
    assert "12000 x 12000 pixels; at most 89 million" in told(picture=tmp_path / "many.png")
    (tmp_path / "text.png").write_text("no picture")
    assert "this is no picture that can be used: broken image" in told(picture=tmp_path / "text.png")


def test_a_file_too_large_is_not_taken(client, tmp_path, room):
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100_001))
    with pytest.raises(Exception, match=r"413|exceed"):
        ask(client, picture=tmp_path / "large.png")
    assert not [file for file in room.rglob("*large*") if file.is_file()]


class Elsewhere:
    """Another server of this machine, on a port of its own: answers with one page, counts what it is asked for."""

    def __init__(self, page=""):
        self.page, self.requests = page, []
        other = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                other.requests.append(self.path)
                data = other.page.encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def elsewhere():
    server = Elsewhere()
    yield server
    server.close()


@cache
def http():
    import httpx

    return httpx.Client(timeout=60)


def asked(address, path, values, **headers):
    """(status, text) of a question put by hand, until it is answered."""
    call = f"{address}gradio_api/{path}"
    answer = http().post(call, json={"data": values, "session_hash": "mine", "fn_index": 2}, headers=headers)
    if "event_id" not in answer.text or not path.startswith("call/"):
        return answer.status_code, answer.text
    return 200, http().get(f"{call}/{answer.json()['event_id']}", headers=headers).text


ROUTES = ("call/ask", "call/v2/ask", "run/ask", "api/ask", "queue/join", "component_server")
REFUSED = (403, '{"detail": "a picture is read only from this page\'s own uploads"}')


def test_a_picture_is_an_upload_and_nothing_else(address, runs, room, tmp_path, elsewhere):
    """Another picture of the user, no file, a folder, a text: one answer, in every form and field, for every route."""
    picture = runs.examples("routed")[0].image
    (tmp_path / "mine.png").write_bytes(picture)
    (tmp_path / "notes.txt").write_text("mine")
    upload = http().post(f"{address}gradio_api/upload", files={"files": ("../../a.png", picture)}).json()[0]
    assert Path(upload).resolve().is_relative_to(room.resolve())
    link = Path(upload).with_name("link.png")
    link.symlink_to(tmp_path / "mine.png")
    beside = Path(upload).with_name("beside.png")
    beside.write_bytes(picture)
    places = [tmp_path / name for name in ("mine.png", "nothing.png", ".", "notes.txt")]
    places += [link, beside, f"{upload}/../link.png", room, "/dev/zero", "/proc/self/environ", f"{elsewhere.url}a.png"]
    meta = {"meta": {"_type": "gradio.FileData"}}
    files = [{"path": str(place), **more} for place in places for more in ({}, meta, {**meta, "orig_name": "a.png"})]
    files += [
        {"path": None, "url": f"{elsewhere.url}a.png", **meta},
        {"path": upload, "url": f"{elsewhere.url}a.png", **meta},
    ]
    fields = ["routed", 2, "What?", None, LONGEST, 1, "v_proj"]
    for file in files:
        assert asked(address, "call/ask", [*fields[:3], file, *fields[4:]]) == REFUSED, file
    for route in ROUTES:
        for number in range(len(fields)):
            for value in (files[1], [files[1]], {"value": files[-3]}):
                assert asked(address, route, [*fields[:number], value, *fields[number + 1 :]]) == REFUSED
    for name in (*places, elsewhere.url):
        answer = http().get(f"{address}gradio_api/file={name}")
        assert (answer.status_code, answer.text) == REFUSED
    assert elsewhere.requests == []
    assert http().get(f"{address}gradio_api/file={upload}").content == picture
    status, told = asked(address, "call/ask", [*fields[:3], {"path": upload, **meta}, *fields[4:]])
    assert (status, "event: complete" in told) == (200, True)


def test_another_host_or_origin_is_refused(address):
    port = address.rstrip("/").rpartition(":")[2]
    values = ["routed", 0, "What?", None, LONGEST, 1, "v_proj"]
    for headers in (
        {"Host": f"evil.example:{port}"},
        {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
    ):
        assert asked(address, "call/ask", values, **headers)[0] == 403
        for method, path in (
            ("GET", ""),
            ("GET", "config"),
            ("OPTIONS", "gradio_api/call/ask"),
            ("POST", "gradio_api/upload"),
        ):
            more = {"Access-Control-Request-Method": "POST"} if method == "OPTIONS" else {}
            answer = http().request(method, f"{address}{path}", headers={**headers, **more})
            assert answer.status_code == 403
            assert not [name for name in answer.headers if name.startswith("access-control")]
            assert "gradio" not in answer.text.lower()
    for name in ("127.0.0.1", "localhost"):
        headers = {"Host": f"{name}:{port}", "Origin": f"http://{name}:{port}"}
        status, told = asked(address, "call/ask", values, **headers)
        assert (status, "event: complete" in told) == (200, True)


# Every way a page has of asking another address; `window.read` is what it could read.
ATTACK = r"""<!doctype html><title>elsewhere</title><body><script>
const target = TARGET, body = JSON.stringify({data: ["routed", 0, "HOSTILE", null, 8, 1, "v_proj"]});
window.read = [];
const note = (what) => (value) => window.read.push(`${what}: ${value}`);
const text = (answer) => answer.text().then((text) => { if (!answer.ok) throw text; return text; });
window.done = Promise.allSettled([
  fetch(target + "config").then(text).then(note("config")),
  fetch(target + "gradio_api/call/ask", {method: "POST", body, headers: {"Content-Type": "application/json"}})
    .then(text).then((answer) => fetch(`${target}gradio_api/call/ask/${JSON.parse(answer).event_id}`)).then(text)
    .then(note("json")),
  fetch(target + "gradio_api/call/ask", {method: "POST", body, headers: {"Content-Type": "text/plain"}}).then(text)
    .then(note("simple")),
  fetch(target + "gradio_api/call/ask", {method: "POST", mode: "no-cors", body}),
  new Promise((done) => { const picture = new Image(); picture.onload = () => done(note("image")("loaded"));
    picture.onerror = done; picture.src = target + "static/img/logo.svg"; }),
  new Promise((done) => { const script = document.createElement("script");
    script.onload = () => done(note("script")("loaded")); script.onerror = done;
    script.src = target + "theme.css"; document.body.append(script); }),
  new Promise((done) => { const stream = new EventSource(target + "gradio_api/heartbeat/x");
    stream.onopen = () => done(note("stream")("open")); stream.onerror = () => { stream.close(); done(); }; }),
  new Promise((done) => { const frame = document.createElement("iframe"); frame.sandbox = "allow-scripts allow-forms";
    frame.onload = done; frame.srcdoc = `<form method=post enctype="text/plain" action="${target}gradio_api/call/ask">
      <input name='${body.slice(0, -1)},"a":"' value='"}'></form><script>document.forms[0].submit()<\/script>`;
    document.body.append(frame); }),
]);
</script>"""


@pytest.mark.parametrize("where", ["another port", "another name for the page's own address"])
def test_a_page_elsewhere_does_not_reach_it_in_a_browser(runs, room, tmp_path, monkeypatch, where):
    pytest.importorskip("gradio")
    from dymoe.play.serve import serve
    from tests.report.browser import chromium

    questions = []
    monkeypatch.setattr(runs, "ask", lambda *words: questions.append(words) or type(runs).ask(runs, *words))
    other = Elsewhere()
    # Stands for a name server that first leads a name to its owner's machine, then to this one.
    switch = f"--host-resolver-rules=MAP rebound.example 127.0.0.1, MAP evil.example {other.url.split('/')[2]}"
    with serve(runs, "127.0.0.1", None, room) as address, chromium(tmp_path / "profile", switch) as tab:
        if where == "another port":
            other.page = ATTACK.replace("TARGET", json.dumps(address))
            tab.visit("http://evil.example/")
            tab.evaluate("window.done.then(() => 0)")
            assert tab.evaluate("window.read") == []
        else:
            tab.visit(address.replace("127.0.0.1", "rebound.example"))
            assert "answers only at its own address" in tab.evaluate("document.body.textContent")
        assert questions == []
        # The same from the page itself: the script can ask, so it is the guard that stopped it.
        tab.visit(address)
        script = ATTACK.partition("<script>")[2].rpartition("</script>")[0].replace("TARGET", json.dumps(address))
        tab.evaluate(f"(() => {{ {script} }})()")
        tab.evaluate("window.done.then(() => 0)")
        kinds = {line.partition(":")[0] for line in tab.evaluate("window.read")}
        assert kinds >= {"config", "json", "image", "script", "stream"}
    other.close()
    assert "HOSTILE" in {words[2] for words in questions}


def test_a_cancelled_question_makes_room_for_the_next(client):
    job = client.submit("routed", 0, "What is it?", None, 256, 1, "v_proj", api_name="/ask")
    until = time.monotonic() + 60
    while not job.outputs() and not job.done():
        assert time.monotonic() < until
        time.sleep(0.02)
    job.cancel()
    answer, _ = ask(client)
    assert isinstance(answer, str)


def test_a_taken_port_is_one_line(address, runs, room):
    from dymoe.play.serve import serve

    port = int(address.rstrip("/").rpartition(":")[2])
    line = rf"play: 127.0.0.1:{port} cannot be listened on; give another --port"
    with pytest.raises(DymoeError, match=line) as told, serve(runs, "127.0.0.1", port, room):
        pass
    assert "\n" not in str(told.value)


def test_it_listens_on_this_machine_alone(address):
    assert address.startswith("http://127.0.0.1:")
    port = int(address.rstrip("/").rpartition(":")[2])
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for other in (other for other in others if not other.startswith("127.")):
        with pytest.raises(OSError):
            socket.create_connection((other, port), timeout=2)


def test_a_person_asks_in_a_browser(address, tmp_path):
    from tests.report.browser import chromium

    with chromium(tmp_path / "profile") as tab:
        tab.size(1280, 900)
        tab.visit(address)
        tab.wait("document.querySelector('textarea') !== null && document.querySelector('button.primary') !== null", 60)
        tab.wait("document.querySelectorAll('tbody tr img').length === 4", 30)
        tab.evaluate("document.querySelector('tbody tr').click()")
        tab.wait(
            "[...document.querySelectorAll('textarea')].some((box) => box.value.startsWith('What is the object'))", 30
        )
        press = "[...document.querySelectorAll('button')].find((one) => one.textContent.trim() === 'Ask').click()"
        tab.evaluate(press)
        tab.wait("document.querySelectorAll('.routing .patches b').length === 8", 60)
        pictures_ = (
            "[...document.querySelectorAll('.routing .patches')].map((p) => getComputedStyle(p).backgroundImage)"
        )
        assert [shown.startswith('url("data:image/webp') for shown in tab.evaluate(pictures_)] == [True, True]
        patch = "document.querySelector('.routing [data-colour={}] .patches b')"
        for colour, marks in (("group", ("attr(data-g)", '"1"', '"2"')), ("type", ('"n"', '"a"', '"o"'))):
            assert tab.evaluate(f"getComputedStyle({patch.format(colour)}, '::after').content") in marks
            shade = tab.evaluate(f"getComputedStyle({patch.format(colour)}).backgroundColor")
            assert shade != "rgba(0, 0, 0, 0)"
        # By hand: a hostile question. The field's own setter, so that the page notices.
        tab.evaluate(
            "(() => { const box = document.querySelector('textarea');"
            "Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set.call(box, "
            f"{json.dumps(HOSTILE)}); box.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
        )
        tab.evaluate(press)
        tab.wait(
            "(document.querySelector('.routing')?.textContent ?? '').replace(/[^a-z]/g, '').includes('windowhacked')",
            60,
        )
        assert tab.evaluate("window.hacked === undefined")
        assert tab.evaluate("document.querySelector('.routing img, .routing script') === null")
        tab.size(390, 900)
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        assert tab.messages == []
        assert {url.split("/")[2] for url in tab.requests if url.startswith(("http", "ws"))} == {address.split("/")[2]}


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_end(folders, tmp_path, end):
    pytest.importorskip("gradio")
    words = [sys.executable, "-m", "dymoe", "play", str(folders[1])]
    surroundings = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings) as served:
        line = served.stdout.readline()
        assert re.fullmatch(r"Open http://127\.0\.0\.1:\d+/ \(Ctrl\+C ends\)\n", line)
        assert list(tmp_path.glob("dymoe-play-*"))
        served.send_signal(end)
        _, err = served.communicate(timeout=60)
    assert served.returncode == 0
    assert err.splitlines() == [f"loading {folders[1]}"]
    assert not list(tmp_path.glob("dymoe-play-*"))
