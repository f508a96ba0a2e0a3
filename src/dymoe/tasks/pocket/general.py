"""The stream "pocket-general": what the pocket model can do before it learns a task; asked, never learned.

Its tasks have no training samples: they are for a recipe's `evaluation.watch`.
"""

from pathlib import Path

from dymoe.tasks.base import Task
from dymoe.tasks.pocket.stream import DATA, Rule, read_splits

DESCRIBE = "Describe the picture."  # what the projector was trained with
TASKS = {"Captions": Rule("token_f1", 24), "Text": Rule("containment", 16)}


def load_task(name: str, instructions: str = "original", seed: int = 0, folder: Path = DATA / "general") -> Task:
    """Load one task from `folder`, every record checked; its questions are the same under all instructions.

    Raises:
        DymoeError: as `read_splits`.
    """
    rule = TASKS[name]
    samples = read_splits(folder / f"{name}-test.parquet", ("validation", "test"), rule)
    return Task(name, (), samples["validation"], samples["test"], rule.scorer, rule.max_new_tokens)
