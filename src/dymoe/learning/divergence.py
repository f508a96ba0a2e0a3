"""Training that diverged ends at the step where it did, with a word on what to try."""

import math
from typing import Any

import torch
from torch import Tensor

from dymoe.errors import DymoeError


class Divergence:
    """Loss and gradient norm of the steps not looked at yet.

    They stay where they were computed until `check`: looking at each step would let a GPU wait for the CPU.

    Args:
        name: what learns, for the message.
        rate: the learning rate.
    """

    def __init__(self, name: str, rate: float) -> None:
        self.name = name
        self.rate = rate
        self._loss: Tensor | float = 0.0
        self._steps: list[tuple[int, Tensor, Tensor]] = []
        self._finite: tuple[int, float] | None = None

    def add(self, loss: Tensor) -> None:
        """A micro-batch's part of the step's loss."""
        self._loss = self._loss + loss.detach()

    def end_step(self, step: int, norm: Any) -> None:
        """All of a step's loss is there.

        Args:
            step: optimizer steps done, this one included.
            norm: of its gradient; None where it does not count (float16 skips a step whose gradient overflows).
        """
        loss = torch.as_tensor(self._loss)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2's is spread over the processes
        norm = loss.new_zeros(()) if norm is None else torch.as_tensor(norm, device=loss.device)
        self._steps.append((step, loss, norm))
        self._loss = 0.0

    def check(self) -> None:
        """Look at the steps since the last look.

        Raises:
            DymoeError: a loss or a gradient norm was not finite.
        """
        if not self._steps:
            return
        values = torch.stack([torch.stack((loss.double(), norm.double())) for _, loss, norm in self._steps]).tolist()
        steps, self._steps = [step for step, _, _ in self._steps], []
        for step, (loss, norm) in zip(steps, values, strict=True):
            if math.isfinite(loss):
                self._finite = (step, loss)
                if math.isfinite(norm):
                    continue
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
            last = (
                "there was no finite loss before"
                if self._finite is None
                else "the last finite loss was {1:.4g}, at step {0}".format(*self._finite)
            )
            raise DymoeError(
                f"{self.name}: step {step}: {what}; {last}. Training diverged: try a lower training.lr (it is "
                f"{self.rate:g}), a longer training.warmup, or the defaults of what settings change; nothing of this "
                "step is saved"
            )
