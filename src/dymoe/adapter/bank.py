"""The expert bank of one linear: y = y0 + sum over experts of w_e * scale * B_e A_e x.

`reference` is the formula as a loop, the oracle; `stacked` is what runs: two dense products for each block of experts,
over the tokens that use it. Few tokens without gradient, as while decoding, gather the rows of their own experts.
Plain torch, differentiated by autograd.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dymoe.routing import Decision

# Experts in a block per expert that a token uses, from which rows are gathered where no gradient is asked for.
GATHERED_FROM = 4
# Share of the tokens up to which the products of a side are made over its own tokens alone.
OWN_TOKENS = 0.5


class Block(NamedTuple):
    """Consecutive experts of equal rank; ranks come first, so that a weight meets all experts of a rank side by side.

    Attributes:
        a: (rank, experts, in_features); [:, e] is A_e.
        b: (rank, experts, out_features); [:, e] is B_e transposed.
        scale: factor on the block's output (1 where it is already part of `b`).
        dropout: dropout on the block's input while training.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    dropout: float = 0.0

    @property
    def experts(self) -> int:
        """Number of experts in the block."""
        return self.a.shape[1]


def reference(result: Tensor, x: Tensor, decision: Decision, old: Sequence[Block], new: Block | None) -> Tensor:
    """Base output plus bank output, one expert after the other.

    Args:
        result: the base's output, (tokens, out_features), any float dtype; not changed.
        x: (tokens, in_features), dtype of the blocks.
        decision: weights of both sides' experts; one row serves all tokens where it has only one.
        old: blocks of the old groups, in the order of their experts.
        new: block of the new group.

    Returns:
        (tokens, out_features), dtype of `result`.
    """
    output = x.new_zeros(len(x), result.shape[-1])
    blocks = [*old, *([] if new is None else [new])]
    weights, expert = torch.cat([decision.columns(0), decision.columns(1)], -1), 0
    for block in blocks:
        inputs = F.dropout(x, block.dropout) if block.dropout else x
        for e in range(block.experts):
            weight = (weights[:, expert] * block.scale).unsqueeze(-1).to(x.dtype)
            output = output + weight * ((inputs @ block.a[:, e].t()) @ block.b[:, e])
            expert += 1
    return result + output.to(result.dtype)


def stacked(result: Tensor, x: Tensor, decision: Decision, old: Sequence[Block], new: Block | None) -> Tensor:
    """Base output plus bank output by dense products; arguments and result as for `reference`."""
    for side, blocks in enumerate((old, [] if new is None else [new])):
        rows, index = _own_tokens(decision.tokens[side]), decision.indices[side]
        if len(blocks) == 1 and index is not None:
            add = _add_gathered if _gathers(index, blocks[0]) else _add_block
            result = add(result, x, decision.weights[side], index, blocks[0], rows)
        elif blocks:
            parts = decision.columns(side).split([block.experts for block in blocks], -1)
            for block, weights in zip(blocks, parts, strict=True):
                result = _add_block(result, x, weights, None, block, rows)
    return result


def _own_tokens(use: Tensor | None) -> Tensor | None:
    """Places of the tokens that use a side, from (tokens,), bool; None where products over all tokens are as cheap.

    On a CPU alone: a GPU would wait for their number, and a compiled graph would end here.
    """
    if use is None or use.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    rows = use.nonzero().squeeze(1)
    return rows if len(rows) <= OWN_TOKENS * len(use) else None


def _add_block(
    result: Tensor, x: Tensor, weights: Tensor, index: Tensor | None, block: Block, rows: Tensor | None
) -> Tensor:
    """Add a block's output.

    Args:
        result: (tokens, out_features).
        x: (tokens, in_features).
        weights: (tokens, candidates), or one row for all tokens.
        index: the candidates' positions among the block's experts, (tokens, candidates); None for all in order.
        block: the block.
        rows: positions of the tokens that use it, or None for all.
    """
    if rows is not None:
        x, weights = x.index_select(0, rows), weights.index_select(0, rows)
        index = None if index is None else index.index_select(0, rows)
    if block.dropout:
        x = F.dropout(x, block.dropout)
    if block.scale != 1.0:
        weights = weights * block.scale
    hidden = F.linear(x, block.a.flatten(0, 1)).unflatten(-1, (len(block.a), -1))
    if index is None:
        gated = _gated(hidden, weights)
    else:
        index = index.unsqueeze(-2).expand(-1, len(block.a), -1)
        gated = torch.zeros_like(hidden).scatter(-1, index, _gated(hidden.gather(-1, index), weights))
    gated, b = gated.flatten(1), block.b.flatten(0, 1)
    if rows is not None:
        return result.index_add(0, rows, (gated @ b).to(result.dtype))
    if result.dtype == b.dtype:
        return torch.addmm(result, gated, b)
    return result + (gated @ b).to(result.dtype)


def _gated(hidden: Tensor, weights: Tensor) -> Tensor:
    """Hidden values (tokens, r, experts) times their experts' weights (tokens, experts), in the values' dtype."""
    # The weights stay in float32: their gradient is a sum over ranks whose terms nearly cancel in the softmax.
    return (hidden * weights.unsqueeze(-2)).to(hidden.dtype)


def _gathers(index: Tensor, block: Block) -> bool:
    """Whether gathered rows serve: no gradient, and many more experts than a token uses."""
    return not torch.is_grad_enabled() and block.experts >= GATHERED_FROM * index.shape[-1]


def _add_gathered(
    result: Tensor, x: Tensor, weights: Tensor, index: Tensor, block: Block, rows: Tensor | None
) -> Tensor:
    """`_add_block` that reads the rows of each token's own experts alone."""
    assert rows is None, "passes without gradient guide no token"
    a, b, (r, experts) = block.a.flatten(0, 1), block.b.flatten(0, 1), block.a.shape[:2]
    ranks = (index.unsqueeze(1) + experts * torch.arange(r, device=index.device).unsqueeze(1)).flatten(1)
    if ranks.numel() <= len(a):  # few tokens: their rows alone are read
        hidden = torch.bmm(a[ranks], x.unsqueeze(2)).squeeze(2)
    else:
        hidden = F.linear(x, a).gather(1, ranks)
    gated = _gated(hidden.unflatten(-1, (r, -1)), weights * block.scale).flatten(1)
    return result + F.embedding_bag(ranks, b, mode="sum", per_sample_weights=gated).to(result.dtype)
