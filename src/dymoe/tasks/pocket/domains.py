"""The stream "pocket-domains": the same question and answers in each of five tasks, other pictures in each."""

from pathlib import Path

from dymoe.tasks.base import Task
from dymoe.tasks.pocket.stream import DATA, Rule, load_files

QUESTION = "What kind of thing is this?"
ANSWERS = ("bird", "mammal", "road vehicle", "ship")
DOMAINS = ("Photos", "Twemoji", "Worn", "Noto", "Outlines")
TASKS = {name: Rule("exact_match", 8, instruction="ImageNet") for name in DOMAINS}


def load_task(name: str, instructions: str = "original", seed: int = 0, folder: Path = DATA / "domains") -> Task:
    """Load one task from `folder`, every record checked.

    Raises:
        DymoeError: as `load_files`.
    """
    return load_files(name, TASKS[name], instructions, seed, folder)
