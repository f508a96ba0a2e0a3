"""Answers by batched greedy generation, scored by each task's own rule, with the routing they caused."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from dymoe.errors import DymoeError
from dymoe.evaluation.decode import Greedy
from dymoe.tasks.scoring import rule
from dymoe.tasks.scoring.answers import Answer, percent, score_answers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers.generation.streamers import BaseStreamer

    from dymoe.adapter.context import ForwardContext
    from dymoe.models import Collator, Lvlm
    from dymoe.tasks import Sample, Task


Gather = Callable[[Any], Sequence[Any]]  # a process's value -> those of all processes, in order


@dataclass(frozen=True)
class Prediction:
    """One answered sample; `score` by the strict rule, `lenient` by the format-tolerant one, both 0 to 1."""

    id: str
    question: str
    answer: str
    prediction: str
    score: float
    lenient: float


@dataclass(frozen=True)
class TaskResult:
    """A task's predictions and where its tokens were routed.

    Attributes:
        task: the task's name.
        predictions: one per sample, in the order of the split.
        groups: names of the expert groups, empty for the base model.
        weight: mean routing weight per group over tokens and layers.
        by_layer: the same for every decoder layer.
        measures: what else was measured, by name (`dymoe.tasks.scoring.Rule`, the right answers' loss).
    """

    task: str
    predictions: tuple[Prediction, ...]
    groups: tuple[str, ...] = ()
    weight: tuple[float, ...] = ()
    by_layer: dict[int, list[float]] | None = None
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def strict(self) -> float:
        """Accuracy in percent under the strict rule."""
        return percent([each.score for each in self.predictions])

    @property
    def lenient(self) -> float:
        """Accuracy in percent under the lenient rule."""
        return percent([each.lenient for each in self.predictions])

    def records(self) -> list[dict[str, Any]]:
        """The predictions as they stand in predictions/<task>.jsonl."""
        return [asdict(prediction) for prediction in self.predictions]


def generate(
    lvlm: "Lvlm",
    collator: "Collator",
    samples: Sequence["Sample"],
    max_new_tokens: int,
    batch_size: int = 32,
    dtype: str = "bfloat16",
    progress: Callable[[int], None] | None = None,
    part: tuple[int, int] = (0, 1),
    gather: Gather = lambda value: [value],
    context: "ForwardContext | None" = None,
    streamer: "BaseStreamer | None" = None,
) -> list[str]:
    """Greedy answers, in the order of `samples`; a row ends at the end token.

    Args:
        lvlm: the model, with or without experts; it is left in evaluation mode.
        collator: makes the left-padded prompts.
        samples: questions with or without an image.
        max_new_tokens: longest answer in tokens.
        batch_size: questions answered together.
        dtype: of autocast, as in training; ``float32`` switches autocast off.
        progress: called with the number of answers done after each batch.
        part: which of how many processes this is; each answers its own batches (see `batches`).
        gather: gives every process's value, in order, to each of them.
        context: of the experts; it is told which rows have ended, so that their tokens do not count.
        streamer: gets the tokens of a single sample as they come (see `dymoe.evaluation.stream`).
    """
    model: Any = lvlm.model
    tokenizer: Any = lvlm.processor.tokenizer  # type: ignore[attr-defined]
    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.eval()
    index_batches = batches(collator.lengths(samples), batch_size, part)
    collator.see([samples[index] for indices in index_batches for index in indices])
    answers: dict[int, str] = {}
    for indices in index_batches:
        batch = to_device(collator.prompts([samples[index] for index in indices]), model.device)
        with torch.inference_mode(), autocast(model.device.type, dtype):
            tokens = model.generate(
                **batch,
                custom_generate=Greedy(context, streamer),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=collator.stop_tokens,
                pad_token_id=pad,
            )
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            answers[index] = text.strip()
        if progress is not None:
            progress(min(len(samples), len(answers) * part[1]))
    every = {index: answer for part_answers in gather(answers) for index, answer in part_answers.items()}
    return [every[index] for index in range(len(samples))]


def batches(lengths: Sequence[int], batch_size: int, part: tuple[int, int] = (0, 1)) -> list[list[int]]:
    """Places of the samples that are answered together: those of like length, the longest first.

    The batches of all parts together are those of one part alone, so that an answer does not depend on the number of
    parts.

    Args:
        lengths: of the prompts, in tokens.
        batch_size: of each batch but the last.
        part: (number from 0, of how many): this part's batches alone, dealt in turn.
    """
    number, count = part
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)][number::count]


def evaluate(
    lvlm: "Lvlm",
    collator: "Collator",
    task: "Task",
    *,
    peft_model: "PeftModel | None" = None,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 32,
    dtype: str = "bfloat16",
    progress: Callable[[int], None] | None = None,
    part: tuple[int, int] = (0, 1),
    gather: Gather = lambda value: [value],
) -> TaskResult:
    """Ask the task's samples, score the answers and measure the routing of their tokens.

    Several processes share the work, each with its own `part`; all of them get the whole result. Answers and scores are
    those of one process, since every batch is (the kernels of another kind of device may round otherwise); sums of
    routing weights are equal to rounding.

    Args:
        peft_model: the model with its expert groups, None for the base model alone.
        split: ``test`` or ``validation``.
        limit: only the first samples of the split.
        part: which of how many processes this is.
        gather: gives every process's value, in order, to each of them.

    Raises:
        DymoeError: the split is empty, the model's scores are not finite, or a reference cannot be read (the sample is
            named).
    """
    samples = evaluated(task, split, limit)
    trace = None if peft_model is None else cast(Any, peft_model.base_model).trace
    measuring, context = (nullcontext(), None) if trace is None else (trace.measuring(), trace.context)
    with measuring as weights:
        try:
            answers = generate(
                lvlm, collator, samples, task.max_new_tokens, batch_size, dtype, progress, part, gather, context
            )
        except DymoeError as error:
            raise DymoeError(f"task {task.name!r}: {error}") from error
    answered = [Answer(sample.id, text, sample.reference) for sample, text in zip(samples, answers, strict=True)]
    scoring = rule(task.scorer)
    scores = score_answers(scoring, answered, f"task {task.name!r}: sample")
    predictions = [
        Prediction(sample.id, sample.question, sample.answer, text, score.strict, score.lenient)
        for sample, text, score in zip(samples, answers, scores, strict=True)
    ]
    more = scoring.measures(answers, [sample.reference for sample in samples])
    if weights is None:
        return TaskResult(task.name, tuple(predictions), measures=more)
    weights = weights.joined(gather(weights))
    groups, by_layer = tuple(weights.groups), weights.by_layer()
    return TaskResult(task.name, tuple(predictions), groups, tuple(weights.by_group()), by_layer, more)


def evaluated(task: "Task", split: str, limit: int | None) -> Sequence["Sample"]:
    """The samples of `task` that are asked: the first `limit` of the split.

    Raises:
        DymoeError: there is none.
    """
    samples = task.validation if split == "validation" else task.test
    if not samples:
        raise DymoeError(f"task {task.name!r}: its {split} split is empty, so there is nothing to evaluate")
    return samples[:limit]


def autocast(device: str, dtype: str) -> Any:
    """Autocast in `dtype`, or nothing for float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device, dtype=getattr(torch, dtype))


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors in nested mappings (model outputs included) to `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [to_device(item, device) for item in value]
    if isinstance(value, dict):
        moved = {key: to_device(item, device) for key, item in value.items()}
        return moved if type(value) is dict else type(value)(**moved)
    return value
