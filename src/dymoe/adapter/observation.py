"""Forward passes that only look: in evaluation mode, without gradient, and the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from dymoe.adapter.selection import Collected


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Keep `model` in evaluation mode (no dropout) while the block runs; gradients stay possible."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def observe(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *observers: Any,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    until: tuple[type[Exception], ...] = (),
) -> None:
    """Pass batches through the model only to look at what its layers do; selectors do not see the answers.

    The trace holds the last batch's state afterwards; inside of ``trace.aside()`` it is as it was.

    Args:
        model: a PEFT model with expert groups.
        batches: the model's keyword arguments, with or without `labels`, on its device.
        observers: each gets every wrapped layer's routing (`RoutingTrace.observers`); hooks see the rest.
        autocast: makes the context in which the model runs.
        until: exceptions with which a pass may end, once all is seen.
    """
    trace = model.base_model.trace
    trace.observers += observers
    try:
        with evaluating(model):
            for batch in batches:
                inputs = {key: value for key, value in batch.items() if key != "labels"}
                labelled = trace.context.labelled(batch.get("labels"))
                with labelled, torch.no_grad(), autocast(), suppress(*until):
                    model(**inputs, logits_to_keep=1, use_cache=False)
    finally:
        for observer in observers:
            trace.observers.remove(observer)


def prompt_features(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """What the model's selector sees of these prompts, answers left out: (samples, width), float32.

    Args:
        model: a PEFT model with a selector.
        batches: as for `observe`, as `autocast` is.
    """
    tuner = model.base_model
    with tuner.trace.aside(), tuner.selector.collecting() as rows:
        observe(model, batches, autocast=autocast, until=(Collected,))
    return torch.cat(rows)
