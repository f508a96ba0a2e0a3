"""Selectors: weights over the expert groups that hold for a whole sample, decided once per prompt.

A selector sits beside the language model's first layer. Before that layer runs it sees the prompt's embeddings (text
and image alike) and leaves a selection (samples, groups) in the forward context; the gates of all layers obey it. Its
parameters belong to the groups: they are saved, frozen, hashed and deleted with them. A selector that holds while
training may learn: its gradient comes back through the decoder's input (see `adapter.context.SelectionGradient`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dymoe.adapter.context import ForwardContext, SelectionGradient
from dymoe.adapter.decoder import key_value_cache
from dymoe.adapter.holder import GroupHolder


class Selector(GroupHolder):
    """Base of all selectors.

    Args:
        width: features of the language model's embeddings.

    Attributes:
        name: what a config's `selector` says.
        while_training: whether the selection also holds in training mode (soft attention over groups does, a choice
            of a task does not).
    """

    name: ClassVar[str] = ""
    while_training: ClassVar[bool] = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self._collected: list[Tensor] | None = None

    def add_group(self, group: str, options: Mapping[str, Any]) -> None:
        """Make the group's parameters (`options` are the config's `selector_options`)."""
        raise NotImplementedError

    def select(self, prompt: Prompt, groups: Sequence[str]) -> Tensor | None:
        """Weights over the active groups, (samples, groups), float32; None selects nothing."""
        raise NotImplementedError

    @contextmanager
    def collecting(self) -> Iterator[list[Tensor]]:
        """Gather the features of prompts instead of choosing; each forward pass ends early by raising `Collected`."""
        self._collected = []
        try:
            yield self._collected
        finally:
            self._collected = None

    def decide(self, prompt: Prompt, groups: Sequence[str]) -> Tensor | None:
        """As `select`, or while `collecting` nothing but the prompt's features.

        Raises:
            Collected: the features are taken.
        """
        if self._collected is not None:
            self._collected.append(prompt.features())
            raise Collected
        return self.select(prompt, groups)


class Collected(Exception):
    """A forward pass gave its features and need not go on."""


class Prompt:
    """What a selector may look at: the embeddings that enter the decoder.

    Args:
        decoder: the language model's decoder.
        embeddings: (samples, tokens, width).
        attention_mask: (samples, tokens), true for tokens that are not padding; None for all.
        prompt_mask: the same without the answer while training; equal to the attention mask otherwise.
        arguments: the decoder's other keyword arguments.
    """

    def __init__(
        self,
        decoder: nn.Module,
        embeddings: Tensor,
        attention_mask: Tensor | None,
        prompt_mask: Tensor | None,
        arguments: Mapping[str, Any],
    ) -> None:
        self.decoder = decoder
        self.embeddings = embeddings
        full = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        self.attention_mask = full if attention_mask is None else attention_mask.bool()
        self.prompt_mask = self.attention_mask if prompt_mask is None else prompt_mask
        self.arguments = arguments

    def features(self) -> Tensor:
        """Last hidden state of the frozen decoder, all adapters off, at the last prompt token: (samples, width).

        One more pass through the decoder, without gradient.
        """
        holders = [module for module in self.decoder.modules() if isinstance(module, GroupHolder)]
        before = [holder._disable_adapters for holder in holders]
        training = self.decoder.training
        try:
            self.decoder.eval()
            for holder in holders:
                holder._disable_adapters = True
            with torch.no_grad():
                hidden = self.decoder.forward(
                    inputs_embeds=self.embeddings,
                    attention_mask=self.attention_mask.long(),
                    position_ids=self.arguments.get("position_ids"),
                    use_cache=False,
                ).last_hidden_state
        finally:
            self.decoder.train(training)
            for holder, disabled in zip(holders, before, strict=True):
                holder._disable_adapters = disabled
        tokens = torch.arange(hidden.shape[1], device=hidden.device)
        last = (self.prompt_mask * (tokens + 1)).argmax(1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last].float()


class Select:
    """Forward pre-hook of the decoder: lets the selector decide at the start of a prompt.

    While decoding with a cache the prompt's decision holds. Without a cache every step is a prompt of its own, which
    ends with the tokens answered so far.
    """

    def __init__(self, selector: Selector, context: ForwardContext) -> None:
        self.selector = selector
        self.context = context

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Decide, unless a prompt's decision still holds.

        Returns:
            The decoder's new arguments where the selector learns: its input then carries the selection's gradient.
        """
        context, groups = self.context, tuple(self.selector.active_adapters)
        entering = kwargs.get("inputs_embeds")
        if entering is None:
            entering = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        follows = _follows(entering.shape[1], context.token_mask, kwargs.get("position_ids"))
        past = key_value_cache(module, (*args, *kwargs.values()), needed=follows)
        if past is not None and past.get_seq_length() > 0:
            return None  # decoding goes on with what the prompt decided
        context.selection = context.selection_gradient = None
        idle = self.selector._disable_adapters or not groups
        if idle or (module.training and not self.selector.while_training):
            return None
        embeddings = entering
        if not entering.is_floating_point():
            embeddings = module.get_input_embeddings()(entering)  # type: ignore[operator]
        mask = kwargs.get("attention_mask")
        mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else context.token_mask
        prompt = Prompt(module, embeddings, mask, context.prompt_mask, kwargs)
        chosen = self.selector.decide(prompt, groups)
        if chosen is None:
            return None
        context.selection = (groups, chosen.detach())
        if not (torch.is_grad_enabled() and chosen.requires_grad):
            return None
        context.selection_gradient = SelectionGradient()
        tied = context.selection_gradient.tie(embeddings, chosen)
        kwargs = {**kwargs, "inputs_embeds": tied}
        if args:
            return (None, *args[1:]), kwargs  # the decoder's first argument is input_ids
        return args, {**kwargs, "input_ids": None}


def _follows(tokens: int, mask: Tensor | None, positions: Tensor | None) -> bool:
    """Whether so many tokens follow others, by the mask of all or by their positions (some models count from 1)."""
    if mask is not None and mask.shape[1] > tokens:
        return True
    return tokens == 1 and positions is not None and bool((positions > 1).all())
