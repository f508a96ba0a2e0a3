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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dymoe.adapter.ops import numba
from dymoe.adapter.ops.block import ExpertBlock
from dymoe.adapter.ops.candidates import Candidates, Rule, choose, descend
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
        training: the linear is in training mode; both passes of checkpointing then compute the same way.
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
    training: bool = False


def inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| of tokens (..., d) in float32 or wider, (n, 1); 0 for a zero vector, which thus scores 0."""
    with torch.no_grad():
        wide = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        return norm.reciprocal().masked_fill_(norm == 0, 0)


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
    inverse_of: Callable[[Tensor], Tensor] = inverse_norm,
) -> tuple[Tensor, Outcome]:
    """Base output plus bank output.

    Args:
        x: (..., d), any float dtype.
        result: the frozen base's output, (..., out); overwritten where the bank allows it and the dtypes agree.
        router: router rows of the new group, (experts, d), or None without a new group.
        a: its A, (experts * r, d).
        b: its B transposed, (experts * r, out).
        bank: the frozen rest.
        inverse_of: gives `inverse_norm` of x; linears with the same input may share it.

    Returns:
        The output, (..., out), dtype of `result`, and the `Outcome` (detached).
    """
    outcome = Outcome()
    with torch.autocast(x.device.type, enabled=False):  # the function says itself what is computed in which dtype
        if torch.is_grad_enabled():
            return _Fused.apply(x, result, router, a, b, bank, outcome, partial(inverse_of, x)), outcome
        return _Fused.forward(None, x, result, router, a, b, bank, outcome, partial(inverse_of, x)), outcome


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
        inverse_of_x: Callable[[], Tensor],
    ) -> Tensor:
        dtype, shape = bank.dtype, result.shape
        x = x.reshape(-1, x.shape[-1])
        # In place where nobody else can hold the base's output: a fresh tensor, not a view.
        inplace = bank.inplace and result.dtype == dtype and result._base is None and result.is_contiguous()
        inplace = inplace and not (result.is_leaf and result.requires_grad)
        output = (
            result.view(len(x), shape[-1]) if inplace else torch.zeros(len(x), shape[-1], dtype=dtype, device=x.device)
        )
        alone = ctx is None and router is None and not bank.training
        if alone and bank.directions is not None and numba.serves(x, bank.frozen, dtype, bank.rule.top_k):
            outcome.old, outcome.chosen = numba.serve(x, output, bank.frozen[0], bank.directions, bank.rule)
            outcome.new = outcome.old[:, :0]
            return result if inplace else result + output.view(shape).to(result.dtype)
        inverse = inverse_of_x()
        wide = inverse.dtype
        xw, xc = x.to(wide), x.to(dtype)
        old = new = xw.new_empty(len(x), 0)
        if bank.directions is not None:
            old = (xw @ bank.directions.to(wide).t()).mul_(inverse)
        if router is not None:
            new = (xw @ F.normalize(router.to(wide), dim=1, eps=1e-12).t()).mul_(inverse)
        learning = ctx is not None and any(ctx.needs_input_grad)
        decide = numba.choose if numba.suits(xw, bank.training or learning) else choose
        chosen = decide(old, new, bank.rule, bank.mask, bank.scale, slope=learning)
        saved: list[Tensor | None] = _add_old(output, xc, chosen, bank) if bank.frozen else []
        rows = None
        if a is not None and b is not None:
            rows = few_rows(chosen.weights[:, chosen.split :]) if chosen.split else None
            saved += _add_new(output, xc, rows, chosen, a.to(dtype), b.to(dtype), bank)
        if inplace and ctx is not None:
            ctx.mark_dirty(result)
        if not inplace:
            result = result + output.view(shape).to(result.dtype)
        if learning:
            ctx.bank, ctx.split, ctx.tokens = bank, chosen.split, shape[:-1]
            decision = (chosen.scores, chosen.weights, *chosen.index, chosen.slope)
            ctx.save_for_backward(x, inverse, router, a, b, rows, *decision, *saved)
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
    dtype, wide, split = bank.dtype, inverse.dtype, chosen.split
    needs_x, needs_result = ctx.needs_input_grad[:2]
    g, xc = gradient.reshape(-1, gradient.shape[-1]).to(dtype), x.to(dtype)
    by_weight: list[Tensor] = []  # gradient at the candidates' weights, side by side
    inner: list[_Product] = []  # what dx is the sum of
    to_router = to_a = to_b = None
    if bank.frozen:
        inner += _old_back(g, saved, chosen, bank, by_weight)
    if a is not None:
        product, to_a, to_b = _new_back(g, xc, rows, saved[-3:], chosen, a, b, bank, by_weight)
        inner.append(product)
    through_gate = numba.descend if numba.suits(weights) else descend
    joined = by_weight[0] if len(by_weight) == 1 else torch.cat(by_weight, 1)
    scaled, along = through_gate(chosen, joined, inverse, bank.rule.temperature, bank.upstream)
    if split:
        inner.append(_old_rows(scaled[:, :split], chosen, bank))
    if router is not None:
        product, to_router = _router_back(x.to(wide), chosen.spread(scaled[:, split:], 1, len(router)), router, dtype)
        inner.append(product)
    to_x = None
    if needs_x:
        to_x = xc * along.to(dtype)
        for product in inner:
            product.add_to(to_x)
        to_x = to_x.to(x.dtype).view(*ctx.tokens, x.shape[1])
    return to_x, gradient if needs_result else None, to_router, to_a, to_b, None, None, None


@dataclass
class _Product:
    """values @ matrix, a part of the gradient at x.

    Attributes:
        values: (n, ranks), compute dtype.
        matrix: (ranks, d).
        ranks: rows of the matrix that the values belong to, (n, ranks); None where they are all rows in order.
        rows: tokens that the values belong to, or None for all.
        kept: what dropout kept of the input, or None.
        share: share that it keeps.
    """

    values: Tensor
    matrix: Tensor
    ranks: Tensor | None = None
    rows: Tensor | None = None
    kept: Tensor | None = None
    share: float = 1.0

    def add_to(self, total: Tensor) -> None:
        """Add the product to the tokens' gradient, (tokens, d)."""
        if self.ranks is not None:
            total.add_(bag(self.ranks, self.values, self.matrix))
        elif self.rows is None and self.kept is None:
            total.addmm_(self.values, self.matrix)
        else:
            part = self.values @ self.matrix
            if self.kept is not None:
                part.mul_(self.kept).mul_(1 / self.share)
            total.add_(part) if self.rows is None else total.index_add_(0, self.rows, part)


