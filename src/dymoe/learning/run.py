"""A run from its recipe to its folder: the stream is read and checked, then learned stage by stage (`Learner`).

Every process of a run goes through this. They learn and ask together; process 0 alone writes, and decides what is
decided by looking at the disk (`dymoe.learning.distributed`).
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dymoe.errors import DymoeError
from dymoe.files import atomic_json, atomic_write, read_bytes
from dymoe.learning import conditions, inspection
from dymoe.learning.checkpoints import last_checkpoint, remove_checkpoints
from dymoe.learning.conditions import Description, State
from dymoe.learning.distributed import join
from dymoe.learning.folder import RunFolder, StageFolder, verify
from dymoe.learning.learner import Learner, Substitute
from dymoe.learning.progress import Display, silent
from dymoe.learning.recipe import Recipe
from dymoe.learning.results import shown_samples, write_results
from dymoe.libraries import quiet

if TYPE_CHECKING:
    from dymoe.tasks import Stream, Task


def run(
    recipe: Recipe,
    resume: bool = False,
    display: Display | None = None,
    substitute: Substitute | None = None,
    accept: Sequence[str] = (),
) -> Path:
    """Learn the recipe's stream and return the run's folder.

    Args:
        recipe: the experiment.
        resume: go on with the folder of a run that was interrupted, from its last complete checkpoint.
        display: where progress is shown; made for standard error when None.
        substitute: stream and model in place of those that the recipe names.
        accept: what may differ from what the run computed with so far (`dymoe.learning.conditions.ACCEPTABLE`).

    Raises:
        DymoeError: a bad task, sample or folder, a full disk, a frozen group that changed, a run that is not this one
            or whose files are not as they were written; what is finished stays.
    """
    processes = join()
    if processes.wrapped and substitute is not None:
        raise DymoeError("a dry run works in one process; start it without a launcher")
    method = recipe.build_method()
    title, console = f"{recipe.method} on {recipe.stream}", None if processes.main else silent()
    with _threads(recipe.training.threads), quiet():
        ahead = Display(title, 0, console)
        stream = checked(inspection.load(recipe, ahead.inspecting) if substitute is None else substitute.stream, recipe)
        rounds = method.rounds(stream.tasks)
        with (
            closing(RunFolder(Path(recipe.output), resume, processes.main)) as folder,
            display or Display(title, len(rounds), console) as shown,
        ):
            stages = [
                folder.stage(index, name, [task.name for task in tasks])
                for index, (name, tasks) in enumerate(rounds, start=1)
            ]
            if processes.main:
                start = _Start(recipe, stream, rounds, folder, stages)
                description = start.begin(processes.count, substitute is None, accept)
                for note in (*stream.notes, *start.tidy()):
                    shown.note(note)
            revision = processes.from_main(lambda: description["base"].get("commit"))
            if processes.from_main(lambda: any(stage.done is None for stage in stages or [folder.zero_shot])):
                learner = Learner(recipe, method, stream, folder, stages, shown, processes, substitute, revision)
                learner.learn(rounds)
            shown.finish()
            if processes.main:
                write_results(folder, recipe, stream.names, stages)
            processes.wait()
    return folder.path


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch compute with so many CPU threads in a block, as many as it likes when None."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Start:
    """The beginning of a run, or of its going on, in the process that writes."""

    recipe: Recipe
    stream: "Stream"
    rounds: "Sequence[tuple[str, tuple[Task, ...]]]"
    folder: RunFolder
    stages: list[StageFolder]

    def begin(self, processes: int, real: bool, accept: Sequence[str]) -> Description:
        """Write the folder's description; of a run that goes on, compare it and all files first.

        Args:
            processes: how many there are.
            real: whether the base model is the recipe's (else made, which has no state to compare).
            accept: as `run`.

        Raises:
            DymoeError: the run is not this one, or a file is not as it was written.
        """
        from dymoe.models.identity import identity

        path, evaluation = self.folder.path, self.recipe.evaluation
        here: Description = {
            "recipe": self.recipe.resolved(),
            "base": {},
            "data": conditions.data_of(self.stream, evaluation.split, evaluation.limit),
            "step": {"samples": self.recipe.training.samples_of_step(processes)},
            "environments": [conditions.environment(1)],
            "accepted": [],
        }
        there = conditions.read(path) if self.folder.begun else None
        state = State(1, (), ())
        if there is not None:
            conditions.refuse_other(path, there, here)
            self.folder.events()
            verify([self.folder.zero_shot])
            verify(self.stages)
            state = self.state()
        if real and state.stage is not None:
            here["base"] = identity(self.recipe.model, revision=there["base"].get("commit") if there else None)
        if there is not None:
            here = conditions.go_on(path, there, here, state, accept)
        if here != there:
            conditions.write(path, here)
        return here

    def state(self) -> State:
        """How far the run is."""

        def begun(stage: StageFolder) -> bool:
            return stage.trained or stage.probed is not None or any(map(last_checkpoint, (stage.trainer, stage.probe)))

        order = self.stages or [self.folder.zero_shot]
        trained = [
            task.name
            for stage, (_, tasks) in zip(self.stages, self.rounds, strict=True)
            if begun(stage)
            for task in tasks
        ]
        folders = (self.folder.zero_shot, *self.stages)
        evaluated = {task for stage in folders for task in (*stage.scores, *stage.watch.scores)}
        undone = (number for number, stage in enumerate(order, start=1) if stage.done is None)
        return State(next(undone, None), trained, evaluated)

    def tidy(self) -> list[str]:
        """Clear what a kill left, write what is rewritten at every start, and say what a reader should know."""
        folder, notes = self.folder, []
        folder.clear_partial()
        done = [number for number, stage in enumerate(self.stages, start=1) if stage.done is not None]
        # A kill just before a stage's marker leaves its event, which is written again.
        folder.keep_events(lambda event: event["event"] != "stage" or event.get("stage") in done)
        for stage in self.stages:
            if stage.done is not None:
                remove_checkpoints(stage.trainer)
        note_skipped(folder, self.stream)
        shown = (self.recipe.evaluation.split, self.recipe.evaluation.limit)
        atomic_json(folder.path / "samples.json", shown_samples(self.stream.tasks, *shown))
        notes += inspection.left_out(self.stream.skipped, folder.path / inspection.SKIPPED)
        if folder.begun:
            folders = self.stages or [folder.zero_shot]
            notes.append(found_again(folder.path, [stage.done is not None for stage in folders]))
            notes += missing_events(folder, self.stages)
        return notes


def missing_events(folder: RunFolder, stages: Sequence[StageFolder]) -> list[str]:
    """What events.jsonl has lost of the trained stages, a line each; results.json does not depend on it."""
    there = Counter(event.get("stage") for event in folder.events() if event["event"] == "step")
    logged = {number: stage.record["logged"] for number, stage in enumerate(stages, start=1) if stage.trained}
    return [
        f"{folder.path / 'events.jsonl'}: {there[number]} of {count} steps of stage {number} are left; the numbers in "
        "results.json are from the stage's own record"
        for number, count in logged.items()
        if there[number] < count
    ]


def found_again(path: Path, done: Sequence[bool]) -> str:
    """What is said of a run that was there already: what of it is done, and that it goes on or is kept."""
    if all(done):
        return f"{path}: finished before, kept as it is"
    return f"{path}: goes on; {sum(done)} of {len(done)} tasks are done"


def note_skipped(folder: RunFolder, stream: "Stream") -> None:
    """List the records that were left out in skipped.jsonl and say so in events.jsonl, once per list."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in stream.skipped)
    file = folder.path / inspection.SKIPPED
    if text.encode() != (read_bytes(file) if file.is_file() else b""):  # all may have been mended since
        counts = Counter(row["file"] for row in stream.skipped)
        atomic_write(file, text)
        folder.event("skipped", records=len(stream.skipped), files=dict(counts))


def checked(stream: "Stream", recipe: Recipe) -> "Stream":
    """The stream with at most `training.limit` training samples per task, every split checked to hold some.

    Raises:
        DymoeError: a task that is learned without training samples, or any without evaluation samples.
    """
    from dymoe.evaluation.generate import evaluated

    tasks = []
    for task in stream.tasks:
        if not task.train:
            raise DymoeError(
                f"stream {stream.name!r}: task {task.name!r} has no training samples; give it some (train), or name "
                "the stream where evaluation.watch only asks it"
            )
        evaluated(task, recipe.evaluation.split, recipe.evaluation.limit)
        tasks.append(replace(task, train=task.train[: recipe.training.limit]))
    for task in stream.watch:
        evaluated(task, recipe.evaluation.split, recipe.evaluation.limit)
    return replace(stream, tasks=tuple(tasks))
