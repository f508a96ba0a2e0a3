"""Everything that can be checked before a run begins: data, lengths, disk, memory, time, versions."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dymoe.errors import DymoeError
from dymoe.files import expand
from dymoe.learning.inspection import WORTHLESS, inspect
from dymoe.learning.recipe import Recipe
from dymoe.names import parts_of, safe_names
from dymoe.preflight.capacity import check_recipes, check_room, check_time, known_shape
from dymoe.preflight.findings import Checkup, Level

if TYPE_CHECKING:
    from dymoe.learning.inspection import Inspection, Progress
    from dymoe.models import Lvlm
    from dymoe.tasks import Sample, Stream, Task

# What is checked of samples: the kinds of `dymoe.learning.inspection.Unusable`, and what mends them.
CHECKS = {"pictures": ("picture",), "tokens": ("text",), "references": ("reference",), "answers": WORTHLESS}
MENDS = {
    "pictures": "fetch these files again, or data.on_bad: skip",
    "tokens": "mend or shorten these records, model_options.max_length, or data.on_bad: skip",
    "references": "mend these records, or data.on_bad: skip",
    "answers": "mend the records, the task's scorer or its max_new_tokens",
}
ASSEMBLE = "dymoe assemble builds it (docs/models.md); or give --model FOLDER"


def check(
    recipe: Recipe,
    path: str = "recipe",
    samples: int | None = None,
    beside: Path | None = None,
    everything: bool = False,
    progress: "Progress | None" = None,
) -> Checkup:
    """Check everything; nothing is written but what the cache keeps of the data.

    Args:
        recipe: the experiment.
        path: where it comes from, for the findings.
        samples: look at the first so many of each split; all that the run takes when None.
        beside: a folder of recipes; which of them fit this machine is told.
        everything: look at every sample of the data, whatever the recipe's limits.
        progress: called while samples are looked at.
    """
    checkup = Checkup()
    _versions(checkup)
    stream = _data(checkup, recipe)
    lvlm = _model(checkup, recipe)
    lengths: dict[str, tuple[float, int]] = {}
    if stream is not None and lvlm is not None:
        _names(checkup, stream, lvlm)
    if stream is not None:
        inspected = inspect(stream, recipe, lvlm, progress, samples, everything)
        _samples(checkup, recipe, inspected, lvlm is not None)
        lengths = {each.task: each.tokens for each in inspected if each.split == "train"}
        for task in stream.tasks:
            _twice(checkup, task)
    shape = known_shape(recipe, lvlm)
    check_room(checkup, recipe, path, shape, max((longest for _, longest in lengths.values()), default=0))
    if stream is not None:
        check_time(checkup, recipe, stream, shape, lengths)
    if beside is not None:
        check_recipes(checkup, beside)
    return checkup


def _data(checkup: Checkup, recipe: Recipe) -> "Stream | None":
    """Load the stream; and hear what it says of its files."""
    from dymoe.tasks.base import hook

    if findings := hook(recipe.stream, "findings"):
        for row in findings(recipe.task_names(), recipe.instructions, recipe.data):
            checkup.add(*row)
    try:
        stream = recipe.load_stream()
    except DymoeError as error:
        message = str(error)
        if not any(finding.level == "wrong" and finding.result in message for finding in checkup.findings):
            checkup.add("wrong", "records", recipe.stream, message, "mend or fetch what is named (docs/coin.md)")
        return None
    needed = [(task, split) for task in stream.tasks for split in ("train", recipe.evaluation.split)]
    for task, split in [*needed, *((task, recipe.evaluation.split) for task in stream.watch)]:
        if not getattr(task, split):
            checkup.add("wrong", "records", task.name, f"no {split} samples", "choose another split or more data")
    count = sum(len(task.train) + len(task.test) for task in (*stream.tasks, *stream.watch))
    more = f", and {len(stream.watch)} that are only asked" if stream.watch else ""
    checkup.add("fine", "records", recipe.stream, f"{count:,} samples can be read, tasks: {len(stream.tasks)}{more}")
    if stream.skipped:
        first = stream.skipped[0]
        text = f"{len(stream.skipped)} left out, the first: {first['file']}: record {first['record']}: {first['error']}"
        checkup.add("note", "records", recipe.stream, text, "mend them, or leave data.on_bad: skip")
    return stream


def _twice(checkup: Checkup, task: "Task") -> None:
    """Samples that are trained on and asked."""
    same = overlap(task.train, task.test)
    if same:
        first, second = same[0]
        text = f"{len(same)} training questions are asked in the test too, the first: {first!r} and {second!r}"
        checkup.add("wrong", "train in test", task.name, text, "leave them out of the training file")
    test_ids = {sample.id for sample in task.test}
    shared = sum(sample.id in test_ids for sample in task.train)
    if shared:
        checkup.add("note", "ids", task.name, f"{shared} ids stand in training and test; fine if they name two things")


def overlap(train: Sequence["Sample"], test: Sequence["Sample"]) -> list[tuple[str, str]]:
    """(training id, test id) of the samples with the same question about the same picture.

    Pictures are told apart by their paths, or their bytes where a sample has no path; questions of all turns count.
    """
    ids_by_question: dict[bytes, str] = {}
    for sample in test:
        ids_by_question.setdefault(_key(sample, sample.question), sample.id)
    pairs = []
    for sample in train:
        for question in (sample.question, *(question for question, _ in sample.turns)):
            other = ids_by_question.get(_key(sample, question))
            if other is not None:
                pairs.append((sample.id, other))
    return pairs


def _key(sample: "Sample", question: str) -> bytes:
    name = getattr(sample.picture, "name", None)
    picture = name.encode() if isinstance(name, str) else hashlib.sha256(sample.image or b"").digest()
    return hashlib.sha256(picture + b"\0" + question.encode()).digest()


def _model(checkup: Checkup, recipe: Recipe) -> "Lvlm | None":
    """The model's shapes with its own processor; None where the folder is not there or they do not fit."""
    from dymoe.libraries import require_extra
    from dymoe.models.shapes import outline

    needs = {
        "model_options.load_in_4bit": recipe.model_options.load_in_4bit,
        "training.optimizer": recipe.training.optimizer == "paged-adamw",
    }
    for key in (key for key, needed in needs.items() if needed):
        try:
            require_extra("quantization", key)
        except DymoeError as error:
            checkup.add("wrong", "packages", "bitsandbytes", str(error), "pip install dymoe[quantization]")
    try:
        folder = expand(recipe.model)
        if not folder.is_dir() and recipe.model_options.shape != "none":
            raise DymoeError("no such folder")
        lvlm = outline(recipe.model, recipe.model_options)
    except DymoeError as error:
        text = f"{error}; special tokens, token lengths and max_new_tokens were not checked"
        there = expand(recipe.model).is_dir()
        checkup.add("wrong", "model", recipe.model, text, "mend this folder's files" if there else ASSEMBLE)
        return None
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        checkup.add("wrong", "model", recipe.model, "no safetensors in this folder", ASSEMBLE)
    return lvlm


