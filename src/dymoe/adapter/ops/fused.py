"""The cosine gate and the bank of one linear as one autograd function, with its backward written out.

Forward, for tokens x (n, d), unit router rows U and hidden values h = A x of each side:

    s = (x . U) / |x|,   w = gate(s),   y = y0 + sum over sides of (w h) B

Backward, given g = dL / dy, with G = g B^T per side:

    dw = sum over ranks of G h,   dh = G w,   dA = dh^T x,   dB = (w h)^T g           (A and B of the new group alone)
    ds = (gate's Jacobian) dw + upstream * slope of the loss terms
    dx = dh A + (ds / |x|) U - (sum_e ds_e s_e / |x|^2) x

Only top_k scores a side have weight or slope, so ds is formed at the candidates alone (`candidates`). What else a
token does not use is left out on a CPU, where products of few rows pay (`sparse`): old experts outside its top k once
the bank is large, and the new group where guidance sends few tokens there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dymoe.adapter.ops.block import ExpertBlock
from dymoe.adapter.ops.candidates import Candidates, Rule, choose, through_softmax
from dymoe.adapter.ops.sparse import Used, bag, few_rows


@dataclass
class Bank:
    """One linear's bank and what its gate is told.

    Attributes:
        frozen: blocks of the old experts, scale folded into B, in the compute dtype.
        directions: their unit router rows, (old experts, d), float32 or wider; None without old experts.
        rows: the same in the compute dtype.
        rule: of the gate.
        dtype: of the bank's products.
        r: rank of the new experts.
        scaling: factor on the new group's output.
        dropout: on the new group's input.
        mask: (n,), true for tokens that count in the losses, or None.
        scale: of the regularization, 0-d, or None.
        inplace: the base's output may be overwritten.
        upstream: 0-d tensor that holds, once the backward pass arrives, the gradient of the loss terms' sum;
            None is 1.
    """

    frozen: Sequence[ExpertBlock]
    directions: Tensor | None
    rows: Tensor | None
    rule: Rule
    dtype: torch.dtype
    r: int = 1
    scaling: float = 1.0
    dropout: float = 0.0
    mask: Tensor | None = None
    scale: Tensor | None = None
    upstream: Tensor | None = None
    inplace: bool = True


@dataclass
class Outcome:
    """What the forward pass found besides its output: both sides' scores (n, experts) and the gate's decision."""

    old: Tensor | None = None
    new: Tensor | None = None
    chosen: Candidates | None = None

    def scores(self) -> Tensor:
        """Scores of all experts, (n, experts)."""
        assert self.old is not None
        assert self.new is not None
        return torch.cat([self.old, self.new], 1)

    def weights(self) -> Tensor:
        """Routing weights of all experts, (n, experts)."""
        assert self.chosen is not None
        assert self.old is not None
        assert self.new is not None
        chosen, split = self.chosen, self.chosen.split
        old = chosen.spread(chosen.weights[:, :split], 0, self.old.shape[1])
        return torch.cat([old, chosen.spread(chosen.weights[:, split:], 1, self.new.shape[1])], 1)


def fused(
    x: Tensor,
    result: Tensor,
    router: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    bank: Bank,
) -> tuple[Tensor, Outcome]:
    """Base output plus bank output.

    Args:
        x: (..., d), any float dtype.
        result: the frozen base's output, (..., out); overwritten where the bank allows it and the dtypes agree.
        router: router rows of the new group, (experts, d), or None without a new group.
        a: its A, (experts * r, d).
        b: its B transposed, (experts * r, out).
        bank: the frozen rest.

    Returns:
        The output, (..., out), dtype of `result`, and the `Outcome` (detached).
    """
    outcome = Outcome()
    with torch.autocast(x.device.type, enabled=False):  # the function says itself what is computed in which dtype
        if torch.is_grad_enabled():
            return _Fused.apply(x, result, router, a, b, bank, outcome), outcome
        return _Fused.forward(None, x, result, router, a, b, bank, outcome), outcome


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor,
        router: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        bank: Bank,
        outcome: Outcome,
    ) -> Tensor:
        dtype, shape = bank.dtype, result.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.reshape(-1, x.shape[-1])
        # In place where nobody else can hold the base's output: a fresh tensor, not a view.
        inplace = bank.inplace and result.dtype == dtype and result._base is None and result.is_contiguous()
        inplace = inplace and not (result.is_leaf and result.requires_grad)
        output = (
            result.view(len(x), shape[-1]) if inplace else torch.zeros(len(x), shape[-1], dtype=dtype, device=x.device)
        )
        xw, xc = x.to(wide), x.to(dtype)
        norm = torch.linalg.vector_norm(xw, dim=1, keepdim=True)
        inverse = norm.reciprocal().masked_fill_(norm == 0, 0)  # a zero vector scores 0
        old = new = xw.new_empty(len(x), 0)
        if bank.directions is not None:
            old = (xw @ bank.directions.to(wide).t()).mul_(inverse)
        if router is not None:
            new = (xw @ F.normalize(router.to(wide), dim=1, eps=1e-12).t()).mul_(inverse)
        learning = ctx is not None and any(ctx.needs_input_grad)
        chosen = choose(old, new, bank.rule, bank.mask, bank.scale, slope=learning)
        split = chosen.split
        saved: list[Tensor | None] = []
        used = Used.of(bank.frozen, chosen) if bank.frozen else None
        if used is not None:
            hidden = used.sampled(xc, used.block.a)
            output.add_(used.summed(_gated(hidden, chosen.weights[:, :split].to(dtype), used.block.r), used.block.b))
            saved.append(hidden)
        elif bank.frozen:
            weights = chosen.spread(chosen.weights[:, :split], 0, old.shape[1]).to(dtype)
            parts = weights.split([block.experts for block in bank.frozen], 1)
            for block, part in zip(bank.frozen, parts, strict=True):
                hidden = xc @ block.a.t()
                output.addmm_(_gated(hidden, part, block.r), block.b)
                saved.append(hidden)
        rows = None
        if a is not None and b is not None:
            rows = few_rows(chosen.weights[:, split:]) if split else None
            own = chosen.spread(chosen.weights[:, split:], 1, new.shape[1])
            xn, own = (xc, own) if rows is None else (xc.index_select(0, rows), own.index_select(0, rows))
            kept = dropped = None
            if bank.dropout:
                xn, kept = torch.native_dropout(xn, bank.dropout, True)
                dropped = xn
            hidden = xn @ a.to(dtype).t()
            gated = _gated(hidden, (own * bank.scaling).to(dtype), bank.r)
            if rows is None:
                output.addmm_(gated, b.to(dtype))
            else:
                output.index_add_(0, rows, gated @ b.to(dtype))
            saved += [hidden, dropped, kept]
        if inplace and ctx is not None:
            ctx.mark_dirty(result)
        if not inplace:
            result = result + output.view(shape).to(result.dtype)
        if learning:
            ctx.bank, ctx.split, ctx.tokens = bank, split, shape[:-1]
            ctx.save_for_backward(
                x, inverse, router, a, b, rows, chosen.scores, chosen.weights, *chosen.index, chosen.slope, *saved
            )
        outcome.old, outcome.new, outcome.chosen = old, new, chosen
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(gradients[0].device.type, enabled=False):
            return _backward(ctx, gradients[0])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, inverse, router, a, b, rows, scores, weights, index_old, index_new, slope, *saved = ctx.saved_tensors
    bank, chosen = ctx.bank, Candidates(scores, weights, (index_old, index_new), ctx.split, slope=slope)
    used = Used.of(bank.frozen, chosen) if bank.frozen else None  # cheaper to find again than to keep
    dtype, wide, split = bank.dtype, inverse.dtype, chosen.split
    needs_x, needs_result, needs_router, needs_a, needs_b = ctx.needs_input_grad[:5]
    g, xc = gradient.reshape(-1, gradient.shape[-1]).to(dtype), x.to(dtype)
    num_old = 0 if bank.directions is None else len(bank.directions)
    by_weight: list[Tensor] = []  # gradient at the candidates' weights
    inner: list[tuple[Tensor, Tensor]] = []  # (gradient at hidden values, A): products that make up dx
    if used is not None:
        back = used.sampled(g, used.block.b)
        by_weight.append(_rank_sum(back, saved[0], used.block.r, wide))
        gathered = _gated(back, chosen.weights[:, :split].to(dtype), used.block.r)
    elif bank.frozen:
        weights = chosen.spread(chosen.weights[:, :split], 0, num_old).to(dtype)
        parts = weights.split([block.experts for block in bank.frozen], 1)
        found = []
        for block, hidden, part in zip(bank.frozen, saved, parts, strict=False):
            back = g @ block.b.t()
            found.append(_rank_sum(back, hidden, block.r, wide))
            inner.append((_gated(back, part, block.r), block.a))
        by_weight.append(chosen.picked(found[0] if len(found) == 1 else torch.cat(found, 1), 0))
    to_router = to_a = to_b = through = kept = None
    if a is not None:
        hidden, dropped, kept = saved[-3:]
        own = chosen.spread(chosen.weights[:, split:], 1, len(router))
        gn, xn = g, xc
        if rows is not None:
            gn, xn, own = g.index_select(0, rows), xc.index_select(0, rows), own.index_select(0, rows)
        xn = xn if dropped is None else dropped
        own = (own * bank.scaling).to(dtype)
        back = gn @ b.to(dtype).t()
        per_expert = _rank_sum(back, hidden, bank.r, wide).mul_(bank.scaling)
        if rows is not None:
            per_expert = per_expert.new_zeros(len(x), len(router)).index_copy_(0, rows, per_expert)
        by_weight.append(chosen.picked(per_expert, 1))
        through = _gated(back, own, bank.r)
        if needs_b:
            to_b = (_gated(hidden, own, bank.r).t() @ gn).to(b.dtype)
        if needs_a:
            to_a = (through.t() @ xn).to(a.dtype)
    slope = by_weight[0] if len(by_weight) == 1 else torch.cat(by_weight, 1)
    slope = through_softmax(chosen.weights, slope, bank.rule.temperature)
    if chosen.slope is not None:
        slope.add_(chosen.slope if bank.upstream is None else chosen.slope * bank.upstream.to(slope.device, wide))
    scaled = slope * inverse
    at_new = unit = norm = None
    if router is not None and (needs_x or needs_router):
        at_new = chosen.spread(scaled[:, split:], 1, len(router))
        norm = torch.linalg.vector_norm(router.to(wide), dim=1, keepdim=True).clamp_(min=1e-12)
        unit = router.to(wide) / norm
        if needs_router:
            direct = at_new.t() @ x.to(wide)
            to_router = direct.addcmul_(unit, (direct * unit).sum(1, keepdim=True), value=-1).div_(norm)
            to_router = to_router.to(router.dtype)
    result = gradient if needs_result else None
    if not needs_x:
        return None, result, to_router, to_a, to_b, None, None
    along = (scaled * chosen.scores).sum(1, keepdim=True).mul_(inverse).neg_()
    to_x = xc * along.to(dtype)
    if used is not None:
        to_x.add_(used.summed(gathered, used.block.a))
    for values, matrix in inner:
        to_x.addmm_(values, matrix)
    if split:
        index = chosen.index[0]
        if index is None or not len(x) or x.device.type != "cpu":
            to_x.addmm_(chosen.spread(scaled[:, :split], 0, num_old).to(dtype), bank.rows)
        else:
            to_x.add_(bag(index, scaled[:, :split].to(dtype), bank.rows))
    if at_new is not None and unit is not None:
        to_x.addmm_(at_new.to(dtype), unit.to(dtype))
    if through is not None:
        part = through @ a.to(dtype)
        if kept is not None:
            part.mul_(kept).mul_(1 / (1 - bank.dropout))
        to_x = to_x.add_(part) if rows is None else to_x.index_add_(0, rows, part)
    return to_x.to(x.dtype).view(*ctx.tokens, x.shape[1]), result, to_router, to_a, to_b, None, None


def _gated(hidden: Tensor, weights: Tensor, r: int) -> Tensor:
    """Hidden values (n, experts * r) times their expert's weight (n, experts)."""
    return hidden * weights.repeat_interleave(r, 1)


def _rank_sum(back: Tensor, hidden: Tensor, r: int, dtype: torch.dtype) -> Tensor:
    """Sum over each expert's ranks of back * hidden, (n, experts)."""
    return (back * hidden).unflatten(1, (-1, r)).sum(2, dtype=dtype)
