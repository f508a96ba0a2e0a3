"""Ways to compute the bank: y = sum_e w_e scale_e B_e A_e x. `reference` is the oracle, `stacked` the default."""

from collections.abc import Callable, Sequence

from torch import Tensor

from dymoe.adapter.ops.block import ExpertBlock
from dymoe.adapter.ops.candidates import Candidates, Rule
from dymoe.adapter.ops.fused import Bank, fused
from dymoe.adapter.ops.reference import reference
from dymoe.adapter.ops.stacked import stacked

BankOp = Callable[[Tensor, Tensor, Sequence[ExpertBlock]], Tensor]
OPS: dict[str, BankOp] = {"reference": reference, "stacked": stacked}

__all__ = ["OPS", "Bank", "BankOp", "Candidates", "ExpertBlock", "Rule", "fused", "reference", "stacked"]
