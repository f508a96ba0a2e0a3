"""The bank and the cosine gate by Triton kernels, for GPUs. Nothing here imports Triton before a kernel is launched."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dymoe.adapter.ops.block import ExpertBlock
from dymoe.adapter.ops.stacked import stacked
from dymoe.adapter.ops.triton.bank import triton
from dymoe.adapter.ops.triton.launch import DTYPES, missing

__all__ = ["auto", "missing", "suits", "triton"]


def suits(x: Tensor) -> bool:
    """Whether `auto` takes Triton: the input on a GPU, in 16 or 32 bits, Triton installed, not under torch.compile."""
    if not x.is_cuda or x.dtype not in DTYPES or torch.compiler.is_compiling():
        return False
    return missing(x.device) is None


def auto(x: Tensor, weights: Tensor, blocks: Sequence[ExpertBlock], top_k: int | None = None) -> Tensor:
    """`triton` where it `suits`, else `stacked`. Arguments and result as for `triton`."""
    return triton(x, weights, blocks, top_k) if suits(x) else stacked(x, weights, blocks)
