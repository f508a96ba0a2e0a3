"""Everything that can be checked before a run begins: data, lengths, disk, memory, time, versions."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dymoe.errors import DymoeError
from dymoe.files import expand
from dymoe.learning.capacity import fits, holds, known_shape, times
from dymoe.learning.findings import Checkup, Level
from dymoe.learning.recipe import Recipe
from dymoe.names import parts_of, safe_names

if TYPE_CHECKING:
    from dymoe.lvlm import Lvlm
    from dymoe.tasks import Sample, Stream, Task

ASSEMBLE = "dymoe assemble builds it (docs/models.md); or give --model FOLDER"


def check(recipe: Recipe, path: str = "recipe", samples: int | None = 64, beside: Path | None = None) -> Checkup:
    """Check everything; nothing is written but the data's index in the cache.

    Args:
        recipe: the experiment.
        path: where it comes from, for the findings.
        samples: pictures and token lengths looked at per task and split, drawn at random (the longest texts besides);
            None for all.
        beside: a folder of recipes; which of them fit this machine is told.
    """
    found = Checkup()
    _versions(found)
    stream = _data(found, recipe)
    if stream is not None:
        for task in stream.tasks:
            _pictures(found, task, samples)
            _twice(found, task)
    lvlm = _model(found, recipe)
    lengths: dict[str, tuple[float, int]] = {}
    if stream is not None and lvlm is not None:
        _names(found, stream, lvlm)
        lengths = {task.name: _tokens(found, recipe, lvlm, task, samples) for task in stream.tasks}
    shape = known_shape(recipe, lvlm)
    holds(found, recipe, path, shape, max((longest for _, longest in lengths.values()), default=0))
    if stream is not None:
        times(found, recipe, stream, shape, lengths)
    if beside is not None:
        fits(found, beside)
    return found


def _data(found: Checkup, recipe: Recipe) -> "Stream | None":
    """Load the stream; for CoIN also look at its indexes."""
    if recipe.stream == "coin":
        _coin(found, recipe)
    try:
        stream = recipe.load_stream()
    except DymoeError as error:
        said = str(error)
        if not any(finding.level == "wrong" and finding.found in said for finding in found.findings):
            found.add("wrong", "records", recipe.stream, said, "mend or fetch what is named (docs/coin.md)")
        return None
    for task in stream.tasks:
        for split in ("train", recipe.evaluation.split):
            if not getattr(task, split):
                found.add("wrong", "records", task.name, f"no {split} samples", "choose another split or more data")
    count = sum(len(task.train) + len(task.test) for task in stream.tasks)
    found.add("fine", "records", recipe.stream, f"{count:,} samples can be read, tasks: {len(stream.tasks)}")
    if stream.skipped:
        first = stream.skipped[0]
        told = f"{len(stream.skipped)} left out, the first: {first['file']}: record {first['record']}: {first['error']}"
        found.add("note", "records", recipe.stream, told, "mend them, or leave data.on_bad: skip")
    return stream


def _coin(found: Checkup, recipe: Recipe) -> None:
    """Sizes, repeated ids and bad records of CoIN's files."""
    from dymoe.tasks.coin import check as coin
    from dymoe.tasks.coin.layout import find
    from dymoe.tasks.coin.stream import indexes

    names = recipe.task_names()
    try:
        layout = find(recipe.data, recipe.instructions, names)
    except DymoeError as error:
        found.add("wrong", "folders", "data.root", str(error), "give --data.root FOLDER (docs/coin.md)")
        return
    found.add("fine", "folders", str(layout.instructions), f"layout {layout.variant}, pictures in {layout.images}")
    compared = recipe.data.scoring == "coin"
    for name in names:
        try:
            both = indexes(layout, name, recipe.data)
        except DymoeError as error:
            found.add("wrong", "records", name, str(error), "fetch the file, or leave the task out with --tasks")
            continue
        for size in coin.sizes(both):
            if not size.right:
                told = f"{size.found:,} {size.what} records, {size.published:,} are published"
                mend = "fetch the published files; with data.scoring: corrected other sizes are a note"
                found.add("wrong" if compared else "note", "size", name, told, mend)
        for each in (both.train, both.test):
            if each.bad:
                first = each.bad[0]
                told = f"{len(each.bad)} cannot be used, the first: record {first['record']}: {first['error']}"
                level: Level = "wrong" if recipe.data.on_bad == "error" else "note"
                found.add(level, "records", str(each.path), told, "mend them; data.on_bad: skip leaves them out")
            if each.repeated_ids:
                found.add("note", "ids", str(each.path), f"{each.repeated_ids} ids are there more than once")


def _pictures(found: Checkup, task: "Task", samples: int | None) -> None:
    """Every picture is there and can be decoded."""
    from dymoe.lvlm.images import decode
    from dymoe.tasks.coin.check import broken_images

    looked = 0
    broken = []
    for split in ("train", "validation", "test"):
        part = getattr(task, split)
        looked += len(part) if samples is None else min(samples, len(part))
        broken += list(broken_images(part, samples, decode=decode))
    if broken:
        name, why = broken[0]
        told = f"{len(broken)} of {looked} cannot be read, the first: sample {name!r}: {why}"
        found.add("wrong", "pictures", task.name, told, "fetch these files again")
    else:
        found.add("fine", "pictures", task.name, f"{looked} of {looked} looked at can be read")


