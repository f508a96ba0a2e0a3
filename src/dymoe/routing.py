"""Routing mathematics of LLaVA-DyMoE: scores, weights, token types, guidance and the losses on scores.

What runs is `route`, which composes the formulas below it; every layer's forward pass calls it, and autograd
differentiates it. Pure functions, tensors in and tensors out, torch alone. Everywhere `scores` has shape
(..., experts); the last `num_new` columns belong to the new expert group, the columns before them to the old groups.
Scores are cosines (no unit, in [-1, 1]), weights are shares (no unit, rows sum to 1). Everything is computed in float32
at least (float64 stays float64), also under autocast.

Source: "On Token's Dilemma" (LLaVA-DyMoE, CVPR 2026). Where the paper and what is reported of its authors' code
differ, the function's docstring names the choice.
"""

from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dymoe.routing_settings import MASKS, Mask, Routing


class TokenType(IntEnum):
    """The type of a token of the new task, judged by its routing scores (the values `token_types` returns)."""

    OLD = 0
    AMBIGUOUS = 1
    NEW = 2


# The tokens that see the new group. Under `exclusive` these lose the old groups; otherwise all tokens see the old ones.
REACHES: dict[str, tuple[TokenType, ...]] = {
    "exclusive": (TokenType.NEW,),
    "protect": (TokenType.NEW,),
    "only-ambiguous": (TokenType.AMBIGUOUS,),
    "only-old": (TokenType.OLD,),
    "no-token": (),
    "none": tuple(TokenType),
}

__all__ = [
    "MASKS",
    "REACHES",
    "Decision",
    "Mask",
    "Routing",
    "TokenType",
    "Tokens",
    "cosine_scores",
    "exclusivity_loss",
    "group_mass",
    "load_balance_loss",
    "reaches_new",
    "route",
    "routing_score_regularization",
    "rsr_scale",
    "specialization_loss",
    "straight_through",
    "token_assignment_guidance",
    "token_statistics",
    "token_types",
    "topk_weights",
]


class Decision(NamedTuple):
    """Where the tokens of one layer go, and what this adds to the loss.

    Sides are the old groups (0) and the new group (1). A side's *candidates* are its top_k experts with the largest
    scores, all of them where it has no more: no other expert can have weight, so weights and losses need them alone.

    Attributes:
        scores: of each side's experts before guidance, (tokens, experts); None for a gate without scores.
        weights: of each side's candidates, (tokens, candidates).
        indices: the candidates' places among the side's experts, (tokens, candidates); None for all in order.
        experts: of each side.
        tokens: which tokens guidance lets use the side, (tokens,), bool; None for all.
        terms: load balance, exclusivity and specialization, (3,), unweighted; None where nothing learns.
        total: their weighted sum, scalar, or None.
        statistics: `token_statistics`, or None.
    """

    scores: tuple[Tensor, Tensor] | None
    weights: tuple[Tensor, Tensor]
    indices: tuple[Tensor | None, Tensor | None]
    experts: tuple[int, int]
    tokens: tuple[Tensor | None, Tensor | None] = (None, None)
    terms: Tensor | None = None
    total: Tensor | None = None
    statistics: Tensor | None = None

    def repeated(self, times: int) -> "Decision":
        """The same for `times` tokens in place of each, one after the other."""

        def repeat(pair: Any) -> Any:
            return None if pair is None else tuple(None if t is None else t.repeat_interleave(times, 0) for t in pair)

        parts = {name: repeat(getattr(self, name)) for name in ("scores", "weights", "indices", "tokens")}
        return self._replace(**parts)

    def columns(self, side: int) -> Tensor:
        """Weights of all experts of one side, (tokens, experts)."""
        weights, index = self.weights[side], self.indices[side]
        if index is None:
            return weights
        return weights.new_zeros(*weights.shape[:-1], self.experts[side]).scatter(-1, index, weights)