def _names(checkup: Checkup, stream: "Stream", lvlm: "Lvlm") -> None:
    """Every task's name can name a group of this model."""
    try:
        safe_names(stream.names, "task", parts_of(lvlm.model))
    except DymoeError as error:
        checkup.add("wrong", "names", stream.name, str(error), "give the task another name")


def _samples(checkup: Checkup, recipe: Recipe, inspected: "Sequence[Inspection]", read: bool) -> None:
    """What the look at every sample that the run takes says, task by task.

    Args:
        checkup: what is added to.
        recipe: what is done with samples that cannot be used, and the longest that is taken.
        inspected: of all splits.
        read: whether the texts were read by the model's processor.
    """
    skips = recipe.data.on_bad == "skip"
    for each in inspected:
        checkup.unusable += [{"task": each.task, "split": each.split, **asdict(one)} for one in each.unusable]
        for what, kinds in CHECKS.items():
            bad = [one for one in each.unusable if one.kind in kinds]
            if not bad:
                continue
            text = f"{len(bad)} of {each.samples} {each.split} samples, the first: {bad[0]}"
            level: Level = "note" if skips and len(each.unusable) < each.samples else "wrong"
            if what == "answers":
                text += f"; accuracy reaches {each.reachable:.1f} % at most"
                level = "wrong" if each.hopeless else "note"
            checkup.add(level, what, each.task, text, "they are left out" if skips else MENDS[what])
    for task in dict.fromkeys(each.task for each in inspected):
        splits = [each for each in inspected if each.task == task]
        looked = ", ".join(f"{each.samples} {each.split}" for each in splits)
        if not any(one.kind == "picture" for each in splits for one in each.unusable):
            checkup.add("fine", "pictures", task, f"all can be read ({looked} samples looked at)")
        mean, longest = splits[0].tokens
        if read and not any(one.kind == "text" for each in splits for one in each.unusable):
            limit = recipe.model_options.max_length
            checkup.add("fine", "tokens", task, f"mean {mean:.0f}, longest {longest} of {limit} ({looked} samples)")


def _versions(checkup: Checkup) -> None:
    """Installed packages against what dymoe needs."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    from dymoe.learning.conditions import versions

    checkup.machine["versions"] = versions()
    wrong = 0
    for text in requires("dymoe") or []:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(need.name)
        except PackageNotFoundError:
            have = ""
        if not have or not need.specifier.contains(have, prereleases=True):
            wrong += 1
            comparison = f"{have or 'not installed'}, needed is {need.specifier or 'any'}"
            checkup.add("wrong", "packages", need.name, comparison, f"pip install '{need.name}{need.specifier}'")
    if not wrong:
        comparison = ", ".join(f"{name} {value}" for name, value in checkup.machine["versions"].items())
        checkup.add("fine", "packages", "dymoe", comparison)
