"""Serve a stage behind an endpoint as OpenAI's chat completions are: any method, token by token routed or not.

    python examples/serve.py SOURCE [--stage N] [--model MODEL] [--dtype bfloat16] [--host 127.0.0.1] [--port 8000]

SOURCE is a run folder, or what `dymoe push` or `dymoe pull` wrote. MODEL is the base model where it is not where the
recipe says. It needs Starlette and uvicorn: `pip install starlette uvicorn` (the extra `play` brings both).

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "What is it?"}], "stream": true}'

A picture comes inside its request, as {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}: no
other address is fetched and no file is read. There is no password: whoever reaches the host can ask.
"""

import argparse
import base64
import binascii
import json
import time
import uuid
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

import dymoe
from dymoe.errors import DymoeError
from dymoe.files import parse_json
from dymoe.images import MAX_BYTES, decode
from dymoe.models import load
from dymoe.models.options import ModelOptions
from dymoe.schema import Range
from dymoe.share.stages import read_stage

LONGEST = 4096  # tokens of an answer, at most; 256 where a request does not say
BODY_BYTES = 2 * MAX_BYTES  # base64 takes four bytes for three
NOT_HERE = ("tools", "functions", "response_format", "logprobs", "stop", "audio")  # they would change the answer


class Url(TypedDict):
    """Where a picture is."""

    url: str


class Part(TypedDict):
    """A part of a message."""

    type: Literal["text", "image_url"]
    text: NotRequired[str]
    image_url: NotRequired[Url]


class Message(TypedDict):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class StreamOptions(TypedDict):
    """What a stream says beside the answer."""

    include_usage: NotRequired[bool]


Tokens = Annotated[int, Range(1, LONGEST)]


class Chat(TypedDict):
    """The body of a request; keys that change nothing here pass."""

    messages: list[Message]
    model: NotRequired[str | None]
    max_tokens: NotRequired[Tokens | None]
    max_completion_tokens: NotRequired[Tokens | None]
    temperature: NotRequired[Annotated[float, Range(0, 2)] | None]
    top_p: NotRequired[Annotated[float, Range(1e-6, 1)] | None]
    seed: NotRequired[Annotated[int, Range(0, 2**63 - 1)] | None]
    n: NotRequired[Literal[1] | None]
    stream: NotRequired[bool | None]
    stream_options: NotRequired[StreamOptions | None]


class Stop(StoppingCriteria):
    """Ends a generation once nobody reads its answer."""

    def __init__(self):
        self.event = Event()

    def __call__(self, input_ids, scores, **_):
        """Whether each row ends here."""
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class Answer:
    """One answer: its pieces of text as they come; afterwards how many tokens it took and why it ended."""

    def __init__(self, stage, inputs, options, seed):
        self.stage, self.inputs, self.options, self.seed = stage, inputs, options, seed
        self.prompt_tokens, self.tokens, self.finish = inputs["input_ids"].shape[1], 0, "stop"
        self.error = None

    def __iter__(self):
        stop, streamer = Stop(), TextIteratorStreamer(self.stage.tokenizer, skip_prompt=True, skip_special_tokens=True)
        thread = Thread(target=self._generate, args=(streamer, stop), daemon=True)
        thread.start()
        try:
            yield from (text for text in streamer if text)
            thread.join()
            if self.error is not None:
                raise self.error
        finally:
            stop.event.set()

    def _generate(self, streamer, stop):
        try:
            with self.stage.one_at_a_time, self.stage.autocast():
                if self.seed is not None:
                    torch.manual_seed(self.seed)
                criteria = StoppingCriteriaList([stop])
                output = self.stage.model.generate(
                    **self.inputs, **self.options, streamer=streamer, stopping_criteria=criteria
                )
            answer = output[0, self.prompt_tokens :]
            self.tokens = len(answer)
            self.finish = "stop" if int(answer[-1]) in self.options["eos_token_id"] else "length"
        except Exception as error:  # told where the answer is read
            self.error = error
            streamer.end()

    @property
    def usage(self):
        """Tokens of prompt and answer."""
        total = self.prompt_tokens + self.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}