def route(
    old: Tensor,
    new: Tensor,
    routing: Routing,
    *,
    visible: Tensor | None = None,
    learns: bool = False,
    guide: bool = True,
    mask: Tensor | None = None,
    scale: Tensor | float | None = 1.0,
    report: bool = False,
) -> Decision:
    """Route tokens by their scores: guidance, softmax over the top k, and the losses on both.

    Args:
        old: scores of the old groups' experts, (tokens, old experts); may be empty.
        new: scores of the new group's experts, (tokens, new experts); may be empty.
        routing: the settings.
        visible: (tokens, old and new experts), bool, what a selection leaves to a token; a token to which it leaves
            nothing has weights 0. None for all.
        learns: the new group trains: tokens are guided and the losses computed.
        guide: the scores are cosines, which guidance compares.
        mask: (tokens,), true for tokens that count in the losses (not padding); all count when None.
        scale: factor on exclusivity and specialization (`rsr_scale`); None while they are off.
        report: also compute `Decision.statistics`, and the regularization's terms while they are off.

    Raises:
        ValueError: settings that a formula refuses.
    """
    sides = [_candidates(scores, routing.top_k if visible is None else scores.shape[-1]) for scores in (old, new)]
    scores = torch.cat([values for values, _ in sides], -1)
    num_old, num_new = (values.shape[-1] for values, _ in sides)
    guidance: Mask = routing.guidance if learns and guide and num_old and num_new else "none"
    guided, types = scores, None
    tokens: tuple[Tensor | None, Tensor | None] = (None, None)
    if guidance != "none" or (learns and report):
        types = token_types(scores, num_new, routing.tau)
        guided = token_assignment_guidance(scores, num_new, routing.tau, guidance, types)
        tokens = _tokens_of_sides(types, guidance)
    # Where a token keeps one side alone, the candidates are its top k already.
    top_k = scores.shape[-1] if guidance == "exclusive" and visible is None else routing.top_k
    if visible is None:
        weights = topk_weights(guided, top_k, routing.temperature)
    else:
        weights = _visible_weights(guided, visible, top_k, routing.temperature)
    decision = Decision(
        scores=(old, new),
        weights=weights.split([num_old, num_new], -1),
        indices=(sides[0][1], sides[1][1]),
        experts=(old.shape[-1], new.shape[-1]),
        tokens=tokens,
    )
    if not learns or not num_new:
        return decision
    terms, total = _losses(decision, scores, num_new, routing, mask, scale, report)
    statistics = None if types is None or not report else token_statistics(types, weights.detach(), num_new, mask)
    return decision._replace(terms=terms, total=total, statistics=statistics)


def _candidates(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor | None]:
    """The largest scores of each token, (tokens, candidates), and their places; None for all in order."""
    if scores.shape[-1] <= top_k:
        return scores, None
    values, index = scores.topk(top_k, dim=-1, sorted=False)
    return values, index


def _visible_weights(scores: Tensor, visible: Tensor, top_k: int, temperature: float) -> Tensor:
    """`topk_weights` of the scores that `visible` (tokens, experts) leaves; 0 for a token that it leaves none."""
    scores = scores.masked_fill(~visible, float("-inf"))
    nothing = scores.amax(-1, keepdim=True) == float("-inf")  # a softmax over nothing is NaN, also in its gradient
    return topk_weights(scores.masked_fill(nothing, 0.0), top_k, temperature).masked_fill(nothing, 0.0)


