"""`joint`: all tasks at once, the upper bound of continual learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dymoe.methods.incmoelora import IncMoELoRA

if TYPE_CHECKING:
    from dymoe.tasks import Task


@dataclass
class Joint(IncMoELoRA):
    """One group of experts, one stage, the shuffled samples and the steps of all tasks together."""

    name: ClassVar[str] = "joint"
    summary: ClassVar[str] = "one group of experts trained on all tasks at once (upper bound)"

    def rounds(self, tasks: Sequence[Task]) -> list[tuple[str, tuple[Task, ...]]]:
        """A single stage that holds every task."""
        return [(self.name, tuple(tasks))]
