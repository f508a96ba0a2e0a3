"""A run at full shape without data or weights: random weights, made samples, a few steps and answers per task.

The ordinary loop does the work (`dymoe.learning.run`); what is measured is what it did. Two steps are trained and
two batches asked per task, the first of each to warm up.
"""

import io
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe.errors import DymoeError
from dymoe.files import read_json
from dymoe.learning.progress import Display
from dymoe.learning.recipe import Recipe

if TYPE_CHECKING:
    from dymoe.tasks import Sample, Stream, Task

TIMES = Path(__file__).parent / "published_times.json"
STEPS = 2  # the first warms up: kernels are chosen, memory is taken


@cache
def published() -> dict[str, Any]:
    """Table 15 of the paper, and the lengths that made samples have, with their sources."""
    values: dict[str, Any] = read_json(TIMES)
    return values


@dataclass(frozen=True)
class Lengths:
    """Tokens of text in a task's samples: of a question, an answer, and how many of both a record has."""

    question: int
    answer: int
    turns: int = 1


@dataclass(frozen=True)
class Measured:
    """What one stage took.

    Attributes:
        task: its name.
        step_seconds: of one optimizer step, warmed up.
        tokens_per_second: of training, padding and image tokens among them.
        answers_per_second: of evaluation.
        peak_bytes: of the GPU, else of the process.
        estimated_bytes: the same by `dymoe.preflight.memory`, None where it says nothing.
        steps: optimizer steps of the real task, None where its size is not known.
        hours: to train it, projected.
        asking_hours: to ask this task once, projected.
        paper_hours: Table 15's, on its hardware; None for other methods or tasks.
    """

    task: str
    step_seconds: float
    tokens_per_second: float
    answers_per_second: float
    peak_bytes: int
    estimated_bytes: float | None
    steps: int | None
    hours: float | None
    asking_hours: float | None
    paper_hours: float | None


def dry_run(recipe: Recipe, display: Display | None = None) -> list[Measured]:
    """Train two steps and ask two batches per task, with random weights and, for CoIN, made samples.

    Another stream's own samples are taken, the first of each task.

    Raises:
        DymoeError: the model has no configuration to be made from, or a stage fails as it would in the run.
    """
    from dymoe.learning.learner import Made
    from dymoe.learning.run import run
    from dymoe.models.shapes import config_of, meta_model, random_lvlm
    from dymoe.preflight.memory import memory, shape_of

    rows = recipe.training.samples_of_step()
    stream, sizes = made_stream(recipe, STEPS * rows, STEPS * recipe.evaluation.batch_size)
    if not recipe.trains:
        raise DymoeError(f"a dry run measures training; {recipe.method} trains nothing")
    shape = shape_of(meta_model(config_of(recipe.model, recipe.model_options)))
    lvlm = random_lvlm(recipe.model, recipe.training.dtype, recipe.model_options)
    watch = _Watch(f"dry run of {recipe.method}", len(stream.tasks))
    with tempfile.TemporaryDirectory(prefix="dymoe-dry-") as place:
        small = replace(
            recipe,
            training=replace(
                recipe.training,
                epochs=None,
                steps_per_task=STEPS,
                save_steps=10**6,
                log_steps=1,
                limit=None,
                report_to=[],
            ),
            evaluation=replace(recipe.evaluation, limit=None, split="test", zero_shot=False),
            output=str(Path(place) / "run"),
        )
        run(small, display=display or watch, made=Made(stream, lvlm, max(sum(map(sum, sizes.values())), 1)))
        seen = display if isinstance(display, _Watch) else watch
        lengths = [_tokens(lvlm, task, recipe, rows) for task in stream.tasks]
    found = []
    for number, (task, (tokens, longest)) in enumerate(zip(stream.tasks, lengths, strict=True), start=1):
        seconds = seen.steps[task.name]
        asked = seen.asked[task.name]
        train, test = sizes[task.name]
        steps = recipe.training.steps(min(train, recipe.training.limit or train))
        minutes = published()["minutes"].get(recipe.method, {}).get(task.name) if recipe.stream == "coin" else None
        found.append(
            Measured(
                task=task.name,
                step_seconds=seconds,
                tokens_per_second=tokens / seconds,
                answers_per_second=recipe.evaluation.batch_size / asked,
                peak_bytes=seen.peaks[task.name],
                estimated_bytes=memory(recipe, shape, number, longest).peak,
                steps=steps,
                hours=steps * seconds / 3600,
                asking_hours=test * asked / recipe.evaluation.batch_size / 3600,
                paper_hours=None if minutes is None else minutes / 60,
            )
        )
    return found


