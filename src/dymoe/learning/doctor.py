"""Everything that can be checked before a run begins: data, lengths, disk, memory, time, versions."""

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dymoe.errors import DymoeError
from dymoe.files import free_space
from dymoe.learning.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from dymoe.learning.budget import Shape
    from dymoe.lvlm import Lvlm
    from dymoe.tasks import Sample, Stream, Task

Level = Literal["wrong", "note", "fine"]
ASSEMBLE = "dymoe assemble builds it (docs/models.md); or give --model FOLDER"
SPARE = 2e9  # bytes of a device that torch, its kernels and fragmentation take beside the arithmetic
# Share of the machine's matrix speed that training reaches; LLaVA-like runs are reported between 0.3 and 0.5.
EFFICIENCY = 0.4


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        level: ``wrong`` (the run would fail or mislead), ``note`` or ``fine``.
        what: what was checked.
        where: task, file or recipe.
        found: what was found.
        mend: what to do about it.
    """

    level: Level
    what: str
    where: str
    found: str
    mend: str = ""


@dataclass
class Checkup:
    """All findings, what each task takes, which recipes fit.

    Attributes:
        findings: in the order of the checks.
        tasks: task, training records, tokens of a sample (mean, longest), estimated hours.
        fits: recipe, bytes at its peak, whether this machine holds them.
        machine: device, its bytes, versions.
    """

    findings: list[Finding] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    fits: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def wrong(self) -> int:
        """How many findings are wrong."""
        return sum(finding.level == "wrong" for finding in self.findings)

    def add(self, level: Level, what: str, where: str, found: str, mend: str = "") -> None:
        """One more finding."""
        self.findings.append(Finding(level, what, where, found, mend))

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "wrong": self.wrong}


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
        lengths = {task.name: _tokens(found, recipe, lvlm, task, samples) for task in stream.tasks}
    shape = _shape(recipe, lvlm)
    _machine(found, recipe, path, shape, max((longest for _, longest in lengths.values()), default=0))
    if stream is not None:
        _times(found, recipe, stream, shape, lengths)
    if beside is not None:
        _fits(found, beside)
    return found


# --- data ------------------------------------------------------------------------------------------------------


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
    found.add("fine", "records", recipe.stream, f"{count:,} samples of {len(stream.tasks)} tasks can be read")
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


# --- model and lengths -----------------------------------------------------------------------------------------


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
        folder = Path(recipe.model).expanduser()
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


# --- the machine -----------------------------------------------------------------------------------------------


def _shape(recipe: Recipe, lvlm: "Lvlm | None") -> "Shape | None":
    from dymoe.learning.budget import shape_of
    from dymoe.lvlm.shapes import config_of, meta_model

    try:
        return shape_of(lvlm.model if lvlm is not None else meta_model(config_of(recipe.model, recipe.model_options)))
    except (DymoeError, AttributeError):
        return None


def device() -> tuple[str, float]:
    """This machine's device and its bytes: the GPU's, else main memory's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), float(torch.cuda.get_device_properties(0).total_memory)
    return "CPU", float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _machine(found: Checkup, recipe: Recipe, path: str, shape: "Shape | None", longest: int) -> None:
    """Memory and disk."""
    from dymoe.learning.budget import memory

    name, size = device()
    found.machine |= {"device": name, "bytes": size}
    if name == "CPU":
        found.add("note", "device", name, "no GPU: the run would compute on the CPU")
    if shape is None:
        found.add("note", "memory", path, "not estimated: the model's shapes are not known here")
        return
    stages = len(recipe.task_names())
    budget = memory(recipe, shape, stages, longest or None)
    told = f"{budget.peak / 1e9:.1f} GB at the last task of {stages}, {name} has {size / 1e9:.1f} GB"
    if budget.peak + SPARE > size:
        mend = "a smaller training.batch_size, training.gradient_checkpointing, model_options.load_in_4bit"
        found.add("wrong", "memory", path, told, f"{mend} (docs/memory.md)")
    else:
        found.add("fine", "memory", path, told)
    # The groups of all stages, and two checkpoints of the group that trains with its optimizer state.
    needed = 4 * budget.stored + 2 * 12 * budget.trainable
    place, free = free_space(recipe.output or ".")
    told = f"{needed / 1e9:.1f} GB are written, {free / 1e9:.1f} GB are free"
    if needed > free:
        found.add("wrong", "disk", str(place), told, "make room, or give --output on another disk")
    else:
        found.add("fine", "disk", str(place), told)


