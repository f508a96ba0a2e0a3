"""The cosine gate in the space of candidates: weights, token types and loss terms in one go, with their gradients.

At most top_k experts of each side (old, new) can get weight. Their scores, the *candidates* (tokens, C) with
C <= 2 top_k, are all that guidance, both softmaxes and all losses need, however many experts the bank holds: one top-k
over the old side is the only pass over its scores. The formulas are those of `dymoe.routing`, which the tests compare.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from dymoe import routing


@dataclass(frozen=True)
class Rule:
    """What the gate does with the scores; the fields are those of `DyMoEConfig`.

    Attributes:
        guidance: "none" where there is nothing to guide (evaluation, first task).
        balance_all: the load balance evens out all experts instead of the new group.
        regularize: compute exclusivity and specialization.
        layers: the terms' weights are divided by it.
        statistics: also find `Candidates.statistics`.
    """

    top_k: int
    temperature: float
    tau: float = 0.2
    guidance: str = "none"
    load_balance: float = 0.0
    balance_all: bool = False
    exclusivity: float = 0.0
    specialization: float = 0.0
    rsr_temperature: float = 0.1
    regularize: bool = False
    layers: int = 1
    statistics: bool = False


@dataclass
class Candidates:
    """A gate's decision.

    Attributes:
        scores: (tokens, C), the old side's candidates, then the new side's.
        weights: (tokens, C), rows sum to 1.
        index: expert of each candidate within its side, (tokens, candidates of the side), for (old, new); None where a
            side's candidates are all its experts in order.
        split: number of old candidates.
        types: (tokens,), int8 `TokenType`, or None.
        terms: load balance, exclusivity, specialization, (3,), unweighted; None if the rule has no terms.
        total: their weighted sum, scalar, or None.
        slope: d total / d candidate score, (tokens, C), or None.
        statistics: over the tokens that count the shares of new, ambiguous and old ones, the mean weight on the new
            group and the mean entropy of the weights in nats, (5,), or None.
    """

    scores: Tensor
    weights: Tensor
    index: tuple[Tensor | None, Tensor | None]
    split: int
    types: Tensor | None = None
    terms: Tensor | None = None
    total: Tensor | None = None
    slope: Tensor | None = field(default=None, repr=False)
    statistics: Tensor | None = None

    def spread(self, values: Tensor, side: int, experts: int) -> Tensor:
        """Values at one side's candidates (tokens, candidates) as columns of its experts, 0 elsewhere."""
        index = self.index[side]
        if index is None:
            return values
        return values.new_zeros(len(values), experts).scatter_(1, index, values)

    def picked(self, values: Tensor, side: int) -> Tensor:
        """Columns of one side's experts (tokens, experts) at its candidates."""
        index = self.index[side]
        return values if index is None else values.gather(1, index)


def _best(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor | None]:
    if scores.shape[1] <= top_k:
        return scores, None
    values, index = scores.topk(top_k, dim=1, sorted=False)
    return values, index


def choose(
    old: Tensor, new: Tensor, rule: Rule, mask: Tensor | None = None, scale: Tensor | None = None, slope: bool = True
) -> Candidates:
    """Gate the scores of both sides.

    Args:
        old: scores of the old experts, (tokens, old experts), float32 or wider; may have no columns.
        new: scores of the new group, (tokens, new experts); may have no columns.
        rule: see `Rule`.
        mask: (tokens,), true for tokens that count in the losses; all when None.
        scale: factor on exclusivity and specialization, 0-d (`RoutingTrace.scale`).
        slope: also compute the loss terms' gradient.
    """
    values_old, index_old = _best(old, rule.top_k)
    values_new, index_new = _best(new, rule.top_k)
    split, count = values_old.shape[1], values_old.shape[1] + values_new.shape[1]
    both = 0 < split < count
    scores = torch.cat([values_old, values_new], 1) if both else (values_old if split else values_new)
    chosen = Candidates(scores, scores, (index_old, index_new), split)
    guided = both and rule.guidance != "none"
    if both and (guided or rule.statistics):
        chosen.types = routing.types_of_best(values_old.amax(1), values_new.amax(1), rule.tau)
    member = None  # which candidates are among the top k of all
    regularize = both and rule.regularize
    if both and count > rule.top_k and (regularize or not guided or rule.guidance != "exclusive"):
        top = scores.topk(rule.top_k, dim=1, sorted=False).indices
        member = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, top, True)
    allowed = member
    if guided and chosen.types is not None:
        to_new = routing.reaches_new(chosen.types, cast(routing.Mask, rule.guidance)).unsqueeze(1)
        on_new = torch.arange(count, device=scores.device) >= split
        allowed = on_new == to_new
        if rule.guidance != "exclusive":  # the old side stays visible
            everything = to_new if member is None else to_new & member
            allowed = (~on_new & ~to_new) | everything
    chosen.weights = _softmax(scores, allowed, rule.temperature)
    if rule.load_balance > 0 or rule.regularize:
        _add_terms(chosen, rule, (old.shape[1], new.shape[1]), member, mask, scale, slope)
    if rule.statistics:
        chosen.statistics = token_statistics(chosen.types, chosen.weights, count - split, mask)
    return chosen


