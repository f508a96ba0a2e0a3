"""Samples to batches: prompt, answer, image tokens, padding on the left, labels on the answer alone.

Nothing here knows a model by name. The processor writes the prompt, expands its image token and prepares the pictures;
what else it gives for every token (which tokens are an image's, say) goes on over the answer and the padding.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dymoe.errors import DymoeError
from dymoe.images import decode
from dymoe.libraries import untested
from dymoe.messages import brief
from dymoe.models.features import ImageFeatures, joined, made_picture, same
from dymoe.models.rows import Row, extended, filled

if TYPE_CHECKING:
    from dymoe.models.model import Lvlm
    from dymoe.tasks import Sample

IGNORE = -100  # the label of a position that is no target
# What may stand before an answer that is tokenised apart: something that no tokenizer merges with what follows.
_ANCHORS = (":", "\n", ".", "a")


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

    The prompt is the one that generation sees, token for token; the answer's tokens are those that the tokenizer gives
    it behind this prompt, up to the token that ends a turn. Sequences are padded on the left: the answer always ends
    the row. A processor without a chat template gets the plain prompt "{image}{question}\\n".

    Keys of a batch: `input_ids`, `attention_mask` and, in training, `labels`, all int64 (batch, length), further
    columns of the processor by token; for the images `pixel_values` (and what else the processor makes), or with
    `features` `mm_encoder_outputs` = {"image": output}, whose pooler_output is (images, image_tokens, hidden).

    Attributes:
        stop_tokens: ids that end an answer, for generate.
    """

    def __init__(self, lvlm: "Lvlm", features: ImageFeatures | None = None, max_length: int = 2048) -> None:
        processor = cast(Any, lvlm.processor)
        model = cast(Any, lvlm.model)
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._features = features
        self._max_length = max_length
        self._dtype: torch.dtype = model.dtype
        self._image_token: str | None = getattr(processor, "image_token", None)
        if self._image_token is None:
            raise DymoeError(
                f"{type(processor).__name__}: it has no image token, so no prompt with a picture is written"
            )
        self._apart: bool | None = None  # see `_one_by_one`
        # Its processor writes the answer itself, as the argument `suffix`: the prompt's tokens see each other.
        self._takes_suffix = model.config.model_type == "paligemma"
        self._eos: str = self._tokenizer.eos_token
        self._end = self._end_token()
        self._end_id: int = self._tokenizer.convert_tokens_to_ids(self._end)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._eos  # masked everywhere, so any token does
        self._pad: int = self._tokenizer.pad_token_id
        stops = model.generation_config.eos_token_id
        stops = [stops] if isinstance(stops, int) else stops or []
        self.stop_tokens: list[int] = sorted({self._tokenizer.eos_token_id, self._end_id, *stops})
        marks = {self._image_token, self._eos, self._end, *self._special()}
        image = getattr(model.config, "image_token_id", None)
        if isinstance(image, int) and image < len(self._tokenizer):
            marks.add(self._tokenizer.convert_ids_to_tokens(image))
        # The longest first, so that the message names the whole token.
        longest = sorted((mark for mark in marks if mark.strip()), key=lambda mark: (-len(mark), mark))
        self._marks = re.compile("|".join(map(re.escape, longest)))

    def __call__(self, samples: "Sequence[Sample]") -> dict[str, Any]:
        """The training batch.

        Raises:
            DymoeError: naming the sample: no answer, broken image, an image token in the text, longer than
                `max_length`, a prompt or answer that the processor cannot take.
        """
        for sample in samples:
            self._require_answer(sample)
        texts = [self._prompt_text(sample) for sample in samples]
        if self._takes_suffix:
            rows, images = self._encode(samples, texts, [sample.answer for sample in samples])
            learned = [[True] * int(row["token_type_ids"].sum()) for row in rows]
            if not all(learned):
                raise untested(self._processor, "marks no token of an answer that it was given as its suffix")
        else:
            endings = [self._ending(sample, text) for sample, text in zip(samples, texts, strict=True)]
            prompts, images = self._encode(samples, texts)
            rows = [
                extended(row, [token for part, _ in parts for token in part])
                for row, parts in zip(prompts, endings, strict=True)
            ]
            learned = [[answer for part, answer in parts for _ in part] for parts in endings]
        batch = self._pad_left(samples, rows)
        labels = torch.full_like(batch["input_ids"], IGNORE)
        for row, mask in enumerate(learned):
            ending = batch["input_ids"][row, -len(mask) :]
            labels[row, -len(mask) :] = torch.where(torch.tensor(mask), ending, IGNORE)
        return {**batch, "labels": labels, **images}

    def prompts(self, samples: "Sequence[Sample]") -> dict[str, Any]:
        """The batch for generate: the same without answers and labels.

        Raises:
            DymoeError: as for training batches.
        """
        rows, images = self._encode(samples, [self._prompt_text(sample) for sample in samples])
        return {**self._pad_left(samples, rows), **images}

    def lengths(self, samples: "Sequence[Sample]") -> list[int]:
        """Tokens of each sample's prompt; a picture counts as many as the first sample's that has one.

        Raises:
            DymoeError: as for training batches.
        """
        if not samples:
            return []
        texts = [self._prompt_text(sample) for sample in samples]
        ids = self._tokenizer(texts, add_special_tokens=self._adds_special(texts), padding=False).input_ids
        lengths = [len(row) for row in ids]
        first = next((index for index, sample in enumerate(samples) if sample.has_image), None)
        if first is None:
            return lengths
        (row,), _ = self._encode([samples[first]], [texts[first]])
        picture = len(row["input_ids"]) - lengths[first]
        return [length + picture * sample.has_image for length, sample in zip(lengths, samples, strict=True)]

    def see(self, samples: "Sequence[Sample]") -> None:
        """Compute the image features of `samples` that are not there yet, if there is a cache that holds so many.

        Raises:
            DymoeError: an image is broken; the message names its sample.
        """
        if self._features is not None and self._features.holds(len(samples)):
            self._features.add_samples(samples)

    # --- text ----------------------------------------------------------------------------------------------

    def _special(self) -> set[str]:
        """The tokenizer's special tokens, which a decoded answer never shows."""
        added = {str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        return added | set(self._tokenizer.all_special_tokens)

    def _require_answer(self, sample: "Sample") -> None:
        if sample.turns and self._takes_suffix:
            raise DymoeError(f"{sample.label}: it has several turns, this model's processor takes one")
        if not sample.answer.strip():
            raise DymoeError(f"{sample.label}: it has no answer to learn")

    def _prompt_text(self, sample: "Sample") -> str:
        for field, text in (("question", sample.question), ("answer", sample.answer)):
            if (mark := self._marks.search(text)) is not None:
                raise DymoeError(f"{sample.label}: its {field} contains the special token {mark[0]}")
        text = self._render(sample.question, sample.has_image)
        written, pictures = text.count(cast(str, self._image_token)), int(sample.has_image)
        if written != pictures:
            raise DymoeError(
                f"{sample.label}: the chat template writes {self._image_token} {written} times for {pictures} pictures"
            )
        return text

    def _ending(self, sample: "Sample", prompt: str) -> list[tuple[list[int], bool]]:
        """The tokens behind the prompt in parts, each with whether it is learned: an answer, a question, an answer ..

        Raises:
            DymoeError: as `_answer_ids`; or a later question holds a special token, or the chat template writes a
                conversation of several turns otherwise than its first one.
        """
        parts = [(self._answer_ids(sample, prompt), True)]
        pairs = [(sample.question, sample.answer)]
        for question, answer in sample.turns:
            later = replace(sample, picture=None, question=question, answer=answer, turns=())
            alone = self._prompt_text(later)
            before = self._render(*pairs[-1][:1], sample.has_image, pairs[-1][1], pairs[:-1])
            before = before[: before.rfind(self._end) + len(self._end)] if self._end in before else before
            rendered = self._render(question, sample.has_image, None, pairs)
            if not answer.strip() or not rendered.startswith(before):
                raise DymoeError(f"{sample.label}: the chat template cannot go on with its later turns")
            # Behind the end token, as in the whole text: a tokenizer may begin a text otherwise than a turn.
            front, both = self._tokenize([self._end, self._end + rendered[len(before) :]])
            parts += [(both[len(front) :], False), (self._answer_ids(later, alone), True)]
            pairs.append((question, answer))
        return parts

    def _render(
        self, question: str, image: bool, answer: str | None = None, earlier: Sequence[tuple[str, str]] = ()
    ) -> str:
        """The conversation as text: up to where an answer begins, or with the answer.

        The picture stands in the first question, that of the first of the `earlier` (question, answer) pairs if there
        are any.
        """
        turns: list[tuple[str, str | None]] = [*earlier, (question, answer)]
        structured = bool(getattr(self._processor, "chat_template", None))
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(turns):
            for role, text in zip(("user", "assistant"), turn, strict=True):
                if text is None:
                    continue
                shows_image = image and number == 0 and role == "user"
                if structured:
                    parts: list[dict[str, str]] = [{"type": "image"}] if shows_image else []
                    messages.append({"role": role, "content": [*parts, {"type": "text", "text": text}]})
                else:
                    messages.append({"role": role, "content": f"{self._image_token}\n{text}" if shows_image else text})
        if structured or getattr(self._tokenizer, "chat_template", None):
            writer = self._processor if structured else self._tokenizer
            return writer.apply_chat_template(messages, add_generation_prompt=answer is None, tokenize=False)
        before = self._image_token if image else ""
        written = [f"{user}\n" + ("" if reply is None else f"{reply}{self._eos}") for user, reply in turns]
        return f"{before}{''.join(written)}"

    def _end_token(self) -> str:
        """The special token that the template writes behind an answer, else the tokenizer's end token."""
        probe = "blue"
        behind = self._render("q", False, probe).rpartition(probe)[2]
        special = self._special() | {self._eos}
        candidates = [(behind.find(token), -len(token), token) for token in special if token and token in behind]
        return min(candidates)[2] if candidates else self._eos

    def _answer_text(self, sample: "Sample", prompt: str) -> str:
        """What follows the prompt before the end token: mostly a space and the answer."""
        full = self._render(sample.question, sample.has_image, sample.answer)
        if full.startswith(prompt):
            text = full[len(prompt) :]
        else:  # the template asks in other words than it records
            before = full.rpartition(sample.answer)[0]
            space = before[len(before.rstrip()) :]
            text = ("" if prompt.endswith(space) else space) + sample.answer
        start = text.find(sample.answer)
        head, tail = (text[:start], text[start:]) if start >= 0 else ("", sample.answer)
        answer, end, _ = tail.partition(self._end)
        return head + (answer if end else answer.rstrip())

    def _answer_ids(self, sample: "Sample", prompt: str) -> list[int]:
        """The answer's tokens and the end token.

        Tokenizers may merge the end of the prompt with the start of the answer. The prompt's tokens stay what
        generation will see; the answer is then tokenised behind something that does not merge.

        Raises:
            DymoeError: no way was found to tokenise the answer behind this prompt.
        """
        answer = self._answer_text(sample, prompt)
        before, complete = self._tokenize([prompt, prompt + answer])
        expected = self._decode(complete)
        for anchor in (prompt, *_ANCHORS, ""):
            front, both = (before, complete) if anchor == prompt else self._tokenize([anchor, anchor + answer])
            ids = both[len(front) :]
            if both[: len(front)] == front and ids and self._decode(before + ids) == expected:
                return [*ids, self._end_id]
        raise DymoeError(
            f"{sample.label}: its answer {brief(sample.answer)} cannot be tokenised apart from the prompt's end "
            f"{prompt[-20:]!r}"
        )

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self._tokenizer(texts, add_special_tokens=False, padding=False).input_ids]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # --- images --------------------------------------------------------------------------------------------

    def _encode(
        self, samples: "Sequence[Sample]", texts: list[str], suffixes: list[str] | None = None
    ) -> tuple[list[Row], dict[str, Any]]:
        """Each prompt's row with its image tokens, and what the model needs for the images.

        Samples with and without a picture are processed apart: not every processor takes both at once.
        """
        if not samples:
            raise DymoeError("a batch needs at least one sample")
        rows: list[Row] = [{}] * len(samples)
        images: dict[str, Any] = {}
        for pictured in (False, True):
            numbers = [number for number, sample in enumerate(samples) if (sample.has_image) == pictured]
            if not numbers:
                continue
            part = [samples[number] for number in numbers]
            prompts = [texts[number] for number in numbers]
            if pictured and self._features is not None:
                encoded, images = self._from_features(part, prompts, self._features)
            else:
                ends = None if suffixes is None else [suffixes[number] for number in numbers]
                encoded, images = self._processed(part, prompts, ends)
            for number, row in zip(numbers, encoded, strict=True):
                rows[number] = row
        return filled(rows), images

    def _processed(
        self, samples: "Sequence[Sample]", texts: list[str], suffixes: list[str] | None
    ) -> tuple[list[Row], dict[str, Any]]:
        """Rows and image inputs of samples that all have a picture, or none.

        Pictures are decoded and brought to the model's size one after another, so that one alone is in memory as
        large as it is; all at once only where the processor makes something else of several.
        """
        if samples[0].has_image and len(samples) > 1 and self._one_by_one():
            ends: Sequence[str | None] = suffixes or [None] * len(samples)
            parts = [
                self._processed([sample], [text], None if end is None else [end])
                for sample, text, end in zip(samples, texts, ends, strict=True)
            ]
            return [row for rows, _ in parts for row in rows], joined([images for _, images in parts])
        pictures = [_named(sample, decode) for sample in samples] if samples[0].has_image else None
        return self._process(samples, texts, pictures, suffixes)

    def _one_by_one(self) -> bool:
        """Whether two pictures processed apart and joined are what the processor makes of both; tried out once."""
        if self._apart is None:
            from dymoe.tasks import Sample

            pair = [Sample(str(size), made_picture(*size), "What is it?", "It", {}) for size in ((40, 24), (20, 48))]
            texts, suffixes = [self._render(sample.question, True) for sample in pair], ["It", "It"]
            try:
                self._apart = False
                together = self._processed(pair, texts, suffixes if self._takes_suffix else None)
                self._apart = True
                self._apart = same(together, self._processed(pair, texts, suffixes if self._takes_suffix else None))
            except (DymoeError, TypeError, ValueError, RuntimeError, IndexError):
                self._apart = False  # whatever it is, the batch itself meets and tells it
        return self._apart

    def _process(
        self, samples: "Sequence[Sample]", texts: list[str], pictures: list[Any] | None, suffixes: list[str] | None
    ) -> tuple[list[Row], dict[str, Any]]:
        """Rows and image inputs as the model's own processor makes them of these samples together."""
        options: dict[str, Any] = {
            "padding": True,
            "padding_side": "left",
            "return_tensors": "pt",
            "add_special_tokens": self._adds_special(texts),
        }
        if pictures is not None:
            options["images"] = [[picture] for picture in pictures]
        if self._takes_suffix:
            options["suffix"] = suffixes
            texts = [text.removesuffix("\n") for text in texts]  # it ends the prompt with a newline itself
        try:
            inputs = dict(self._processor(text=texts, **options))
        except (ValueError, TypeError) as error:
            raise DymoeError(f"{samples[0].label} and its batch: the processor refuses them ({error})") from error
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask").bool()
        inputs.pop("labels", None)
        of_images = set(self._processor.image_processor.model_input_names)
        columns = {"input_ids": ids}
        for name, value in list(inputs.items()):
            if name not in of_images and isinstance(value, torch.Tensor) and value.shape[:2] == ids.shape:
                columns[name] = inputs.pop(name)
        rows = [
            {name: value[number][mask[number]] for name, value in columns.items()} for number in range(len(samples))
        ]
        if suffixes is None:
            rows = [self._open_ended(row, text) for row, text in zip(rows, texts, strict=True)]
        return rows, {name: self._image_input(value) for name, value in inputs.items()}

    def _adds_special(self, texts: list[str]) -> bool:
        """Whether the tokenizer is to add its start token: not where the template wrote it (transformers' own rule)."""
        bos = getattr(self._tokenizer, "bos_token", None)
        return not (bos and texts[0].startswith(bos))

    def _prompt_ids(self, texts: list[str]) -> list[torch.Tensor]:
        """The tokens of prompts whose image tokens stand there as they are."""
        ids = self._tokenizer(texts, add_special_tokens=self._adds_special(texts), padding=False).input_ids
        rows = [self._open_ended({"input_ids": torch.tensor(row)}, text) for row, text in zip(ids, texts, strict=True)]
        return [row["input_ids"] for row in rows]

    def _open_ended(self, row: Row, text: str) -> Row:
        """The row without an end token that the tokenizer put behind the prompt by itself."""
        if int(row["input_ids"][-1]) == self._tokenizer.eos_token_id and not text.rstrip().endswith(self._eos):
            return {name: value[:-1] for name, value in row.items()}
        return row

    def _image_input(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(self._dtype) if value.is_floating_point() else value
        return [self._image_input(item) for item in value] if isinstance(value, list) else torch.as_tensor(value)

    def _from_features(
        self, samples: "Sequence[Sample]", texts: list[str], features: ImageFeatures
    ) -> tuple[list[Row], dict[str, Any]]:
        """Prompts with as many image tokens as the cached features have, and these features."""
        token = cast(str, self._image_token)
        tokens = features.of_samples(samples)
        expanded = [text.replace(token, token * len(image)) for text, image in zip(texts, tokens, strict=True)]
        rows = [{"input_ids": ids} for ids in self._prompt_ids(expanded)]
        # FastVLM takes one tensor, LLaVA a list of one tensor per image: whatever the model itself makes.
        output = ImageTokens(pooler_output=cast(Any, torch.stack(tokens) if features.as_tensor else tokens))
        return rows, {"mm_encoder_outputs": {"image": output}}

    # --- padding -------------------------------------------------------------------------------------------

    def _refuse_longer(self, sample: "Sample", length: int) -> None:
        if length > self._max_length:
            raise DymoeError(
                f"{sample.label}: {length} tokens, more than max_length {self._max_length}; "
                "shorten it or raise model_options.max_length"
            )

    def _pad_left(self, samples: "Sequence[Sample]", rows: list[Row]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        for sample, length in zip(samples, lengths, strict=True):
            self._refuse_longer(sample, length)
        longest = max(lengths)
        mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
        batch = {"attention_mask": mask}
        for name, first in rows[0].items():
            value = self._pad if name == "input_ids" else 0
            column = torch.full((len(rows), longest, *first.shape[1:]), value, dtype=first.dtype)
            for number, row in enumerate(rows):
                column[number, longest - lengths[number] :] = row[name]
            batch[name] = column
        return batch


def _named(sample: "Sample", read: Any) -> Any:
    """`read(sample.image)`, an error naming the sample."""
    try:
        return read(sample.image)
    except DymoeError as error:
        raise DymoeError(f"{sample.label}: {error}") from error