def _add_old(output: Tensor, x: Tensor, chosen: Candidates, bank: Bank) -> list[Tensor | None]:
    """Add the old experts' output; returns the hidden values, of the ranks in use or of each block."""
    weights = chosen.weights[:, : chosen.split]
    used = Used.of(bank.frozen, chosen)
    if used is not None:
        hidden = used.sampled(x, used.block.a)
        output.add_(used.summed(_gated(hidden, weights.to(bank.dtype), used.block.r), used.block.b))
        return [hidden]
    hiddens: list[Tensor | None] = []
    for block, part in _by_block(weights, chosen, bank):
        hidden = x @ block.a.t()
        output.addmm_(_gated(hidden, part, block.r), block.b)
        hiddens.append(hidden)
    return hiddens


def _old_back(
    g: Tensor, hiddens: Sequence[Tensor], chosen: Candidates, bank: Bank, by_weight: list[Tensor]
) -> list[_Product]:
    """Append the gradient at the old candidates' weights; returns the products of their part of dx."""
    weights = chosen.weights[:, : chosen.split]
    used = Used.of(bank.frozen, chosen)  # cheaper to find again than to keep
    if used is not None:
        back = used.sampled(g, used.block.b)
        by_weight.append(_rank_sum(back, hiddens[0], used.block.r, weights.dtype))
        return [_Product(_gated(back, weights.to(bank.dtype), used.block.r), used.block.a, used.ranks)]
    found, products = [], []
    for (block, part), hidden in zip(_by_block(weights, chosen, bank), hiddens, strict=False):
        back = g @ block.b.t()
        found.append(_rank_sum(back, hidden, block.r, weights.dtype))
        products.append(_Product(_gated(back, part, block.r), block.a))
    by_weight.append(chosen.picked(found[0] if len(found) == 1 else torch.cat(found, 1), 0))
    return products