def token_statistics(types: Tensor | None, weights: Tensor, num_new: int, mask: Tensor | None) -> Tensor:
    """`Candidates.statistics` from the tokens' types (tokens,), None where all are new, and their weights
    (tokens, experts), the new group's last, over the tokens that `mask` (tokens,) counts."""
    counts = weights.new_ones(weights.shape[:-1]) if mask is None else mask.to(weights.dtype)
    counts = counts / counts.sum().clamp(min=1)
    if types is None:
        shares = [counts.sum(), counts.new_zeros(()), counts.new_zeros(())]
    else:
        order = (routing.TokenType.NEW, routing.TokenType.AMBIGUOUS, routing.TokenType.OLD)
        shares = [((types == int(kind)) * counts).sum() for kind in order]
    means = (weights[..., weights.shape[-1] - num_new :].sum(-1), torch.special.entr(weights).sum(-1))
    return torch.stack([*shares, *((value * counts).sum() for value in means)])


def descend(
    chosen: Candidates, by_weight: Tensor, inverse: Tensor, temperature: float, upstream: Tensor | None
) -> tuple[Tensor, Tensor]:
    """From the gradient at the candidates' weights to the one at what the scores are made of.

    Args:
        chosen: the gate's decision.
        by_weight: gradient at its weights, (tokens, C).
        inverse: 1 / |x|, (tokens, 1).
        temperature: of its softmax.
        upstream: gradient of the loss terms' sum, 0-d; None is 1.

    Returns:
        ds / |x| for the candidates' scores s, (tokens, C), and the factor of x in dx, - sum(ds s) / |x|^2, (tokens, 1).
    """
    gradient = through_softmax(chosen.weights, by_weight, temperature)
    if chosen.slope is not None:
        gradient.add_(chosen.slope if upstream is None else chosen.slope * upstream.to(gradient))
    scaled = gradient.mul_(inverse)
    return scaled, (scaled * chosen.scores).sum(1, keepdim=True).mul_(inverse).neg_()


def _softmax(scores: Tensor, allowed: Tensor | None, temperature: float) -> Tensor:
    if allowed is not None:
        scores = torch.where(allowed, scores, float("-inf"))
    return torch.softmax(scores / temperature, dim=1)