def _twice(found: Checkup, task: "Task") -> None:
    """Samples that are trained on and asked."""
    from dymoe.tasks.coin.check import overlap

    same = overlap(task.train, task.test)
    if same:
        first, second = same[0]
        told = f"{len(same)} training questions are asked in the test too, the first: {first!r} and {second!r}"
        found.add("wrong", "train in test", task.name, told, "leave them out of the training file")
    asked = {sample.id for sample in task.test}
    shared = sum(sample.id in asked for sample in task.train)
    if shared:
        found.add("note", "ids", task.name, f"{shared} ids stand in training and test; fine if they name two things")


def _model(found: Checkup, recipe: Recipe) -> "Lvlm | None":
    """The model's shapes with its own processor; None where the folder is not there."""
    from dymoe.lvlm import Lvlm, load
    from dymoe.lvlm.model import require_bitsandbytes
    from dymoe.lvlm.shapes import config_of, meta_model, processor_of

    asked = {
        "model_options.load_in_4bit": recipe.model_options.load_in_4bit,
        "training.optimizer": recipe.training.optimizer == "paged-adamw",
    }
    for key in (key for key, wanted in asked.items() if wanted):
        try:
            require_bitsandbytes(key)
        except DymoeError as error:
            found.add("wrong", "packages", "bitsandbytes", str(error), "pip install bitsandbytes")
    try:
        if recipe.model == "pocket":
            return load("pocket", recipe.training.dtype)
        folder = expand(recipe.model)
        if not folder.is_dir() and recipe.model_options.shape != "none":
            found.add("wrong", "model", recipe.model, "no such folder; token lengths are not checked", ASSEMBLE)
            return None
        config = config_of(recipe.model, recipe.model_options)
        made = Lvlm(meta_model(config), processor_of(recipe.model, config))
    except (DymoeError, OSError, ValueError) as error:
        found.add("wrong", "model", recipe.model, str(error).splitlines()[0], ASSEMBLE)
        return None
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        found.add("wrong", "model", recipe.model, "no safetensors in this folder", ASSEMBLE)
    return made


def _names(found: Checkup, stream: "Stream", lvlm: "Lvlm") -> None:
    """Every task's name can name a group of this model."""
    try:
        safe_names(stream.names, "task", parts_of(lvlm.model))
    except DymoeError as error:
        found.add("wrong", "names", stream.name, str(error), "give the task another name")


def _tokens(found: Checkup, recipe: Recipe, lvlm: "Lvlm", task: "Task", samples: int | None) -> tuple[float, int]:
    """(mean, longest) tokens of training samples; too long ones and ones without a loss are wrong."""
    from dymoe.lvlm import Collator

    collator = Collator(lvlm, max_length=recipe.model_options.max_length)
    chosen = _drawn(task.train, samples)
    drawn = len(chosen)
    if samples is not None:
        chosen = [*chosen, *_longest(task.train, max(samples // 4, 1))]
    lengths, refused, masked = [], [], []
    for place, sample in enumerate(chosen):
        try:
            batch = collator([sample])
        except DymoeError as error:
            refused.append(str(error))
            continue
        if not bool((batch["labels"] != -100).any()):
            masked.append(sample.id)
        lengths.append((int(batch["input_ids"].shape[1]), place < drawn))
    if refused:
        told = f"{len(refused)} of {len(chosen)} cannot be trained on, the first: {refused[0]}"
        found.add("wrong", "tokens", task.name, told, "shorten or leave out these records; model_options.max_length")
    if masked:
        told = f"{len(masked)} of {len(chosen)} have no token that is learned, the first: {masked[0]!r}"
        found.add("wrong", "loss", task.name, told, "give these records an answer")
    longest = max((length for length, _ in lengths), default=0)
    typical = [length for length, random_one in lengths if random_one] or [0]
    mean = sum(typical) / len(typical)
    if lengths and not refused:
        limit = recipe.model_options.max_length
        found.add(
            "fine", "tokens", task.name, f"mean {mean:.0f}, longest {longest} of {limit} ({len(lengths)} looked at)"
        )
    return mean, longest


def _drawn(samples: "Sequence[Sample]", count: int | None) -> "list[Sample]":
    if count is None or count >= len(samples):
        return list(samples)
    return [samples[place] for place in sorted(random.Random(0).sample(range(len(samples)), count))]


def _longest(samples: "Sequence[Sample]", count: int) -> "list[Sample]":
    """The samples with the most text."""
    from dymoe.tasks.coin.check import longest
    from dymoe.tasks.lazy import Records

    if isinstance(samples, Records):
        return longest(samples, count)
    return sorted(samples, key=lambda sample: -len(sample.question) - len(sample.answer))[:count]


def _versions(found: Checkup) -> None:
    """Installed packages against what dymoe needs."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    from dymoe.learning.results import versions

    found.machine["versions"] = versions()
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
            told = f"{have or 'not installed'}, needed is {need.specifier or 'any'}"
            found.add("wrong", "packages", need.name, told, f"pip install '{need.name}{need.specifier}'")
    if not wrong:
        told = ", ".join(f"{name} {value}" for name, value in found.machine["versions"].items())
        found.add("fine", "packages", "dymoe", told)
