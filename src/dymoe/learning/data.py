"""The data of one stage as a method's hooks may use it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dymoe.learning.recipe import Training

if TYPE_CHECKING:
    from torch import Tensor

    from dymoe.models import Collator
    from dymoe.tasks import Sample


@dataclass(frozen=True)
class Data:
    """Batches and losses for a method's hooks (`dymoe.methods.base.StageData`).

    Attributes:
        samples: what the stage trains on.
        collator: makes batches.
        see: computes the image features of samples before they are collated.
        training: the recipe's part.
        device: where batches go.
        steps: optimizer steps of the stage.
    """

    samples: "Sequence[Sample]"
    collator: "Collator"
    see: "Callable[[Sequence[Sample]], None]"
    training: Training
    device: Any
    steps: int

    def batches(
        self, samples: "Sequence[Sample] | None" = None, batch_size: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Collated batches with labels, in order, on the model's device; the stage's samples when None."""
        from dymoe.evaluation.generate import to_device

        chosen = self.samples if samples is None else samples
        size = batch_size or self.training.batch_size
        for start in range(0, len(chosen), size):
            part = list(chosen[start : start + size])
            self.see(part)
            yield to_device(self.collator(part), self.device)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> "Tensor":
        """Mean next-token loss of the batch's answers, a scalar, without any other term."""
        from dymoe.learning.loss import answer_logits, next_token_loss

        inputs = {key: value for key, value in batch.items() if key != "labels"}
        labels = batch["labels"]
        trace = getattr(getattr(model, "base_model", None), "trace", None)
        with nullcontext() if trace is None else trace.context.labelled(labels), self.autocast():
            outputs = model(**inputs, logits_to_keep=answer_logits(labels), use_cache=False)
        return next_token_loss(outputs.logits, labels)

    def autocast(self) -> Any:
        """The run's mixed precision."""
        from dymoe.evaluation.generate import autocast

        return autocast(self.device.type, self.training.dtype)
