"""`lora`: one LoRA, trained on through all tasks; what forgets most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dymoe.methods.base import Method, Stage
from dymoe.schema import Size

if TYPE_CHECKING:
    from dymoe.adapter import DyMoEConfig


@dataclass
class LoRA(Method):
    """Sequential fine-tuning of a single LoRA.

    Growth: one group of one expert at the first task, trained on afterwards. Gate: always 1.

    Attributes:
        rank: rank of the LoRA; 64 is that of one task's bank of 16 experts of rank 4.
    """

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "one LoRA, fine-tuned on every task in turn"

    rank: Size = 64

    def group(self, stage: Stage) -> str:
        """The same group at every stage."""
        return "shared"

    def config(self, stage: Stage) -> DyMoEConfig:
        """One expert of full rank whose weight is 1 for every token."""
        return self.group_config(1, self.rank, top_k=1, gate="uniform")
