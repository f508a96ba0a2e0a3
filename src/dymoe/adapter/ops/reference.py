"""The bank as the formula is written: one expert after the other."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dymoe.adapter.ops.block import ExpertBlock


def reference(x: Tensor, weights: Tensor, blocks: Sequence[ExpertBlock], top_k: int | None = None) -> Tensor:
    """Sum over experts of w_e * scale * B_e A_e x, in a loop.

    Args:
        x: (..., in_features).
        weights: (..., experts), or (experts,) when all tokens share them; columns in the order of the blocks.
        blocks: at least one.
        top_k: the gate's promise that no token has more than this many weights above 0 and that it asks for no
            gradient of the others; None promises nothing. Not used here.

    Returns:
        (..., out_features), dtype of the blocks.
    """
    output = x.new_zeros(*x.shape[:-1], blocks[0].b.shape[1], dtype=blocks[0].b.dtype)
    expert = 0
    for block in blocks:
        inputs = F.dropout(x, block.dropout) if block.dropout else x
        for e in range(block.experts):
            rows = slice(e * block.r, (e + 1) * block.r)
            a, b = block.a[rows], block.b[rows]
            weight = (weights[..., expert] * block.scale).unsqueeze(-1).to(x.dtype)
            output = output + weight * ((inputs @ a.t()) @ b)
            expert += 1
    return output
