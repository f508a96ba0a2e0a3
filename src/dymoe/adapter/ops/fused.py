"""The cosine gate and the bank of one linear as one autograd function, with its backward written out.

Forward, for tokens x (n, d), unit router rows U and hidden values h = A x of each side:

    s = (x . U) / |x|,   w = gate(s),   y = y0 + sum over sides of (w h) B

Backward, given g = dL / dy, with G = g B^T per side:

    dw = sum over ranks of G h,   dh = G w,   dA = dh^T x,   dB = (w h)^T g           (A and B of the new group alone)
    ds = (gate's Jacobian) dw + upstream * slope of the loss terms
    dx = dh A + (ds / |x|) U - (sum_e ds_e s_e / |x|^2) x

Only top_k scores a side have weight or slope, so ds is formed at the candidates alone (`candidates`). Where guidance
sends few tokens to the new group, its products run over those tokens' rows only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dymoe.adapter.ops.block import ExpertBlock
from dymoe.adapter.ops.candidates import Candidates, Rule, choose, through_softmax


@dataclass
class Bank:
    """One linear's bank and what its gate is told.

    Attributes:
        frozen: blocks of the old experts, scale folded into B, in the compute dtype.
        directions: their unit router rows, (old experts, d), float32 or wider; None without old experts.
        rule: of the gate.
        dtype: of the bank's products.
        r: rank of the new experts.
        scaling: factor on the new group's output.
        dropout: on the new group's input.
        mask: (n,), true for tokens that count in the losses, or None.
        scale: of the regularization, 0-d, or None.
        upstream: 0-d tensor that holds, once the backward pass arrives, the gradient of the loss terms' sum.
    """

    frozen: Sequence[ExpertBlock]
    directions: Tensor | None
    rule: Rule
    dtype: torch.dtype
    r: int = 1
    scaling: float = 1.0
    dropout: float = 0.0
    mask: Tensor | None = None
    scale: Tensor | None = None
    upstream: Tensor | None = None


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
        result: the frozen base's output, (..., out); overwritten where it has the compute dtype.
        router: router rows of the new group, (experts, d), or None without a new group.
        a: its A, (experts * r, d).
        b: its B transposed, (experts * r, out).
        bank: the frozen rest.

    Returns:
        The output, (..., out), dtype of `result`, and the `Outcome` (detached).
    """
    outcome = Outcome()
    with torch.autocast(x.device.type, enabled=False):  # the function says itself what is computed in which dtype
        return _Fused.apply(x, result, router, a, b, bank, outcome), outcome


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
        dtype = bank.dtype
        wide = torch.promote_types(x.dtype, torch.float32)
        shape, x = result.shape, x.reshape(-1, x.shape[-1])
        # In place where nobody else can hold the base's output: a fresh tensor, not a view.
        inplace = result.dtype == dtype and result._base is None and result.is_contiguous()
        inplace = inplace and not (result.is_leaf and result.requires_grad)
        output = result.view(len(x), -1) if inplace else torch.zeros(len(x), shape[-1], dtype=dtype, device=x.device)
        xw = x.to(wide)
        inverse = 1 / torch.linalg.vector_norm(xw, dim=1, keepdim=True).clamp(min=1e-12)
        directions = None if bank.directions is None else bank.directions.to(wide)
        old = x.new_empty(len(x), 0, dtype=wide) if directions is None else (xw @ directions.t()).mul_(inverse)
        unit = None if router is None else F.normalize(router.to(wide), dim=1, eps=1e-12)
        new = x.new_empty(len(x), 0, dtype=wide) if unit is None else (xw @ unit.t()).mul_(inverse)
        learning = any(ctx.needs_input_grad)
        chosen = choose(old, new, bank.rule, bank.mask, bank.scale, slope=learning)
        xc = x.to(dtype)
        split = chosen.split
        saved: list[Tensor | None] = []
        if bank.frozen:
            weights = chosen.spread(chosen.weights[:, :split], 0, old.shape[1]).to(dtype)
            start = 0
            for block in bank.frozen:
                hidden = xc @ block.a.t()
                part = weights[:, start : start + block.experts]
                output.addmm_(_gated(hidden, part, block.r), block.b)
                start += block.experts
                saved.append(hidden)
        rows = None
        if a is not None and b is not None:
            rows = _new_rows(chosen)
            own = chosen.spread(chosen.weights[:, split:], 1, new.shape[1])
            xn = xc if rows is None else xc[rows]
            own = own if rows is None else own[rows]
            kept = None
            if bank.dropout:
                xn, kept = torch.native_dropout(xn, bank.dropout, True)
            hidden = xn @ a.to(dtype).t()
            gated = _gated(hidden, (own * bank.scaling).to(dtype), bank.r)
            if rows is None:
                output.addmm_(gated, b.to(dtype))
            else:
                output.index_add_(0, rows, gated @ b.to(dtype))
            saved += [hidden, xn if kept is not None else None, kept]
        if inplace:
            ctx.mark_dirty(result)
        else:
            result = result + output.view(shape).to(result.dtype)
        if learning:
            ctx.bank, ctx.chosen, ctx.sizes = bank, chosen, (old.shape[1], new.shape[1])
            ctx.shape = result.shape[:-1]
            ctx.save_for_backward(x, inverse, router, a, b, rows, *saved)
        outcome.old, outcome.new, outcome.chosen = old, new, chosen
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(gradients[0].device.type, enabled=False):
            return _backward(ctx, gradients[0])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, inverse, router, a, b, rows, *saved = ctx.saved_tensors
    bank, chosen, (num_old, num_new) = ctx.bank, ctx.chosen, ctx.sizes
    dtype, split = bank.dtype, chosen.split
    wide = inverse.dtype
    g = gradient.reshape(len(x), -1).to(dtype)
    xc = x.to(dtype)
    to_x = to_router = to_a = to_b = None
    needs_x, _, needs_router, needs_a, needs_b = ctx.needs_input_grad[:5]
    inner = torch.zeros_like(x, dtype=dtype) if needs_x else None
    by_weight = []
    if bank.frozen:
        weights = chosen.spread(chosen.weights[:, :split], 0, num_old).to(dtype)
        found, start = [], 0
        for block, hidden in zip(bank.frozen, saved, strict=False):
            back = g @ block.b.t()
            found.append(_rank_sum(back, hidden, block.r, wide))
            if inner is not None:
                inner.addmm_(_gated(back, weights[:, start : start + block.experts], block.r), block.a)
            start += block.experts
        by_weight.append(chosen.picked(found[0] if len(found) == 1 else torch.cat(found, 1), 0))
    if a is not None:
        hidden, dropped, kept = saved[len(bank.frozen) :]
        gn = g if rows is None else g[rows]
        xn = dropped if dropped is not None else (xc if rows is None else xc[rows])
        own = chosen.spread(chosen.weights[:, split:], 1, num_new)
        own = ((own if rows is None else own[rows]) * bank.scaling).to(dtype)
        back = gn @ b.to(dtype).t()
        per_expert = _rank_sum(back, hidden, bank.r, wide).mul_(bank.scaling)
        if rows is not None:
            per_expert = per_expert.new_zeros(len(x), num_new).index_copy_(0, rows, per_expert)
        by_weight.append(chosen.picked(per_expert, 1))
        through = _gated(back, own, bank.r)
        if needs_b:
            to_b = (_gated(hidden, own, bank.r).t() @ gn).to(b.dtype)
        if needs_a:
            to_a = (through.t() @ xn).to(a.dtype)
        if inner is not None:
            if kept is not None:
                part = (through @ a.to(dtype)).mul_(kept).mul_(1 / (1 - bank.dropout))
                inner = inner.add_(part) if rows is None else inner.index_add_(0, rows, part)
            elif rows is None:
                inner.addmm_(through, a.to(dtype))
            else:
                inner.index_add_(0, rows, through @ a.to(dtype))
    slope = by_weight[0] if len(by_weight) == 1 else torch.cat(by_weight, 1)
    slope = through_softmax(chosen.weights, slope, bank.rule.temperature)
    if chosen.slope is not None:
        slope.addcmul_(chosen.slope, bank.upstream.to(slope.device, wide))
    along = (slope * chosen.scores).sum(1, keepdim=True)
    scaled = slope * inverse
    if needs_x:
        to_x = inner.addcmul_(xc, (along * inverse.square()).to(dtype), value=-1)
        if split:
            to_x.addmm_(chosen.spread(scaled[:, :split], 0, num_old).to(dtype), bank.directions.to(dtype))
    if router is not None:
        at_new = chosen.spread(scaled[:, split:], 1, num_new)
        norm = torch.linalg.vector_norm(router.to(wide), dim=1, keepdim=True).clamp(min=1e-12)
        unit = router.to(wide) / norm
        if needs_x:
            to_x.addmm_(at_new.to(dtype), unit.to(dtype))
        if needs_router:
            direct = at_new.t() @ x.to(wide)
            to_router = direct.addcmul_(unit, (direct * unit).sum(1, keepdim=True), value=-1).div_(norm)
            to_router = to_router.to(router.dtype)
    result = gradient if ctx.needs_input_grad[1] else None
    to_x = None if to_x is None else to_x.to(x.dtype).view(*ctx.shape, -1)
    return to_x, result, to_router, to_a, to_b, None, None


def _gated(hidden: Tensor, weights: Tensor, r: int) -> Tensor:
    """Hidden values (n, experts * r) times their expert's weight (n, experts)."""
    return (hidden.unflatten(1, (-1, r)) * weights.unsqueeze(2)).flatten(1)


def _rank_sum(back: Tensor, hidden: Tensor, r: int, dtype: torch.dtype) -> Tensor:
    """Sum over each expert's ranks of back * hidden, (n, experts)."""
    return (back * hidden).unflatten(1, (-1, r)).sum(2, dtype=dtype)


def _new_rows(chosen: Candidates) -> Tensor | None:
    """Tokens with weight on the new group where they are known to be few, else None (all).

    On a CPU alone: elsewhere counting them would wait for the device.
    """
    if chosen.split == 0 or chosen.weights.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    rows = chosen.weights[:, chosen.split :].amax(1).nonzero().squeeze(1)
    return rows if len(rows) * 2 <= len(chosen.weights) else None
