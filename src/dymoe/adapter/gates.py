"""Gates: how a token's weights over the experts come about."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dymoe.routing import scores_of_directions, topk_weights

Guide = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Routing:
    """A gate's decision: scores (..., experts) before guidance or None, weights (..., experts) or (experts,)."""

    scores: Tensor | None
    weights: Tensor


def cosine_gate(
    x: Tensor, directions: Sequence[Tensor], experts: int, top_k: int, temperature: float, guide: Guide | None
) -> Routing:
    """Cosine scores, guidance, softmax over the top k.

    Args:
        x: layer inputs, (..., features).
        directions: unit router rows of each block of experts, (experts of the block, features), float32.
        experts: experts in all blocks (unused: the rows say it).
        top_k: experts with weight per token.
        temperature: of the softmax.
        guide: maps scores to guided scores while training, or None.
    """
    scores = scores_of_directions(x, *directions)
    return Routing(scores, topk_weights(scores if guide is None else guide(scores), top_k, temperature))


def uniform_gate(
    x: Tensor, directions: Sequence[Tensor], experts: int, top_k: int, temperature: float, guide: Guide | None
) -> Routing:
    """Weight 1 for every expert of every token (arguments as for `cosine_gate`, of which only `experts` is used)."""
    return Routing(None, torch.ones(experts, dtype=torch.float32, device=x.device))


Gate = Callable[[Tensor, Sequence[Tensor], int, int, float, Guide | None], Routing]
GATES: dict[str, Gate] = {"cosine": cosine_gate, "uniform": uniform_gate}
