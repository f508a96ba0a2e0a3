"""Ways to compute the bank: y = sum_e w_e scale_e B_e A_e x.

`reference` is the oracle, `stacked` the default, `triton` fused kernels for GPUs.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from dymoe.adapter.ops.block import ExpertBlock
from dymoe.adapter.ops.reference import reference
from dymoe.adapter.ops.stacked import stacked
from dymoe.adapter.ops.triton import triton

BankOp = Callable[[Tensor, Tensor, Sequence[ExpertBlock]], Tensor]
OPS: dict[str, BankOp] = {"reference": reference, "stacked": stacked, "triton": triton}

__all__ = ["OPS", "BankOp", "ExpertBlock", "reference", "stacked", "triton"]
