"""Gates: how a token's weights over the experts come about."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dymoe.routing import scores_of_directions, topk_weights

Guide = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Gating:
    """What a gate sees of the bank.

    Args:
        sizes: experts of each active group, in the order of their columns.
        rows: router rows, float32. Cosine gate: unit rows, blocks in the order of the columns. Linear gate: one matrix
            (experts of the bank up to and with the group, features) for every active group. Uniform gate: none.
        top_k: experts with weight per token.
        temperature: of the softmax.
        guide: maps scores to (guided scores, token types) while training, or None.
        selection: (samples, groups), what a selector decided for each sample, or None (see `adapter.selection`).
    """

    sizes: tuple[int, ...]
    rows: tuple[Tensor, ...]
    top_k: int
    temperature: float
    guide: Guide | None = None
    selection: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """A gate's decision: scores (..., experts) before guidance or None, weights (..., experts) or (experts,).

    `types` holds the token types (...) where guidance computed them.
    """

    scores: Tensor | None
    weights: Tensor
    types: Tensor | None = None


def by_expert(selection: Tensor, sizes: tuple[int, ...], tokens: torch.Size) -> Tensor:
    """Each sample's selection repeated for the experts of each group, (samples, 1, ..., experts).

    Raises:
        ValueError: the layer's input does not start with the dimension of samples.
    """
    if len(tokens) < 2 or tokens[0] != selection.shape[0]:
        raise ValueError(
            f"a selection for {selection.shape[0]} samples does not fit an input of {tuple(tokens)} tokens"
        )
    repeats = torch.tensor(sizes, device=selection.device)
    spread = selection.repeat_interleave(repeats, dim=1, output_size=sum(sizes))
    return spread.view(tokens[0], *[1] * (len(tokens) - 1), -1)


def cosine_gate(x: Tensor, gating: Gating) -> Routing:
    """Cosine scores, guidance, softmax over the top k; groups that a selection leaves at 0 get no weight.

    Args:
        x: layer inputs, (..., features).
        gating: the bank.
    """
    scores = guided = scores_of_directions(x, *gating.rows)
    types = None
    if gating.guide is not None:
        guided, types = gating.guide(scores)
    if gating.selection is None:
        return Routing(scores, topk_weights(guided, gating.top_k, gating.temperature), types)
    guided = guided.masked_fill(by_expert(gating.selection, gating.sizes, x.shape[:-1]) == 0, float("-inf"))
    # A selected group may have no experts in this layer: a softmax over nothing would be NaN, also in its gradient.
    nothing = guided.amax(-1, keepdim=True) == float("-inf")
    weights = topk_weights(guided.masked_fill(nothing, 0.0), gating.top_k, gating.temperature)
    return Routing(scores, weights.masked_fill(nothing, 0.0), types)


def uniform_gate(x: Tensor, gating: Gating) -> Routing:
    """Weight 1 for every expert of every token, or what the selection gives its group."""
    if gating.selection is None:
        return Routing(None, torch.ones(sum(gating.sizes), dtype=torch.float32, device=x.device))
    dtype = torch.promote_types(gating.selection.dtype, torch.float32)
    return Routing(None, by_expert(gating.selection, gating.sizes, x.shape[:-1]).to(dtype))


def linear_gate(x: Tensor, gating: Gating) -> Routing:
    """Softmax over the top k of a linear router, which scores all experts that its group found or brought.

    The last active group's router decides, or the routers that the selection names for a sample (a mixture where it
    names several).

    Raises:
        ValueError: a router does not fit the groups before it (they are not the ones it was trained with).
    """
    total, ends = 0, []
    for size in gating.sizes:
        total += size
        ends.append(total)
    for rows, end in zip(gating.rows, ends, strict=True):
        if rows.shape[0] != end:
            raise ValueError(
                f"a linear router for {rows.shape[0]} experts meets {end}: activate the groups it was trained with, in "
                "their order"
            )
    if gating.selection is None:
        scores = _linear_scores(x, gating.rows[-1])
        return Routing(scores, topk_weights(scores, gating.top_k, gating.temperature))
    shape = (x.shape[0], *[1] * (x.dim() - 1))
    weights = x.new_zeros(*x.shape[:-1], total, dtype=gating.rows[-1].dtype)
    for number, rows in enumerate(gating.rows):
        share = gating.selection[:, number].view(shape).to(weights.dtype)
        own = topk_weights(_linear_scores(x, rows), gating.top_k, gating.temperature)
        weights = weights + share * torch.nn.functional.pad(own, (0, total - rows.shape[0]))
    return Routing(None, weights)


def _linear_scores(x: Tensor, rows: Tensor) -> Tensor:
    with torch.autocast(device_type=x.device.type, enabled=False):
        return torch.nn.functional.linear(x.to(rows.dtype), rows)


Gate = Callable[[Tensor, Gating], Routing]
GATES: dict[str, Gate] = {"cosine": cosine_gate, "uniform": uniform_gate, "linear": linear_gate}
