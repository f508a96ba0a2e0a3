"""Recipes: one YAML file per experiment, typed, checked in full before any work starts."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dymoe.errors import DymoeError
from dymoe.files import expand
from dymoe.learning.catalog import locate, suggestion
from dymoe.messages import brief, shorten
from dymoe.methods import Composed, Method, plugin_settings, settings_of
from dymoe.methods.base import require
from dymoe.methods.settings import build
from dymoe.models.options import ModelOptions
from dymoe.schema import Count, LesserShare, Positive, Range, Size, Weight, check_fields
from dymoe.tasks.source import Source
from dymoe.yamls import parse_yaml, read_yaml

if TYPE_CHECKING:
    from dymoe.tasks import Stream, Task

MOST_FILES = 50  # that inherit one from another


@dataclass
class Training:
    """How each task is trained; the optimizer is a fresh AdamW per task.

    Attributes:
        steps_per_task: optimizer steps per task; exactly one of this and `epochs`.
        epochs: passes over the task's training samples. A pass ends with a smaller step where its samples do not fill
            the last one; a part of a pass is rounded up to whole steps.
        batch_size: samples per device and forward pass.
        gradient_accumulation: forward passes per optimizer step and device; 1 where `samples_per_step` is given.
        samples_per_step: samples per optimizer step over all devices; the forward passes are worked out from it, so
            that one recipe learns the same on one GPU and on many. None for what `batch_size` and
            `gradient_accumulation` give.
        lr: peak learning rate; 2e-3 suits the pocket model's short tasks (CoIN's 7B recipe has 2e-4).
        scheduler: shape of the learning rate after warmup, one of transformers' names.
        warmup: share of the steps in which the learning rate rises.
        weight_decay: AdamW's weight decay.
        optimizer: ``adamw``, or ``paged-adamw`` of bitsandbytes: the same steps, its state in memory that moves to the
            CPU's when the GPU's is full.
        max_grad_norm: gradients are clipped to this norm; 0 switches clipping off.
        dtype: of the frozen model and of autocast; the experts stay in float32.
        gradient_checkpointing: recompute activations in the backward pass.
        threads: CPU threads of torch, none for torch's own choice.
        workers: processes that read, decode and collate the next batches while one is computed; none for 4 (fewer on
            fewer cores) where a GPU would wait for pictures, 0 where their features are cached or the CPU computes.
        save_steps: optimizer steps between two checkpoints inside a task.
        log_steps: optimizer steps between two lines in events.jsonl.
        dynamics_every: optimizer steps between two lines in a stage's dynamics.jsonl, which say of every layer where
            its tokens were routed (docs/analysis.md); the first and the last step have one too. 0 switches them off.
        report_to: logging integrations of transformers (trackio, tensorboard, wandb).
        limit: at most this many training samples per task, none for all.
    """

    steps_per_task: Size | None = None
    epochs: Positive | None = None
    batch_size: Size = 8
    gradient_accumulation: Size = 1
    samples_per_step: Size | None = None
    lr: Positive = 2e-3
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup: LesserShare = 0.03
    weight_decay: Weight = 0.0
    optimizer: Literal["adamw", "paged-adamw"] = "adamw"
    max_grad_norm: Weight = 1.0
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    gradient_checkpointing: bool = False
    threads: Size | None = None
    workers: Count | None = None
    save_steps: Size = 50
    log_steps: Size = 1
    dynamics_every: Count = 10
    report_to: list[str] = field(default_factory=list)
    limit: Size | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of range and a step budget given twice or not at all."""
        check_fields(self)
        one = (self.steps_per_task is None) != (self.epochs is None)
        require(one, "steps_per_task", "exactly one of steps_per_task and epochs", self.steps_per_task)
        one = self.samples_per_step is None or self.gradient_accumulation == 1
        require(one, "gradient_accumulation", "1 beside samples_per_step", self.gradient_accumulation)

    def accumulation(self, processes: int = 1) -> int:
        """Forward passes per optimizer step and device, with so many devices.

        Raises:
            DymoeError: `samples_per_step` is no multiple of what all devices take at once.
        """
        if self.samples_per_step is None:
            return self.gradient_accumulation
        passes, rest = divmod(self.samples_per_step, self.batch_size * processes)
        if rest or not passes:
            raise DymoeError(
                f"training.samples_per_step: {self.samples_per_step} is no multiple of batch_size {self.batch_size} x "
                f"{processes} {'process' if processes == 1 else 'processes'}; change one of the three"
            )
        return passes

    def samples_of_step(self, processes: int = 1) -> int:
        """Samples per optimizer step over all devices."""
        return self.batch_size * processes * self.accumulation(processes)

    def steps(self, samples: int, tasks: int = 1, processes: int = 1) -> int:
        """Optimizer steps of a stage that learns `tasks` tasks with `samples` samples together, on so many devices."""
        if self.steps_per_task is not None:
            return self.steps_per_task * tasks
        passes, part = divmod(self.epochs or 1.0, 1)
        size = self.samples_of_step(processes)
        return int(passes) * math.ceil(samples / size) + math.ceil(part * samples / size)


