"""The bank as two matrix products per block: all experts' A, the gate, all experts' B."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dymoe.adapter.ops.block import ExpertBlock


def stacked(x: Tensor, weights: Tensor, blocks: Sequence[ExpertBlock], top_k: int | None = None) -> Tensor:
    """Sum over experts of w_e * scale * B_e A_e x. Arguments and result as for `reference`."""
    output: Tensor | None = None
    parts = weights.split([block.experts for block in blocks], dim=-1) if len(blocks) > 1 else (weights,)
    for block, part in zip(blocks, parts, strict=True):
        inputs = F.dropout(x, block.dropout) if block.dropout else x
        hidden = F.linear(inputs, block.a)
        if block.scale != 1.0:
            part = part * block.scale
        gated = hidden.unflatten(-1, (block.experts, block.r)) * part.unsqueeze(-1).to(hidden.dtype)
        product = torch.matmul(gated.flatten(-2), block.b)
        output = product if output is None else output + product
    assert output is not None, "a bank has at least one block"
    return output
