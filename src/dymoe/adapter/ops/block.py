"""A block: consecutive experts of one rank, stacked row by row."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ExpertBlock:
    """Experts of equal rank r, as two matrices.

    Args:
        a: (experts * r, in_features); rows e*r .. e*r + r - 1 are A_e.
        b: (experts * r, out_features); the same rows are B_e transposed.
        r: rank of each expert.
        scale: factor on the block's output (1 where it is already part of `b`).
        dropout: dropout on the block's input while training.
    """

    a: Tensor
    b: Tensor
    r: int
    scale: float = 1.0
    dropout: float = 0.0

    @property
    def experts(self) -> int:
        """Number of experts in the block."""
        return self.a.shape[0] // self.r
