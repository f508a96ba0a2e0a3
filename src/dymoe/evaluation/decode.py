"""The greedy decoding loop that transformers' `generate` runs for us: rows that have ended leave the batch."""

from typing import TYPE_CHECKING, Any

import torch

from dymoe.adapter.decoder import key_value_cache
from dymoe.errors import DymoeError
from dymoe.libraries import require_names, untested

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from dymoe.adapter.context import ForwardContext


class Greedy:
    """A decoding method for `generate(custom_generate=...)`: the most likely token, until every row has ended.

    Whenever half of the rows at work have ended, the others go on without them (a row's cached keys and values are
    copied at most as often as the batch can be halved). The tokens are those of transformers' own loop.

    Args:
        context: of the experts; it is told which rows have ended, so that their tokens do not count.
        streamer: gets the answer's tokens of a single sample as they come.
    """

    def __init__(self, context: "ForwardContext | None" = None, streamer: "BaseStreamer | None" = None) -> None:
        from transformers import GenerationMixin

        require_names(GenerationMixin, "_prefill", "_update_model_kwargs_for_generation")
        self._context = context
        self._streamer = streamer

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

        Raises:
            DymoeError: a most likely token's score is infinite or not a number.
        """
        steps = stopping_criteria.max_length - input_ids.shape[1]
        pad, ends = generation_config._pad_token_tensor, generation_config._eos_token_tensor
        written = pad.repeat(input_ids.shape[0], steps)
        batch_rows = torch.arange(input_ids.shape[0], device=input_ids.device)  # in the batch, of the rows at work
        running = torch.ones_like(batch_rows, dtype=torch.bool)
        finite = running.all()
        try:
            outputs = model._prefill(input_ids, generation_config, carried)
            for step in range(steps):
                carried = model._update_model_kwargs_for_generation(outputs, carried)
                scores = logits_processor(input_ids, outputs.logits[:, -1].to(torch.float32, copy=True))
                chosen = scores.argmax(-1)
                finite &= (scores.gather(1, chosen[:, None])[:, 0].isfinite() | ~running).all()
                tokens = torch.where(running, chosen, pad)
                written[batch_rows, step] = tokens
                if self._streamer is not None:
                    self._streamer.put(tokens.cpu())
                running = running & ~torch.isin(tokens, ends)
                left = int(running.sum())
                if not left or step == steps - 1:
                    break
                input_ids = torch.cat([input_ids, tokens[:, None]], 1)
                cache: Any = key_value_cache(model, carried.values(), needed=generation_config.use_cache)
                if 2 * left <= len(running) and _may_shrink(carried):
                    rows = running.nonzero().squeeze(1)
                    carried = self._shrink(cache, carried, rows, input_ids.shape)
                    input_ids, batch_rows, running = input_ids[rows], batch_rows[rows], running[rows]
                if self._context is not None:
                    self._context.finished = ~running
                outputs = model(**_next(model, input_ids, carried, cached=cache is not None), return_dict=True)
        finally:
            if self._context is not None:
                self._context.finished = None
        if not finite:  # only now: to look at each step would be one more wait for a GPU
            raise DymoeError(
                "the model's scores for the next token are not finite; its groups or its weights are broken"
            )
        return written[:, : step + 1]

    def _shrink(self, cache: Any, carried: dict[str, Any], rows: torch.Tensor, shape: torch.Size) -> dict[str, Any]:
        """Go on with these rows of the batch alone: in the cache, in the context and in what is carried on."""
        cache.batch_select_indices(rows)
        if self._context is not None:
            self._context.keep_samples(rows)
        return {name: _rows(value, rows, shape) for name, value in carried.items()}


def _may_shrink(carried: dict[str, Any]) -> bool:
    """Whether there is a cache and every layer's is a plain one, of which rows can be taken."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

    cache = next((value for value in carried.values() if isinstance(value, DynamicCache)), None)
    return cache is not None and all(
        isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in cache.layers
    )


def _next(model: Any, input_ids: torch.Tensor, carried: dict[str, Any], cached: bool) -> dict[str, Any]:
    """The model's inputs for the next step: the last tokens alone where the earlier ones are cached."""
    new = 1 if cached else input_ids.shape[1]
    inputs: dict[str, Any] = model.prepare_inputs_for_generation(input_ids, next_sequence_length=new, **carried)
    if inputs["input_ids"].shape[1] != new:
        raise untested(model, "reads an answer's earlier tokens again beside their cache")
    return inputs


def _rows(value: Any, index: torch.Tensor, shape: torch.Size) -> Any:
    """The rows `index` of what is carried on, known by its two dimensions of `shape` (batch, tokens).

    What has none is the prompt's (the pictures were read with it) or the same for all.
    """
    if isinstance(value, torch.Tensor):
        for dimension in range(value.dim() - 1):
            if value.shape[dimension : dimension + 2] == shape:
                return value.index_select(dimension, index)
    return value
