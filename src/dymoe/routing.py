"""Routing mathematics of LLaVA-DyMoE: scores, weights, token types, guidance and the losses on scores.

Pure functions, tensors in and tensors out, torch alone. Everywhere `scores` has shape (..., experts); the last
`num_new` columns belong to the new expert group, the columns before them to the old groups. Scores are cosines
(no unit, in [-1, 1]), weights are shares (no unit, rows sum to 1). Everything is computed in float32 at least
(float64 stays float64), also under autocast.

Source: "On Token's Dilemma" (LLaVA-DyMoE, CVPR 2026). Where the paper and what is reported of its authors' code
differ, the function's docstring names the choice.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Mask = Literal["exclusive", "protect", "only-ambiguous", "only-old", "no-token", "none"]


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
MASKS: tuple[str, ...] = tuple(REACHES)


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


def cosine_scores(x: Tensor, router: Tensor) -> Tensor:
    """Cosine between each token and each router row: s_e = (x / |x|) . (r_e / |r_e|).

    Args:
        x: layer inputs, (..., features), any float dtype.
        router: router rows, (experts, features), any float dtype.

    Returns:
        Scores, (..., experts), float32 (float64 if both inputs are). A zero vector scores 0.

    Raises:
        ValueError: the feature sizes differ.
    """
    if x.shape[-1] != router.shape[-1]:
        raise ValueError(f"tokens have {x.shape[-1]} features but router rows have {router.shape[-1]}")
    return scores_of_directions(x, F.normalize(_wide(router), dim=-1, eps=1e-12))


def scores_of_directions(x: Tensor, *directions: Tensor) -> Tensor:
    """`cosine_scores` for router rows that have unit length already (frozen rows are normalised only once).

    Args:
        x: layer inputs, (..., features), any float dtype.
        directions: blocks of unit router rows, (experts of the block, features) each, float32 or float64; the scores'
            columns follow their order.

    Returns:
        Scores, (..., experts of all blocks), float32 or wider.
    """
    rows = directions[0] if len(directions) == 1 else torch.cat(directions)
    with torch.autocast(device_type=x.device.type, enabled=False):
        return _Cosine.apply(x, rows.to(torch.promote_types(x.dtype, torch.float32)))


class _Cosine(torch.autograd.Function):
    """s = (x . d) / |x|, with a backward of one product and one fused sum instead of autograd's chain over x.

    ds/dx = (d - s x / |x|) / |x|; a zero vector has scores and gradient 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        wide = x.to(rows.dtype)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.reciprocal().masked_fill_(norm == 0, 0)
        scores = F.linear(wide, rows) * inverse
        ctx.save_for_backward(x, rows, inverse, scores)
        return scores

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, rows, inverse, scores = ctx.saved_tensors
        wide, scaled = x.to(rows.dtype), gradients[0] * inverse
        to_x = to_rows = None
        if ctx.needs_input_grad[0]:
            along = -(scaled * scores).sum(-1, keepdim=True) * inverse
            to_x = torch.addcmul(scaled @ rows, wide, along).to(x.dtype)
        if ctx.needs_input_grad[1]:
            to_rows = scaled.flatten(0, -2).t() @ wide.flatten(0, -2) if x.dim() > 1 else torch.outer(scaled, wide)
        return to_x, to_rows


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
    seen = types == int(kinds[0])
    for kind in kinds[1:]:
        seen = seen | (types == int(kind))
    return seen


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

    Args:
        scores: unguided scores, (..., experts).
        num_new: size of the new group (the last columns).
        top_k: experts with weight per token.
        temperature: > 0.

    Returns:
        (old mass, new mass, largest old weight), each (...); the last is detached and 0 without old experts.
    """
    num_old = _check_groups(scores, num_new)
    weights = topk_weights(scores, top_k, temperature)
    old, new = weights[..., :num_old], weights[..., num_old:]
    largest = old.detach().amax(-1) if num_old else torch.zeros_like(weights[..., 0])
    return old.sum(-1), new.sum(-1), largest


def _exclusivity(old_mass: Tensor, new_mass: Tensor) -> Tensor:
    return old_mass * new_mass


def _specialization(new_mass: Tensor, largest_old: Tensor) -> Tensor:
    target = (1 - largest_old).clamp(0, 1)
    return -(target * new_mass.clamp(min=1e-8).log() + (1 - target) * (1 - new_mass).clamp(min=1e-8).log())


def exclusivity_loss(
    scores: Tensor, num_new: int, top_k: int = 16, temperature: float = 0.1, mask: Tensor | None = None
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
    scores: Tensor, num_new: int, top_k: int = 16, temperature: float = 0.1, mask: Tensor | None = None
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
    top_k: int = 16,
    temperature: float = 0.1,
    mask: Tensor | None = None,
    mass: Callable[[Tensor, int, int, float], tuple[Tensor, Tensor, Tensor]] = group_mass,
) -> tuple[Tensor, Tensor]:
    """(exclusivity_loss, specialization_loss) of the same scores for the price of one softmax, computed by `mass`."""
    old, new, largest = mass(scores, num_new, top_k, temperature)
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
    new = _wide(weights[..., num_old:]).reshape(-1, num_new)
    if num_new == 0 or new.numel() == 0:
        return new.sum()
    counts = new.detach().sum(-1) > 0
    if mask is not None:
        if mask.shape != weights.shape[:-1]:
            raise ValueError(
                f"mask must have the shape of the tokens {tuple(weights.shape[:-1])}, got {tuple(mask.shape)}"
            )
        counts = counts & mask.reshape(-1).bool()
    new = new * counts.unsqueeze(-1)
    top = F.one_hot(new.detach().argmax(-1), num_new).to(new.dtype) * counts.unsqueeze(-1)
    dispatched = top.sum(0) / counts.sum().clamp(min=1)
    mass = new.sum(0)
    total = mass.sum()
    share = mass / torch.where(total > 0, total, torch.ones_like(total))
    return num_new * (dispatched * share).sum()


def rsr_scale(step: float, total_steps: float, start: float = 0.5) -> float:
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
