"""The routing trace: what each wrapped layer leaves behind in a forward pass.

One trace per model, with the context that says what a pass is told. Every wrapped layer leaves its loss terms and, if
somebody observes, its routing. The loss terms act on the layer's parameters although they never travel through the
model's outputs: each layer passes its output through `inject`, which hands the terms their gradient when the backward
pass arrives, scaled by whatever the loss itself was scaled with (`attach`). This keeps the terms right under both kinds
of gradient checkpointing, gradient accumulation and loss scaling, with any trainer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dymoe.adapter.context import ForwardContext

TERMS = ("load_balance", "exclusivity", "specialization")
UNKNOWN_WEIGHT = (
    "dymoe: the loss is not the model's own, so the routing terms weigh 1 in every backward pass, whatever the loss is "
    "divided or multiplied by (gradient accumulation, float16, several processes); give the model its labels, or call "
    "model.base_model.trace.attach(loss, share) on the loss"
)
STATISTICS = ("share_new", "share_ambiguous", "share_old", "new_group_weight", "entropy")


@dataclass(frozen=True)
class LayerRouting:
    """How one wrapped layer routed the tokens of one forward pass (all tensors detached).

    Args:
        layer: the layer's name in the model.
        groups: names of the active groups, in the order of their columns.
        sizes: experts of each group.
        scores: routing scores before guidance, (..., experts), or None for a gate without scores.
        weights: routing weights, (..., experts).
        mask: (...), true for tokens that count, or None when all do.
    """

    layer: str
    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    scores: Tensor | None
    weights: Tensor
    mask: Tensor | None


def place_of(layer: str) -> tuple[int, str]:
    """Decoder layer (0 where the name has no number) and projection of a wrapped layer, by its name in the model.

    >>> place_of("model.language_model.layers.3.self_attn.v_proj")
    (3, 'v_proj')
    """
    parts = layer.split(".")
    return next((int(part) for part in parts if part.isdigit()), 0), parts[-1]


class RoutingTrace:
    """What the wrapped layers of a model leave in a forward pass: routing for observers, terms for the loss.

    Attributes:
        context: what the pass is told.
        observers: each gets every wrapped layer's `LayerRouting`.
        upstream: the gradient that the loss received, scalar; layers give it to their terms.
    """

    def __init__(self) -> None:
        self.context = ForwardContext()
        self._forget()

    def _forget(self) -> None:
        self.observers: list[Callable[[LayerRouting], None]] = []
        self.upstream: Tensor = torch.ones(())
        self._share: Tensor | float = 1.0
        self._items: Tensor | int | None = None
        self._attached: list[bool] = []
        self._totals: dict[str, Tensor] = {}
        self._terms: dict[str, Tensor] = {}
        self._statistics: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles of a model take over: nothing of the pass that the original is in."""
        copy = RoutingTrace.__new__(RoutingTrace)
        copy.context = self.context
        copy._forget()
        # A tensor made here would be gone before another process has opened its memory.
        return {**vars(copy), "upstream": self.upstream}

    def begin(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        """Start a forward pass: read its arguments, and the micro-batch's share of the loss from them.

        Args:
            module: the model.
            kwargs: its keyword arguments; `labels` (batch, tokens) and `num_items_in_batch` are read where present, and
                what `ForwardContext.begin` reads.
        """
        self.context.begin(module, kwargs)
        labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        # With gradient accumulation the loss of a micro-batch is its sum over all items of the batch; a mean over the
        # micro-batch's tokens then counts by the micro-batch's share of the items.
        self._share = (labels[..., 1:] != -100).sum() / items if labels is not None and items is not None else 1.0
        device = next((value.device for value in kwargs.values() if isinstance(value, Tensor)), None)
        self.upstream = torch.ones((), device=device)
        self._items, self._attached = items, []
        self._totals, self._terms, self._statistics = {}, {}, {}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keep this pass's state while the block runs the model for another purpose (a teacher, a probe)."""
        snapshots = [(part, dict(vars(part))) for part in (self, self.context)]
        self.observers = []
        try:
            yield
        finally:
            for part, snapshot in snapshots:
                vars(part).update(snapshot)

    def leave_terms(self, layer: str, total: Tensor, terms: Tensor, statistics: Tensor | None) -> None:
        """Record a layer's weighted loss (scalar), its unweighted terms (3,) and its token statistics (5,) or None."""
        self._totals[layer] = total.detach()
        self._terms[layer] = terms.detach()
        if statistics is not None:
            self._statistics[layer] = statistics

    def leave_routing(self, routing: LayerRouting) -> None:
        """Hand a layer's routing to every observer."""
        for observer in self.observers:
            observer(routing)

    def inject(self, output: Tensor, total: Tensor) -> Tensor:
        """Return `output` unchanged, tied to the layer's loss `total` (scalar) so that backward reaches it."""
        return _Inject.apply(output, total, self.upstream)

    def attach(self, loss: Tensor, share: float | Tensor | None = None) -> Tensor:
        """Add the layers' loss terms to the loss and let them share the gradient that the loss receives.

        The model's forward calls this when it computes a loss; a trainer that computes the loss itself calls it on
        that loss, once per forward pass.

        Args:
            loss: scalar.
            share: this micro-batch's share of the batch (1 without accumulation); read from the forward's arguments
                when None.
        """
        if not self._totals:
            return loss
        self._attached.append(True)
        total = torch.stack([value.to(loss.device) for value in self._totals.values()]).sum()
        return _Attach.apply(loss, total, self.upstream, self._share if share is None else share)

    def follow(self, logits: Tensor) -> None:
        """Weigh the terms of a pass whose loss somebody computes from these logits and never attaches.

        A loss over the items of a whole batch has the share of this micro-batch's items, and those are the tokens whose
        logits get a gradient. Where the number of the batch's items is not known, or the loss is scaled by what cannot
        be seen from here, the terms weigh 1 a backward pass and one warning says so.

        Args:
            logits: (..., tokens, vocabulary).
        """
        if not self._totals or not logits.requires_grad or torch.compiler.is_compiling():
            return
        upstream, items, attached = self.upstream, self._items, self._attached
        half = torch.is_autocast_enabled(logits.device.type) and (
            torch.get_autocast_dtype(logits.device.type) == torch.float16
        )
        many = torch.distributed.is_available() and torch.distributed.is_initialized()

        def weigh(gradient: Tensor) -> None:
            if attached:
                return
            if items is not None:
                upstream.data.copy_((gradient != 0).any(-1).sum() / items)
            if items is None or half or (many and torch.distributed.get_world_size() > 1):
                warnings.warn(UNKNOWN_WEIGHT, stacklevel=1)

        logits.register_hook(weigh)

    def by_layer(self) -> dict[str, dict[str, float]]:
        """Return the loss terms and token statistics of every wrapped layer in the last training forward."""
        result: dict[str, dict[str, float]] = {}
        for names, values in ((TERMS, self._terms), (STATISTICS, self._statistics)):
            if values:
                rows = torch.stack([value.float().cpu() for value in values.values()]).tolist()
                for layer, row in zip(values, rows, strict=True):
                    result.setdefault(layer, {}).update(zip(names, row, strict=True))
        return result

    def summary(self) -> dict[str, float]:
        """Return means over the wrapped layers of the last training forward: loss terms and token statistics."""
        rows = list(self.by_layer().values())
        return {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}

    @contextmanager
    def measuring(self) -> Iterator[GroupWeights]:
        """Sum the routing weight of every group while the block runs (see `GroupWeights`)."""
        weights = GroupWeights()
        self.observers.append(weights)
        try:
            yield weights
        finally:
            self.observers.remove(weights)
            weights.fetch()


class GroupWeights:
    """An observer that sums each group's routing weight by layer, in constant memory.

    Sums stay where the layers are until `fetch`: a copy from a GPU would wait for it in every layer.
    """

    def __init__(self) -> None:
        self.groups: tuple[str, ...] = ()
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}

    def __call__(self, routing: LayerRouting) -> None:
        """Add one layer's routing of one forward pass."""
        weights, mask = routing.weights, routing.mask
        if mask is not None:
            weights = weights * mask.unsqueeze(-1)
            tokens = mask.sum(dtype=torch.float64)
        else:
            tokens = weights.new_full((), weights[..., 0].numel(), dtype=torch.float64)
        by_expert = weights.reshape(-1, weights.shape[-1]).double().sum(0)
        by_group = torch.stack([part.sum() for part in by_expert.split(list(routing.sizes))])
        self.groups = routing.groups
        for sums, value in ((self._sums, by_group), (self._tokens, tokens)):
            sums[routing.layer] = sums[routing.layer] + value if routing.layer in sums else value

    def fetch(self) -> None:
        """Bring the sums to the CPU."""
        for sums in (self._sums, self._tokens):
            sums.update({layer: value.cpu() for layer, value in sums.items()})

    @classmethod
    def joined(cls, parts: Sequence[GroupWeights]) -> GroupWeights:
        """The sums over several observers of one model, for example those of several processes."""
        total = cls()
        for part in parts:
            total.groups = part.groups or total.groups
            for sums, addends in ((total._sums, part._sums), (total._tokens, part._tokens)):
                for name, value in addends.items():
                    sums[name] = sums[name] + value if name in sums else value
        return total

    def by_name(self) -> dict[str, list[float]]:
        """Return the mean weight per group for every wrapped layer, keyed by the layer's name."""
        return {name: (total / self._tokens[name].clamp(min=1)).tolist() for name, total in self._sums.items()}

    def by_layer(self) -> dict[int, list[float]]:
        """Return the mean weight per group for every decoder layer, over its projections."""
        rows: dict[int, list[Tensor]] = {}
        for name, row in self.by_name().items():
            rows.setdefault(place_of(name)[0], []).append(torch.tensor(row, dtype=torch.float64))
        return {layer: torch.stack(parts).mean(0).tolist() for layer, parts in sorted(rows.items())}

    def by_group(self) -> list[float]:
        """Return the mean weight per group over tokens and wrapped layers, in the order of `groups`."""
        rows = list(self.by_name().values())
        return torch.tensor(rows, dtype=torch.float64).mean(0).tolist() if rows else []


class _Inject(torch.autograd.Function):
    """Identity on the output whose backward also sends the current upstream gradient into the layer's loss."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, total: Tensor, upstream: Tensor) -> Tensor:
        ctx.save_for_backward(upstream)
        ctx.total_dtype = total.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (upstream,) = ctx.saved_tensors
        return gradients[0], upstream.to(gradients[0].device, ctx.total_dtype), None


class _Attach(torch.autograd.Function):
    """Sum of loss and layer terms; its backward tells the layers the gradient that the sum received."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, total: Tensor, upstream: Tensor, share: Tensor | float) -> Tensor:
        ctx.upstream, ctx.share = upstream, share
        return loss + (total * share).to(loss.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        # Through `.data`: the layers saved this tensor for their backward, which runs after this one.
        ctx.upstream.data.copy_((gradients[0] * ctx.share).detach())
        return gradients[0], None, None, None
