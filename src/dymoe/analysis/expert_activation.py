"""How much each expert is used, which are dead, and what pruning would remove."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from dymoe.adapter import LayerRouting
from dymoe.adapter.trace import place_of
from dymoe.analysis.learned import Learned, Tell, open_run, silently
from dymoe.analysis.storage import joined
from dymoe.methods.companions.pruning import keep

EXPERT = ["layer", "projection", "group"]  # with its number within the group, what names an expert
DEAD = 1e-3  # mean routing weight


def activation(
    run: str | Path | Learned,
    samples: int | None = None,
    stages: Sequence[int] | None = None,
    tell: Tell = silently,
) -> pd.DataFrame:
    """How each task's tokens use each expert, at every stage from the one that learned the task (Figure 4 in numbers).

    Prompt and reference answer go through the model in one forward pass; all their tokens count.

    Args:
        run: a run folder, or a run that is open.
        samples: the first so many of each task's samples; those that the run was asked when None.
        stages: the stages to look at, from 1; all when None.
        tell: called as the work goes on.

    Returns:
        One row per stage, task, layer, projection, group and expert; columns as in docs/analysis.md.

    Raises:
        DymoeError: see `open_run`; no such stage; a method that routes nothing.
    """
    learned = open_run(run)
    learned.require_routing()
    frames = []
    for number in learned.chosen_stages(stages):
        for task, own in learned.chosen_tasks(None):
            if own.index > number:
                continue
            learned.activate(number)
            chosen, sums = learned.samples(task, samples), _Sums()
            done = 0
            for batch in learned.batches(chosen):
                sums.mask = batch["attention_mask"].bool().reshape(-1)
                learned.observe(batch, sums)
                done += len(batch["input_ids"])
                tell(f"stage {number}, {task.name}", done, len(chosen))
            frames.append(pd.DataFrame(sums.rows()).assign(task=task.name, stage=number))
    return joined("activation", frames)


class _Sums:
    """Sums over tokens for every expert of every layer; an observer.

    Attributes:
        mask: (tokens,), true for the tokens of the coming pass that count.
    """

    def __init__(self) -> None:
        self.mask = torch.zeros(0, dtype=torch.bool)
        self.groups: tuple[str, ...] = ()
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.totals: dict[str, Tensor] = {}  # (3, experts): weight, tokens with weight, tokens whose top expert it is
        self.tokens: dict[str, int] = {}

    def __call__(self, routing: LayerRouting) -> None:
        """Add one layer; one that sees other tokens (a vision tower's) is passed over."""
        if routing.weights[..., 0].numel() != len(self.mask):
            return
        weights = routing.weights.reshape(len(self.mask), -1)[self.mask].double()
        largest, expert = weights.max(-1)
        top = torch.nn.functional.one_hot(expert, weights.shape[-1]) * (largest > 0).unsqueeze(-1)
        sums = torch.stack([weights.sum(0), (weights > 0).double().sum(0), top.double().sum(0)]).cpu()
        name = routing.layer
        self.groups, self.sizes[name] = routing.groups, routing.sizes
        self.totals[name] = self.totals[name] + sums if name in self.totals else sums
        self.tokens[name] = self.tokens.get(name, 0) + len(weights)

    def rows(self) -> list[dict[str, Any]]:
        """The frame's rows, without task and stage."""
        found = []
        for name, totals in self.totals.items():
            layer, projection = place_of(name)
            by_group = (totals / max(1, self.tokens[name])).split(list(self.sizes[name]), dim=1)
            for group, values in zip(self.groups, by_group, strict=True):
                for expert, (weight, active, top) in enumerate(values.T.tolist()):
                    place = {"layer": layer, "projection": projection, "group": group, "expert": expert}
                    found.append({**place, "weight": weight, "active": active, "top": top})
        return found


def dead(frame: pd.DataFrame, stage: int | None = None, below: float = DEAD) -> pd.DataFrame:
    """Experts that no task seen by a stage uses: their mean routing weight is below `below` on each of them.

    Args:
        frame: of `activation`.
        stage: the last one in the frame when None.
        below: 0.001 by default. At temperature 0.01 a softmax gives nearly every expert some weight, so that none
            would count as dead for having exactly none.

    Returns:
        Columns layer, projection, group, expert and weight, the largest mean weight that a task gives it.
    """
    rows = frame[frame["stage"] == (frame["stage"].max() if stage is None else stage)]
    most = rows.groupby([*EXPERT, "expert"], sort=False, as_index=False)["weight"].max()
    return most[most["weight"] < below].reset_index(drop=True)


def pruned(frame: pd.DataFrame, share: float) -> pd.DataFrame:
    """What the companion `pruning` would remove from each group after its stage, by its own criterion.

    The weights are those of the task's evaluation samples, prompts and answers; the companion measures on training
    prompts. A group that several tasks share is judged by the mean over those of its first stage.

    Args:
        frame: of `activation`.
        share: of each layer's experts of the group, for example 1/8 and 1/4.

    Returns:
        Columns stage, layer, projection, group, expert and weight (mean routing weight on the new task's tokens).
    """
    used = _new_use(frame)
    gone = [
        part.drop(index=part.index[keep(part["weight"].tolist(), share)])
        for _, part in used.groupby(EXPERT, sort=False)
    ]
    return pd.concat([used.head(0), *gone], ignore_index=True)


def _new_use(frame: pd.DataFrame) -> pd.DataFrame:
    """Each expert's weight on the tokens of what its group was first trained on, at that stage.

    A group whose first stage is not in the frame is left out.
    """
    begun = frame.groupby("group")["stage"].transform("min")  # a group's first stage
    learned = frame.groupby("task")["stage"].transform("min")  # a task is asked from the stage that learned it
    alone = frame["group"].groupby(begun).transform("nunique") == 1  # a stage adds one group, so none is missing before
    own = frame[(frame["stage"] == begun) & (begun == learned) & alone]
    return own.groupby(["stage", *EXPERT, "expert"], sort=False, as_index=False)["weight"].mean()


def pruned_share(frame: pd.DataFrame, share: float) -> pd.DataFrame:
    """How many experts `pruned` removes from each group and how much of the new task's routing goes with them.

    Returns:
        Columns group, experts (removed, over all layers), of (the group's experts), weight (mean over layers and
        projections of the removed experts' summed weight), group_weight (the same of all the group's experts).
    """
    used, gone = _new_use(frame).groupby("group", sort=False), pruned(frame, share).groupby("group", sort=False)
    places = used[["layer", "projection"]].apply(lambda part: len(part.drop_duplicates()))
    found = pd.DataFrame(
        {
            "experts": gone["expert"].count(),
            "of": used["expert"].count(),
            "weight": gone["weight"].sum() / places,
            "group_weight": used["weight"].sum() / places,
        }
    ).reindex(used["expert"].count().index)
    found = found.fillna({"experts": 0, "weight": 0.0}).astype({"experts": int})
    return found.rename_axis("group").reset_index()