def through_softmax(weights: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    """Gradient at the scores of softmax(scores / temperature), given the one at its result."""
    product = weights * gradient
    return torch.addcmul(product, weights, product.sum(1, keepdim=True), value=-1).div_(temperature)


def _add_terms(
    chosen: Candidates,
    rule: Rule,
    experts: tuple[int, int],
    member: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    slope: bool,
) -> None:
    """Add the loss terms, their weighted sum and its slope."""
    zero = chosen.scores.new_zeros(())
    balance = exclusivity = specialization = zero
    total, gradient = zero, None
    if rule.load_balance > 0:
        balance, by_weight = _load_balance(chosen, rule, experts, mask)
        total = balance * (rule.load_balance / rule.layers)
        if slope:
            gradient = through_softmax(chosen.weights, by_weight, rule.temperature) * (rule.load_balance / rule.layers)
    if rule.regularize and 0 < chosen.split < chosen.scores.shape[1]:
        exclusivity, specialization, by_score = _regularization(chosen, rule, member, mask, slope)
        factor = 1.0 if scale is None else scale.to(zero.device)
        penalty = rule.exclusivity * exclusivity + rule.specialization * specialization
        total = total + penalty * factor / rule.layers
        if by_score is not None:
            by_score = by_score * (factor / rule.layers)
            gradient = by_score if gradient is None else gradient.add_(by_score)
    chosen.terms = torch.stack([balance, exclusivity, specialization])
    chosen.total, chosen.slope = total, gradient


def _load_balance(
    chosen: Candidates, rule: Rule, experts: tuple[int, int], mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`routing.load_balance_loss` and its gradient at the candidates' weights.

    L = n sum_e f_e m_e / M with M = sum_e m_e, m_e = sum_t w_te over counted tokens: dL / dw_te = n (f_e - L / n) / M.
    """
    split = chosen.split
    sides = [side for side in (0, 1) if experts[side] and (side == 1 or rule.balance_all)]
    parts = (chosen.weights[:, :split], chosen.weights[:, split:])
    if not sides or not len(chosen.weights):
        return chosen.weights.new_zeros(()), torch.zeros_like(chosen.weights)
    weights = torch.cat([chosen.spread(parts[side], side, experts[side]) for side in sides], 1)
    counts = weights.sum(1) > 0
    if mask is not None:
        counts = counts & mask
    counted = counts.unsqueeze(1).to(weights.dtype)
    weights = weights * counted
    mass = weights.sum(0)
    total = mass.sum()
    total = torch.where(total > 0, total, torch.ones_like(total))
    dispatched = torch.zeros_like(mass).index_add_(0, weights.argmax(1), counted.squeeze(1))
    dispatched = dispatched / counted.sum().clamp(min=1)
    number = weights.shape[1]
    mean = (dispatched * mass).sum() / total
    by_expert = (dispatched - mean) * (number / total)
    gradient = torch.zeros_like(chosen.weights)
    start = 0
    for side in sides:
        own = by_expert[start : start + experts[side]]
        index = chosen.index[side]
        place = slice(None, split) if side == 0 else slice(split, None)
        gradient[:, place] = own if index is None else own[index]
        start += experts[side]
    return number * mean, gradient.mul_(counted)


def _regularization(
    chosen: Candidates, rule: Rule, member: Tensor | None, mask: Tensor | None, slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`routing.routing_score_regularization` and the gradient of its weighted sum at the candidates' scores.

    With old mass o, new mass n and target y (no gradient): d L_exc / do = n, d L_exc / dn = o,
    d L_spe / dn = (1 - y) / (1 - n) - y / n, each 0 where its logarithm is clamped.
    """
    split = chosen.split
    weights = _softmax(chosen.scores, member, rule.rsr_temperature)
    old, new = weights[:, :split].sum(1), weights[:, split:].sum(1)
    target = 1 - weights[:, :split].amax(1)
    small = 1e-8
    inside, outside = new.clamp(min=small), (1 - new).clamp(min=small)
    if mask is None:
        share = torch.full_like(new, 1 / max(len(new), 1))
    else:
        share = mask.to(new.dtype)
        share = share / share.sum().clamp(min=1)
    exclusivity = torch.dot(old * new, share)
    specialization = -torch.dot(target * inside.log() + (1 - target) * outside.log(), share)
    if not slope:
        return exclusivity, specialization, None
    by_new = (1 - target) / outside * (1 - new >= small) - target / inside * (new >= small)
    by_old = rule.exclusivity * new * share
    by_new = (rule.exclusivity * old + rule.specialization * by_new) * share
    gradient = torch.cat(
        [by_old.unsqueeze(1).expand(-1, split), by_new.unsqueeze(1).expand(-1, weights.shape[1] - split)], 1
    )
    return exclusivity, specialization, through_softmax(weights, gradient, rule.rsr_temperature)
