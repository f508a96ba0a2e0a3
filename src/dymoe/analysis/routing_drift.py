"""Where an earlier task's tokens go as later groups are added, and how that goes with what is forgotten."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from dymoe.adapter import LayerRouting
from dymoe.adapter.trace import place_of
from dymoe.analysis.learned import Learned, Tell, open_run, silently
from dymoe.analysis.storage import joined
from dymoe.analysis.tokens import KINDS, image_tokens, kinds
from dymoe.errors import DymoeError
from dymoe.evaluation.metrics import AccuracyMatrix
from dymoe.evaluation.metrics import drift as drift_of
from dymoe.learning.formats import run_results

if TYPE_CHECKING:
    from dymoe.tasks import Task

NOTHING = -1  # in place of an expert: no expert has weight


def drift(
    run: str | Path | Learned,
    samples: int | None = None,
    stages: Sequence[int] | None = None,
    tell: Tell = silently,
) -> pd.DataFrame:
    """The weight that each task's tokens put on each group, at the stage that learned the task and at all later ones.

    Prompt and reference answer go through the model in one forward pass. The data are streamed: memory does not grow
    with the samples.

    Args:
        run: a run folder, or a run that is open.
        samples: the first so many of each task's samples; those that the run was asked when None.
        stages: the stages to look at, from 1; all when None. A task's own stage is always computed, to compare with.
        tell: called as the work goes on.

    Returns:
        One row per task, stage, layer, projection, part and group, groups in the order they were added; columns as in
        docs/analysis.md.

    Raises:
        DymoeError: see `open_run`; no such stage; a method that routes nothing.
    """
    learned = open_run(run)
    learned.require_routing()
    wanted = learned.chosen_stages(stages)
    frames = []
    for task, own in learned.chosen_tasks(None):
        numbers = [own.index, *(number for number in wanted if number > own.index)]
        sums = _task_sums(learned, task, numbers, samples, tell)
        for number in numbers:
            if number in wanted:
                frames.append(pd.DataFrame(sums[number].rows()).assign(task=task.name, stage=number))
    return joined("drift", frames)


def _task_sums(
    learned: Learned, task: "Task", numbers: Sequence[int], limit: int | None, tell: Tell
) -> "dict[int, _Sums]":
    """The sums of one task at these stages, the first of which is its own."""
    chosen = learned.samples(task, limit)
    sums = {number: _Sums() for number in numbers}
    images, done = image_tokens(learned.lvlm), 0
    for batch in learned.batches(chosen):
        parts = kinds(batch, images)
        top: dict[str, Tensor] = {}
        for number in numbers:
            learned.activate(number)
            watch = _Watch(parts, sums[number], top, own=number == numbers[0])
            learned.observe(batch, watch)
        if not top:
            raise DymoeError(f"{learned.path}: no wrapped layer sees the tokens of the prompt, so nothing was observed")
        done += len(parts)
        tell(task.name, done, len(chosen))
    return sums


class _Sums:
    """Routing weight, changed tokens and tokens by part, for every layer; of one task at one stage."""

    def __init__(self) -> None:
        self.groups: tuple[str, ...] = ()
        self.weight: dict[str, Tensor] = {}  # (parts, groups)
        self.counts: dict[str, Tensor] = {}  # (parts, 2): tokens, changed tokens

    def add(self, routing: LayerRouting, weight: Tensor, counts: Tensor) -> None:
        """Add one layer's sums of one forward pass."""
        self.groups = routing.groups
        for held, value in ((self.weight, weight), (self.counts, counts)):
            held[routing.layer] = held[routing.layer] + value if routing.layer in held else value

    def rows(self) -> list[dict[str, Any]]:
        """The frame's rows, without task and stage."""
        found = []
        for name, weights in self.weight.items():
            layer, projection = place_of(name)
            counts = self.counts[name].tolist()
            for part, (tokens, changed), row in zip(KINDS, counts, weights.tolist(), strict=True):
                if tokens:
                    place = {"layer": layer, "projection": projection, "part": part}
                    both = {"tokens": int(tokens), "changed": changed / tokens}
                    found += [
                        {**place, "group": group, "weight": weight / tokens, **both}
                        for group, weight in zip(self.groups, row, strict=True)
                    ]
        return found


