"""Samples to batches: prompt, answer, image tokens, padding on the left, labels on the answer alone."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dymoe.errors import DymoeError
from dymoe.lvlm.features import ImageFeatures
from dymoe.lvlm.images import decode

if TYPE_CHECKING:
    from dymoe.lvlm.model import Lvlm
    from dymoe.tasks import Sample

IGNORE = -100  # the label of a position that is no target


class ImageTokens(BaseModelOutputWithPooling):
    """Precomputed image features in `pooler_output`, as transformers expects them.

    A plain ModelOutput forbids `update`, with which torch's DataLoader moves a mapping into pinned memory.
    """

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set the given fields."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value


class Collator:
    """Turns samples into a batch for the model's forward (call it) or for generate (`prompts`).

    Prompt and answer are written with the processor's chat template and tokenised apart, so that the prompt has the
    same tokens in training and in generation. Sequences are padded on the left: the answer always ends the row.
    Keys of a batch: `input_ids`, `attention_mask` and, in training, `labels`, all int64 (batch, length); for the
    images `pixel_values` (and what else the processor makes), or with `features` `mm_encoder_outputs`
    = {"image": output}, whose pooler_output is (images, image_tokens, hidden).
    """

    def __init__(self, lvlm: "Lvlm", features: ImageFeatures | None = None, max_length: int = 2048) -> None:
        processor = cast(Any, lvlm.processor)
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._features = features
        self._max_length = max_length
        self._eos: str = self._tokenizer.eos_token
        self._image_token: str = processor.image_token
        pad = self._tokenizer.pad_token_id
        self._pad: int = self._tokenizer.eos_token_id if pad is None else pad

    def __call__(self, samples: "Sequence[Sample]") -> dict[str, Any]:
        """The training batch.

        Raises:
            DymoeError: naming the sample: no answer, broken image, an image token in the text, longer than
                `max_length`.
        """
        prompts, images = self._encode_prompts(samples)
        answers = self._tokenize([self._answer_text(sample) for sample in samples])
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        batch = self._pad_left(samples, rows)
        labels = torch.full_like(batch["input_ids"], IGNORE)
        for row, answer in enumerate(answers):
            labels[row, -len(answer) :] = batch["input_ids"][row, -len(answer) :]
        return {**batch, "labels": labels, **images}

    def prompts(self, samples: "Sequence[Sample]") -> dict[str, Any]:
        """The batch for generate: the same without answers and labels.

        Raises:
            DymoeError: as for training batches.
        """
        rows, images = self._encode_prompts(samples)
        return {**self._pad_left(samples, rows), **images}

    # --- text ----------------------------------------------------------------------------------------------

    def _prompt_text(self, sample: "Sample") -> str:
        for field, text in (("question", sample.question), ("answer", sample.answer)):
            for token in (self._image_token, self._eos):
                if token in text:
                    raise DymoeError(f"sample {sample.id!r}: its {field} contains the special token {token}")
        return self._processor.apply_chat_template([self._question(sample)], add_generation_prompt=True, tokenize=False)

    @staticmethod
    def _question(sample: "Sample") -> dict[str, Any]:
        parts: list[dict[str, str]] = [{"type": "text", "text": sample.question}]
        if sample.image is not None:
            parts.insert(0, {"type": "image"})
        return {"role": "user", "content": parts}

    def _answer_text(self, sample: "Sample") -> str:
        """What follows the prompt: the template's answer (mostly a space and the answer) up to one end token."""
        if not sample.answer.strip():
            raise DymoeError(f"sample {sample.id!r}: it has no answer to learn")
        reply = {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]}
        prompt = self._prompt_text(sample)
        whole = self._processor.apply_chat_template([self._question(sample), reply], tokenize=False)
        text = whole.removeprefix(prompt) if whole.startswith(prompt) else f" {sample.answer}"
        start = text.find(sample.answer)
        head, tail = (text[:start], text[start:]) if start >= 0 else ("", sample.answer)
        return head + tail.split(self._eos)[0].rstrip() + self._eos

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, padding=False).input_ids

    # --- images --------------------------------------------------------------------------------------------

    def _encode_prompts(self, samples: "Sequence[Sample]") -> tuple[list[list[int]], dict[str, Any]]:
        """Tokens of each prompt with its image tokens, and what the model needs for the images."""
        if not samples:
            raise DymoeError("a batch needs at least one sample")
        texts = [self._prompt_text(sample) for sample in samples]
        with_image = [sample for sample in samples if sample.image is not None]
        if not with_image:
            return self._tokenize(texts), {}
        if self._features is not None:
            return self._from_features(samples, texts, self._features)
        pictures = [_named(sample, decode) for sample in with_image]
        inputs = self._processor(images=pictures, text=texts, padding=False)
        rows = inputs.pop("input_ids")
        extra = {key: value for key, value in inputs.items() if key not in ("attention_mask", "token_type_ids")}
        return [list(row) for row in rows], {key: _tensor(value) for key, value in extra.items()}

    def _from_features(
        self, samples: "Sequence[Sample]", texts: list[str], features: ImageFeatures
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """Prompts with as many image tokens as the cached features have, and these features."""
        tokens: list[torch.Tensor] = []
        expanded = []
        for sample, text in zip(samples, texts, strict=True):
            if sample.image is not None:
                tokens.append(_named(sample, features.get))
                text = text.replace(self._image_token, self._image_token * len(tokens[-1]))
            expanded.append(text)
        # FastVLM takes one tensor, LLaVA a list of one tensor per image: whatever the model itself makes.
        output = ImageTokens(pooler_output=cast(Any, torch.stack(tokens) if features.as_tensor else tokens))
        return self._tokenize(expanded), {"mm_encoder_outputs": {"image": output}}

    # --- padding -------------------------------------------------------------------------------------------

    def _pad_left(self, samples: "Sequence[Sample]", rows: list[list[int]]) -> dict[str, torch.Tensor]:
        for sample, row in zip(samples, rows, strict=True):
            if len(row) > self._max_length:
                raise DymoeError(
                    f"sample {sample.id!r}: {len(row)} tokens, more than max_length {self._max_length}; "
                    "shorten it or raise max_length"
                )
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, length - len(row) :] = torch.tensor(row)
            mask[number, length - len(row) :] = 1
        return {"input_ids": ids, "attention_mask": mask}


def _named(sample: "Sample", read: Any) -> Any:
    """`read(sample.image)`, an error naming the sample."""
    try:
        return read(sample.image)
    except DymoeError as error:
        raise DymoeError(f"sample {sample.id!r}: {error}") from error


def _tensor(value: Any) -> Any:
    """What an image processor made, as tensors: a list of equal arrays becomes one tensor."""
    if isinstance(value, list) and value and all(hasattr(item, "shape") for item in value):
        return torch.stack([torch.as_tensor(item) for item in value])
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
