"""Ways to compute the bank: y = sum_e w_e scale_e B_e A_e x.

`reference` is the oracle, `stacked` the default, `triton` kernels for GPUs, `auto` takes them where they run.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from dymoe.adapter.ops.block import ExpertBlock
from dymoe.adapter.ops.candidates import Candidates, Rule
from dymoe.adapter.ops.fused import Bank, fused
from dymoe.adapter.ops.reference import reference
from dymoe.adapter.ops.stacked import stacked
from dymoe.adapter.ops.triton import auto, triton

BankOp = Callable[[Tensor, Tensor, Sequence[ExpertBlock], int | None], Tensor]
OPS: dict[str, BankOp] = {"reference": reference, "stacked": stacked, "triton": triton, "auto": auto}

__all__ = [
    "OPS",
    "Bank",
    "BankOp",
    "Candidates",
    "ExpertBlock",
    "Rule",
    "auto",
    "fused",
    "reference",
    "stacked",
    "triton",
]
