"""`zero-shot`: the base model, never trained; the lower bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dymoe.methods.base import Method

if TYPE_CHECKING:
    from dymoe.tasks import Task


@dataclass
class ZeroShot(Method):
    """No stage, no group: the base model answers every task once."""

    name: ClassVar[str] = "zero-shot"
    summary: ClassVar[str] = "the base model as it is, never trained (lower bound)"
    trains: ClassVar[bool] = False

    def rounds(self, tasks: Sequence[Task]) -> list[tuple[str, tuple[Task, ...]]]:
        """No stage: nothing is learned."""
        return []