@dataclass
class Evaluation:
    """How each stage is evaluated on every task seen so far.

    Attributes:
        batch_size: questions answered together.
        limit: at most this many samples per task, the first ones of the split; none for all.
        split: the samples that are asked; choices are made on validation, results stated on test.
        zero_shot: also evaluate the base model on every task, once, before it learns.
        watch: streams (by name, or the path of a YAML file) that are only asked, never learned: before the first task
            and after every stage, with the same split and limit.
    """

    batch_size: Size = 32
    limit: Size | None = None
    split: Literal["test", "validation"] = "test"
    zero_shot: bool = False
    watch: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse empty batches and limits."""
        check_fields(self)


@dataclass
class Recipe:
    """One experiment, complete: what is learned, by which method, how it is trained and measured.

    Attributes:
        model: ``pocket``, or a folder or Hub id of an image-text model of transformers.
        model_options: how it is loaded: in 4 bits, how long a sequence may be.
        stream: the stream of tasks by name, or the path of a YAML file about your own data.
        data: where the files of a stream that is read from files are, and how they are read.
        order: order of the stream's tasks.
        instructions: which instruction templates the questions carry.
        tasks: only these tasks of the stream, none for all.
        method: the method's name, see ``dymoe list methods``, or a class of your own, ``my_method.py:Mine``.
        settings: the method's own settings, see `dymoe.methods`.
        with_: plugins by name or as classes of your own (``my_plugin.py:Mine``), each with its settings (key
            ``with``; a list of names takes their defaults).
        training: how each task is trained.
        evaluation: how each stage is evaluated.
        seed: of the initial experts, the order of the samples and dropout.
        output: the run's folder.
    """

    model: str = "pocket"
    model_options: ModelOptions = field(default_factory=ModelOptions)
    stream: str = "pocket-coin"
    data: Source = field(default_factory=Source)
    order: Literal["origin", "reverse", "alphabet"] = "origin"
    instructions: Literal["original", "diverse", "10type"] = "original"
    tasks: list[str] | None = None
    method: str = "dymoe"
    settings: dict[str, Any] = field(default_factory=dict)
    with_: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    output: str = ""

    def __post_init__(self) -> None:
        """Refuse an unknown method, an empty choice of tasks and a seed out of range."""
        check_fields(self)
        try:
            settings_of(self.method)
        except DymoeError as error:
            raise DymoeError(f"method: {error}") from None
        require(self.tasks is None or len(self.tasks) > 0, "tasks", "at least one task", self.tasks)

    @property
    def trains(self) -> bool:
        """Whether the method learns anything."""
        return settings_of(self.method).trains

    def build_method(self, where: str = "recipe") -> Method:
        """The method with this recipe's settings and plugins.

        Raises:
            DymoeError: an unknown setting or plugin, or one of a wrong type or range; `where` is named.
        """
        method = build(settings_of(self.method), self.settings, where, "settings.")
        plugins = [
            build(plugin_settings(name, where), settings, where, f"with.{name}.")
            for name, settings in self.with_.items()
        ]
        return Composed(method, plugins) if plugins else method

    def task_names(self) -> tuple[str, ...]:
        """The tasks' names in their order, without loading them.

        Raises:
            DymoeError: as `load_stream`.
        """
        from dymoe.tasks import task_names

        return task_names(self.stream, self.order, self.tasks)

    def load_stream(self) -> "Stream":
        """The recipe's tasks and those that are only asked (`evaluation.watch`), every record checked.

        Raises:
            DymoeError: an unknown stream or task, a file or record that cannot be used (`dymoe.tasks.load_stream`).
        """
        from dymoe.tasks import load_stream

        stream = load_stream(self.stream, self.order, self.instructions, self.tasks, self.seed, self.data)
        watch, skipped = self.load_watch()
        return replace(stream, watch=watch, skipped=(*stream.skipped, *skipped))

    def load_watch(self) -> "tuple[tuple[Task, ...], tuple[Mapping[str, Any], ...]]":
        """The tasks that are only asked, with their original instructions, and their records that were left out.

        Raises:
            DymoeError: as `load_stream`.
        """
        from dymoe.tasks import load_stream

        streams = [load_stream(name, source=self.data) for name in self.evaluation.watch]
        tasks = tuple(task for stream in streams for task in stream.tasks)
        return tasks, tuple(row for stream in streams for row in stream.skipped)

    def watch_names(self) -> tuple[str, ...]:
        """The names of the tasks that are only asked, without loading them.

        Raises:
            DymoeError: as `load_stream`, or one has the name of another or of a task that is learned.
        """
        from dymoe.tasks import task_names

        names = list(self.task_names())
        for stream in self.evaluation.watch:
            try:
                added = task_names(stream)
            except DymoeError as error:
                raise DymoeError(f"evaluation.watch: {error}") from None
            for name in added:
                if name in names:
                    raise DymoeError(
                        f"evaluation.watch: stream {brief(stream)} has a task {name!r} as the run has already; a task "
                        "that is only asked needs a name of its own"
                    )
            names += added
        return tuple(names[len(self.task_names()) :])

    def resolved(self) -> dict[str, Any]:
        """All keys with their values, defaults of method and plugins included; what a run folder keeps.

        The key ``data`` is there only with a stream that is read from files, ``model_options``,
        ``training.optimizer``, ``training.samples_per_step``, ``training.workers`` and ``evaluation.watch`` only where
        they are not the defaults: records of earlier runs lack them.
        """
        from dymoe.tasks import from_files

        method = self.build_method()
        plugins: dict[str, Any] = {}
        if isinstance(method, Composed):
            plugins = {name: asdict(each) for name, each in zip(self.with_, method.plugins, strict=True)}
            method = method.method
        values = {key.removesuffix("_"): value for key, value in asdict(self).items()}
        if not any(map(from_files, (self.stream, *self.evaluation.watch))):
            del values["data"]
        if not self.evaluation.watch:
            del values["evaluation"]["watch"]
        if self.model_options == ModelOptions():
            del values["model_options"]
        if self.training.optimizer == Training(epochs=1).optimizer:
            del values["training"]["optimizer"]
        for key in ("samples_per_step", "workers"):
            if values["training"][key] is None:
                del values["training"][key]
        return {**values, "settings": asdict(method), "with": plugins}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, its base recipes (`inherit`) and the command line's overrides.

    Args:
        path: YAML file, or the name of a recipe that comes with dymoe (``pocket/dymoe``); its key ``inherit`` names a
            recipe beside it, or one that comes with dymoe, whose keys hold unless set here.
        overrides: command-line words, ``--training.lr 1e-3`` or ``--training.lr=1e-3``.

    Raises:
        DymoeError: a missing or unreadable file, an unknown key, a wrong type or range; one line each.
    """
    path = Path(path)
    values = read_keys(path)
    changes = parse_overrides(overrides)
    for key, value in changes.items():
        set_key(values, key, _plugins(value, "command line") if key == "with" else value)
    where = str(path)
    if changes:
        # A mistake on the command line is told as such: the file alone is checked first.
        recipe_of(read_keys(path), where)
        where = "command line"
    recipe = recipe_of(values, where)
    if not recipe.output:
        recipe.output = os.fspath(Path("runs") / f"{path.stem}-seed{recipe.seed}")
    return recipe


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Dotted keys and values of ``--key value`` and ``--key=value`` words; values are read as YAML.

    Args:
        words: the words.

    Raises:
        DymoeError: a word that is no key, a key that is there twice or without a value, a value that is not YAML.
    """
    dotted: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise DymoeError(f"command line: {brief(word)}: expected --key value")
        key, equals, text = word[2:].partition("=")
        if key in dotted:
            raise DymoeError(f"command line: --{shorten(key)}: is there twice")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise DymoeError(f"command line: --{shorten(key)}: expected a value after it")
            text = rest.pop(0)
        dotted[key] = parse_yaml(text, f"command line: --{shorten(key)}: {brief(text)}")
    return dotted


def read_keys(path: Path) -> dict[str, Any]:
    """The keys of a file, or of a recipe that comes with dymoe, over those of the files it inherits from.

    Raises:
        DymoeError: a missing or unreadable file, a circle or an endless row of files; one line.
    """
    path = locate(path)
    chain: list[dict[str, Any]] = []
    visited: set[str] = set()
    while True:
        if not os.path.lexists(path):
            raise DymoeError(f"{path}: no such recipe; {suggestion(path)}")
        values = read_yaml(path)
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise DymoeError(f"{path}: expected a mapping of keys, got {type(values).__name__}")
        if os.path.realpath(path) in visited:
            raise DymoeError(f"{path}: inherit: a recipe cannot inherit from itself")
        visited.add(os.path.realpath(path))
        if "with" in values:
            values["with"] = _plugins(values["with"], str(path))
        base = values.pop("inherit", None)
        chain.append(values)
        if base is None:
            break
        if not isinstance(base, str) or not 0 < len(base) < 256:
            raise DymoeError(f"{path}: inherit: expected the name of a recipe file, got {brief(base)}")
        if len(chain) == MOST_FILES:
            raise DymoeError(f"{path}: inherit: more than {MOST_FILES} recipes inherit one from another")
        path = locate(base, path.parent)
    merged: dict[str, Any] = {}
    for values in reversed(chain):
        merged = _merge(merged, values)
    return merged


def _plugins(value: Any, where: str) -> Any:
    """The key ``with`` as a mapping from name to settings; a list of names has default settings.

    Raises:
        DymoeError: a plugin that is there twice.
    """
    settings_by_name: dict[str, Any] = {}
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, str | dict):
            return value  # no list of names and no mapping: the type check says so
        for name, settings in ({entry: None} if isinstance(entry, str) else entry).items():
            if name in settings_by_name:
                raise DymoeError(f"{where}: with.{shorten(str(name))}: is there twice")
            settings_by_name[name] = {} if settings is None else settings
    return settings_by_name


def _merge(base: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key`, making the mappings on its way."""
    *path, last = key.split(".")
    for part in path:
        inner = values.get(part)
        values[part] = inner if isinstance(inner, dict) else {}
        values = values[part]
    values[last] = value


