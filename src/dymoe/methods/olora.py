"""`olora`: a new LoRA per task, kept orthogonal to the older ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dymoe.methods.inclora import IncLoRA
from dymoe.schema import Weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class OLoRA(IncLoRA):
    """O-LoRA (arXiv 2310.14152): the rows of the new A are pushed out of the span of the rows of every older A.

    Growth and gate: `inclora`'s. Loss terms: orthogonality * sum over linears and older tasks of |A_old A_new^T|, and
    l2 * sum of the Euclidean norms of the new A and B. The first task has no term of the first kind.

    Attributes:
        orthogonality: weight of the orthogonality term (0.5, the authors' scripts and Prism; the authors take 5 for
            some late tasks).
        norm: ``l1`` sums the absolute values of the products, as the authors' code does; ``frobenius`` sums their
            squares, as the paper's equation has it.
        l2: weight of the sum over all new matrices of their norm, not squared, as in the authors' code (0; their
            scripts take 0.1 to 0.3 for a few tasks).
    """

    name: ClassVar[str] = "olora"
    summary: ClassVar[str] = "a new LoRA per task, orthogonal to the older ones"

    orthogonality: Weight = 0.5
    norm: Literal["l1", "frobenius"] = "l1"
    l2: Weight = 0.0

    def loss_terms(self, model: Any, batch: Mapping[str, Any], outputs: Any) -> dict[str, Tensor]:
        """Orthogonality from the second task on, the norm of the new matrices where it has a weight."""
        import torch

        from dymoe.methods.parameters import training_lora

        overlaps, norms = [], []
        for lora in training_lora(model):
            if lora.older and self.orthogonality > 0:
                with torch.autocast(lora.a.device.type, enabled=False):
                    overlaps.append(overlap(torch.cat(lora.older), lora.a, self.norm))
            if self.l2 > 0:
                norms += [lora.a.norm(), lora.b.norm()]
        terms = {}
        if overlaps:
            terms["orthogonality"] = self.orthogonality * torch.stack(overlaps).sum()
        if norms:
            terms["l2"] = self.l2 * torch.stack(norms).sum()
        return terms


def overlap(older: Tensor, new: Tensor, norm: str) -> Tensor:
    """Sum over all pairs of rows of the absolute value (``l1``) or the square (``frobenius``) of their product.

    Args:
        older: (rank of the older ones, in_features).
        new: (rank, in_features).
        norm: ``l1`` or ``frobenius``.
    """
    products = older @ new.t()
    return products.abs().sum() if norm == "l1" else products.square().sum()
