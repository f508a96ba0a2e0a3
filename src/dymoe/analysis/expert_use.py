"""Which experts are dead and what pruning would remove: functions of the frame of `activation`, without torch."""

import pandas as pd

from dymoe.methods.companions.pruning import keep

EXPERT = ["layer", "projection", "group"]  # with its number within the group, what names an expert
DEAD = 1e-3  # mean routing weight


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
