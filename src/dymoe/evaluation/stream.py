"""One answer while it is being generated."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from transformers import TextIteratorStreamer

from dymoe.evaluation.generate import generate

if TYPE_CHECKING:
    from dymoe.models import Collator, Lvlm
    from dymoe.tasks import Sample


class Stopped(Exception):
    """Nobody wants the rest of the answer."""


class _Streamer(TextIteratorStreamer):
    """Ends the generation that feeds it once `stopped` is set."""

    stopped = False

    def put(self, value: Any) -> None:
        if self.stopped:
            raise Stopped
        super().put(value)


def stream(
    lvlm: "Lvlm", collator: "Collator", sample: "Sample", max_new_tokens: int, dtype: str = "bfloat16"
) -> Iterator[str]:
    """The answer so far, again and again while it grows; the last one is the whole that `generate` gives.

    Generation runs in a thread of its own and ends with this iterator, also one that is given up early.

    Args:
        lvlm: the model, with or without experts; it is left in evaluation mode.
        collator: makes the prompt.
        sample: the question.
        max_new_tokens: longest answer in tokens.
        dtype: of autocast, as in training.

    Raises:
        DymoeError: what the collator says of the sample.
    """
    tokenizer: Any = lvlm.processor.tokenizer  # type: ignore[attr-defined]
    streamer = _Streamer(tokenizer, skip_special_tokens=True)
    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(generate, lvlm, collator, [sample], max_new_tokens, 1, dtype, streamer=streamer)
        answers.add_done_callback(lambda _: streamer.end())  # also where generation failed before it began
        try:
            answer = ""
            for text in streamer:
                answer += text
                if text.strip():
                    yield answer.strip()
            yield answers.result()[0]
        finally:
            streamer.stopped = True