class _Watch:
    """Observes one forward pass.

    Args:
        parts: of every token, see `kinds`.
        sums: where to add.
        top: layer -> each token's top expert at the task's own stage; filled there, compared with later.
        own: whether this is that stage.
    """

    def __init__(self, parts: Tensor, sums: _Sums, top: dict[str, Tensor], own: bool) -> None:
        self.member = F.one_hot(parts.reshape(-1).long() + 1, len(KINDS) + 1)[:, 1:].double()  # padding in no part
        self.sums = sums
        self.top = top
        self.own = own

    def __call__(self, routing: LayerRouting) -> None:
        """Add one layer; one that sees other tokens (a vision tower's) is passed over."""
        weights = routing.weights
        if weights[..., 0].numel() != len(self.member):
            return
        weights = weights.reshape(len(self.member), -1).double()
        largest, expert = weights.max(-1)
        expert = torch.where(largest > 0, expert, NOTHING)
        if self.own:
            self.top[routing.layer] = expert
        # A layer may get its first experts at a later stage: before, none was a token's top expert.
        changed = (expert != self.top.get(routing.layer, torch.full_like(expert, NOTHING))).double()
        by_group = torch.stack([part.sum(-1) for part in weights.split(list(routing.sizes), dim=-1)], dim=-1)
        counts = torch.stack([torch.ones_like(changed), changed], dim=-1)
        self.sums.add(routing, (self.member.T @ by_group).cpu(), (self.member.T @ counts).cpu())


def drift_by_task(frame: pd.DataFrame) -> pd.DataFrame:
    """The drift of each task at each stage (`evaluation.metrics.drift`), a mean over tokens and wrapped layers.

    Args:
        frame: of `drift`.

    Returns:
        Columns task, stage, drift (0..1), changed (0..1); tasks without drift (no group of their own) are left out.
    """
    rows = []
    for (task, stage), part in frame.groupby(["task", "stage"], sort=False):
        groups = list(dict.fromkeys(part["group"]))
        value = drift_of(str(task), groups, [float(_mean(part[part["group"] == group], "weight")) for group in groups])
        if value is not None:
            changed = float(_mean(part[part["group"] == groups[0]], "changed"))
            rows.append({"task": task, "stage": stage, "drift": value, "changed": changed})
    return pd.DataFrame(rows, columns=["task", "stage", "drift", "changed"])


def _mean(rows: pd.DataFrame, column: str) -> float:
    """A mean over tokens within each layer and projection, then over these."""
    weighted = (rows[column] * rows["tokens"]).groupby([rows["layer"], rows["projection"]]).sum()
    tokens = rows["tokens"].groupby([rows["layer"], rows["projection"]]).sum()
    return float((weighted / tokens).mean())


def drift_and_forgetting(run: str | Path, frame: pd.DataFrame) -> pd.DataFrame:
    """Drift and forgetting of every earlier task at the last stage that both are known for.

    Args:
        run: the run folder; results.json holds the accuracies.
        frame: of `drift`.

    Returns:
        Columns task, stage, drift (0..1), changed (0..1), forgetting (percentage points, best earlier minus final
        accuracy).

    Raises:
        DymoeError: results.json is broken.
    """
    columns = ["task", "stage", "drift", "changed", "forgetting"]
    results: Any = run_results(run) if (Path(run) / "results.json").is_file() else {}
    matrix, names = results.get("matrix") or [], results.get("tasks") or []
    drifts = drift_by_task(frame)
    known = drifts[drifts["stage"] <= len(matrix)]
    if known.empty:
        return pd.DataFrame(columns=columns)
    last = int(known["stage"].max())
    forgetting = AccuracyMatrix(matrix[:last], names[:last]).forgetting_by_task()
    earlier = known[(known["stage"] == last) & known["task"].isin(names[: last - 1])]
    return earlier.assign(forgetting=[forgetting[task] for task in earlier["task"]])[columns].reset_index(drop=True)


def correlation(pairs: pd.DataFrame) -> dict[str, float | int | None]:
    """Correlation of drift with forgetting over tasks.

    Args:
        pairs: of `drift_and_forgetting`.

    Returns:
        tasks (how many), pearson and spearman; the two are None with fewer than three tasks or where one side is
        constant.
    """
    found: dict[str, float | int | None] = {"tasks": len(pairs), "pearson": None, "spearman": None}
    if len(pairs) >= 3 and pairs["drift"].nunique() > 1 and pairs["forgetting"].nunique() > 1:
        found["pearson"] = float(pairs["drift"].corr(pairs["forgetting"]))
        found["spearman"] = float(pairs["drift"].rank().corr(pairs["forgetting"].rank()))
    return found
