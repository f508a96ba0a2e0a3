"""The bank and the cosine gate by Triton kernels, for GPUs. Nothing here imports Triton before a kernel is launched."""

from dymoe.adapter.ops.triton.bank import triton
from dymoe.adapter.ops.triton.launch import missing

__all__ = ["missing", "triton"]
