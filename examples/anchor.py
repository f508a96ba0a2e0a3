"""A method of one's own: sequential LoRA, pulled towards what the task before left.

    dymoe run recipes/pocket/lora.yaml --method examples/anchor.py:Anchor --settings.pull 10.0

A method makes four choices (docs/architecture.md): how the bank grows, the gate, the loss terms it adds, the data it
sees. This one inherits three from `lora` and adds a term: pull / 2 times the squared distance of the LoRA's matrices
from where they stood when the task began, zero on the first task.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dymoe.methods import Stage, StageData
from dymoe.methods.lora import LoRA
from dymoe.methods.parameters import trainable
from dymoe.schema import Weight


@dataclass
class Anchor(LoRA):
    """Sequential LoRA with an L2 pull to the last task's weights; `pull` is its strength."""

    name: ClassVar[str] = "anchor"
    summary: ClassVar[str] = "one LoRA, pulled towards what the task before left"

    pull: Weight = 1.0

    def before_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Keep where the LoRA stands."""
        first = stage.index == 1
        self._start = {} if first else {name: each.detach().clone() for name, each in trainable(model).items()}

    def loss_terms(self, model: Any, batch: Mapping[str, Any], outputs: Any) -> dict[str, Any]:
        """The pull, a scalar."""
        if not self._start:
            return {}
        now = trainable(model)
        return {"pull": self.pull / 2 * sum((now[name] - start).square().sum() for name, start in self._start.items())}
