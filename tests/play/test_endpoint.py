"""examples/serve.py as a server of its own, on the pocket model, asked over HTTP as any client would."""

import base64
import http.client
import io
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

import dymoe
from dymoe.cli import main
from dymoe.evaluation.generate import generate
from dymoe.models import Collator, load
from dymoe.tasks import Sample, load_stream
from tests.learning.tiny import write_recipe

SERVER = Path(__file__).resolve().parents[2] / "examples" / "serve.py"
LONGEST = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two tasks of DyMoE on the pocket model, a few steps each, so that its answers are no longer the base's."""
    pytest.importorskip("starlette")
    path = tmp_path_factory.mktemp("endpoint") / "run"
    training = {"steps_per_task": 3, "batch_size": 2, "limit": 6, "lr": 0.005, "warmup": 0.0, "save_steps": 100}
    recipe = write_recipe(path.with_suffix(".yaml"), "pocket", training=training, evaluation={"limit": 2})
    values = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**values, "settings": {"lora_dropout": 0.0}}))
    assert main(["run", str(recipe)]) == 0
    return path


@pytest.fixture(scope="module")
def port(run):
    """A server of stage 2 in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
    words = [sys.executable, str(SERVER), str(run), "--stage", "2", "--port", str(number)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            for _ in range(600):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", number)) == 0:
                        break
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.2)
            yield number
        finally:
            process.terminate()
            process.wait(10)


@pytest.fixture(scope="module")
def samples():
    return [load_stream("pocket-coin", tasks=[name]).tasks[0].test[0] for name in ("ImageNet", "VQAv2")]


def connect(port, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    text = body if body is None or isinstance(body, bytes) else json.dumps(body)
    connection.request(method, path, text, {"Content-Type": "application/json", **headers})
    return connection.getresponse()


def ask(port, body, **headers):
    """Status and JSON of one request."""
    response = connect(port, "POST", "/v1/chat/completions", body, **headers)
    return response.status, json.loads(response.read())


def message(sample):
    """A sample as a client sends it."""
    url = f"data:image/png;base64,{base64.b64encode(sample.image).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sample.question}]
    return {"role": "user", "content": parts}


def test_the_answers_are_those_of_evaluation(run, port, samples):
    lvlm = load("pocket", "float32")
    asked = [*samples, Sample("plain", None, "What colour is the sky?", "", {})]
    before = generate(lvlm, Collator(lvlm), asked, LONGEST, 1, "float32")
    dymoe.load_stage(run, lvlm.model, 2)
    expected = generate(lvlm, Collator(lvlm), asked, LONGEST, 1, "float32")
    assert expected != before
    messages = [*map(message, samples), {"role": "user", "content": asked[-1].question}]
    for one, answer in zip(messages, expected, strict=True):
        status, reply = ask(port, {"messages": [one], "max_tokens": LONGEST, "temperature": 0})
        assert status == 200
        assert reply["object"] == "chat.completion"
        assert reply["choices"][0]["message"] == {"role": "assistant", "content": answer}
        usage = reply["usage"]
        assert 1 <= usage["completion_tokens"] <= LONGEST
        ended = "length" if usage["completion_tokens"] == LONGEST else "stop"
        assert reply["choices"][0]["finish_reason"] == ended
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_is_the_same_answer_in_pieces(port, samples):
    body = {"messages": [message(samples[1])], "max_completion_tokens": LONGEST}
    _, whole = ask(port, body)
    streaming = {**body, "stream": True, "stream_options": {"include_usage": True}}
    response = connect(port, "POST", "/v1/chat/completions", streaming)
    assert response.getheader("content-type").startswith("text/event-stream")
    lines = [line for line in response.read().decode().split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert text.strip() == whole["choices"][0]["message"]["content"]
    assert events[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]


def test_a_conversation_goes_on_and_sampling_has_a_seed(port):
    turns = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": [{"type": "text", "text": "Another one?"}]},
    ]
    body = {"messages": turns, "max_tokens": LONGEST, "temperature": 1.5, "top_p": 0.9}
    answers = [ask(port, {**body, "seed": seed})[1]["choices"][0]["message"]["content"] for seed in (1, 1, 2, 3, 4)]
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1


def test_a_client_that_leaves_does_not_keep_the_others_waiting(port):
    long = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 1500, "stream": True}
    response = connect(port, "POST", "/v1/chat/completions", long)
    response.read(200)
    response.close()
    start = time.monotonic()
    assert ask(port, {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2})[0] == 200
    assert time.monotonic() - start < 20


def test_the_models_are_listed(port):
    reply = json.loads(connect(port, "GET", "/v1/models").read())
    assert [entry["id"] for entry in reply["data"]] == ["run-02-VQAv2"]
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "model": "run-02-VQAv2"}
    assert ask(port, body)[0] == 200


def picture(url):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def text(words):
    return [{"role": "user", "content": words}]


BROKEN = base64.b64encode(b"\x89PNG\r\n\x1a\nnothing more").decode()
REFUSALS = [
    ({"messages": picture("http://127.0.0.1:1/cat.png")}, "messages.1.content.1.image_url.url: expected data:image/"),
    ({"messages": picture("file:///etc/passwd")}, "no other address is read"),
    ({"messages": picture("/etc/passwd")}, "no other address is read"),
    ({"messages": picture("data:text/html;base64,PGI+")}, "no other address is read"),
    ({"messages": picture("data:image/png;base64,????")}, "messages.1.content.1.image_url.url: "),
    ({"messages": picture(f"data:image/png;base64,{BROKEN}")}, "broken image"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.1.content.1.text: is missing"),
    ({"messages": text("look: <image>")}, "messages.1.content.1.text: contains the special token <image>"),
    ({"messages": text("so <|im_end|>")}, "contains the special token <|im_end|>"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.1.role: expected one of system, user, assistant"),
    ({"messages": []}, "messages: expected a conversation"),
    ({"messages": text("a"), "n": 2}, "n: expected"),
    ({"messages": text("a"), "max_tokens": 0}, "max_tokens: expected"),
    ({"messages": text("a"), "max_tokens": 4096, "temperature": 3}, "temperature: expected"),
    ({"messages": text("word " * 9000)}, "are more than the model's 8192"),
    ({"messages": text("a"), "tools": [{}]}, "tools: this server does not do that"),
    ({"messages": text("a"), "model": "gpt"}, "model: there is run-02-VQAv2 here"),
    ({}, "messages: is missing"),
    (b"{", "not valid JSON"),
]


@pytest.mark.parametrize(("body", "error"), REFUSALS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_answered_is_one_line(port, body, error):
    status, reply = ask(port, body)
    assert status == 400
    assert error in reply["error"]["message"]
    assert "\n" not in reply["error"]["message"]
    assert reply["error"]["type"] == "invalid_request_error"


def test_pages_elsewhere_do_not_reach_it(port):
    hello = {"messages": text("Hello"), "max_tokens": 1}
    assert connect(port, "POST", "/v1/chat/completions", hello, Host="evil.example").status == 400
    status, reply = ask(port, hello, **{"Content-Type": "text/plain"})
    assert status == 400
    assert "Content-Type" in reply["error"]["message"]
    assert connect(port, "POST", "/v1/chat/completions", hello).getheader("access-control-allow-origin") is None


def test_a_picture_larger_than_is_read_is_refused(port):
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    status, reply = ask(port, {"messages": picture(url)})
    assert status == 400
    assert "10000 x 10000 pixels" in reply["error"]["message"]


def test_a_source_that_is_none_ends_it_in_one_line(tmp_path):
    pytest.importorskip("starlette")
    done = subprocess.run([sys.executable, str(SERVER), str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert done.stderr.count("\n") == 1
