"""`incmoelora`: a group of LoRA experts per task, routed freely; the baseline that DyMoE corrects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dymoe.methods.base import Method, Stage, require

if TYPE_CHECKING:
    from dymoe.adapter import DyMoEConfig


@dataclass
class IncMoELoRA(Method):
    """Every task adds a group of experts and router rows, the older ones are frozen.

    Growth: one group a task. Gate: softmax over the top-k cosine scores of all groups. No guidance, no terms.

    Attributes:
        num_experts: experts that a task adds (16, the paper's).
        rank: rank of each expert (4, the paper's).
        top_k: experts that a token uses, over all groups (16, the paper's).
        temperature: temperature of the routing softmax (0.01, reported of the authors' code).
    """

    name: ClassVar[str] = "incmoelora"
    summary: ClassVar[str] = "a group of experts per task, routed without guidance"

    num_experts: int = 16
    rank: int = 4
    top_k: int = 16
    temperature: float = 0.01

    def __post_init__(self) -> None:
        """Refuse an empty bank and a temperature that is not positive."""
        super().__post_init__()
        for key in ("num_experts", "rank", "top_k"):
            require(getattr(self, key) >= 1, key, "1 or more", getattr(self, key))
        require(self.temperature > 0, "temperature", "a number above 0", self.temperature)

    def config(self, stage: Stage) -> DyMoEConfig:
        """The group's config with every routing term switched off."""
        choices = {"top_k": self.top_k, "temperature": self.temperature}
        return self.group_config(self.num_experts, self.rank, gate="cosine", **choices)
