"""The page: a picture and a question on one side, the answer and its tokens' routing on the other.

Gradio serves it, without its analytics, share links, web fonts and footer: the page asks no address but its own.
"""

import html
from abc import ABCMeta
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from dymoe import images
from dymoe.errors import DymoeError
from dymoe.play import overlay
from dymoe.play.ask import LONGEST, Exchange, Runs
from dymoe.play.guard import ONLY_UPLOADS, Uploads
from dymoe.tasks.records import check_image

TITLE = "dymoe: ask a learned run"
FONTS: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
ANSWER = 32  # tokens, unless asked for more
QUESTION = 4000  # characters
WAITING = 16  # questions in the queue
BEFORE = "Here the routing of the tokens is drawn when a question has been answered."
ABOUT = """Ask what the run was taught, stage by stage; with the instruction that its examples carry, the answer is the
one that evaluation gives. Below it each patch of the picture and each word is marked with the expert group that serves
it and with its token type."""


def _upload_field(uploads: Uploads) -> Any:
    """Gradio's image field, which decodes nothing, fetches nothing and reads uploads alone.

    Made without Gradio's own metaclass code, which would write a stub (.pyi) beside this file; a class all the same,
    since Gradio makes new fields of it for each visitor.
    """

    def encoded(self: Any, payload: Any) -> bytes | None:
        """The encoded picture, checked before anything decodes it; None without one.

        Raises:
            gr.Error: it is no upload, no picture, or a larger one than is read.
        """
        if payload is None:
            return None
        file = uploads.find(payload.path)
        if file is None:
            raise _shown(ONLY_UPLOADS)
        try:
            images.check_size(file.stat().st_size)
            data = file.read_bytes()
            check_image(data)
        except (DymoeError, OSError) as error:
            raise _shown(_line(error).replace("'image' is", "this is", 1)) from None
        return data

    members = {"__module__": __name__, "is_template": True, "preprocess": encoded}
    return ABCMeta.__new__(type(gr.Image), "Upload", (gr.Image,), members)


@dataclass(frozen=True)
class Question:
    """The fields that a question is put with, and the buttons that ask it and end its answer."""

    picture: Any
    text: Any
    run: Any
    stage: Any
    longest: Any
    ask: Any
    stop: Any


@dataclass(frozen=True)
class Answer:
    """The fields that show the answer, and where its routing is drawn, of which layer and projection."""

    text: Any
    expected: Any
    layer: Any
    projection: Any
    routing: Any