def _tokens_of_sides(types: Tensor, guidance: Mask) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens use the old groups and which the new one, (tokens,) each; None for all."""
    if guidance == "none":
        return None, None
    to_new = reaches_new(types, guidance)
    return ~to_new if guidance == "exclusive" else None, to_new


def _losses(
    decision: Decision,
    scores: Tensor,
    num_new: int,
    routing: Routing,
    mask: Tensor | None,
    scale: Tensor | float | None,
    report: bool,
) -> tuple[Tensor, Tensor]:
    """`Decision.terms` and `Decision.total` from the candidates' scores (tokens, candidates)."""
    balance = exclusivity = specialization = scores.new_zeros(())
    if routing.load_balance > 0:
        evened = decision.columns(1)
        if routing.balance_over == "all":
            evened = torch.cat([decision.columns(0), evened], -1)
        balance = load_balance_loss(evened, evened.shape[-1], mask)
    regularized = routing.exclusivity > 0 or routing.specialization > 0
    if regularized and num_new < scores.shape[-1] and (scale is not None or report):
        # Before the regularization starts its terms are only reported.
        with torch.set_grad_enabled(torch.is_grad_enabled() and scale is not None):
            exclusivity, specialization = routing_score_regularization(
                scores, num_new, routing.top_k, routing.rsr_temperature, mask
            )
    total = routing.load_balance * balance
    if scale is not None:
        total = total + scale * (routing.exclusivity * exclusivity + routing.specialization * specialization)
    return torch.stack([balance, exclusivity, specialization]), total


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or unchanged when it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_groups(scores: Tensor, num_new: int) -> int:
    """Check that the bank can hold `num_new` new experts; return the number of old ones."""
    experts = scores.shape[-1]
    if not 0 <= num_new <= experts:
        raise ValueError(f"num_new must be between 0 and the number of experts ({experts}), got {num_new}")
    return experts - num_new


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of per-token values (...) over the tokens where `mask` (...) is true; 0 when there is none."""
    if mask is None:
        return values.mean() if values.numel() else values.sum()
    if mask.shape != values.shape:
        raise ValueError(f"mask must have the shape of the tokens {tuple(values.shape)}, got {tuple(mask.shape)}")
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


class Tokens(NamedTuple):
    """A layer's inputs as a router sees them.

    Attributes:
        wide: (..., features), float32 or float64.
        inverse: 1 / |x|, (..., 1); 0 for a zero vector, which thus scores 0 and gets no gradient.
        narrow: bfloat16 inputs and their inverse lengths in bfloat16, through which the gradient goes; None where it
            goes through `wide`, or nowhere.
    """

    wide: Tensor
    inverse: Tensor
    narrow: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, x: Tensor) -> "Tokens":
        """Of inputs (..., features), any float dtype."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            narrow = None
            if x.dtype == torch.bfloat16 and torch.is_grad_enabled():
                narrow, x = (x, _inverse_length(x)), x.detach()
            wide = _wide(x)
            return cls(wide, _inverse_length(wide), narrow)


def _inverse_length(x: Tensor) -> Tensor:
    """1 / |x| of vectors (..., features), (..., 1), in their dtype; 0 for a zero vector."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.masked_fill(length == 0, float("inf")).reciprocal()


def cosine_scores(x: Tensor | Tokens, router: Tensor, unit: bool = False) -> Tensor:
    """Cosine between each token and each router row: s_e = (x / |x|) . (r_e / |r_e|).

    The value is float32's. The gradient of bfloat16 inputs is that of the same formula in bfloat16, as autocast gives
    it to every other weight: otherwise a float32 copy of the tokens would wait in each layer for the backward pass.

    Args:
        x: layer inputs, (..., features), any float dtype, or their `Tokens`.
        router: router rows, (experts, features), any float dtype.
        unit: the rows have unit length already (frozen rows are normalised only once).

    Returns:
        Scores, (..., experts), float32 (float64 if x is). A zero vector scores 0.

    Raises:
        ValueError: the feature sizes differ.
    """
    tokens = x if isinstance(x, Tokens) else Tokens.of(x)
    if tokens.wide.shape[-1] != router.shape[-1]:
        raise ValueError(f"tokens have {tokens.wide.shape[-1]} features but router rows have {router.shape[-1]}")
    with torch.autocast(device_type=tokens.wide.device.type, enabled=False):
        rows = router.to(tokens.wide.dtype)
        if not unit:
            rows = F.normalize(rows, dim=-1, eps=1e-12)
        if tokens.narrow is None:
            return F.linear(tokens.wide, rows) * tokens.inverse
        narrow, inverse = tokens.narrow
        value = F.linear(tokens.wide, rows.detach()) * tokens.inverse
        return straight_through(value, F.linear(narrow, rows.to(narrow.dtype)) * inverse)


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value of one tensor, which has no gradient, with the gradient of another of the same shape."""
    return value + (surrogate - surrogate.detach())