class Stage:
    """A stage in memory.

    Args:
        source, number, model, dtype: see above; None for what the recipe says, and for the last stage.
    """

    def __init__(self, source, number=None, model=None, dtype=None):
        saved = read_stage(source, number)
        self.dtype = dtype or saved.recipe["training"]["dtype"]
        options = ModelOptions(load_in_4bit=saved.recipe.get("model_options", {}).get("load_in_4bit", False))
        commit = (saved.base or {}).get("commit")
        lvlm = load(model or saved.recipe["model"], self.dtype, options=options, revision=commit)
        if torch.cuda.is_available():
            lvlm.model.to("cuda")
        self.base, self.processor, self.tokenizer = lvlm.model, lvlm.processor, lvlm.processor.tokenizer
        self.model = dymoe.load_stage(source, lvlm.model, number)
        self.name = f"{Path(source).name}-{saved.folder}"
        self.one_at_a_time = Lock()
        ends = self.base.generation_config.eos_token_id
        self.ends = sorted({self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
        self.special = {*self.tokenizer.all_special_tokens, self.processor.image_token}

    def autocast(self):
        """The precision in which the stage learned."""
        dtype = getattr(torch, self.dtype)
        return torch.autocast(self.base.device.type, dtype, enabled=dtype != torch.float32)

    def answer(self, chat):
        """The answer to a request, not begun yet.

        Raises:
            DymoeError: the request cannot be answered as it asks; the message names its key.
        """
        for key in NOT_HERE:
            if chat.get(key):
                raise DymoeError(f"{key}: this server does not do that; leave it out")
        if (chat.get("model") or self.name) != self.name:
            raise DymoeError(f"model: there is {self.name} here, not {chat['model']}")
        inputs = self.inputs(chat["messages"])
        longest = chat.get("max_completion_tokens") or chat.get("max_tokens") or 256
        room = self.base.config.get_text_config().max_position_embeddings
        if inputs["input_ids"].shape[1] + longest > room:
            count = inputs["input_ids"].shape[1]
            raise DymoeError(f"messages: {count} tokens and an answer of {longest} are more than the model's {room}")
        temperature = chat.get("temperature") or 0.0  # greedy, as a run is evaluated, where a request does not say
        sampled = {"temperature": temperature, "top_p": chat.get("top_p") or 1.0, "top_k": 0} if temperature else {}
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.ends[0]
        options = {"max_new_tokens": longest, "do_sample": temperature > 0, "eos_token_id": self.ends, **sampled}
        return Answer(self, inputs, {**options, "pad_token_id": pad}, chat.get("seed"))

    def inputs(self, messages):
        """Tokens and pictures of a conversation, as the model's own processor makes them."""
        if not messages or messages[-1]["role"] == "assistant":
            raise DymoeError("messages: expected a conversation whose last turn is not the assistant's")
        turns = []
        for number, message in enumerate(messages, start=1):
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            entries = [self.part(part, f"messages.{number}.content.{place}") for place, part in enumerate(parts, 1)]
            turns.append({"role": message["role"], "content": entries})
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        try:
            inputs = self.processor.apply_chat_template(turns, **how)
        except (ValueError, TypeError, IndexError) as error:
            raise DymoeError(f"messages: the model's processor refuses them ({' '.join(str(error).split())})") from None
        return inputs.to(self.base.device, dtype=self.base.dtype)

    def part(self, part, key):
        """A part as the processor takes it.

        Raises:
            DymoeError: it lacks its text or picture, has a special token, an address that is no data: URL, or a
                picture that cannot be read.
        """
        if part["type"] == "text":
            text = part.get("text")
            if text is None:
                raise DymoeError(f"{key}.text: is missing")
            if token := next((token for token in self.special if token in text), None):
                raise DymoeError(f"{key}.text: contains the special token {token}")
            return {"type": "text", "text": text}
        url = part.get("image_url", {}).get("url", "")
        kind, comma, data = url.partition(";base64,")
        if not kind.startswith("data:image/") or not comma:
            raise DymoeError(f"{key}.image_url.url: expected data:image/...;base64,..., no other address is read")
        try:
            return {"type": "image", "image": decode(base64.b64decode(data, validate=True))}
        except (binascii.Error, DymoeError) as error:
            raise DymoeError(f"{key}.image_url.url: {error}") from None


async def read(request):
    """The body of a request, checked.

    Raises:
        DymoeError: it is no JSON of a chat, or too large.
    """
    # Not every page of the web may ask: a browser sends this type from elsewhere only where the server allows it.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise DymoeError("expected a body with Content-Type: application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES:
            raise DymoeError(f"a body of more than {BODY_BYTES} bytes")
    return parse_json(body, "request", Chat)


def application(stage, hosts):
    """The endpoint as a server (ASGI); `hosts` are the names that requests may call it by."""

    def head(kind):
        facts = {"object": kind, "created": int(time.time()), "model": stage.name}
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", **facts}

    def events(answer, chat):
        shared = head("chat.completion.chunk")

        def event(delta=None, finish=None, **more):
            choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
            return f"data: {json.dumps({**shared, 'choices': choices, **more})}\n\n"

        yield event({"role": "assistant", "content": ""})
        for text in answer:
            yield event({"content": text})
        yield event({}, answer.finish)
        if (chat.get("stream_options") or {}).get("include_usage"):
            yield event(usage=answer.usage)
        yield "data: [DONE]\n\n"

    async def chat_completions(request: Request) -> Any:
        chat = await read(request)
        answer = await run_in_threadpool(stage.answer, chat)
        if chat.get("stream"):
            return StreamingResponse(events(answer, chat), media_type="text/event-stream")
        text = await run_in_threadpool(lambda: "".join(answer))
        message = {"role": "assistant", "content": text.strip()}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish}
        return JSONResponse({**head("chat.completion"), "choices": [choice], "usage": answer.usage})

    async def models(request: Request) -> Any:
        entry = {"id": stage.name, "object": "model", "created": int(time.time()), "owned_by": "dymoe"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def refuse(request: Request, error: Exception) -> Any:
        body = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": body}, 400)

    routes = [Route("/v1/chat/completions", chat_completions, methods=["POST"]), Route("/v1/models", models)]
    # A name elsewhere that is made to lead to this machine does not reach it.
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers={DymoeError: refuse})


def main():
    """Load the stage, serve it until Ctrl+C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--stage", type=int)
    parser.add_argument("--model")
    parser.add_argument("--dtype")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    try:
        stage = Stage(options.source, options.stage, options.model, options.dtype)
    except DymoeError as error:
        parser.exit(2, f"serve: {error}\n")
    everywhere = options.host in ("0.0.0.0", "::")
    hosts = ["*"] if everywhere else sorted({options.host, "localhost", "127.0.0.1"})
    print(f"{stage.name}: http://{options.host}:{options.port}/v1", flush=True)
    uvicorn.run(application(stage, hosts), host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
