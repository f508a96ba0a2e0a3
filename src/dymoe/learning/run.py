"""A run from its recipe to its folder: the stream is read and checked, then learned stage by stage (`Learner`).

Every process of a run goes through this. They learn and ask together; process 0 alone writes, and decides what is
decided by looking at the disk (`dymoe.learning.processes`).
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dymoe.errors import DymoeError
from dymoe.files import atomic_json, atomic_write
from dymoe.learning import preflight
from dymoe.learning.folder import RunFolder, StageFolder
from dymoe.learning.learner import Learner, Made
from dymoe.learning.processes import join
from dymoe.learning.progress import Display, silent
from dymoe.learning.recipe import Recipe
from dymoe.learning.results import data_description, shown_samples, versions, write_results

if TYPE_CHECKING:
    from dymoe.tasks import Stream

SKIPPED = "skipped.jsonl"  # the records that were left out, one a line


def run(recipe: Recipe, resume: bool = False, display: Display | None = None, made: Made | None = None) -> Path:
    """Learn the recipe's stream and return the run's folder.

    Args:
        recipe: the experiment.
        resume: go on with the folder of a run that was interrupted, from its last complete checkpoint.
        display: where progress is shown; made for standard error when None.
        made: stream and model in place of those that the recipe names.

    Raises:
        DymoeError: a bad task, sample or folder, a full disk, a frozen group that changed; what is finished
            stays.
    """
    processes = join()
    if processes.wrapped and made is not None:
        raise DymoeError("a dry run works in one process; start it without a launcher")
    method = recipe.build_method()
    ahead = Display(f"{recipe.method} on {recipe.stream}", 0, None if processes.main else silent())
    stream = checked(preflight.load(recipe, ahead.inspecting) if made is None else made.stream, recipe)
    rounds = method.rounds(stream.tasks)
    description = {"recipe": recipe.resolved(), "data": data_description(stream), "versions": versions()}
    description["step"] = {"samples": recipe.training.samples_of_step(processes.count)}
    folder = RunFolder(Path(recipe.output), description, resume, processes.main)
    try:
        processes.wait()
        stages = [folder.stage(index, name) for index, (name, _) in enumerate(rounds, start=1)]
        if processes.main:
            folder.clear_partial()
            note_skipped(folder, stream)
            shown_of = (recipe.evaluation.split, recipe.evaluation.limit)
            atomic_json(folder.path / "samples.json", shown_samples(stream.tasks, *shown_of))
        shown_as = (f"{recipe.method} on {recipe.stream}", len(rounds))
        with display or Display(*shown_as, None if processes.main else silent()) as shown:
            for note in (*stream.notes, *preflight.left_out(stream.skipped, folder.path / SKIPPED)):
                shown.note(note)
            asked = stages or [StageFolder(folder.path / "zero-shot")]
            if folder.found:
                shown.note(found_again(folder.path, [stage.done is not None for stage in asked]))
            if processes.from_main(lambda: any(stage.done is None for stage in asked)):
                learner = Learner.load(recipe, method, stream, folder, stages, shown, processes, made)
                learner.learn(rounds)
            shown.finish()
        if processes.main:
            write_results(folder, recipe, stream.names, stages)
        processes.wait()
    finally:
        folder.close()
    return folder.path


def found_again(path: Path, done: Sequence[bool]) -> str:
    """What is said of a run that was there already: what of it is done, and that it goes on or is kept."""
    if all(done):
        return f"{path}: finished before, kept as it is"
    return f"{path}: goes on; {sum(done)} of {len(done)} tasks are done"


def note_skipped(folder: RunFolder, stream: "Stream") -> None:
    """List the records that were left out in skipped.jsonl and say so in events.jsonl, once per list."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in stream.skipped)
    file = folder.path / SKIPPED
    if text and not (file.is_file() and file.read_text(encoding="utf-8") == text):
        counts = Counter(row["file"] for row in stream.skipped)
        atomic_write(file, text)
        folder.event("skipped", records=len(stream.skipped), files=dict(counts))


def checked(stream: "Stream", recipe: Recipe) -> "Stream":
    """The stream with at most `training.limit` training samples per task, every split checked to hold some.

    Raises:
        DymoeError: a task without training or evaluation samples.
    """
    from dymoe.evaluation.generate import evaluated

    tasks = []
    for task in stream.tasks:
        if not task.train:
            raise DymoeError(f"stream {stream.name!r}: task {task.name!r} has no training samples")
        evaluated(task, recipe.evaluation.split, recipe.evaluation.limit)
        tasks.append(replace(task, train=task.train[: recipe.training.limit]))
    return replace(stream, tasks=tuple(tasks))
