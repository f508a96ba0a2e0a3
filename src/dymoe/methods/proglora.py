"""`proglora`: a LoRA per task, all mixed by one attention weight per sample and task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, ClassVar

from dymoe.methods.base import Method, Stage
from dymoe.schema import Positive, Share, Size

if TYPE_CHECKING:
    from dymoe.adapter import DyMoEConfig
    from dymoe.tasks import Sample


@dataclass
class ProgLoRA(Method):
    """ProgLoRA (Findings of ACL 2025, 2025.findings-acl.143).

    Growth: one LoRA, one key and one copy of the query transform T a task; the older ones are frozen. Gate: the
    attention of the sample's query to the keys, one weight per LoRA for all its tokens and layers (the selector
    `keys`, which says how T is kept). Data: optionally samples of earlier tasks (task recall).

    Attributes:
        lora_alpha: alpha of the scale alpha / rank; 16 is twice the rank, as in the authors' scripts.
        rank: rank of each task's LoRA; the paper's is not known, 8 gives eight tasks the rank 64 of the other banks'
            single task.
        hidden: inner width of T (100, the authors' scripts).
        recall: task recall, samples of earlier tasks that a stage adds, as a share of its own. How many the paper adds
            is not known (its code only appends a file of them to the training data); 0, the default, is the setting
            without recall.
    """

    name: ClassVar[str] = "proglora"
    summary: ClassVar[str] = "a LoRA per task, mixed by one learned attention weight per sample"

    lora_alpha: Positive = 16.0
    rank: Size = 8
    hidden: Size = 100
    recall: Share = 0.0

    def config(self, stage: Stage) -> DyMoEConfig:
        """One expert of full rank, whose weight is what the selector gives its group."""
        options = {"hidden": self.hidden}
        return self.group_config(1, self.rank, top_k=1, gate="uniform", selector="keys", selector_options=options)

    def training_samples(self, stage: Stage) -> Sequence[Sample]:
        """The stage's own samples, then those recalled: drawn without repetition, evenly from the tasks seen."""
        from dymoe.tasks.lazy import joined

        fresh = super().training_samples(stage)
        count = round(self.recall * len(fresh))
        if count == 0 or not stage.earlier_tasks:
            return fresh
        draw = random.Random(stage.seed)
        pools = [draw.sample(range(len(task.train)), len(task.train)) for task in stage.earlier_tasks]
        picks = [
            (task, index)
            for row in zip_longest(*pools)
            for task, index in zip(stage.earlier_tasks, row, strict=True)
            if index is not None
        ]
        return joined([fresh, [task.train[index] for task, index in picks[:count]]])
