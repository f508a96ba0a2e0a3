"""`sefe`: SEFE's RegLoRA; a new LoRA per task that stays small where the older ones were large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dymoe.methods.base import Stage, StageData
from dymoe.methods.inclora import IncLoRA
from dymoe.schema import Positive, PositiveShare, Size, Weight

if TYPE_CHECKING:
    from torch import Tensor

FILE = "keys.safetensors"


@dataclass
class SEFE(IncLoRA):
    """RegLoRA, one half of SEFE (arXiv 2505.02486); the other, answer style diversification, is the plugin `asd`.

    Growth and gate: `inclora`'s; the sum of the frozen LoRAs is what the authors merge into the base. After each task
    the positions of the largest |dW| of every linear are kept, dW = scale * B A of the task's own LoRA. Loss term, from
    the second task on: penalty * mean over linears of the mean over all positions kept so far of |dW_new|.

    Attributes:
        rank: rank of each task's LoRA; 64 with alpha 128 as in Prism's CoIN settings (the authors: 128 with 256), the
            rank of one task's bank in the other methods.
        lora_alpha: 128, which gives the scale 2 at rank 64.
        penalty: weight of the term (2500, the authors').
        share: share of a linear's positions that a task keeps (0.02, the authors').
        scaled: whether dW in the term carries the scale of the LoRA, so that it is the change of the weight. ``false``
            takes B A without it (half of it at scale 2), as the authors' code does, for which 2500 was chosen.
        overlap: ``once`` counts a position that several tasks kept once, a set as summaries of the paper have it;
            ``repeated`` counts it once per task, as the lists of the authors' code do.
    """

    name: ClassVar[str] = "sefe"
    summary: ClassVar[str] = "a new LoRA per task, kept small where the older ones were largest (RegLoRA)"

    rank: Size = 64
    lora_alpha: Positive = 128.0
    penalty: Weight = 2500.0
    share: PositiveShare = 0.02
    scaled: bool = False
    overlap: Literal["once", "repeated"] = "once"

    def __post_init__(self) -> None:
        """Begin without positions of earlier tasks."""
        super().__post_init__()
        # Not a dataclass field: it is no setting.
        self._keys: dict[str, Tensor] = {}

    def before_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Read the positions that the earlier tasks kept and join them, linear by linear."""
        import torch

        from dymoe.methods.parameters import load_tensors, training_lora

        earlier = [load_tensors(memory / FILE) for memory in stage.earlier]
        self._keys = {}
        for lora in training_lora(model):
            lists = [keys[lora.layer] for keys in earlier if lora.layer in keys]
            if lists:
                joined = torch.cat(lists)
                joined = torch.unique(joined) if self.overlap == "once" else joined
                self._keys[lora.layer] = joined.to(lora.a.device)

    def loss_terms(self, model: Any, batch: Mapping[str, Any], outputs: Any) -> dict[str, Tensor]:
        """The size of the new LoRA at the positions kept.

        A linear's dW lives only while its positions are read (autograd keeps A, B and the positions), so that one is
        held at a time.
        """
        import torch

        from dymoe.methods.parameters import training_lora

        if not self._keys or self.penalty == 0:
            return {}
        sizes = [
            lora.delta(self.scaled).view(-1).index_select(0, self._keys[lora.layer]).abs().mean()
            for lora in training_lora(model)
            if lora.layer in self._keys
        ]
        return {"reglora": self.penalty * torch.stack(sizes).mean()}

    def after_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Keep the positions of the task's largest changes."""
        import torch

        from dymoe.methods.parameters import save_tensors, training_lora

        with torch.no_grad():
            keys = {lora.layer: largest(lora.delta(), self.share) for lora in training_lora(model)}
        save_tensors(stage.memory / FILE, keys)


def largest(delta: Tensor, share: float) -> Tensor:
    """Positions of the largest absolute values of a matrix.

    Args:
        delta: (out_features, in_features).
        share: of its elements, rounded down, at least one.

    Returns:
        Row-major positions in ascending order, (count,), int32.

    Raises:
        ValueError: the matrix has more elements than int32 can number.
    """
    import torch

    if delta.numel() > 2**31 - 1:
        raise ValueError(f"a linear of {tuple(delta.shape)} has more positions than int32 can number")
    count = max(1, int(share * delta.numel()))
    return torch.topk(delta.abs().flatten(), count, sorted=False).indices.sort().values.to(torch.int32)
