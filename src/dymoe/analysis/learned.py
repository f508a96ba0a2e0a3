"""A run opened for looking at: its model with all groups, any stage of it, its samples, one forward pass observed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import PeftModel

from dymoe.adapter import DyMoEConfig, LayerRouting
from dymoe.adapter.observation import observe
from dymoe.errors import DymoeError
from dymoe.evaluation.generate import autocast, batches, evaluated, to_device
from dymoe.files import read_json
from dymoe.learning import conditions, inspection
from dymoe.learning.folder import StageFolder
from dymoe.learning.formats import Saved
from dymoe.learning.groups import WEIGHTS, hashes, load_group, read_tensors, set_group, trace_of
from dymoe.learning.learner import base_model
from dymoe.learning.recipe import Recipe, recorded
from dymoe.models import Collator, Lvlm, cached_features
from dymoe.models.identity import identity
from dymoe.tasks import Sample, Task

Observer = Callable[[LayerRouting], None]
Tell = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True)
class LearnedStage:
    """One stage whose group is saved.

    Attributes:
        index: counted from 1.
        name: of the stage.
        tasks: what it learned.
        group: the group that it trained.
        adapter: the group's folder.
    """

    index: int
    name: str
    tasks: tuple[Task, ...]
    group: str
    adapter: Path


@dataclass
class Learned:
    """A run's model with the groups of all its trained stages.

    Groups are separate, so any stage is the first groups of the same model (`activate`). A group that several stages
    trained on is kept on disk as each of them left it, and read again when the stage changes.

    Attributes:
        path: the run folder.
        recipe: what ran.
        stages: the trained stages in order, at least one.
        lvlm: the base model, wrapped.
        model: PEFT's model, frozen, in evaluation mode.
        collator: makes the batches.
    """

    path: Path
    recipe: Recipe
    stages: tuple[LearnedStage, ...]
    lvlm: Lvlm
    model: PeftModel
    collator: Collator
    _loaded: dict[str, int] = field(default_factory=dict)

    @property
    def tasks(self) -> dict[str, tuple[Task, LearnedStage]]:
        """Name -> the task and the stage that learned it, in learned order."""
        return {task.name: (task, stage) for stage in self.stages for task in stage.tasks}

    def chosen_tasks(self, names: Sequence[str] | None) -> list[tuple[Task, LearnedStage]]:
        """These tasks, all when None.

        Raises:
            DymoeError: the run has not learned such a task.
        """
        known = self.tasks
        for name in names or ():
            if name not in known:
                raise DymoeError(f"{self.path}: task {name!r} was not learned here; there is {', '.join(known)}")
        return [entry for name, entry in known.items() if names is None or name in names]

    def chosen_stages(self, numbers: Sequence[int] | None) -> list[int]:
        """These stages, all when None.

        Raises:
            DymoeError: the run has no such trained stage.
        """
        last = len(self.stages)
        for number in numbers or ():
            if not 1 <= number <= last:
                raise DymoeError(f"{self.path}: stage {number}: the run has stages 1 to {last} so far")
        return list(range(1, last + 1)) if numbers is None else sorted(set(numbers))

    def groups(self, stage: int) -> tuple[str, ...]:
        """The groups of a stage in the order of their columns."""
        return tuple(dict.fromkeys(one.group for one in self.stages[:stage]))

    def activate(self, stage: int) -> tuple[str, ...]:
        """Let the model be as `stage` (from 1) left it; returns `groups(stage)`."""
        for one in self.stages[:stage]:
            newest = max(other.index for other in self.stages[:stage] if other.group == one.group)
            if self._loaded[one.group] != newest:
                file = self.stages[newest - 1].adapter / WEIGHTS
                set_group(self.model, one.group, read_tensors(file), str(file))
                self._loaded[one.group] = newest
        groups = self.groups(stage)
        tuner: Any = self.model.base_model
        if tuple(tuner.stage) != groups:
            tuner.set_adapter(list(groups))
        return groups

    def samples(self, task: Task, limit: int | None) -> Sequence[Sample]:
        """The samples that the run itself was asked, or the first `limit` of their split."""
        options = self.recipe.evaluation
        return evaluated(task, options.split, options.limit if limit is None else limit)

    def batches(
        self, task: Task, limit: int | None, tell: Tell | None = None, what: str = ""
    ) -> Iterator[dict[str, Any]]:
        """Prompts of `samples` with their reference answers, samples of like length together.

        `tell` is called after each batch, with `what` (the task's name if empty).
        """
        device = cast(Any, self.lvlm.model).device
        samples, done = self.samples(task, limit), 0
        for indices in batches(self.collator.lengths(samples), self.recipe.evaluation.batch_size):
            part = [samples[index] for index in indices]
            self.collator.see(part)
            yield to_device(self.collator(part), device)
            done += len(part)
            if tell:
                tell(what or task.name, done, len(samples))

    def observe(self, batch: dict[str, Any], observer: Observer) -> None:
        """One forward pass over a batch, the routing of every layer handed to `observer`."""
        look(self.model, batch, observer, self.recipe.training.dtype)

    def require_routing(self) -> None:
        """Refuse a run whose experts all have weight 1.

        Raises:
            DymoeError: its method routes nothing.
        """
        config = next(iter(self.model.peft_config.values()))
        assert isinstance(config, DyMoEConfig)
        if config.weights_depend_on == "nothing":
            raise DymoeError(
                f"{self.path}: method {self.recipe.method} routes nothing (each of its experts has weight 1 for every "
                "token); give a run of a method with a gate, such as dymoe or incmoelora"
            )


def look(model: PeftModel, batch: dict[str, Any], observer: Observer, dtype: str = "bfloat16") -> None:
    """One forward pass over a batch, the routing of every layer handed to `observer`; the trace is as it was after it.

    Args:
        model: with its groups.
        batch: what a collator makes, with or without `labels`, on the model's device.
        observer: called once per wrapped layer that has experts.
        dtype: of autocast, as in training.
    """
    with trace_of(model).aside():
        observe(model, [batch], observer, autocast=lambda: autocast(batch["input_ids"].device.type, dtype))


def open_run(run: "str | Path | Learned") -> Learned:
    """Load a run: its recipe, its samples, the base model and the groups of every trained stage.

    Args:
        run: a run folder, finished or not; a run that is open already is returned as it is.

    Raises:
        DymoeError: it is no run folder, no stage has trained yet, the run has no experts, its base model has changed,
            or a group is not the one that was saved.
    """
    if isinstance(run, Learned):
        return run
    path = Path(run)
    recipe = recorded(path)
    stream = inspection.load(recipe) if recipe.data.on_bad == "skip" else recipe.load_stream()
    rounds = recipe.build_method().rounds(stream.tasks)
    if not rounds:
        raise DymoeError(f"{path}: method {recipe.method} has no experts, so there is no routing to look at")
    stages, expected = [], {}
    for index, (name, tasks) in enumerate(rounds, start=1):
        folder = StageFolder(path / "stages" / f"{index:02d}-{name}")
        if not folder.trained:
            break
        record = read_json(folder.path / "training.json", Saved)
        stages.append(LearnedStage(index, name, tasks, record["group"], folder.adapter))
        expected[record["group"]] = record["hashes"][record["group"]]
    if not stages:
        raise DymoeError(f"{path}: no stage of this run has trained yet; let `dymoe run` finish its first task")
    base = conditions.read(path)["base"]
    if identity(recipe.model, revision=base.get("commit")) != base:
        raise DymoeError(f"{path}: its base model {recipe.model} has changed since; put back what the run learned on")
    lvlm = base_model(recipe, base.get("commit"))
    model: PeftModel | None = None
    last = {stage.group: stage for stage in stages}
    for group, stage in last.items():
        model = load_group(lvlm.model, model, group, stage.adapter)
    assert model is not None
    for group, value in hashes(model).items():
        if value != expected[group]:
            raise DymoeError(f"{last[group].adapter}: expert group {group!r} is not the one saved (hash differs)")
    collator = Collator(lvlm, cached_features(lvlm), recipe.model_options.max_length)
    loaded = {group: stage.index for group, stage in last.items()}
    return Learned(path, recipe, tuple(stages), lvlm, model, collator, loaded)
