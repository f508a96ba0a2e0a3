"""`incmoelora`: a group of LoRA experts per task, routed freely; the baseline that DyMoE corrects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dymoe.methods.base import Method, Stage
from dymoe.routing_settings import Routing
from dymoe.schema import Positive, Size

if TYPE_CHECKING:
    from dymoe.adapter import DyMoEConfig


@dataclass
class IncMoELoRA(Method):
    """Every task adds a group of experts and router rows, the older ones are frozen.

    Growth: one group a task. Gate: softmax over the top-k cosine scores of all groups. No guidance, no terms.

    Attributes:
        num_experts: experts that a task adds (16, the paper's).
        rank: rank of each expert (4, the paper's).
        top_k: experts that a token uses, over all groups; this and all settings of the router here and in `dymoe` have
            default, range and source from `dymoe.routing_settings.Routing`.
        temperature: temperature of the routing softmax.
    """

    name: ClassVar[str] = "incmoelora"
    summary: ClassVar[str] = "a group of experts per task, routed without guidance"

    num_experts: Size = 16
    rank: Size = 4
    top_k: Size = Routing.top_k
    temperature: Positive = Routing.temperature

    def config(self, stage: Stage) -> DyMoEConfig:
        """The group's config with every routing term switched off."""
        choices = {"top_k": self.top_k, "temperature": self.temperature}
        return self.group_config(self.num_experts, self.rank, gate="cosine", **choices)
