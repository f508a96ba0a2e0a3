"""A run at full shape without data or weights: random weights, made samples, a few steps and answers per task.

The ordinary loop does the work (`dymoe.learning.run`); what is measured is what it did. Two steps are trained and
two batches asked per task, the first of each to warm up.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe.errors import DymoeError
from dymoe.learning.progress import Display
from dymoe.learning.recipe import Recipe

if TYPE_CHECKING:
    from dymoe.tasks import Sample, Stream, Task

STEPS = 2  # the first warms up: kernels are chosen, memory is taken


@dataclass(frozen=True)
class Measured:
    """What one stage took, or asking a task that is only asked (`evaluation.watch`).

    Attributes:
        task: its name.
        step_seconds: of one optimizer step, warmed up; None of a task that is only asked.
        tokens_per_second: of training, padding and image tokens among them; None likewise.
        answers_per_second: of evaluation.
        peak_bytes: of the GPU, else of the process.
        estimated_bytes: the same by `dymoe.preflight.memory`, None where it says nothing.
        steps: optimizer steps of the real task, None where its size is not known.
        hours: to train it, projected.
        asking_hours: to ask this task once, projected.
        paper_hours: Table 15's, on its hardware; None for other methods or tasks.
    """

    task: str
    step_seconds: float | None
    tokens_per_second: float | None
    answers_per_second: float
    peak_bytes: int
    estimated_bytes: float | None
    steps: int | None
    hours: float | None
    asking_hours: float | None
    paper_hours: float | None


def dry_run(recipe: Recipe) -> list[Measured]:
    """Train two steps and ask two batches per task, with random weights and, where the stream makes some, made samples.

    Another stream's own samples are taken, the first of each task.

    Raises:
        DymoeError: the model has no configuration to be made from, or a stage fails as it would in the run.
    """
    from dymoe.learning.learner import Substitute
    from dymoe.learning.run import run
    from dymoe.models.shapes import config_of, meta_model, random_lvlm
    from dymoe.preflight.memory import memory, shape_of

    rows = recipe.training.samples_of_step()
    stream, sizes = some_stream(recipe, STEPS * rows, STEPS * recipe.evaluation.batch_size)
    if not recipe.trains:
        raise DymoeError(f"a dry run measures training; {recipe.method} trains nothing")
    shape = shape_of(meta_model(config_of(recipe.model, recipe.model_options)))
    lvlm = random_lvlm(recipe.model, recipe.training.dtype, recipe.model_options)
    pictures = sum(sum(sizes[task.name]) for task in stream.tasks)
    watch = _Watch(f"dry run of {recipe.method}", len(stream.tasks))
    with tempfile.TemporaryDirectory(prefix="dymoe-dry-") as folder:
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
            output=str(Path(folder) / "run"),
        )
        run(small, display=watch, substitute=Substitute(stream, lvlm, max(pictures, 1)))
        lengths = [_tokens(lvlm, task, recipe, rows) for task in stream.tasks]
    return [
        _measured(
            recipe,
            task.name,
            watch,
            sizes[task.name],
            tokens,
            estimate=memory(recipe, shape, number, longest).peak,
        )
        for number, (task, (tokens, longest)) in enumerate(zip(stream.tasks, lengths, strict=True), start=1)
    ] + [_only_asked(recipe, task.name, watch, sizes[task.name][1]) for task in stream.watch]


def _only_asked(recipe: Recipe, task: str, watch: "_Watch", questions: int) -> Measured:
    """What asking a task took that is only asked, and what asking all its questions once would."""
    seconds_to_answer, batch = watch.answer_seconds[task], recipe.evaluation.batch_size
    hours = questions * seconds_to_answer / batch / 3600
    return Measured(task, None, None, batch / seconds_to_answer, watch.peaks[task], None, None, None, hours, None)


def _measured(
    recipe: Recipe, task: str, watch: "_Watch", sizes: tuple[int, int], tokens: int, estimate: float
) -> Measured:
    """What one stage took, and what the whole task would.

    Args:
        recipe: of the run.
        task: that the stage learned.
        watch: what was noted.
        sizes: training and test samples of the real task.
        tokens: of one optimizer step.
        estimate: of its peak in bytes.
    """
    train, test = sizes
    seconds, seconds_to_answer, batch = watch.steps[task], watch.answer_seconds[task], recipe.evaluation.batch_size
    steps = recipe.training.steps(min(train, recipe.training.limit or train))
    minutes = paper_times(recipe).get("minutes", {}).get(recipe.method, {}).get(task)
    return Measured(
        task=task,
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        answers_per_second=batch / seconds_to_answer,
        peak_bytes=watch.peaks[task],
        estimated_bytes=estimate,
        steps=steps,
        hours=steps * seconds / 3600,
        asking_hours=test * seconds_to_answer / batch / 3600,
        paper_hours=None if minutes is None else minutes / 60,
    )


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
        self.answer_seconds: dict[str, float] = {}
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
        self.answer_seconds[task], self._at = now - self._at, now
        self.peaks[self._task] = self.peaks[task] = peak()


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


def paper_times(recipe: Recipe) -> Mapping[str, Any]:
    """Published times for the recipe's stream: source, hardware, minutes by method and task; empty without any."""
    from dymoe.tasks.base import hook

    published: Any = hook(recipe.stream, "published_times")
    return published() if published else {}


def some_stream(recipe: Recipe, train: int, test: int) -> tuple["Stream", dict[str, tuple[int, int]]]:
    """A stream with so many samples per task, and the true numbers of samples (training, test) of each task.

    They are made where the stream says how (`dymoe.tasks.base`), else its own, repeated as often as needed; so
    are those of tasks that are only asked.
    """
    from dymoe.learning.inspection import load
    from dymoe.tasks.base import hook

    def only_asked(tasks: "Sequence[Task]") -> "tuple[Task, ...]":
        sizes.update({task.name: (0, len(task.test)) for task in tasks})
        return tuple(replace(task, test=_repeated(task.test, test)) for task in tasks)

    if stand_in := hook(recipe.stream, "stand_in"):
        synthetic, sizes = stand_in(recipe.task_names(), train, test)
        return replace(synthetic, watch=only_asked(recipe.load_watch()[0])), sizes
    stream = load(recipe)
    sizes = {task.name: (len(task.train), len(task.test)) for task in stream.tasks}
    tasks = tuple(
        replace(task, train=_repeated(task.train, train), test=_repeated(task.test, test)) for task in stream.tasks
    )
    return replace(stream, tasks=tasks, watch=only_asked(stream.watch), skipped=()), sizes


def _repeated(samples: "Sequence[Sample]", count: int) -> "list[Sample]":
    if not samples:
        raise DymoeError("a task has no samples to make a dry run of")
    return [replace(samples[number % len(samples)], id=f"dry-{number}") for number in range(count)]


# --- telling ---------------------------------------------------------------------------------------------------


def as_dict(rows: Sequence[Measured], recipe: Recipe) -> dict[str, Any]:
    """The measurement as plain values, with what it was made on."""
    from dymoe.learning.conditions import machine, versions

    return {
        "recipe": recipe.resolved(),
        "machine": machine(),
        "versions": versions(),
        "paper": {key: value for key, value in paper_times(recipe).items() if key in ("source", "hardware")},
        "tasks": [asdict(row) for row in rows],
    }
