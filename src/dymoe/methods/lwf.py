"""`lwf`: one LoRA that is asked to answer as the model before the task would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dymoe.methods.base import Stage, StageData
from dymoe.methods.lora import LoRA
from dymoe.schema import Positive, Weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class LwF(LoRA):
    """Learning without forgetting (arXiv 1606.09282) on one LoRA.

    Growth and gate: `lora`'s. Loss term, from the second task on: distillation * T^2 * KL(p_old^T || p_new^T), the mean
    over the positions of the new task's batch that predict a token of an answer (labels not -100, shifted by one), with
    p^T = softmax(logits / T) and p_old the model as it was before the task, without dropout. KL and the paper's cross
    entropy differ by a constant.

    The old model is the same model run with a copy of the LoRA's parameters; the base is held once.

    Attributes:
        distillation: lambda; 1 as in the paper and common ports (no value of a multimodal benchmark was found).
        temperature: T (2, the paper's).
    """

    name: ClassVar[str] = "lwf"
    summary: ClassVar[str] = "one LoRA, distilled from the model before the task"

    distillation: Weight = 1.0
    temperature: Positive = 2.0

    def __post_init__(self) -> None:
        """Begin without a teacher."""
        super().__post_init__()
        # Not dataclass fields: these are no settings.
        self._teacher: dict[str, Tensor] = {}
        self._data: StageData | None = None

    def state_size(self, trainable: int, inputs: Sequence[int]) -> int:
        """The teacher."""
        return trainable

    def before_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Copy the parameters as the earlier tasks left them; a stage that goes on finds the same ones."""
        from dymoe.methods.parameters import trainable

        # The first task has no earlier one to keep.
        known = trainable(model) if stage.earlier else {}
        self._teacher = {name: parameter.detach().clone() for name, parameter in known.items()}
        self._data = data

    def loss_terms(self, model: Any, batch: Mapping[str, Any], outputs: Any) -> dict[str, Tensor]:
        """The distillation term; one further forward pass without gradients."""
        if not self._teacher or self.distillation == 0:
            return {}
        new, labels = outputs.logits, batch["labels"]
        old = self._old_logits(model, batch, new.shape[1])
        weight = self.distillation * self.temperature**2
        return {"distillation": weight * divergence(old, new, labels, self.temperature)}

    def after_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Forget the copy."""
        self._teacher, self._data = {}, None

    def _old_logits(self, model: Any, batch: Mapping[str, Any], positions: int) -> Tensor:
        """Logits of the model before the task at the last `positions` positions, (batch, positions, vocabulary)."""
        import torch

        from dymoe.adapter.observation import evaluating

        assert self._data is not None
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        inputs.update(logits_to_keep=positions, use_cache=False)
        # Aside: the pass that is to be learned from has left its terms in the trace and its backward is still to come.
        try:
            with model.base_model.trace.aside(), evaluating(model), torch.no_grad(), self._data.autocast():
                return torch.func.functional_call(model, self._teacher, kwargs=inputs).logits
        finally:
            # A layer in evaluation packs what it is given: the next pass must not find the teacher there.
            for layer in model.base_model.layers():
                layer.groups_changed()


def divergence(old: Tensor, new: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean of KL(softmax(old / T) || softmax(new / T)) over the positions that predict an answer's token; a scalar.

    Args:
        old: the teacher's logits of the last k positions, (batch, k, vocabulary).
        new: the student's, of the same shape; computed in float32 whatever their dtypes are.
        labels: (batch, tokens >= k), -100 where nothing is learned.
        temperature: T.
    """
    import torch.nn.functional as F

    learned = labels[:, labels.shape[1] - new.shape[1] + 1 :] != -100
    teacher = F.log_softmax(old[:, :-1][learned].float() / temperature, dim=-1)
    student = F.log_softmax(new[:, :-1][learned].float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) / learned.sum().clamp(min=1)
