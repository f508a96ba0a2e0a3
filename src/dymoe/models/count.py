"""How many tokens a sample has, told before any batch is made of it and without its picture."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dymoe.errors import DymoeError
from dymoe.models.collate import Collator

if TYPE_CHECKING:
    from dymoe.models.model import Lvlm
    from dymoe.tasks import Sample

# Pictures of these sizes tell whether a picture's size changes its number of tokens: flat, tall, larger than a tile.
_SIZES = ((40, 24), (24, 400), (1600, 1200))


class TokenCounter(Collator):
    """A collator that counts the tokens of samples and refuses those of which it would make no batch."""

    def __init__(self, lvlm: "Lvlm", max_length: int = 2048) -> None:
        super().__init__(lvlm, max_length=max_length)
        self._beyond_text: dict[tuple[int, int] | None, int] = {}

    def length(self, sample: "Sample", size: tuple[int, int] | None, learned: bool) -> int:
        """Tokens of a sample's row, checked as a batch checks it, without reading its picture.

        Args:
            sample: any.
            size: width and height of its picture, None without one.
            learned: whether the answer and later turns stand in the row, as in training.

        Raises:
            DymoeError: as for batches, but for a broken picture.
        """
        if learned:
            self._require_answer(sample)
        text = self._prompt_text(sample)
        if self._takes_suffix:
            suffixes = [sample.answer] if learned else None
            (row,), _ = self._process([sample], [text], _blank(size), suffixes)
            length = len(row["input_ids"])
        else:
            length = len(self._prompt_ids([text])[0]) + self._added(sample, text, size)
            length += sum(len(part) for part, _ in self._ending(sample, text)) if learned else 0
        self._refuse_longer(sample, length)
        return length

    def cut(self, sample: "Sample", answer: str, tokens: int) -> str:
        """What is written of an answer to a sample where at most so many tokens may be."""
        try:
            ids = self._answer_ids(replace(sample, answer=answer), self._prompt_text(sample))[:-1]
        except DymoeError:  # not a text that is learned behind this prompt
            (ids,) = self._tokenize([answer])
        if len(ids) <= tokens:
            return answer
        return str(self._tokenizer.decode(ids[:tokens], skip_special_tokens=True)).strip()

    def _added(self, sample: "Sample", text: str, size: tuple[int, int] | None) -> int:
        """Tokens that a prompt has beyond those of its text, for a picture of this size (None: without one)."""

        def beyond(size: tuple[int, int] | None) -> int:
            if size not in self._beyond_text:
                (row,), _ = self._process([sample], [text], _blank(size), None)
                self._beyond_text[size] = len(row["input_ids"]) - len(self._prompt_ids([text])[0])
            return self._beyond_text[size]

        fixed = size is not None and len({beyond(tried) for tried in _SIZES}) == 1
        return beyond(_SIZES[0] if fixed else size)


def _blank(size: tuple[int, int] | None) -> list[Any] | None:
    """A white picture of this size, as a processor takes them."""
    from PIL import Image

    return None if size is None else [Image.new("RGB", size, "white")]
