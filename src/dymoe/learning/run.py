"""The loop over a stream: learn a task, freeze its group, ask every task seen so far, write it down."""

import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dymoe.errors import DymoeError
from dymoe.files import atomic_json
from dymoe.learning.data import Data
from dymoe.learning.folder import RunFolder, StageFolder
from dymoe.learning.progress import Display
from dymoe.learning.recipe import Recipe
from dymoe.learning.results import data_description, shown_samples, versions, write_results
from dymoe.methods import Method, Stage

if TYPE_CHECKING:
    from peft import PeftModel

    from dymoe.lvlm import Collator, ImageFeatures, Lvlm
    from dymoe.tasks import Sample, Stream, Task


def run(recipe: Recipe, resume: bool = False, display: Display | None = None) -> Path:
    """Learn the recipe's stream and return the run's folder.

    Args:
        recipe: the experiment.
        resume: go on with the folder of a run that was interrupted, from its last complete checkpoint.
        display: where progress is shown; made for standard error when None.

    Raises:
        DymoeError: a bad task, sample or folder, a full disk, a frozen group that changed; what is finished
            stays.
    """
    from dymoe.tasks import load_stream

    method = recipe.build_method()
    whole = load_stream(recipe.stream, recipe.order, recipe.instructions, recipe.tasks, recipe.seed)
    stream = checked(whole, recipe)
    rounds = method.rounds(stream.tasks)
    description = {"recipe": recipe.resolved(), "data": data_description(stream), "versions": versions()}
    folder = RunFolder(Path(recipe.output), description, resume)
    try:
        folder.clear_partial()
        stages = [folder.stage(index, name) for index, (name, _) in enumerate(rounds, start=1)]
        atomic_json(folder.path / "samples.json", shown_samples(stream.tasks, recipe.evaluation.split))
        with display or Display(f"{recipe.method} on {recipe.stream}", len(rounds)) as shown:
            asked = stages or [StageFolder(folder.path / "zero-shot")]
            if any(stage.done is None for stage in asked):
                learner = _Learner.load(recipe, method, stream, folder, stages, shown)
                learner.learn(rounds)
            shown.finish()
        write_results(folder, recipe, stream.names, stages)
    finally:
        folder.close()
    return folder.path


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