def _tokens(lvlm: Any, task: "Task", recipe: Recipe, rows: int) -> tuple[int, int]:
    """Tokens of one optimizer step, and of its longest sequence."""
    from dymoe.models import Collator

    row = Collator(lvlm, max_length=recipe.model_options.max_length)(list(task.train[:1]))
    length = int(row["input_ids"].shape[1])
    return rows * length, length


class _Watch(Display):
    """A display that also notes when steps and answers are done, and how much memory a stage took."""

    def __init__(self, title: str, stages: int) -> None:
        super().__init__(title, stages)
        self.steps: dict[str, float] = {}
        self.asked: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._task = ""
        self._at = time.perf_counter()

    def stage(self, index: int, name: str) -> None:
        """A stage begins: from now on the peak is its own."""
        super().stage(index, name)
        self._task = name
        reset_peak()
        self._at = time.perf_counter()

    def step(self, step: int, steps: int, logs: Mapping[str, float]) -> None:
        """A step is done; the last one counts."""
        super().step(step, steps, logs)
        now = time.perf_counter()
        self.steps[self._task], self._at = now - self._at, now
        self.peaks[self._task] = peak()

    def evaluating(self, task: str, done: int, samples: int) -> None:
        """A batch is answered; the last one of a task counts."""
        super().evaluating(task, done, samples)
        now = time.perf_counter()
        self.asked[task], self._at = now - self._at, now
        self.peaks[self._task] = peak()


def reset_peak() -> None:
    """Begin to measure the GPU's peak anew; the peak of a process cannot be."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    """Bytes: the GPU's peak since `reset_peak`, else the process's since its start."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- samples ---------------------------------------------------------------------------------------------------


def made_stream(recipe: Recipe, train: int, test: int) -> tuple["Stream", dict[str, tuple[int, int]]]:
    """A stream with so many samples per task, and the true numbers of samples (training, test) of each task.

    CoIN's samples are made (`made_task`), another stream's are its own, repeated as often as needed.
    """
    from dymoe.learning.inspection import load
    from dymoe.tasks import Stream

    if recipe.stream == "coin":
        from dymoe.tasks.coin.layout import published as coin

        names = recipe.task_names()
        sizes = {name: (coin()["tasks"][name]["train"], coin()["tasks"][name]["test"]) for name in names}
        lengths = {name: Lengths(**published()["lengths"][name]) for name in names}
        return Stream("coin", tuple(made_task(name, lengths[name], train, test) for name in names)), sizes
    stream = load(recipe)
    sizes = {task.name: (len(task.train), len(task.test)) for task in stream.tasks}
    tasks = tuple(
        replace(task, train=_repeated(task.train, train), test=_repeated(task.test, test)) for task in stream.tasks
    )
    return replace(stream, tasks=tasks, skipped=()), sizes


def _repeated(samples: "Sequence[Sample]", count: int) -> "list[Sample]":
    if not samples:
        raise DymoeError("a task has no samples to make a dry run of")
    return [replace(samples[number % len(samples)], id=f"dry-{number}") for number in range(count)]


def made_task(name: str, lengths: Lengths, train: int, test: int) -> "Task":
    """A task of made samples: noise pictures of 336 x 336 and texts of so many words.

    Generation stops where the model says so, and a random model hardly ever does: answers get as many tokens as the
    task's have, not CoIN's limit.
    """
    from dymoe.tasks import Sample, Task

    picture = _noise()
    question, answer = _words(lengths.question, 3), _words(lengths.answer, 7)
    turns = tuple((question, answer) for _ in range(lengths.turns - 1))

    def some(count: int, later: tuple[tuple[str, str], ...]) -> list[Sample]:
        reference = {"answer": answer}
        return [Sample(f"{name}-{n}", picture, question, answer, reference, later) for n in range(count)]

    return Task(name, some(train, turns), [], some(test, ()), "exact_match", lengths.answer + 1)


def _words(count: int, first: int) -> str:
    """So many words that a made tokenizer knows; a real one makes more tokens of them."""
    return " ".join(f"w{first + number % 50}" for number in range(count))


@cache
def _noise() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((336, 336), 64).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


# --- telling ---------------------------------------------------------------------------------------------------


def as_dict(rows: Sequence[Measured], recipe: Recipe) -> dict[str, Any]:
    """The measurement as plain values, with what it was made on."""
    from dymoe.learning.conditions import machine, versions

    return {
        "recipe": recipe.resolved(),
        "machine": machine(),
        "versions": versions(),
        "paper": {key: published()[key] for key in ("source", "hardware")},
        "tasks": [asdict(row) for row in rows],
    }
