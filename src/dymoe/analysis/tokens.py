"""The tokens of a batch: which are an image's, the instruction's, the answer's; their text and their patch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from dymoe.models import Lvlm

KINDS = ("image", "instruction", "answer")
PADDING = -1


def image_tokens(lvlm: "Lvlm") -> list[int]:
    """Ids that stand for a part of a picture."""
    processor: Any = lvlm.processor
    written = getattr(processor, "image_token", None)
    tokens = {getattr(lvlm.model.config, "image_token_id", None)}
    if isinstance(written, str):
        tokens.add(processor.tokenizer.convert_tokens_to_ids(written))
    return sorted(token for token in tokens if isinstance(token, int))


def kinds(batch: Mapping[str, Any], images: Sequence[int]) -> "Tensor":
    """Place in `KINDS` of every token, `PADDING` for padding: int8 (batch, tokens).

    The answer is what labels mark, its end token included; all the rest of the text counts as instruction.

    Args:
        batch: `input_ids` and `attention_mask` (batch, tokens); `labels`, where there is an answer.
        images: see `image_tokens`.
    """
    import torch

    ids = batch["input_ids"]
    parts = torch.full(ids.shape, KINDS.index("instruction"), dtype=torch.int8, device=ids.device)
    parts[torch.isin(ids, torch.tensor(images, dtype=ids.dtype, device=ids.device))] = KINDS.index("image")
    if batch.get("labels") is not None:
        parts[batch["labels"] != -100] = KINDS.index("answer")
    parts[batch["attention_mask"] == 0] = PADDING
    return parts


def texts(lvlm: "Lvlm", ids: Sequence[int], images: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; "" for a token of a picture.

    Decoded with the words before it, since some tokenizers write a leading space only inside a text.
    """
    tokenizer: Any = lvlm.processor.tokenizer  # type: ignore[attr-defined]
    pieces: list[str] = []
    words: list[int] = []
    before = ""
    for token in ids:
        if token in images:
            words, before = [], ""
            pieces.append("")
            continue
        words.append(token)
        now = tokenizer.decode(words, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append(now[len(before) :])
        before = now
    return pieces


def patch_grid(batch: Mapping[str, Any], tokens: int) -> tuple[int, int] | None:
    """Rows and columns of one picture's patches, None where they are no plain grid.

    Args:
        batch: of one sample; `image_grid_thw` is read where the processor gives it.
        tokens: how many tokens the picture has.
    """
    grid = batch.get("image_grid_thw")
    if grid is not None and tuple(grid.shape) == (1, 3):
        frames, rows, columns = (int(value) for value in grid[0])
        merged = round((rows * columns / tokens) ** 0.5) if tokens else 0  # patches along a side of a token
        if frames == 1 and rows * columns == tokens * merged**2:
            return rows // merged, columns // merged
    side = round(tokens**0.5)
    return (side, side) if tokens and side * side == tokens else None