@dataclass
class _Learner:
    """One run at work: the model with the groups learned so far, and where everything is written."""

    recipe: Recipe
    method: Method
    stream: "Stream"
    folder: RunFolder
    stages: list[StageFolder]
    display: Display
    lvlm: "Lvlm"
    collator: "Collator"
    features: "ImageFeatures | None"
    model: "PeftModel | None" = None

    @classmethod
    def load(
        cls,
        recipe: Recipe,
        method: Method,
        stream: "Stream",
        folder: RunFolder,
        stages: list[StageFolder],
        display: Display,
    ) -> "_Learner":
        """Load the base model and the groups that earlier stages trained."""
        import torch

        from dymoe.lvlm import Collator, ImageFeatures, load

        _quiet()
        if recipe.training.threads is not None:
            torch.set_num_threads(recipe.training.threads)
        display.note(f"loading the model {recipe.model}")
        lvlm = load(recipe.model, recipe.training.dtype)
        if torch.cuda.is_available():
            cast(Any, lvlm.model).to("cuda")
        features = ImageFeatures(lvlm) if _takes_features(lvlm.model) else None
        collator = Collator(lvlm, features)
        learner = cls(recipe, method, stream, folder, stages, display, lvlm, collator, features)
        learner._load_groups()
        return learner

    def _load_groups(self) -> None:
        """Load every trained group; one that several stages trained on as the last of them left it."""
        from dymoe.learning.groups import hashes, load_group

        trained = [(stage, stage.read("training.json")) for stage in self.stages if stage.trained]
        for group, (stage, record) in {record["group"]: (stage, record) for stage, record in trained}.items():
            self.model = load_group(self.lvlm.model, self.model, group, stage.adapter)
            if hashes(self.model)[group] != record["hashes"][group]:
                raise DymoeError(f"{stage.adapter}: expert group {group!r} is not the one saved (hash differs)")

    def learn(self, rounds: "Sequence[tuple[str, tuple[Task, ...]]]") -> None:
        """Go through the stages; finished ones are passed over."""
        if not rounds or (self.recipe.evaluation.zero_shot and self.model is None):
            self.display.note("asking the model before it learns")
            folder = StageFolder(self.folder.path / "zero-shot")
            folder.write("done.json", {"seconds": {"evaluate": self._evaluate(self.stream.tasks, folder)}})
        learned: list[Task] = []
        for index, (name, tasks) in enumerate(rounds, start=1):
            folder = self.stages[index - 1]
            earlier = tuple(stage.memory for stage in self.stages[: index - 1])
            stage = Stage(index, name, tasks, folder.memory, earlier, tuple(learned), self._seed(index))
            learned += tasks
            if folder.done is None:
                self.display.stage(index, name)
                self._stage(stage, folder, learned)

    def _stage(self, stage: Stage, folder: StageFolder, learned: "Sequence[Task]") -> None:
        """Train the stage's group unless it was, evaluate, mark the stage done."""
        if not folder.trained:
            self._train(stage, folder)
        seconds = self._evaluate(learned, folder)
        record = folder.read("training.json")
        record["seconds"]["evaluate"] = seconds
        self.folder.event("stage", stage=stage.index, task=stage.name, scores=folder.read("scores.json"))
        folder.write("done.json", record)
        write_results(self.folder, self.recipe, self.stream.names, self.stages)
        shutil.rmtree(folder.trainer, ignore_errors=True)

    def _train(self, stage: Stage, folder: StageFolder) -> None:
        """Train the stage's group, check that the frozen ones did not change, save it with its record.

        Raises:
            DymoeError: a frozen group changed, or the group cannot be written.
        """
        from transformers import set_seed

        from dymoe.learning.groups import (
            freeze_all,
            hashes,
            save_group,
            stored_parameters,
            train_group,
            trainable_parameters,
        )

        group = self.method.group(stage)
        before = {name: value for name, value in hashes(self.model).items() if name != group}
        data = self._data(stage)
        self._probe(stage, folder, data)
        set_seed(stage.seed)
        self.model = train_group(self.lvlm.model, self.model, group, self.method.config(stage))
        parameters = trainable_parameters(self.model)
        started = time.perf_counter()
        self.method.before_task(self.model, stage, data)
        hooks = time.perf_counter() - started
        self._see(data.samples)
        record = self._fit(self.model, group, stage, data.samples, data.steps, folder.trainer, self.method)
        started = time.perf_counter()
        self.method.after_task(self.model, stage, data)
        record["seconds"]["method"] = round(hooks + time.perf_counter() - started, 1)
        freeze_all(self.model)
        after = hashes(self.model)
        changed = [name for name, value in before.items() if after.get(name) != value]
        if changed:
            raise DymoeError(f"stage {stage.index} {stage.name!r}: frozen expert groups changed: {changed}")
        proof = {"hashes_before": before, "hashes": after}
        sizes = {"trainable_parameters": parameters, "stored_parameters": stored_parameters(self.model)}
        folder.write("training.json", {"group": group, **sizes, **record, **proof})
        save_group(self.model, group, folder.adapter)

    def _seed(self, index: int) -> int:
        """A seed of its own for every stage, the same when the run goes on after a kill."""
        return (1000 * self.recipe.seed + index) % 2**32

    def _data(self, stage: Stage) -> Data:
        """The stage's samples, batches and budget."""
        training = self.recipe.training
        samples = self.method.training_samples(stage)
        if training.steps_per_task is not None:
            steps = training.steps_per_task * len(stage.tasks)
        else:
            rows = training.batch_size * training.gradient_accumulation
            steps = math.ceil(len(samples) * (training.epochs or 1.0) / rows)
        device = cast(Any, self.lvlm.model).device
        return Data(samples, self.collator, self._see, training, device, steps)

    def _probe(self, stage: Stage, folder: StageFolder, data: Data) -> None:
        """Train the method's temporary group, if it wants one and has not looked at it yet, and delete it."""
        from transformers import set_seed

        from dymoe.learning.groups import delete_group, train_group

        marker, place = folder.path / "probed.json", folder.path / "probe"
        if marker.is_file():
            shutil.rmtree(place, ignore_errors=True)  # what a kill right after the marker left
            return
        probe = self.method.probe(stage, data)
        if probe is None:
            return
        name = "probe"
        set_seed(stage.seed)
        self.display.note(f"probing where {stage.name} needs experts")
        self.model = train_group(self.lvlm.model, self.model, name, probe.config)
        self._see(probe.samples)
        record = self._fit(self.model, name, stage, probe.samples, probe.steps, place, Method())
        self.method.probed(self.model, name, stage, data)
        self.model = delete_group(self.model, name)
        atomic_json(marker, record)
        shutil.rmtree(place, ignore_errors=True)

    def _fit(
        self,
        model: "PeftModel",
        group: str,
        stage: Stage,
        samples: "Sequence[Sample]",
        steps: int,
        place: Path,
        method: Method,
    ) -> dict[str, Any]:
        """The trainer's work, from the last complete checkpoint in `place` if there is one."""
        from dymoe.learning.trainer import StageTrainer, last_checkpoint, training_arguments
        from dymoe.learning.watch import Watch

        checkpoint = last_checkpoint(place)
        for rest in place.glob("checkpoint-*"):
            if rest != checkpoint:
                shutil.rmtree(rest)
        done = int(checkpoint.name.split("-")[1]) if checkpoint else 0
        arguments = training_arguments(self.recipe.training, place, stage.seed, steps)
        watch = Watch(self.folder, self.display, stage, group)
        self.folder.rewind_events(stage.index, done, watch.kind)
        trainer = StageTrainer(model, group, method, samples, self.collator, arguments, [watch])
        started = time.perf_counter()
        try:
            output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            trainer.close()
        seconds = round(time.perf_counter() - started, 1)
        return {"steps": output.global_step, "seconds": {"train": seconds}, "resumed_at": done}

    def _see(self, samples: "Sequence[Sample]") -> None:
        """Compute the image features of `samples` that are not there yet."""
        # A tower in training mode would normalise by the batch and change its running statistics.
        self.lvlm.model.eval()
        if self.features is not None:
            self.features.add_samples(samples)

    def _evaluate(self, tasks: "Sequence[Task]", folder: StageFolder) -> float:
        """Ask `tasks`, keep the answers an interrupted run already gave. Returns the seconds it took."""
        started = time.perf_counter()
        scores, routing = folder.read("scores.json"), folder.read("routing.json")
        for task in tasks:
            if task.name not in scores:
                self._evaluate_task(task, folder, scores, routing)
        return round(time.perf_counter() - started, 1)

    def _evaluate_task(
        self, task: "Task", folder: StageFolder, scores: dict[str, Any], routing: dict[str, Any]
    ) -> None:
        """Ask one task; its score is written last and says that the rest is there."""
        from dymoe.evaluation.generate import evaluate, evaluated

        options = self.recipe.evaluation
        samples = evaluated(task, options.split, options.limit)
        self._see(samples)
        result = evaluate(
            self.lvlm,
            self.collator,
            task,
            peft_model=self.model,
            split=options.split,
            limit=options.limit,
            batch_size=options.batch_size,
            dtype=self.recipe.training.dtype,
            progress=lambda done: self.display.evaluating(task.name, done, len(samples)),
        )
        folder.write_predictions(task.name, result.records())
        if result.groups:
            by_layer = {str(layer): row for layer, row in (result.by_layer or {}).items()}
            row = {"weight": list(result.weight), "by_layer": by_layer}
            routing.update(groups=list(result.groups), tasks={**routing.get("tasks", {}), task.name: row})
            folder.write("routing.json", routing)
        count = len(result.predictions)
        scores[task.name] = {"strict": result.strict, "lenient": result.lenient, "samples": count}
        folder.write("scores.json", scores)


def _takes_features(model: Any) -> bool:
    """Whether the model's forward takes image features that were computed before."""
    import inspect

    return "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters


def _quiet() -> None:
    """Silence the progress bars and notes of the libraries below; what went wrong comes as an exception."""
    import warnings

    from transformers.utils import logging as transformers_logging

    # PEFT still asks transformers for names that version 6 will drop.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
