"""What a method is: the four choices growth, gate, loss terms and data, and nothing else.

The loop (`dymoe.learning.learner`) and the trainer (`dymoe.learning.trainer`) know only this class. A method
keeps its settings as dataclass fields; what it has to remember between tasks (a Fisher matrix, statistics) it
writes below `Stage.memory` in `after_task` and reads from `Stage.earlier` in `before_task`, so that a
resumed run finds it again. A plugin (`dymoe.methods.plugins`) has the same hooks and changes what a
method chose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from dymoe.errors import DymoeError
from dymoe.messages import brief
from dymoe.schema import LesserShare, Positive, check_fields

if TYPE_CHECKING:
    from torch import Tensor

    from dymoe.adapter import DyMoEConfig
    from dymoe.tasks import Sample, Task

COMPUTE = ("stacked", "reference")  # as dymoe.adapter.config, which would import torch


@dataclass(frozen=True)
class Stage:
    """One round of learning: which tasks it learns and where it may keep what it must remember.

    Attributes:
        index: 1 for the first stage.
        name: the task's name, or the method's when it learns all tasks at once.
        tasks: the tasks learned in this stage, one for every continual method.
        memory: folder of this stage for the method's own files; it exists only once the method makes it.
        earlier: the `memory` folders of the stages before, in order.
        earlier_tasks: the tasks that earlier stages learned, in order; what replay draws from.
        seed: of this stage, the same when a run goes on after a kill.
    """

    index: int
    name: str
    tasks: tuple[Task, ...]
    memory: Path
    earlier: tuple[Path, ...] = ()
    earlier_tasks: tuple[Task, ...] = ()
    seed: int = 0


class StageData(Protocol):
    """What the hooks may do with data; the loop provides it."""

    @property
    def samples(self) -> Sequence[Sample]:
        """What the stage trains on."""
        ...

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        ...

    def batches(
        self, samples: Sequence[Sample] | None = None, batch_size: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Collated batches with labels, in order, on the model's device; the stage's samples when None."""
        ...

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """Mean next-token loss of one batch's answers (scalar), no other terms, under the run's autocast."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's mixed precision."""
        ...


@dataclass(frozen=True)
class Probe:
    """A temporary group that a stage trains before its own, to decide how the bank grows.

    Attributes:
        config: the probe's adapter config.
        samples: what it trains on.
        steps: its optimizer steps.
    """

    config: DyMoEConfig
    samples: Sequence[Sample]
    steps: int


@dataclass
class Method:
    """Base of every method: a LoRA scale, where the experts sit, and the four choices as methods.

    Attributes:
        lora_alpha: alpha of the scale alpha / (experts x rank); 128 gives the scale 2 for a bank of rank 64,
            the fallback of the authors' code as a third-party port reports it.
        lora_dropout: dropout on the experts' input, 0.05 as CoIN trains its LoRA.
        target_modules: names of the linear layers that get experts; none for the seven projections (q, k, v,
            o, gate, up, down) of the language model.
        compute: how the bank is computed, ``stacked`` (dense products) or ``reference`` (a loop over experts).
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    trains: ClassVar[bool] = True  # whether it has stages

    lora_alpha: Positive = 128.0
    lora_dropout: LesserShare = 0.05
    target_modules: list[str] | None = None
    compute: str = "stacked"

    def __post_init__(self) -> None:
        """Refuse settings that no layer can be built from."""
        check_fields(self)
        require(self.target_modules != [], "target_modules", "at least one layer name", self.target_modules)
        require(self.compute in COMPUTE, "compute", f"one of {', '.join(COMPUTE)}", self.compute)

    # growth
    def rounds(self, tasks: Sequence[Task]) -> list[tuple[str, tuple[Task, ...]]]:
        """Name and tasks of every stage; one stage per task unless a method says otherwise."""
        return [(task.name, (task,)) for task in tasks]

    def group(self, stage: Stage) -> str:
        """Name of the expert group that `stage` trains; a name of an earlier stage trains that group on."""
        return stage.name

    # gate
    def config(self, stage: Stage) -> DyMoEConfig:
        """The adapter config of the group that `stage` adds: its experts, their gate, its routing terms."""
        raise NotImplementedError

    def group_config(self, num_experts: int, rank: int, **choices: Any) -> DyMoEConfig:
        """A group's config with the method's scale, dropout, layers and way to compute; what is not chosen is off.

        Args:
            num_experts: experts of the group.
            rank: rank of each.
            choices: further fields of `DyMoEConfig`; guidance and the routing terms are off unless they stand here.
        """
        from dymoe.adapter import DyMoEConfig

        settings = {key: getattr(self, key) for key in ("lora_alpha", "lora_dropout", "target_modules", "compute")}
        off = {"guidance": "none", "load_balance": 0.0, "exclusivity": 0.0, "specialization": 0.0}
        return DyMoEConfig(num_experts=num_experts, r=rank, **{**settings, **off, **choices})

    def probe(self, stage: Stage, data: StageData) -> Probe | None:
        """A temporary group to train first, all others frozen; None for none."""
        return None

    def probed(self, model: Any, group: str, stage: Stage, data: StageData) -> None:
        """Hook after the probe `group` has trained, before it is deleted and `config` is asked."""

    # loss terms
    def before_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Hook before a stage trains; `model` already holds the group that will train.

        It also runs when a killed stage goes on, before its checkpoint is loaded.
        """

    def loss_terms(self, model: Any, batch: Mapping[str, Any], outputs: Any) -> dict[str, Tensor]:
        """Model-level terms added to the next-token loss of one batch, weights applied; name -> scalar.

        `outputs.logits` are those of the last positions only (see `learning.loss.answer_logits`); `batch` holds
        the labels.
        """
        return {}

    def before_step(self, model: Any) -> None:
        """Hook after the gradients of a step are complete and clipped, before the optimizer uses them."""

    def after_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Hook after a stage has trained, before its group is frozen, saved and evaluated."""

    def state_size(self, trainable: int, inputs: Sequence[int]) -> int:
        """How many numbers in float32 the method holds besides the groups, from the second task on (for budgets).

        Args:
            trainable: parameters that train.
            inputs: width of each input of a wrapped linear; linears with the same input have it once.
        """
        return 0

    def brings(self, hook: str) -> bool:
        """Whether the method, or a plugin with it, has a hook of its own: how training is spread depends on it."""
        return getattr(type(self), hook) is not getattr(Method, hook)

    # data
    def training_samples(self, stage: Stage) -> Sequence[Sample]:
        """The samples that `stage` trains on; those that are on disk stay there."""
        from dymoe.tasks.lazy import joined

        return joined([task.train for task in stage.tasks])


def require(holds: bool, key: str, expected: str, value: Any) -> None:
    """Raise the one-line error of a setting out of range unless `holds`.

    Raises:
        DymoeError: naming `key`, what was expected and the value given.
    """
    if not holds:
        raise DymoeError(f"{key}: expected {expected}, got {brief(value)}")