def topk_weights(scores: Tensor, top_k: int, temperature: float) -> Tensor:
    """Softmax over the `top_k` largest scores divided by the temperature; all other experts get 0.

    A score of -inf (masked by guidance) never gets weight; each row must hold at least one finite score. Among equal
    scores at the border exactly as many are kept as fit. With top_k >= experts this is the plain softmax.

    Args:
        scores: (..., experts), any float dtype.
        top_k: experts with weight per token, >= 1.
        temperature: > 0 (the paper's router uses 0.01, its regularization 0.1).

    Returns:
        Weights, (..., experts), float32 or wider, rows sum to 1.

    Raises:
        ValueError: top_k < 1 or temperature <= 0.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    scores = _wide(scores)
    if top_k >= scores.shape[-1]:
        return torch.softmax(scores / temperature, dim=-1)
    values, index = scores.topk(top_k, dim=-1)
    weights = torch.softmax(values / temperature, dim=-1)
    return torch.zeros_like(scores).scatter(-1, index, weights)


def token_types(scores: Tensor, num_new: int, tau: float) -> Tensor:
    """Type of each token by the relative difference of the best new and the best old score.

    c_old, c_new = the largest score of each side; D_rel = |c_new - c_old| / max(|c_new|, |c_old|), 0 where the
    denominator is 0 (the authors' code is reported to have no epsilon). New where D_rel > tau and c_new > c_old,
    ambiguous where D_rel <= tau, old otherwise. Without old experts every token is new, without new ones old.

    Args:
        scores: raw cosine scores before any temperature, (..., experts).
        num_new: size of the new group (the last columns).
        tau: threshold of the relative difference, >= 0 (paper: 0.2).

    Returns:
        (...), int8, values of `TokenType`.

    Raises:
        ValueError: num_new does not fit the bank, or tau is negative.
    """
    if not tau >= 0:
        raise ValueError(f"tau must not be negative, got {tau}")
    num_old = _check_groups(scores, num_new)
    if num_old == 0 or num_new == 0:
        only = TokenType.OLD if num_new == 0 else TokenType.NEW
        return torch.full(scores.shape[:-1], int(only), dtype=torch.int8, device=scores.device)
    scores = _wide(scores.detach())
    return types_of_best(scores[..., :num_old].amax(-1), scores[..., num_old:].amax(-1), tau)


def types_of_best(old: Tensor, new: Tensor, tau: float) -> Tensor:
    """`token_types` from the largest old and the largest new score of each token, (...) each, float32 or float64."""
    clear = (new - old).abs() > tau * torch.maximum(new.abs(), old.abs())  # D_rel > tau, without a division by 0
    judged = torch.where(new > old, int(TokenType.NEW), int(TokenType.OLD))
    return torch.where(clear, judged, int(TokenType.AMBIGUOUS)).to(torch.int8)


def reaches_new(types: Tensor, mask: Mask) -> Tensor:
    """Which tokens see the new group under a mask, (...), bool, from their types (...)."""
    kinds = REACHES[mask]
    if not kinds:
        return torch.zeros_like(types, dtype=torch.bool)
    reached = types == int(kinds[0])
    for kind in kinds[1:]:
        reached = reached | (types == int(kind))
    return reached


def token_assignment_guidance(
    scores: Tensor, num_new: int, tau: float, mask: Mask = "exclusive", types: Tensor | None = None
) -> Tensor:
    """Token Assignment Guidance (TAG): mask the scores of the side that a token must not see.

    Training only, from the second task on. Two readings of the method exist: `exclusive` (new tokens see the new
    group alone, all others the old groups alone; what the authors' code is reported to run, and the default) and
    `protect` (only the new group is masked, for old and ambiguous tokens; what a summary of the paper says).

    The other masks are for the study of the token's dilemma: which tokens teach the new experts, and which make old
    tasks' tokens follow. As under `protect` the old groups stay visible to all; the new one is visible to the tokens of
    one type alone (`only-ambiguous`, `only-old`; for new tokens that is `protect`), to none (`no-token`: the new group
    learns nothing) or to all (`none`).

    Args:
        scores: (..., experts).
        num_new: size of the new group (the last columns).
        tau: threshold of `token_types`.
        mask: one of `MASKS`.
        types: the tokens' types where they are known already, (...); computed when None.

    Returns:
        Scores of the same shape and dtype with -inf where a token must not go; unchanged when a side is empty.

    Raises:
        ValueError: an unknown mask, or arguments that `token_types` refuses.
    """
    if mask not in MASKS:
        raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")
    num_old = _check_groups(scores, num_new)
    if mask == "none" or num_old == 0 or num_new == 0:
        return scores
    types = token_types(scores, num_new, tau) if types is None else types
    reaches = reaches_new(types, mask).unsqueeze(-1)
    is_new_expert = torch.arange(scores.shape[-1], device=scores.device) >= num_old
    blocked = is_new_expert ^ reaches if mask == "exclusive" else is_new_expert & ~reaches
    return scores.masked_fill(blocked, float("-inf"))


def group_mass(scores: Tensor, num_new: int, top_k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Routing mass of both sides: what the exclusivity and specialization losses share.

    The same softmax over the top k as `topk_weights`, of which the sums are needed alone.

    Args:
        scores: unguided scores, (..., experts).
        num_new: size of the new group (the last columns).
        top_k: experts with weight per token.
        temperature: > 0.

    Returns:
        (old mass, new mass, largest old weight), each (...); the last is detached and 0 without old experts.
    """
    num_old = _check_groups(scores, num_new)
    if top_k >= scores.shape[-1]:
        weights = topk_weights(scores, top_k, temperature)
        is_new = torch.arange(scores.shape[-1], device=scores.device) >= num_old
    else:
        values, index = _wide(scores).topk(top_k, dim=-1, sorted=False)
        weights = topk_weights(values, top_k, temperature)
        is_new = index >= num_old
    on_new = is_new.to(weights.dtype)
    new = (weights * on_new).sum(-1)
    return 1 - new, new, (weights.detach() * (1 - on_new)).amax(-1)


def _exclusivity(old_mass: Tensor, new_mass: Tensor) -> Tensor:
    return old_mass * new_mass


def _specialization(new_mass: Tensor, largest_old: Tensor) -> Tensor:
    target = (1 - largest_old).clamp(0, 1)
    inside, outside = new_mass.clamp(min=1e-8), (1 - new_mass).clamp(min=1e-8)
    return -(torch.xlogy(target, inside) + torch.xlogy(1 - target, outside))


def exclusivity_loss(
    scores: Tensor,
    num_new: int,
    top_k: int = Routing.top_k,
    temperature: float = Routing.rsr_temperature,
    mask: Tensor | None = None,
) -> Tensor:
    """L_exc = mean over tokens of g_old * g_new: a token should belong to one side (Routing Score Regularization).

    Args:
        scores: unguided scores, (..., experts).
        num_new: size of the new group (the last columns).
        top_k: experts with weight per token.
        temperature: of the regularization's own softmax (0.1).
        mask: (...), true for tokens that count (not padding); all count when None.

    Returns:
        Scalar, float32 or wider, in [0, 0.25]; 0 when no token counts.
    """
    old, new, _ = group_mass(scores, num_new, top_k, temperature)
    return _masked_mean(_exclusivity(old, new), mask)


def specialization_loss(
    scores: Tensor,
    num_new: int,
    top_k: int = Routing.top_k,
    temperature: float = Routing.rsr_temperature,
    mask: Tensor | None = None,
) -> Tensor:
    """L_spe = mean over tokens of BCE(g_new, y), y = 1 - max w_old (no gradient): new experts take what no old one has.

    Logarithms are clamped at 1e-8. Arguments and result as for `exclusivity_loss`, except that the value is >= 0
    without an upper bound of 0.25.
    """
    _, new, largest = group_mass(scores, num_new, top_k, temperature)
    return _masked_mean(_specialization(new, largest), mask)


def routing_score_regularization(
    scores: Tensor,
    num_new: int,
    top_k: int = Routing.top_k,
    temperature: float = Routing.rsr_temperature,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(exclusivity_loss, specialization_loss) of the same scores for the price of one softmax."""
    old, new, largest = group_mass(scores, num_new, top_k, temperature)
    return _masked_mean(_exclusivity(old, new), mask), _masked_mean(_specialization(new, largest), mask)


def load_balance_loss(weights: Tensor, num_new: int, mask: Tensor | None = None) -> Tensor:
    """Load balance over the new group only: num_new * sum_e f_e P_e (Switch Transformer, eq. 4, on the new columns).

    f_e is the share of tokens whose strongest new expert is e (no gradient), P_e the share of the new group's routing
    weight that e holds; only tokens with weight on the new group count. The minimum 1 is reached by even use. The
    dispatch is the strongest expert and not membership in the top k, since with 16 experts and top-k 16 every expert
    would be a member and the loss constant (the paper does not say which is meant).

    Args:
        weights: routing weights after guidance, (..., experts).
        num_new: size of the new group (the last columns).
        mask: (...), true for tokens that count (not padding); all count when None.

    Returns:
        Scalar, float32 or wider, in [1, num_new]; 0 when no counted token has weight on the new group.
    """
    num_old = _check_groups(weights, num_new)
    new = _wide(weights[..., num_old:])
    if new.numel() == 0:
        return new.sum()
    new = new.reshape(-1, num_new)
    counts = new.detach().sum(-1) > 0
    if mask is not None:
        if mask.shape != weights.shape[:-1]:
            raise ValueError(
                f"mask must have the shape of the tokens {tuple(weights.shape[:-1])}, got {tuple(mask.shape)}"
            )
        counts = counts & mask.reshape(-1).bool()
    counted = counts.to(new.dtype)
    dispatched = new.new_zeros(num_new).index_add_(0, new.detach().argmax(-1), counted) / counted.sum().clamp(min=1)
    mass = counted @ new
    total = mass.sum()
    return num_new * (dispatched @ mass) / torch.where(total > 0, total, torch.ones_like(total))


def token_statistics(types: Tensor, weights: Tensor, num_new: int, mask: Tensor | None = None) -> Tensor:
    """Where the tokens that count went: shares of new, ambiguous and old ones, mean weight on the new group, entropy.

    Args:
        types: (tokens,), as `token_types` gives them.
        weights: routing weights, (tokens, experts), the new group's last.
        num_new: size of the new group.
        mask: (tokens,), true for tokens that count; all when None.

    Returns:
        (5,), the dtype of the weights; the entropy of a token's weights is in nats. All 0 where no token counts.
    """
    counts = weights.new_ones(weights.shape[:-1]) if mask is None else mask.to(weights.dtype)
    counts = counts / counts.sum().clamp(min=1)
    order = (TokenType.NEW, TokenType.AMBIGUOUS, TokenType.OLD)
    shares = [((types == int(kind)) * counts).sum() for kind in order]
    means = (weights[..., weights.shape[-1] - num_new :].sum(-1), torch.special.entr(weights).sum(-1))
    return torch.stack([*shares, *((value * counts).sum() for value in means)])


def rsr_scale(step: float, total_steps: float, start: float = Routing.rsr_start) -> float:
    """Scale of the regularization: 0 up to the share `start` of a task's steps, then linear to 1 at the end.

    Args:
        step: optimizer steps done in this task, >= 0.
        total_steps: optimizer steps of this task, > 0.
        start: share of the steps before the scale rises, in [0, 1).

    Returns:
        A float in [0, 1].

    Raises:
        ValueError: total_steps <= 0, or start outside [0, 1).
    """
    if not total_steps > 0:
        raise ValueError(f"total_steps must be positive, got {total_steps}")
    if not 0 <= start < 1:
        raise ValueError(f"start must be in [0, 1), got {start}")
    return min(max((step / total_steps - start) / (1 - start), 0.0), 1.0)
