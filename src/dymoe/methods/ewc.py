"""`ewc`: one LoRA whose parameters are held where the earlier tasks need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dymoe.methods.base import Stage, StageData
from dymoe.methods.lora import LoRA
from dymoe.methods.parameters import draw, load_tensors, save_tensors, trainable
from dymoe.schema import PositiveShare, Size, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from dymoe.tasks import Sample

FILE = "ewc.safetensors"


@dataclass
class EWC(LoRA):
    """Elastic weight consolidation (arXiv 1612.00796) on the parameters of one LoRA.

    Growth and gate: `lora`'s. Loss term: penalty / 2 * sum over earlier tasks t of sum_i F_t,i (theta_i - theta_t,i)^2,
    with theta_t the parameters after task t and F_t the diagonal of its empirical Fisher matrix: the mean over samples
    of the squared gradient of one sample's loss, answers as given, no dropout. The loss of a sample is the mean over
    its answer's tokens, the loss that the task was trained with. With ``mode: online`` (arXiv 1805.06370) one running
    Fisher matrix, F = gamma F + F_t, and the last anchor alone.

    Attributes:
        penalty: lambda. 400 is what a public port for language models takes with this estimate of the Fisher matrix
            (single samples, 1000 of them). Prism takes 5000, but squares gradients of whole batches, which are smaller.
        samples: samples of a task, drawn at random from those it trained on, that the Fisher matrix is computed from;
            all where there are fewer (1000, the same port's).
        mode: ``per-task`` keeps an anchor and a Fisher matrix of every task, as the first paper and Prism do;
            ``online`` keeps one.
        gamma: decay of the running Fisher matrix in mode ``online``; 1, as no value for this setting was found.
    """

    name: ClassVar[str] = "ewc"
    summary: ClassVar[str] = "one LoRA, held back where the Fisher matrix says that earlier tasks need it"

    penalty: Weight = 400.0
    samples: Size = 1000
    mode: Literal["per-task", "online"] = "per-task"
    gamma: PositiveShare = 1.0

    def __post_init__(self) -> None:
        """Begin without a penalty."""
        super().__post_init__()
        # Not dataclass fields: these are no settings.
        self._quadratic: dict[str, tuple[Tensor, Tensor]] = {}
        self._rest = 0.0

    def state_size(self, trainable: int, inputs: Sequence[int]) -> int:
        """The anchor and the Fisher matrix."""
        return 2 * trainable

    def before_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Read the earlier tasks' anchors and Fisher matrices and join them to one quadratic."""
        parameters = trainable(model)
        self._quadratic, self._rest = {}, 0.0
        for memory in self._counted(stage.earlier):
            for name, pair in _read(memory).items():
                if name not in parameters:
                    continue
                weight, anchor = (tensor.to(parameters[name].device) for tensor in pair)
                if name in self._quadratic:
                    weight, anchor, rest = joined(self._quadratic[name], (weight, anchor))
                    self._rest += rest
                self._quadratic[name] = (weight, anchor)

    def loss_terms(self, model: Any, batch: Mapping[str, Any], outputs: Any) -> dict[str, Tensor]:
        """The penalty, from the second task on."""
        import torch

        if not self._quadratic:
            return {}
        parameters = trainable(model)
        distances = [
            (weight * (parameters[name].float() - anchor).square()).sum()
            for name, (weight, anchor) in self._quadratic.items()
        ]
        return {"ewc": 0.5 * self.penalty * (torch.stack(distances).sum() + self._rest)}

    def after_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Keep the task's anchor and Fisher matrix (in mode ``online`` the running one)."""
        diagonal = fisher(model, self._chosen(data.samples, stage.seed), data)
        anchors = trainable(model)
        if self.mode == "online" and stage.earlier:
            before = _read(stage.earlier[-1])
            for name in diagonal.keys() & before.keys():
                diagonal[name] += self.gamma * before[name][0].to(diagonal[name].device)
        named = {f"fisher.{name}": tensor for name, tensor in diagonal.items()}
        named.update({f"anchor.{name}": anchor.detach().float() for name, anchor in anchors.items()})
        save_tensors(stage.memory / FILE, named)

    def _counted(self, earlier: Sequence[Path]) -> Sequence[Path]:
        """The stages whose penalty counts."""
        return earlier[-1:] if self.mode == "online" else earlier

    def _chosen(self, samples: Sequence[Sample], seed: int) -> Sequence[Sample]:
        """The samples of the Fisher matrix, the same for the same seed."""
        return draw(samples, self.samples, seed, ordered=False)


def fisher(model: Any, samples: Sequence[Sample], data: StageData) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher matrix of everything that trains, from one gradient per sample.

    Args:
        model: the model; it is put into evaluation mode for the time being.
        samples: at least one.
        data: collates them and computes their loss.

    Returns:
        Name -> float32 tensor of the parameter's shape, on its device: the mean of the squared gradients. Under
        float16 gradients below its range count as 0; bfloat16 and float32 have no such limit.
    """
    import torch

    from dymoe.adapter.observation import evaluating

    parameters = trainable(model)
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    with evaluating(model), torch.enable_grad():
        for batch in data.batches(samples, batch_size=1):
            loss = data.loss(model, batch)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient.float().square())
    return {name: total / len(samples) for name, total in sums.items()}


def joined(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, float]:
    """One quadratic that equals a sum of two, so that the penalty costs the same after every task.

    F_1 (theta - theta_1)^2 + F_2 (theta - theta_2)^2 = F (theta - anchor)^2 + rest with F = F_1 + F_2, the anchor the
    mean of theta_1 and theta_2 weighted by F_1 and F_2 (theta_2 where F is 0).

    Args:
        one: (F_1, theta_1), of one shape, float32.
        other: (F_2, theta_2), of the same shape.

    Returns:
        F, anchor, and rest summed over all elements.
    """
    import torch

    total = one[0] + other[0]
    share = torch.where(total > 0, other[0] / total, 1.0)
    gap = other[1] - one[1]
    rest = float((one[0] * share * gap.square()).sum(dtype=torch.float64))
    return total, one[1] + share * gap, rest


def _read(memory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (Fisher diagonal, anchor) of what a stage kept.

    Raises:
        DymoeError: the stage kept nothing, or the file is broken.
    """
    tensors = load_tensors(memory / FILE)
    names = [name.removeprefix("anchor.") for name in tensors if name.startswith("anchor.")]
    return {name: (tensors[f"fisher.{name}"], tensors[f"anchor.{name}"]) for name in names}
