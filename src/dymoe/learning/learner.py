"""The loop over a stream: learn a task, freeze its group, ask every task seen so far, write it down."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dymoe.errors import DymoeError
from dymoe.learning import clock
from dymoe.learning.checkpoints import last_checkpoint, remove_checkpoints
from dymoe.learning.data import Data
from dymoe.learning.distributed import Processes
from dymoe.learning.folder import RunFolder, StageFolder
from dymoe.learning.formats import Trained
from dymoe.learning.progress import Display
from dymoe.learning.recipe import Recipe
from dymoe.learning.results import routing_over_steps, write_results
from dymoe.libraries import quiet
from dymoe.methods import Method, Stage
from dymoe.names import free_name, parts_of, safe_names

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import TrainerCallback

    from dymoe.models import Lvlm
    from dymoe.tasks import Sample, Stream, Task


@dataclass(frozen=True)
class Substitute:
    """What a run is given in place of what its recipe names; a dry run makes both.

    Attributes:
        stream: the tasks.
        lvlm: the model, on the CPU or where it is to be.
        pictures: how many pictures the recipe's own stream has, so that features are cached here if they are there.
    """

    stream: "Stream"
    lvlm: "Lvlm"
    pictures: int


class Learner:
    """One run at work: the model with the groups learned so far, and where everything is written.

    Loads the base model and the groups that earlier stages trained. `collator` makes the batches to train on,
    `evaluation_collator` the prompts of an evaluation.

    Args:
        recipe: what is learned and how.
        method: of the recipe, with its plugins.
        stream: the tasks.
        folder: the run's.
        stages: folders of all stages.
        display: where progress is shown.
        processes: who takes part.
        substitute: stream and model in place of the recipe's.
        revision: commit of a base model of the Hub.

    Raises:
        DymoeError: the model cannot be loaded, a task has a name that it cannot take, or a saved group is not the one
            that was saved.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        stream: "Stream",
        folder: RunFolder,
        stages: list[StageFolder],
        display: Display,
        processes: Processes,
        substitute: Substitute | None = None,
        revision: str | None = None,
    ) -> None:
        from dymoe.models import Collator, cached_features

        self.recipe, self.method, self.stream = recipe, method, stream
        self.folder, self.stages = folder, stages
        self.display, self.processes = display, processes
        self.revision = revision
        self.model: PeftModel | None = None
        if processes.wrapped:
            display.note(f"{processes.count} processes, {processes.strategy}")
        display.note(f"loading the model {recipe.model}")
        self.lvlm = base_model(recipe, revision) if substitute is None else _placed(substitute.lvlm)
        safe_names(stream.names, f"task of stream {stream.name!r}", parts_of(self.lvlm.model))
        pictures = sum(len(task.train) + len(task.validation) + len(task.test) for task in stream.tasks)
        pictures = pictures if substitute is None else substitute.pictures
        cache = cached_features(self.lvlm)
        # Training meets its pictures in random order: a cache that does not hold all would seldom hold the next.
        self.features = cache if cache and cache.holds(pictures) else None
        self.collator, self.evaluation_collator = (
            Collator(self.lvlm, features, recipe.model_options.max_length) for features in (self.features, cache)
        )
        self._load_groups(self._trained())

    def _trained(self) -> list[tuple[int, Trained]]:
        """Position and record of every stage whose group is saved, as process 0 finds them."""
        stages = enumerate(self.stages)
        return self.processes.from_main(lambda: [(number, stage.record) for number, stage in stages if stage.trained])

    def _load_groups(self, trained: Sequence[tuple[int, Trained]]) -> None:
        """Load every trained group; one that several stages trained on as the last of them left it."""
        from dymoe.learning.groups import hashes, load_group

        last = {record["group"]: (self.stages[number], record) for number, record in trained}
        for group, (stage, record) in last.items():
            self.model = load_group(self.lvlm.model, self.model, group, stage.adapter)
            if hashes(self.model)[group] != record["hashes"][group]:
                raise DymoeError(f"{stage.adapter}: expert group {group!r} is not the one saved (hash differs)")

    def learn(self, rounds: "Sequence[tuple[str, tuple[Task, ...]]]") -> None:
        """Go through the stages; finished ones are passed over."""
        before = self.stream.tasks if not rounds or self.recipe.evaluation.zero_shot else ()
        if (before or self.stream.watch) and self.model is None:
            self.display.note("asking the model before it learns")
            folder = self.folder.zero_shot
            seconds = self._evaluate(before, folder)
            if self.processes.main:
                folder.mark_done(seconds)
        learned: list[Task] = []
        for index, (name, tasks) in enumerate(rounds, start=1):
            folder = self.stages[index - 1]
            earlier = tuple(stage.memory for stage in self.stages[: index - 1])
            stage = Stage(index, name, tasks, folder.memory, earlier, tuple(learned), self._seed(index))
            learned += tasks
            if self.processes.from_main(lambda folder=folder: folder.done is None):  # type: ignore[misc]
                self.display.stage(index, name)
                self._stage(stage, folder, learned)

    def _stage(self, stage: Stage, folder: StageFolder, learned: "Sequence[Task]") -> None:
        """Train the stage's group unless it was, evaluate, mark the stage done."""
        if not self.processes.from_main(lambda: folder.trained):
            self._train(stage, folder)
        seconds = self._evaluate(learned, folder)
        if not self.processes.main:
            return
        self.folder.event("stage", stage=stage.index, task=stage.name, scores=folder.scores)
        folder.mark_done(seconds)
        write_results(self.folder, self.recipe, self.stream.names, self.stages)
        remove_checkpoints(folder.trainer)

    def _train(self, stage: Stage, folder: StageFolder) -> None:
        """Train the stage's group, check that the frozen ones did not change, save it with its record.

        Raises:
            DymoeError: a frozen group changed, or the group cannot be written.
        """
        from transformers import set_seed

        from dymoe.learning.groups import hashes, train_group, trainable_parameters

        group = self.method.group(stage)
        before = {name: value for name, value in hashes(self.model).items() if name != group}
        samples = self.method.training_samples(stage)
        data = self._data(samples, self.recipe.training.steps(len(samples), len(stage.tasks), self.processes.count))
        self._probe(stage, folder, data)
        set_seed(stage.seed)
        self.model = train_group(self.lvlm.model, self.model, group, self.method.config(stage))
        parameters = trainable_parameters(self.model)
        started = clock.seconds()
        self.method.before_task(self.model, stage, data)
        hooks = clock.seconds() - started
        self._see(data.samples)
        record = self._fit(group, stage, data, self.method, folder.trainer, folder.dynamics)
        logs = record.pop("logs")
        record.update(training=routing_over_steps(logs), logged=len(logs))
        if self.processes.main:
            record["trainable_parameters"] = parameters
            record["seconds"]["method"] = hooks
            self._conclude(group, stage, folder, data, before, record)
        self._share()

    def _conclude(
        self,
        group: str,
        stage: Stage,
        folder: StageFolder,
        data: Data,
        before: dict[str, str],
        record: dict[str, Any],
    ) -> None:
        """Let the method finish the trained group; freeze, check and save it. Process 0 alone does this."""
        from dymoe.learning.groups import freeze_all, hashes, save_group, stored_parameters

        assert self.model is not None
        started = clock.seconds()
        self.method.after_task(self.model, stage, data)
        record["seconds"]["method"] = round(record["seconds"]["method"] + clock.seconds() - started, 1)
        freeze_all(self.model)
        after = hashes(self.model)
        changed = [name for name, value in before.items() if after.get(name) != value]
        if changed:
            raise DymoeError(f"stage {stage.index} {stage.name!r}: frozen expert groups changed: {changed}")
        proof = {"hashes_before": before, "hashes": after}
        sizes = {"stored_parameters": stored_parameters(self.model)}
        save_group(self.model, group, folder.adapter)
        folder.mark_trained({"group": group, **sizes, **record, **proof})

    def _share(self) -> None:
        """Wait until process 0 has saved the group; the other processes load it from there."""
        if not self.processes.wrapped:
            return
        trained = self._trained()
        if not self.processes.main:
            self._load_groups(trained)

    def _seed(self, index: int) -> int:
        """A seed of its own for every stage, the same when the run goes on after a kill."""
        return (1000 * self.recipe.seed + index) % 2**32

    def _data(self, samples: "Sequence[Sample]", steps: int) -> Data:
        """Samples to train on as the method's hooks see them, for so many optimizer steps."""
        return Data(samples, self.collator, self._see, self.recipe.training, cast(Any, self.lvlm.model).device, steps)

    def _probe(self, stage: Stage, folder: StageFolder, data: Data) -> None:
        """Train the method's temporary group, if it wants one and has not looked at it yet, and delete it."""
        from transformers import set_seed

        from dymoe.learning.groups import delete_group, train_group

        if self.processes.from_main(lambda: folder.probed is not None):
            if self.processes.main:
                remove_checkpoints(folder.probe)  # what a kill right after the marker left
            return
        probe = self.method.probe(stage, data)
        if probe is None:
            return
        name = free_name("probe", self.stream.names)
        set_seed(stage.seed)
        self.display.note(f"probing where {stage.name} needs experts")
        self.model = train_group(self.lvlm.model, self.model, name, probe.config)
        self._see(probe.samples)
        record = self._fit(name, stage, self._data(probe.samples, probe.steps), Method(), folder.probe)
        del record["logs"]
        if self.processes.main:
            self.method.probed(self.model, name, stage, data)
            self.model = delete_group(self.model, name)
            folder.write("probed.json", record)
            remove_checkpoints(folder.probe)
        self._share()

    def _fit(
        self, group: str, stage: Stage, data: Data, method: Method, root: Path, dynamics: Path | None = None
    ) -> dict[str, Any]:
        """The trainer's work, from the last complete checkpoint in `root` if there is one.

        Args:
            group: what trains; the model holds it.
            stage: of which it is the group, or the probe.
            data: what it trains on, and for how many steps.
            method: whose loss terms and hooks count.
            root: folder of the checkpoints.
            dynamics: where routing by layer is written down; None for a probe, a temporary group.

        Raises:
            DymoeError: the group begins otherwise in another process, or a frozen group changed.
        """
        import torch

        from dymoe.adapter import group_hash
        from dymoe.learning.callbacks import Watch
        from dymoe.learning.dynamics import Dynamics
        from dymoe.learning.groups import trace_of
        from dymoe.learning.sampler import workers_for
        from dymoe.learning.trainer import StageTrainer, training_arguments

        assert self.model is not None
        model, training, processes = self.model, self.recipe.training, self.processes
        if processes.wrapped:
            processes.same(f"the beginning of expert group {group!r}", group_hash(model, group))
        watch = Watch(self.folder, self.display, stage, "probe-step" if dynamics is None else "step")
        checkpoint, done = self._checkpoint(stage, data.steps, root, watch.kind, dynamics)
        workers = workers_for(training.workers, self.features is not None, processes.count)
        arguments = training_arguments(training, root, stage.seed, data.steps, processes.count, workers)
        callbacks: list[TrainerCallback] = [watch]
        if dynamics is not None:
            callbacks.append(Dynamics(dynamics, training.dynamics_every, trace_of(model), processes))
        name = f"task {stage.name!r}{' (probe)' if dynamics is None else ''}"
        trainer = StageTrainer(model, group, method, data.samples, self.collator, arguments, callbacks, processes, name)
        if processes.rank:
            torch.manual_seed(stage.seed + 1_000_003 * processes.rank)  # dropout of its own
        started = clock.seconds()
        try:
            output = trainer.train(resume_from_checkpoint=checkpoint)
            logs = [row for row in trainer.state.log_history if "loss" in row]
            weights = trainer.weights(every=True) if processes.wrapped else {}
        finally:
            trainer.close()
        seconds = round(clock.seconds() - started, 1)
        if processes.wrapped:
            config = model.peft_config[group]
            del model, trainer
            self._renew(group, config, weights)
        return {"steps": output.global_step, "seconds": {"train": seconds}, "resumed_at": done, "logs": logs}

    def _checkpoint(
        self, stage: Stage, steps: int, root: Path, kind: str, dynamics: Path | None
    ) -> tuple[str | None, int]:
        """The last complete checkpoint in `root` and its step, None and 0 if there is none.

        Process 0 removes the other checkpoints, and what the logs say of later steps, which are done again.
        """
        from dymoe.learning.dynamics import rewind

        checkpoint = self.processes.from_main(lambda: last_checkpoint(root, self.display.note))
        done = int(checkpoint.name.split("-")[1]) if checkpoint else 0
        if done:
            self.display.note(f"{stage.name}: goes on after step {done} of {steps}")
        if self.processes.main:
            remove_checkpoints(root, keep=checkpoint)
            self.folder.rewind_events(stage.index, done, kind)
            if dynamics is not None:
                rewind(dynamics, done)
        return str(checkpoint) if checkpoint else None, done

    def _renew(self, group: str, config: "PeftConfig", weights: "dict[str, Tensor]") -> None:
        """Load the base model again: what the launcher's strategy wrapped or cut up cannot be put back.

        Process 0 gets the groups saved so far and the one just trained, which the method may still change; the others
        get theirs when that is saved (`_share`).

        Args:
            group: the group that was trained.
            config: its config.
            weights: the tensors of all groups after training, by their names in the model.

        Raises:
            DymoeError: a frozen group was changed by the training.
        """
        import torch

        from dymoe.learning.groups import train_group

        trained = self._trained()
        self.model = None
        self.lvlm.model = cast(Any, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.processes.strategy == "deepspeed":
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()  # or ZeRO-3 would cut the model up while it is loaded
        self.lvlm.model = base_model(self.recipe, self.revision).model
        if not self.processes.main:
            return
        self._load_groups(trained)
        self.model = train_group(self.lvlm.model, self.model, group, cast(Any, config))
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.copy_(weights[name])
            elif name in weights and not torch.equal(parameter.cpu(), weights[name]):
                raise DymoeError(f"a frozen expert group changed while {group!r} was trained: {name}")

    def _see(self, samples: "Sequence[Sample]") -> None:
        """Compute the image features of `samples` that are not there yet."""
        # A tower in training mode would normalise by the batch and change its running statistics.
        self.lvlm.model.eval()
        if self.features is not None:
            self.features.add_samples(samples)

    def _evaluate(self, tasks: "Sequence[Task]", folder: StageFolder) -> float:
        """Ask `tasks` and those that are only asked, keep the answers an interrupted run already gave.

        Returns the seconds it took.
        """
        started = clock.seconds()
        for part, part_folder in ((tasks, folder), (self.stream.watch, folder.watch)):
            answered = self.processes.from_main(part_folder.intact)
            for task in part:
                if task.name not in answered:
                    self._evaluate_task(task, part_folder, measure_loss=part_folder is not folder)
        return round(clock.seconds() - started, 1)

    def _evaluate_task(self, task: "Task", folder: StageFolder, measure_loss: bool) -> None:
        """Ask one task; its score is written last and says that the rest is there."""
        from dymoe.evaluation.generate import evaluate, evaluated

        options, part = self.recipe.evaluation, (self.processes.rank, self.processes.count)
        samples = evaluated(task, options.split, options.limit)
        result = evaluate(
            self.lvlm,
            self.evaluation_collator,
            task,
            peft_model=self.model,
            split=options.split,
            limit=options.limit,
            batch_size=options.batch_size,
            dtype=self.recipe.training.dtype,
            progress=lambda done: self.display.evaluating(task.name, done, len(samples)),
            part=part,
            gather=self.processes.gather,
        )
        if measure_loss:
            result = replace(result, measures={"loss": self._answer_loss(samples), **result.measures})
        if self.processes.main:
            folder.add_score(result)

    def _answer_loss(self, samples: "Sequence[Sample]") -> float:
        """Mean loss of the right answers' tokens, in nats per token; the processes share the batches."""
        import torch

        from dymoe.evaluation.generate import batches

        model = self.lvlm.model if self.model is None else self.model
        device = cast(Any, self.lvlm.model).device
        data = Data(samples, self.evaluation_collator, lambda count: None, self.recipe.training, device, 0)
        part = (self.processes.rank, self.processes.count)
        total, tokens = 0.0, 0
        model.eval()
        for rows in batches(self.evaluation_collator.lengths(samples), self.recipe.evaluation.batch_size, part):
            batch = next(data.batches([samples[row] for row in rows], len(rows)))
            learned = int((batch["labels"][:, 1:] != -100).sum())
            with torch.inference_mode():
                total += float(data.loss(model, batch)) * learned
            tokens += learned
        gathered = self.processes.gather((total, tokens))
        return sum(total for total, _ in gathered) / sum(tokens for _, tokens in gathered)


def base_model(recipe: Recipe, revision: str | None = None) -> "Lvlm":
    """The recipe's base model where a run has it; of the Hub, at a commit."""
    from dymoe.models import load

    with quiet():
        return _placed(load(recipe.model, recipe.training.dtype, options=recipe.model_options, revision=revision))


def _placed(lvlm: "Lvlm") -> "Lvlm":
    """The model on this process's GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        cast(Any, lvlm.model).to("cuda")
    return lvlm
