"""The greedy decoding loop that transformers' `generate` runs for us: rows that have ended leave the batch."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dymoe.adapter.trace import RoutingTrace

# What `generate` carries on from step to step, one column a token; the batch is the last dimension but one.
_BY_TOKEN = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


class Greedy:
    """A decoding method for `generate(custom_generate=...)`: the most likely token, until every row has ended.

    Whenever half of the rows at work have ended, the others go on without them (a row's cached keys and values are
    copied at most as often as the batch can be halved). The tokens are those of transformers' own loop.

    Args:
        trace: of the experts; it is told which rows have ended, so that their tokens do not count.
    """

    def __init__(self, trace: "RoutingTrace | None" = None) -> None:
        self._trace = trace

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **carried: Any,
    ) -> torch.Tensor:
        """The answers' tokens, int64 (batch, at most the longest answer), padded on the right.

        Args:
            model: what generates.
            input_ids: the prompts, (batch, tokens), padded on the left.
            logits_processor: changes the scores where the model's own generation config asks for it.
            stopping_criteria: its maximum length is kept.
            generation_config: pad and end tokens.
            carried: the model's other inputs.
        """
        steps = stopping_criteria.max_length - input_ids.shape[1]
        pad, ends = generation_config._pad_token_tensor, generation_config._eos_token_tensor
        written = pad.repeat(input_ids.shape[0], steps)
        places = torch.arange(input_ids.shape[0], device=input_ids.device)  # in the batch, of the rows at work
        running = torch.ones_like(places, dtype=torch.bool)
        try:
            outputs = model._prefill(input_ids, generation_config, carried)
            for step in range(steps):
                carried = model._update_model_kwargs_for_generation(outputs, carried)
                scores = logits_processor(input_ids, outputs.logits[:, -1].to(torch.float32, copy=True))
                tokens = torch.where(running, scores.argmax(-1), pad)
                written[places, step] = tokens
                running = running & ~torch.isin(tokens, ends)
                left = int(running.sum())
                if not left or step == steps - 1:
                    break
                input_ids = torch.cat([input_ids, tokens[:, None]], 1)
                if 2 * left <= len(running) and _may_shrink(carried):
                    kept = running.nonzero().squeeze(1)
                    input_ids, places, running = input_ids[kept], places[kept], running[kept]
                    carried = _rows(carried, kept)
                    if self._trace is not None:
                        self._trace.keep_samples(kept)
                if self._trace is not None:
                    self._trace.finished = ~running
                new = 1 if carried.get("use_cache") else None
                inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=new, **carried)
                outputs = model(**inputs, return_dict=True)
        finally:
            if self._trace is not None:
                self._trace.finished = None
        return written[:, : step + 1]


def _may_shrink(carried: dict[str, Any]) -> bool:
    """Whether every layer's cache is a plain one, of which rows can be taken."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

    cache = carried.get("past_key_values")
    return isinstance(cache, DynamicCache) and all(
        isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in cache.layers
    )


def _rows(carried: dict[str, Any], kept: torch.Tensor) -> dict[str, Any]:
    """What is carried on, of the rows `kept` alone; the pictures were read with the prompt."""
    carried["past_key_values"].batch_select_indices(kept)
    taken = {name: carried[name].index_select(-2, kept) for name in _BY_TOKEN if carried.get(name) is not None}
    return {**carried, **taken}
