"""The shipped pocket streams: what a task's files are, and the one way to load them.

A stream is a module with `TASKS` and `load_task` (see `dymoe.tasks.base`): this one is pocket-coin, eight small tasks
that mirror CoIN's eight; `classes` and `domains` are two others, `general` is one that is only asked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dymoe.errors import DymoeError
from dymoe.tasks import instructions as templates
from dymoe.tasks import records
from dymoe.tasks.base import Sample, Task

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Rule:
    """How a task is answered.

    Attributes:
        scorer: its scoring rule.
        max_new_tokens: the longest answer in tokens, the end token included.
        instruction: the task of CoIN whose instruction it has; its own name if empty.
    """

    scorer: str
    max_new_tokens: int
    instruction: str = ""


TASKS = {
    "ScienceQA": Rule("letter", 4),
    "TextVQA": Rule("soft_accuracy", 8),
    "ImageNet": Rule("exact_match", 8),
    "GQA": Rule("exact_match", 8),
    "VizWiz": Rule("soft_accuracy", 8),
    "Grounding": Rule("iou", 28),
    "VQAv2": Rule("soft_accuracy", 8),
    "OCRVQA": Rule("exact_match", 8),
}


def load_task(name: str, instructions: str = "original", seed: int = 0, folder: Path = DATA) -> Task:
    """Load one task of pocket-coin from `folder`, every record checked.

    Raises:
        DymoeError: as `load_files`.
    """
    return load_files(name, TASKS[name], instructions, seed, folder)


def load_files(name: str, rule: Rule, instructions: str, seed: int, folder: Path) -> Task:
    """Load the two parquet files of a task, every record checked.

    Raises:
        DymoeError: a file is missing or unreadable, a record cannot be used, or a split is empty.
    """
    template = rule.instruction or name

    def question(text: str, sample_id: str) -> str:
        return templates.apply(template, text, instructions, sample_id, seed)

    samples = {
        **read_splits(folder / f"{name}-train.parquet", ("train", "validation"), rule, question),
        **read_splits(folder / f"{name}-test.parquet", ("test",), rule, question),
    }
    return Task(name, samples["train"], samples["validation"], samples["test"], rule.scorer, rule.max_new_tokens)


def read_splits(
    path: Path, splits: Sequence[str], rule: Rule, question: Callable[[str, str], str] = lambda text, _: text
) -> dict[str, list[Sample]]:
    """The samples of a parquet file by split, every record checked.

    Args:
        path: the file.
        splits: that it must hold, and no other.
        rule: how the task is answered.
        question: makes a sample's question from (question, id); adds the instruction.

    Raises:
        DymoeError: it is missing or unreadable, a record cannot be used, a split is empty or does not belong here.
    """
    samples = records.samples(path, records.read_table(path), rule.scorer, question)
    for split in splits:
        if not samples.get(split):
            raise DymoeError(f"{path}: no record has split {split!r}; the task would be empty")
    if extra := sorted(set(samples) - set(splits)):
        raise DymoeError(f"{path}: split {extra[0]!r} does not belong here, only {' and '.join(splits)}")
    return samples
