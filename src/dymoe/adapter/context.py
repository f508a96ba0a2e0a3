"""What a forward pass is told: which tokens count, what a selector chose, how far the task is.

One context per model, beside its routing trace, which holds what the layers leave. At the start of a pass the model
reads the pass's own arguments; the rest is set by whoever trains, generates or selects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dymoe.adapter.decoder import key_value_cache
from dymoe.routing import rsr_scale


class ForwardContext:
    """What all wrapped layers of a model are told of the current forward pass.

    Attributes:
        rsr_start: share of a task's steps before the regularization rises (from the training group's config).
        scale: the regularization's scale now, a 0-d float32 tensor (changed in place, so that compiled layers need no
            new compilation); `rsr_active` says whether it is above 0.
        collect: whether layers leave token statistics while training (cheap, but not free).
        num_layers: wrapped layers that carry the training group; terms are means over them.
        token_mask: (batch, tokens), true for tokens that are not padding; None for all.
        prompt_mask: the same without the answers' tokens, where labels are known; else equal to `token_mask`.
        labels: (batch, tokens) of the passes that do not get them as an argument (see `labelled`).
        finished: (batch,), true for rows of a batch in generation that have ended; their tokens do not count. Set by
            whoever generates, None when nobody does.
        selection: what a selector decided for the samples, (groups, (samples, groups) without gradient), or None.
        selection_gradient: collects the layers' gradients of the selection while a selector learns, else None.
        prompts: what gates keep of the samples' prompts by layer, (samples, ...), while answers are decoded; None
            where no key/value cache is in use.
    """

    def __init__(self) -> None:
        self.rsr_start = 0.5
        self.scale = torch.ones(())
        self.rsr_active = True
        self.collect = True
        self.num_layers = 1
        self._progress: float | None = None
        self.forget()

    def forget(self) -> None:
        """Leave everything that belongs to one forward pass."""
        self.token_mask: Tensor | None = None
        self.prompt_mask: Tensor | None = None
        self.labels: Tensor | None = None
        self.finished: Tensor | None = None
        self.selection: tuple[tuple[str, ...], Tensor] | None = None
        self.selection_gradient: SelectionGradient | None = None
        self.prompts: dict[str, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles of a model take over: nothing of the pass that the original is in."""
        copy = ForwardContext.__new__(ForwardContext)
        vars(copy).update(vars(self))
        copy.forget()
        return vars(copy)

    @property
    def progress(self) -> float | None:
        """Share of the task's optimizer steps done, in [0, 1], set by whoever trains.

        None when nobody does; then the regularization runs at full scale.
        """
        return self._progress

    @progress.setter
    def progress(self, value: float | None) -> None:
        self._progress = value
        scale = 1.0 if value is None else rsr_scale(value, 1.0, self.rsr_start)
        self.scale.fill_(scale)
        self.rsr_active = scale > 0

    @contextmanager
    def labelled(self, labels: Tensor | None) -> Iterator[None]:
        """Tell the passes in the block the labels (batch, tokens), so that no selector or gate sees the answers."""
        before, self.labels = self.labels, labels
        try:
            yield
        finally:
            self.labels = before

    def begin(self, module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
        """Start a forward pass: read the masks from its arguments.

        Args:
            module: the model.
            kwargs: its keyword arguments; `attention_mask` (batch, tokens), `labels` (batch, tokens) and a key/value
                cache are read where present.
        """
        mask = kwargs.get("attention_mask")
        self.token_mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if self.token_mask is not None and self.finished is not None:
            self.token_mask = self.token_mask & ~self.finished.unsqueeze(-1)
        known = kwargs["labels"] if kwargs.get("labels") is not None else self.labels
        self.prompt_mask = self.token_mask
        if known is not None and (self.token_mask is None or self.token_mask.shape == known.shape):
            self.prompt_mask = known == -100 if self.token_mask is None else self.token_mask & (known == -100)
        cache = key_value_cache(module, kwargs.values(), needed=False)
        if cache is None or not cache.get_seq_length():
            self.prompts = None if cache is None else {}

    def keep_samples(self, index: Tensor) -> None:
        """Go on with these samples of a batch in generation alone; `index` holds their positions, (samples,)."""
        if self.selection is not None:
            names, weights = self.selection
            self.selection = (names, weights[index.to(weights.device)])
        if self.prompts is not None:
            self.prompts = {layer: value[index.to(value.device)] for layer, value in self.prompts.items()}

    def selection_for(self, groups: Sequence[str], x: Tensor | None = None) -> Tensor | None:
        """Return the selection's columns for these groups, (samples, groups), or None when nothing was selected.

        Args:
            groups: active groups of a layer.
            x: the layer's input; the columns come on its device and, while a selector learns, their gradient is
                collected in the backward pass of the graph that `x` belongs to.
        """
        if self.selection is None:
            return None
        names, weights = self.selection
        if x is not None:
            weights = weights.to(x.device)
            if self.selection_gradient is not None and torch.is_grad_enabled():
                weights = _Take.apply(x, weights, self.selection_gradient)
        return weights if names == tuple(groups) else weights[:, [names.index(group) for group in groups]]

    def mask_for(self, tokens: torch.Size, mask: Tensor | None = None) -> Tensor | None:
        """Return the mask of the tokens that count for a layer input of shape (*tokens, features), or None for all.

        While decoding with a cache the attention mask is longer than the input: its last columns are meant.

        Args:
            tokens: leading dimensions of the layer's input.
            mask: of the model's tokens, (batch, tokens); `token_mask` when None.
        """
        mask = self.token_mask if mask is None else mask
        if mask is None or len(tokens) == 0:
            return None
        if len(tokens) == 2 and tokens[0] == mask.shape[0] and tokens[1] <= mask.shape[1]:
            return mask[:, mask.shape[1] - tokens[1] :]
        if len(tokens) == 1 and tokens[0] == mask.numel():
            return mask.reshape(-1)
        return None


class SelectionGradient:
    """Gradient of a pass's selection on its way from the layers to the selector.

    The layers see the selection detached: were it a part of their graph, reentrant checkpointing would walk through
    the selector once per layer and fail at the second. Each layer takes it through `_Take`, whose backward adds to the
    sum here; `tie` puts a last node between the decoder's layers and their input, which runs after all of them and
    sends the sum into the selector's graph. So everything happens inside the one backward pass, in the order of the
    graph, under both kinds of checkpointing.

    A partial `torch.autograd.grad` that does not reach the selector leaves its sum behind; do not go through the same
    retained graph again after one.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Add one layer's gradient, (samples, groups)."""
        self.total = gradient if self.total is None else self.total + gradient.to(self.total)

    def tie(self, embeddings: Tensor, selection: Tensor) -> Tensor:
        """Return `embeddings` unchanged, with a backward that also hands the collected sum to `selection`."""
        return _Tie.apply(embeddings, selection, self)


class _Take(torch.autograd.Function):
    """A selection without gradient, made a part of the layer's graph by the layer's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, selection: Tensor, gradient: SelectionGradient) -> Tensor:
        ctx.gradient = gradient
        return selection.view_as(selection)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.gradient.add(gradients[0])
        return None, None, None


class _Tie(torch.autograd.Function):
    """Identity on the embeddings whose backward hands the collected gradient to the selection."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, selection: Tensor, gradient: SelectionGradient) -> Tensor:
        ctx.gradient, ctx.like = gradient, (selection.device, selection.dtype)
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        total, ctx.gradient.total = ctx.gradient.total, None
        return gradients[0] if ctx.needs_input_grad[0] else None, None if total is None else total.to(*ctx.like), None
