"""The stream "pocket-coin": eight small tasks that mirror CoIN's eight, shipped with the package."""

from dataclasses import dataclass
from pathlib import Path

from dymoe.errors import DymoeError
from dymoe.tasks import instructions as templates
from dymoe.tasks import records
from dymoe.tasks.base import Task

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Rule:
    """How a task is answered: its scoring rule and the longest answer in tokens, the end token included."""

    scorer: str
    max_new_tokens: int


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
    """Load one task of the stream from `folder`, every record checked.

    Raises:
        DymoeError: a file is missing or unreadable, a record cannot be used, or a split is empty.
    """
    rule = TASKS[name]
    found: dict[str, list[records.Sample]] = {}
    for part, splits in (("train", ("train", "validation")), ("test", ("test",))):
        path = folder / f"{name}-{part}.parquet"
        by_split = records.samples(
            path,
            records.read_table(path),
            rule.scorer,
            lambda text, sample_id: templates.apply(name, text, instructions, sample_id, seed),
        )
        for split in splits:
            if not by_split.get(split):
                raise DymoeError(f"{path}: no record has split {split!r}; the task would be empty")
        if extra := sorted(set(by_split) - set(splits)):
            raise DymoeError(f"{path}: split {extra[0]!r} does not belong here, only {' and '.join(splits)}")
        found.update(by_split)
    return Task(name, found["train"], found["validation"], found["test"], rule.scorer, rule.max_new_tokens)
