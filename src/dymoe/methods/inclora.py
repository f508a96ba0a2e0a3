"""`inclora`: a new LoRA for every task, the older ones frozen and summed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dymoe.methods.base import Stage
from dymoe.methods.lora import LoRA
from dymoe.schema import Positive, Size


@dataclass
class IncLoRA(LoRA):
    """Incremental LoRA: y = W0 x + sum over tasks of (alpha / rank) B_t A_t x.

    Growth: one group of one expert a task. Gate: always 1, for the frozen ones too.

    Attributes:
        rank: rank of each task's LoRA; 8 gives 64 over eight tasks, as Prism's CoIN settings split it.
        lora_alpha: 16, so that the scale alpha / rank is 2 as in CoIN's recipe (and Prism's 128 for a total of 64);
            a change of `rank` alone changes the scale.
    """

    name: ClassVar[str] = "inclora"
    summary: ClassVar[str] = "a new LoRA per task, the older ones frozen and summed"

    rank: Size = 8
    lora_alpha: Positive = 16.0

    def group(self, stage: Stage) -> str:
        """A group of the stage's own."""
        return stage.name