def recipe_of(values: dict[str, Any], where: str) -> Recipe:
    """The typed recipe of plain values, its method's settings checked as well; `where` is what messages call it.

    Raises:
        DymoeError: an unknown key, a wrong type or range; one line.
    """
    recipe = build(Recipe, values, where)
    recipe.build_method(where)
    try:
        recipe.watch_names()
    except DymoeError as error:
        raise DymoeError(f"{where}: {error}") from None
    # A recipe that names its shape can be planned and dry-run before the model's folder is there.
    if recipe.model_options.shape == "none":
        try:
            require_folder(recipe.model)
        except DymoeError as error:
            raise DymoeError(f"{where}: {error}") from None
    return recipe


def recorded(run: Path) -> Recipe:
    """The recipe of a run folder, as its run.yaml holds it.

    Raises:
        DymoeError: the folder holds no run, or its recipe is none that this version can use.
    """
    marker = run / "run.yaml"
    if not marker.is_file():
        raise DymoeError(f"{run}: no run.yaml here; give a run folder, as `dymoe run` makes it")
    values = read_yaml(marker)
    recipe = values.get("recipe") if isinstance(values, dict) else None
    if not isinstance(recipe, dict):
        raise DymoeError(f"{marker}: has no recipe; this is no run's description")
    return recipe_of(recipe, str(marker))


def require_folder(model: str) -> None:
    """Refuse a model that names a folder which is not there.

    Raises:
        DymoeError: no such folder.
    """
    if model.startswith((".", "/", "~")) and not os.path.isdir(expand(model)):
        raise DymoeError(
            f"model: no such folder {shorten(model)}; give pocket, a folder (dymoe assemble builds LLaVA-1.5, "
            "docs/models.md) or a Hub id"
        )
