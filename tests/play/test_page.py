"""The page as it is served, asked through Gradio's own client and looked at in a real browser."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from dymoe import pictures
from dymoe.cli import main
from dymoe.cli import play as command
from dymoe.errors import DymoeError
from dymoe.evaluation.generate import generate
from tests.test_pictures import png_header

HOSTILE = "<img src=x onerror=window.hacked=1> ${window.hacked=1} {{window.hacked=1}} <script>window.hacked=1</script>"
LONGEST = 8


def test_without_gradio_it_says_how_to_get_it(monkeypatch, capsys):
    def missing(name):
        raise command.PackageNotFoundError(name)

    monkeypatch.setattr(command, "version", missing)
    assert main(["play", "runs/x"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "needs Gradio, which is not installed; install it with: pip install 'gradio>=6'" in told
    monkeypatch.setattr(command, "version", lambda name: "5.49.1")
    assert main(["play", "runs/x"]) == 2
    assert "needs Gradio 6 or newer, here is 5.49.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--port", "70000"], "play: --port: expected 1 to 65535, got 70000"),
        (["x", "--prot", "1"], "play: --prot: unknown option; did you mean --port?"),
        (["--port", "7000"], "play: no run folder given; at least one is needed"),
        (["nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setattr(command, "version", lambda name: "6.0")
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
        patch.setattr(pictures, "MAX_BYTES", 100_000)
        from dymoe.play.page import launch

        page, where = launch(runs, "127.0.0.1", None, room)
        yield where
        page.close(verbose=False)


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
    assert "the picture is not a PNG, JPEG or WebP picture" in told(picture=tmp_path / "text.png")


def test_a_file_too_large_is_not_taken(client, tmp_path, room):
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100_001))
    with pytest.raises(Exception, match=r"413|exceed"):
        ask(client, picture=tmp_path / "large.png")
    assert not [file for file in room.rglob("*large*") if file.is_file()]


@pytest.mark.parametrize(
    "file", [{"path": "http://127.0.0.1:9/a.png"}, {"path": None, "url": "data:image/png;base64,AAAA"}]
)
def test_nothing_is_fetched_for_a_client(address, file):
    import httpx

    values = ["routed", 2, "What?", {**file, "meta": {"_type": "gradio.FileData"}}, LONGEST, 1, "v_proj"]
    call = f"{address}gradio_api/call/ask"
    event = httpx.post(call, json={"data": values}).json()["event_id"]
    told = httpx.get(f"{call}/{event}", timeout=60).text
    assert "event: error" in told
    assert "sent here as a file" in told


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
    from dymoe.play.page import launch

    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(DymoeError, match=rf"play: 127.0.0.1:{port} cannot be listened on; give another --port") as told:
        launch(runs, "127.0.0.1", port, room)
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
