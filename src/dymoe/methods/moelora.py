"""`moelora`: one bank of LoRA experts under a linear router, trained on through all tasks (CoIN's baseline)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dymoe.methods.base import Method, Stage
from dymoe.schema import Positive, Size, Weight

if TYPE_CHECKING:
    from dymoe.adapter import DyMoEConfig

GROUP = "shared"


@dataclass
class MoELoRA(Method):
    """MoELoRA as CoIN trains it: y = W0 x + scale * sum_e softmax(R x)_e B_e A_e x, nothing protected.

    Growth: one group at the first task, trained on afterwards. Gate: a linear router without bias per projection,
    softmax over all experts, temperature 1. Loss terms: none; CoIN's code states no load balance.

    The defaults are those of CoIN's code: 8 experts that share a total rank of 128 (rank 16 each), alpha 256, scale
    256 / 128 = 2. The pocket recipe has rank 8 (total 64) and alpha 128, also scale 2, so that every method of the
    pocket stream has a bank of the same size. A starts Kaiming-uniform as in all methods here (CoIN draws it from
    N(0, 0.01)); B starts at 0 in both.

    Attributes:
        num_experts: experts of the bank (8, CoIN's).
        rank: rank of each expert (16, CoIN's total of 128 over 8 experts).
        lora_alpha: alpha of the scale alpha / (experts x rank) (256, CoIN's).
        load_balance: weight of a load-balance term over all experts (`dymoe.routing.load_balance_loss`); 0 as in
            CoIN, where none is stated.
    """

    name: ClassVar[str] = "moelora"
    summary: ClassVar[str] = "one bank of experts under a linear router, fine-tuned on every task in turn"

    num_experts: Size = 8
    rank: Size = 16
    lora_alpha: Positive = 256.0
    load_balance: Weight = 0.0

    def group(self, stage: Stage) -> str:
        """The same group at every stage."""
        return GROUP

    def config(self, stage: Stage) -> DyMoEConfig:
        """A bank under a dense linear router."""
        return self.group_config(
            self.num_experts,
            self.rank,
            top_k=self.num_experts,
            temperature=1.0,
            gate="linear",
            load_balance=self.load_balance,
        )