def _by_block(weights: Tensor, chosen: Candidates, bank: Bank) -> Iterator[tuple[ExpertBlock, Tensor]]:
    """Every frozen block with its experts' weights, (n, experts of the block)."""
    experts = [block.experts for block in bank.frozen]
    spread = chosen.spread(weights, 0, sum(experts)).to(bank.dtype)
    return zip(bank.frozen, spread.split(experts, 1), strict=True)


def _add_new(
    output: Tensor, x: Tensor, rows: Tensor | None, chosen: Candidates, a: Tensor, b: Tensor, bank: Bank
) -> list[Tensor | None]:
    """Add the new group's output for these rows; returns hidden values, dropped input and dropout's mask."""
    weights = chosen.spread(chosen.weights[:, chosen.split :], 1, len(a) // bank.r)
    if rows is not None:
        x, weights = x.index_select(0, rows), weights.index_select(0, rows)
    kept = dropped = None
    if bank.dropout:
        x, kept = torch.native_dropout(x, bank.dropout, True)
        dropped = x
    hidden = x @ a.t()
    gated = _gated(hidden, (weights * bank.scaling).to(bank.dtype), bank.r)
    if rows is None:
        output.addmm_(gated, b)
    else:
        output.index_add_(0, rows, gated @ b)
    return [hidden, dropped, kept]


def _new_back(
    g: Tensor,
    x: Tensor,
    rows: Tensor | None,
    saved: Sequence[Tensor | None],
    chosen: Candidates,
    a: Tensor,
    b: Tensor,
    bank: Bank,
    by_weight: list[Tensor],
) -> tuple[_Product, Tensor, Tensor]:
    """Append the gradient at the new candidates' weights; returns the product of their part of dx, and dA and dB."""
    hidden, dropped, kept = saved
    assert hidden is not None
    weights = chosen.weights[:, chosen.split :]
    own = chosen.spread(weights, 1, len(a) // bank.r)
    x = x if dropped is None else dropped
    if rows is not None:
        g, own = g.index_select(0, rows), own.index_select(0, rows)
        x = x.index_select(0, rows) if dropped is None else dropped
    own = (own * bank.scaling).to(bank.dtype)
    back = g @ b.to(bank.dtype).t()
    per_expert = _rank_sum(back, hidden, bank.r, weights.dtype).mul_(bank.scaling)
    if rows is not None:
        per_expert = per_expert.new_zeros(len(weights), per_expert.shape[1]).index_copy_(0, rows, per_expert)
    by_weight.append(chosen.picked(per_expert, 1))
    through = _gated(back, own, bank.r)
    to_a, to_b = through.t() @ x, _gated(hidden, own, bank.r).t() @ g
    product = _Product(through, a.to(bank.dtype), rows=rows, kept=kept, share=1 - bank.dropout)
    return product, to_a.to(a.dtype), to_b.to(b.dtype)


def _router_back(x: Tensor, at_new: Tensor, router: Tensor, dtype: torch.dtype) -> tuple[_Product, Tensor]:
    """The new router rows' part of dx, and their own gradient, from the one at their scores over |x|, (n, experts)."""
    norm = torch.linalg.vector_norm(router.to(x.dtype), dim=1, keepdim=True).clamp_(min=1e-12)
    unit = router.to(x.dtype) / norm
    direct = at_new.t() @ x
    to_router = direct.addcmul_(unit, (direct * unit).sum(1, keepdim=True), value=-1).div_(norm)
    return _Product(at_new.to(dtype), unit.to(dtype)), to_router.to(router.dtype)


def _old_rows(scaled: Tensor, chosen: Candidates, bank: Bank) -> _Product:
    """The old router rows' part of dx, from the gradient at the old candidates' scores over |x|."""
    index = chosen.index[0]
    assert bank.rows is not None
    if index is None or not len(index) or scaled.device.type != "cpu":
        return _Product(chosen.spread(scaled, 0, len(bank.rows)).to(bank.dtype), bank.rows)
    return _Product(scaled.to(bank.dtype), bank.rows, index)


def _gated(hidden: Tensor, weights: Tensor, r: int) -> Tensor:
    """Hidden values (n, experts * r) times their expert's weight (n, experts)."""
    return hidden * weights.repeat_interleave(r, 1)


def _rank_sum(back: Tensor, hidden: Tensor, r: int, dtype: torch.dtype) -> Tensor:
    """Sum over each expert's ranks of back * hidden, (n, experts)."""
    return (back * hidden).unflatten(1, (-1, r)).sum(2, dtype=dtype)
