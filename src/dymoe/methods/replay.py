"""`replay`: a buffer of earlier tasks' samples, trained on again beside the new task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dymoe.errors import DymoeError
from dymoe.files import atomic_json, read_json
from dymoe.methods.base import Stage, StageData
from dymoe.methods.parameters import draw
from dymoe.methods.plugin import Plugin
from dymoe.schema import ProperShare, Size

if TYPE_CHECKING:
    from dymoe.tasks import Sample, Task

FILE = "replay.json"


@dataclass
class Replay(Plugin):
    """Experience replay (arXiv 2603.27481, supplement B.5: "a standard replay buffer" of 200, 500 or 1000 samples).

    How the authors' buffer is filled and mixed in is not stated. The defaults here are the plainest reading: equal
    parts per task, and the whole buffer appended once to the new task's samples. The buffer keeps samples as the
    tasks have them, not as another plugin rewrote them.

    Attributes:
        size: samples that the buffer holds, over all earlier tasks (200, 500 and 1000 in the supplement).
        policy: ``balanced`` gives every seen task an equal part; ``reservoir`` is algorithm R over all samples seen
            so far, so that each of them is kept with the same chance (Vitter, 1985).
        share: share of replayed samples in the stage's training list, reached by drawing from the buffer with as few
            repetitions as possible; none appends the buffer as it is.
        seed: of the buffer; it does not depend on the run's seed, so that runs replay the same samples.
    """

    name: ClassVar[str] = "replay"
    summary: ClassVar[str] = "a small buffer of earlier tasks' samples, trained on again"

    size: Size = 200
    policy: Literal["balanced", "reservoir"] = "balanced"
    share: ProperShare | None = None
    seed: int = 0

    def training_samples(self, samples: Sequence[Sample], stage: Stage) -> Sequence[Sample]:
        """The stage's samples and, after them, the replayed ones.

        Raises:
            DymoeError: the buffer's file is missing or names a sample that the stream does not have.
        """
        from dymoe.tasks.lazy import joined

        replayed = _resolve(self._earlier(stage)["slots"], stage.earlier_tasks)
        if not replayed or self.share is None:
            return joined([samples, replayed])
        count = round(len(samples) * self.share / (1 - self.share))
        rounds, rest = divmod(count, len(replayed))
        return joined([samples, replayed * rounds, draw(replayed, rest, f"share/{self.seed}/{stage.index}")])

    def after_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Let the stage's tasks into the buffer and write its ids to ``replay.json``."""
        state = self._earlier(stage)
        for task in stage.tasks:
            ids = [sample.id for sample in task.train]
            fill = _reservoir if self.policy == "reservoir" else _balanced
            state["slots"] = fill(state["slots"], state["tasks"], task.name, ids, self.size, self.seed)
            state["tasks"][task.name] = len(ids)
        atomic_json(stage.memory / FILE, {"policy": self.policy, "size": self.size, "seed": self.seed, **state})

    @staticmethod
    def _earlier(stage: Stage) -> dict[str, Any]:
        """The buffer as the stage before left it: ``slots`` [[task, id]] and ``tasks`` {name: samples seen}."""
        if not stage.earlier:
            return {"slots": [], "tasks": {}}
        state = read_json(stage.earlier[-1] / FILE)
        return {"slots": state["slots"], "tasks": state["tasks"]}


def _resolve(slots: Sequence[Sequence[str]], tasks: Sequence[Task]) -> list[Sample]:
    """The samples that the slots name."""
    names = {(task, sample) for task, sample in slots}
    known = {
        (task.name, sample.id): sample for task in tasks for sample in task.train if (task.name, sample.id) in names
    }
    missing = next((slot for slot in slots if tuple(slot) not in known), None)
    if missing is not None:
        raise DymoeError(f"{FILE}: task {missing[0]!r} has no training sample {missing[1]!r}; the data changed")
    return [known[task, sample] for task, sample in slots]


def _reservoir(
    slots: list[list[str]], counts: dict[str, int], task: str, ids: Sequence[str], size: int, seed: int
) -> list[list[str]]:
    """Algorithm R, continued after as many samples as `counts` names: sample n replaces a slot with chance size / n."""
    slots, count = list(slots), sum(counts.values())
    rng = random.Random(f"reservoir/{seed}/{count}")
    for sample in ids:
        count += 1
        if len(slots) < size:
            slots.append([task, sample])
        elif (index := rng.randrange(count)) < size:
            slots[index] = [task, sample]
    return slots


def _balanced(
    slots: list[list[str]], counts: dict[str, int], task: str, ids: Sequence[str], size: int, seed: int
) -> list[list[str]]:
    """Equal parts of every task; the earlier tasks keep the first of what they had."""
    parts = quotas([*counts.values(), len(ids)], size)
    result: list[list[str]] = []
    for name, part in zip(counts, parts, strict=False):
        result += [slot for slot in slots if slot[0] == name][:part]
    return result + [[task, sample] for sample in draw(ids, parts[-1], f"balanced/{seed}/{task}", ordered=False)]


def quotas(available: Sequence[int], size: int) -> list[int]:
    """Split `size` places evenly over tasks with `available` samples each.

    Places are dealt in turn, so parts differ by at most one and the earlier tasks get the remainder; what a small task
    cannot fill goes to the others. A part never grows when a task is added, so a buffer need never fetch a sample back.
    """
    parts = [0] * len(available)
    while size > 0 and (open_ := [index for index, part in enumerate(parts) if part < available[index]]):
        level = min(min(available[index] - parts[index] for index in open_), max(1, size // len(open_)))
        for index in open_:
            take = min(level, size)
            parts[index] += take
            size -= take
    return parts
