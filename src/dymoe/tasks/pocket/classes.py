"""The stream "pocket-classes": other classes in each of five tasks, one and the same question in all of them."""

from pathlib import Path

from dymoe.tasks.base import Task
from dymoe.tasks.pocket.stream import DATA, Rule, load_files

QUESTION = "What is shown in the image?"
# Two classes of CIFAR-10 and two of Fashion-MNIST a task; what is easily confused stands in different tasks.
CLASSES = {
    "classes-1": (("airplane", "cat"), ("trousers", "sandal")),
    "classes-2": (("automobile", "deer"), ("dress", "sneaker")),
    "classes-3": (("bird", "dog"), ("t-shirt", "bag")),
    "classes-4": (("frog", "ship"), ("pullover", "boot")),
    "classes-5": (("horse", "truck"), ("coat", "shirt")),
}
TASKS = {name: Rule("exact_match", 8, instruction="ImageNet") for name in CLASSES}


def load_task(name: str, instructions: str = "original", seed: int = 0, folder: Path = DATA / "classes") -> Task:
    """Load one task from `folder`, every record checked.

    Raises:
        DymoeError: as `load_files`.
    """
    return load_files(name, TASKS[name], instructions, seed, folder)
