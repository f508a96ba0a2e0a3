"""The instruction that ends (or, for boxes, opens) every question, in the CoIN benchmark's three types.

The sentences are those of CoIN as tabulated in DyMoE's supplement (Table 16); `instructions.json` keeps them as
published, slips included, with notes on the slips.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.files import read_json
from dymoe.messages import unknown

TYPES = ("original", "diverse", "10type")
PATH = Path(__file__).parent / "instructions.json"


@cache
def _templates() -> dict[str, dict[str, Any]]:
    templates: dict[str, dict[str, Any]] = read_json(PATH)["templates"]
    return templates


def instruction(task: str, kind: str, sample_id: str, seed: int = 0) -> str:
    """Return a sample's instruction; under "10type" a hash of seed and sample id picks one of the task's list.

    Raises:
        DymoeError: unknown task or instruction type; the message names the nearest one.
    """
    if kind not in TYPES:
        raise DymoeError(unknown("instruction type", kind, TYPES))
    if task not in _templates():
        raise DymoeError(unknown("task", task, _templates()))
    choice = _templates()[task][kind]
    if isinstance(choice, str):
        return choice
    digest = hashlib.sha256(f"{seed}/{sample_id}".encode()).digest()
    picked: str = choice[int.from_bytes(digest[:8], "big") % len(choice)]
    return picked


def apply(task: str, question: str, kind: str, sample_id: str, seed: int = 0) -> str:
    """Return question and instruction as one text, laid out as CoIN lays them out.

    The instruction is the last line; for Grounding it comes first, with the expression behind a colon.

    Raises:
        DymoeError: unknown task or instruction type; the message names the nearest one.
    """
    text = instruction(task, kind, sample_id, seed)
    return f"{text}: {question}" if task == "Grounding" else f"{question}\n{text}"


@cache
def _sentences() -> frozenset[str]:
    choices = (choice for task in _templates().values() for choice in task.values())
    return frozenset(text for choice in choices for text in ([choice] if isinstance(choice, str) else choice))


def strip(question: str) -> str:
    """Return a question without its instruction, whichever task's and type's it is; unchanged where there is none."""
    rest, separator, last = question.rpartition("\n")
    if separator and last.strip().removesuffix(".") in _sentences():
        return rest
    first, separator, rest = question.partition(": ")
    return rest if separator and first in _sentences() else question


def kinds(task: str, question: str) -> set[str]:
    """The types whose sentence for `task` stands in `question`; none where no type's does.

    Raises:
        DymoeError: unknown task; the message names the nearest one.
    """
    if task not in _templates():
        raise DymoeError(unknown("task", task, _templates()))
    last = question.rpartition("\n")[2].strip().removesuffix(".")
    first = question.partition(": ")[0]
    types = set()
    for kind, choice in _templates()[task].items():
        sentences = [choice] if isinstance(choice, str) else choice
        if last in sentences or first in sentences:
            types.add(kind)
    return types