def speed(dtype: str) -> float:
    """Floating-point operations a second in products of square matrices on this machine's device."""
    import time

    import torch

    gpu = torch.cuda.is_available()
    side, place = (8192, "cuda") if gpu else (512, "cpu")
    one = torch.ones(side, side, dtype=getattr(torch, dtype), device=place)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        one @ one
        if gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * side**3 / max(best, 1e-9)


def _times(
    found: Checkup, recipe: Recipe, stream: "Stream", shape: "Shape | None", lengths: dict[str, tuple[float, int]]
) -> None:
    """What each task takes on this machine."""
    from dymoe.learning.budget import memory, operations

    fast = speed(recipe.training.dtype)
    found.machine["operations_per_second"] = fast
    training = recipe.training
    for number, task in enumerate(stream.tasks, start=1):
        mean, longest = lengths.get(task.name, (0.0, 0))
        row: dict[str, Any] = {"task": task.name, "train": len(task.train), "test": len(task.test)}
        row |= {"tokens_mean": round(mean, 1), "tokens_longest": longest, "hours": None}
        if shape is not None and mean and recipe.method != "zero-shot":
            steps = training.steps_per_task
            # Not whole steps: the last one of an epoch takes the samples that are left.
            samples = min(len(task.train), training.limit or len(task.train)) * (training.epochs or 1.0)
            seen = steps * training.samples_of_step() if steps is not None else samples
            stored = memory(recipe, shape, number).stored
            work = operations(shape, stored, seen * mean, training.gradient_checkpointing)
            row["hours"] = work / (EFFICIENCY * fast) / 3600
        found.tasks.append(row)
    hours = [row["hours"] for row in found.tasks if row["hours"] is not None]
    if hours:
        told = f"about {sum(hours):,.1f} hours of training on one such device"
        found.add("note", "time", recipe.stream, told, "dymoe run RECIPE --dry-run measures it")


def _fits(found: Checkup, beside: Path) -> None:
    """Which recipes of a folder fit this machine."""
    from dymoe.learning.budget import memory
    from dymoe.learning.sweep import is_sweep

    _, size = device()
    shapes: dict[str, Any] = {}
    for file in sorted(beside.rglob("*.yaml")):
        if is_sweep(file):
            continue
        try:
            recipe = load_recipe(file)
            key = json.dumps([recipe.model, recipe.model_options.shape])
            if key not in shapes:
                shapes[key] = _shape(recipe, None)
            if shapes[key] is None:
                continue
            peak = memory(recipe, shapes[key], len(recipe.task_names())).peak
        except DymoeError:
            continue
        found.fits.append({"recipe": str(file), "bytes": peak, "fits": peak + SPARE <= size})


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


# --- telling ---------------------------------------------------------------------------------------------------


def tables(found: Checkup) -> Iterator[Any]:
    """What was found, for a terminal: findings, tasks, recipes."""
    from rich.markup import escape
    from rich.table import Table

    def made(title: str, *heads: str) -> Table:
        table = Table(title=title)
        for head in heads:
            table.add_column(head, overflow="fold")
        return table

    colours = {"wrong": "red", "note": "yellow", "fine": "green"}
    first = made("What was checked", "", "what", "where", "found", "how to mend it")
    order: Callable[[Finding], int] = lambda finding: list(colours).index(finding.level)  # noqa: E731
    for finding in sorted(found.findings, key=order):
        words = (escape(word) for word in (finding.what, finding.where, finding.found, finding.mend))
        first.add_row(f"[{colours[finding.level]}]{finding.level}[/]", *words)
    yield first
    if found.tasks:
        second = made("Tasks", "task", "train", "test", "tokens, mean", "longest", "hours")
        for row in found.tasks:
            hours = "-" if row["hours"] is None else f"{row['hours']:,.2f}"
            counts = (f"{row['train']:,}", f"{row['test']:,}", f"{row['tokens_mean']:.0f}", str(row["tokens_longest"]))
            second.add_row(row["task"], *counts, hours)
        yield second
    if found.fits:
        third = made(f"Recipes on {found.machine['device']}", "recipe", "GB", "fits")
        for row in found.fits:
            third.add_row(escape(row["recipe"]), f"{row['bytes'] / 1e9:.1f}", "yes" if row["fits"] else "no")
        yield third
