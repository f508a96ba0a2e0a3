"""Products that leave out what a token does not use: experts outside its top k, rows without weight.

With X the tokens, M a matrix of ranks and P the ranks that each token uses, two products make up a bank: *sampled*,
(X M^T) at P alone, and *summed*, the sum over P of value times row of M. Both cost what the top k costs, however many
experts there are. On a CPU alone: a GPU would wait for the sizes, and its kernels are elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dymoe.adapter.ops import numba
from dymoe.adapter.ops.block import ExpertBlock
from dymoe.adapter.ops.candidates import Candidates

# Measured on two kinds of shapes (576 x 576, 576 x 1536; benchmarks/step.py): below these ratios dense products win.
SUMMED_FROM = 4  # experts in the block per expert that a token uses
SAMPLED_BELOW = 0.5  # share of (token, chunk) pairs in use
CHUNK = 16  # experts that are multiplied together


def bag(index: Tensor, values: Tensor, matrix: Tensor) -> Tensor:
    """Sum over j of values[t, j] * matrix[index[t, j]], (n, columns)."""
    return F.embedding_bag(index, matrix, mode="sum", per_sample_weights=values)


def few_rows(weights: Tensor) -> Tensor | None:
    """Rows of `weights` (n, experts) that are not all 0 where they are fewer than half, else None (all)."""
    if weights.device.type != "cpu":
        return None
    rows = weights.amax(1).nonzero().squeeze(1)
    return rows if 2 * len(rows) <= len(weights) else None


def _ranks(index: Tensor, block: ExpertBlock) -> tuple[Tensor, Tensor, int]:
    """Rows of the block's matrices that each token uses, (n, top_k * r), which chunks it touches, (n, chunks), bool,
    and how many such pairs there are."""
    if numba.available():
        return numba.ranks_in_use(index, block.experts, block.r, CHUNK)
    ranks = (index.unsqueeze(2) * block.r + torch.arange(block.r)).flatten(1)
    number = -(-block.experts // CHUNK)
    touched = torch.zeros(len(index), number, dtype=torch.bool).scatter_(1, index // CHUNK, True)
    return ranks, touched, int(touched.sum())


@dataclass
class Used:
    """The ranks of one block that each token uses.

    Attributes:
        block: the block.
        ranks: (n, top_k * r), rows of the block's matrices.
        chunks: for every chunk of the block the tokens that use it, or None where dense products win.
    """

    block: ExpertBlock
    ranks: Tensor
    chunks: Sequence[Tensor] | None

    @classmethod
    def of(cls, blocks: Sequence[ExpertBlock], chosen: Candidates) -> Used | None:
        """The old side's ranks in use; None where dense products win or the old experts are of several ranks."""
        index = chosen.index[0]
        if len(blocks) != 1 or index is None or index.device.type != "cpu" or not len(index):
            return None
        block = blocks[0]
        if block.experts < SUMMED_FROM * index.shape[1]:
            return None
        ranks, touched, pairs = _ranks(index, block)
        if pairs > SAMPLED_BELOW * touched.numel():
            return cls(block, ranks, None)
        tokens = touched.t().nonzero()[:, 1]
        return cls(block, ranks, tokens.split(touched.sum(0).tolist()))

    def sampled(self, x: Tensor, matrix: Tensor) -> Tensor:
        """(x matrix^T) at the ranks in use, (n, top_k * r)."""
        if len(x) * self.ranks.shape[1] <= len(matrix):  # few tokens, as while decoding
            return torch.bmm(matrix[self.ranks], x.unsqueeze(2)).squeeze(2)
        if self.chunks is None:
            return (x @ matrix.t()).gather(1, self.ranks)
        size = CHUNK * self.block.r
        found = x.new_empty(len(x), len(self.chunks), size)
        for number, tokens in enumerate(self.chunks):
            if len(tokens):
                rows = matrix[number * size : (number + 1) * size]
                found[tokens, number, : len(rows)] = x.index_select(0, tokens) @ rows.t()
        return found.flatten(1).gather(1, self.ranks)

    def summed(self, values: Tensor, matrix: Tensor) -> Tensor:
        """Sum over the ranks in use of value * row, (n, columns)."""
        return bag(self.ranks, values, matrix)