def build(runs: Runs, files: Path, uploads: Uploads) -> gr.Blocks:
    """The page, not yet served.

    Args:
        runs: in memory.
        files: a folder for the examples' pictures.
        uploads: what pictures are read from; told here which files there are.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {TITLE}\n{' '.join(ABOUT.split())}")
        with gr.Row():
            with gr.Column(scale=2):
                question = _question(runs, uploads)
            with gr.Column(scale=3):
                answer = _answer(runs)
        examples = _examples(runs, runs.names[0], files)
        fields = [question.picture, question.text, answer.expected]
        gr.Examples(examples, fields, examples_per_page=8, label="From the run")
        _follow(runs, question, answer)
        page.queue(max_size=WAITING)
    uploads.names = (page.upload_file_set, question.picture.keep_in_cache)
    return page


def _question(runs: Runs, uploads: Uploads) -> Question:
    """The left side, from top to bottom."""
    picture = _upload_field(uploads)(
        label="Picture",
        placeholder="Drop a picture here or click: PNG, JPEG or WebP; none for a question of text alone",
        sources=["upload", "clipboard"],
        buttons=[],
        height=260,
    )
    text = gr.Textbox(label="Question", lines=3, max_length=QUESTION, submit_btn=False)
    first = runs.names[0]
    stages = runs.stages(first)
    # The stages that any run has: a client may ask for one of them without choosing the run in the field first.
    longest_run = max(map(runs.stages, runs.names), key=len)
    every = [*stages, *longest_run[len(stages) :]]
    with gr.Row():
        run = gr.Dropdown(runs.names, value=first, label="Run", interactive=True)
        stage = gr.Dropdown(every, value=len(stages) - 1, label="Stage", interactive=True)
    longest = gr.Slider(1, LONGEST, ANSWER, step=1, label="Longest answer (tokens)")
    with gr.Row():
        ask = gr.Button("Ask", variant="primary")
        stop = gr.Button("Stop")
    return Question(picture, text, run, stage, longest, ask, stop)


def _answer(runs: Runs) -> Answer:
    """The right side, from top to bottom."""
    sites = [site for name in runs.names for site in runs.routed(name)]
    layers = sorted({layer for layer, _ in sites})
    projections = list(dict.fromkeys(projection for _, projection in sites))
    text = gr.Textbox(label="Answer", lines=2, interactive=False, buttons=["copy"])
    expected = gr.Textbox(label="Expected answer", interactive=False)
    with gr.Row():
        layer = gr.Dropdown(layers, value=layers[len(layers) // 2], label="Decoder layer")
        projection = gr.Dropdown(projections, value=_usual(projections), label="Projection")
    routing = gr.HTML(overlay.note(BEFORE), label="Routing", elem_classes="routing-place")
    return Answer(text, expected, layer, projection, routing)


def _follow(runs: Runs, question: Question, answer: Answer) -> None:
    """What happens when a field changes or a button is pressed."""
    exchange = gr.State()
    question.run.change(
        lambda name: gr.Dropdown(runs.stages(name), value=len(runs.stages(name)) - 1),
        question.run,
        question.stage,
        api_visibility="private",
    )
    # The expected answer is that of an example as it stands.
    gr.on([question.picture.input, question.text.input], None, None, answer.expected, js="() => ''")
    how: Any = {"concurrency_id": "model", "concurrency_limit": 1}
    choices = [answer.layer, answer.projection]
    answering = gr.on(
        [question.ask.click, question.text.submit],
        _one_line(_asking(runs)),
        [question.run, question.stage, question.text, question.picture, question.longest, *choices],
        [answer.text, answer.routing, exchange],
        api_name="ask",
        **how,
    )
    question.stop.click(None, cancels=[answering])
    gr.on(
        [answer.layer.change, answer.projection.change],
        _one_line(lambda past, layer, projection: _routing(runs, past, layer, projection)),
        [exchange, *choices],
        answer.routing,
        api_visibility="private",
        **how,
    )


def _asking(runs: Runs) -> Callable[..., Iterator[tuple[Any, ...]]]:
    """What the button does: the answer as it grows, then the routing of its tokens."""

    def ask(
        run: str, stage: int, question: str, picture: bytes | None, longest: int, layer: int, projection: str
    ) -> Iterator[tuple[Any, ...]]:
        past = None
        for past in runs.ask(run, int(stage), question, picture, int(longest)):
            yield past.sample.answer, overlay.note("…"), None
        assert past is not None  # the last answer is the whole one, though it may be empty
        yield past.sample.answer, _routing(runs, past, layer, projection), past

    return ask


def _routing(runs: Runs, past: Exchange | None, layer: int, projection: str) -> Any:
    """The routing as HTML, or a line that says why there is none."""
    from dymoe.analysis.token_overlay import seen_picture

    if past is None:
        return overlay.note(BEFORE)
    learned = runs[past.run]
    try:
        frame = runs.route(past, int(layer))
    except DymoeError as error:
        return overlay.note(_line(error))
    frame = frame[frame["projection"] == projection]
    if frame.empty:
        return overlay.note(f"layer {layer}: {projection} holds no experts in this run")
    picture = seen_picture(learned.lvlm, past.sample) if past.sample.has_image else None
    return overlay.draw(frame, picture, learned.groups(past.stage))


def _examples(runs: Runs, name: str, files: Path) -> list[list[str | None]]:
    """Picture, question and reference answer of the run's examples, the pictures as files."""
    rows: list[list[str | None]] = []
    for number, sample in enumerate(runs.examples(name)):
        path = None
        if (data := sample.image) is not None:
            shown, kind = images.for_browser(data)
            path = files / f"{number}.{kind.removeprefix('image/')}"
            path.write_bytes(shown)
        rows.append([None if path is None else str(path), sample.question, sample.answer])
    return rows


def _usual(projections: list[str]) -> str:
    return "v_proj" if "v_proj" in projections else projections[0]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _shown(text: str) -> gr.Error:
    """An error as the page shows it: one line of text, for Gradio would take it for HTML."""
    return gr.Error(html.escape(text, quote=False), duration=None, title="Not possible", print_exception=False)


def _one_line(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same work, its DymoeErrors shown on the page."""
    from inspect import isgeneratorfunction

    if isgeneratorfunction(work):

        @wraps(work)
        def guard(*values: Any) -> Any:
            try:
                yield from work(*values)
            except DymoeError as error:
                raise _shown(_line(error)) from None
    else:

        @wraps(work)
        def guard(*values: Any) -> Any:
            try:
                return work(*values)
            except DymoeError as error:
                raise _shown(_line(error)) from None

    return guard


def mount(page: gr.Blocks) -> Any:
    """The page as a server (ASGI), not yet guarded or listening."""
    app = FastAPI(openapi_url=None)
    quiet: dict[str, Any] = {"footer_links": [], "run_history": False, "enable_monitoring": False, "show_error": False}
    off: dict[str, Any] = {"ssr_mode": False, "pwa": False, "mcp_server": False}
    look: dict[str, Any] = {"theme": gr.themes.Default(**FONTS), "css": overlay.STYLE}
    gr.mount_gradio_app(app, page, "/", max_file_size=images.MAX_BYTES, **quiet, **off, **look)
    page.app = app.routes[-1].app  # type: ignore[attr-defined]  # whose streams `close` ends
    return app
