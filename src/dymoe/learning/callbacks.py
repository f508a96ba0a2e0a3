"""What looks on while the trainer works: the log and the display, the method, and whether training diverged."""

import math
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dymoe.errors import DymoeError
from dymoe.learning.folder import RunFolder
from dymoe.learning.groups import trace_of
from dymoe.learning.progress import Display
from dymoe.methods import Method, Stage


class Watch(TrainerCallback):
    """One line in events.jsonl for every logged step, one tick of the display.

    Args:
        folder: the run.
        display: what is shown.
        stage: the stage that trains.
        kind: of the lines, "step", or "probe-step" for a temporary group.
    """

    def __init__(self, folder: RunFolder, display: Display, stage: Stage, kind: str) -> None:
        self.folder = folder
        self.display = display
        self.stage = stage
        self.kind = kind

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write and show the logs of a training step."""
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        values = {key: round(value, 6) for key, value in logs.items()}
        stage = self.stage
        self.folder.event(self.kind, stage=stage.index, task=stage.name, step=state.global_step, **values)
        self.display.step(state.global_step, state.max_steps, logs)


class StageCallback(TrainerCallback):
    """Tells the trace how far the task is, lets the method see the gradients, saves no checkpoint at the end."""

    def __init__(self, model: PeftModel, method: Method) -> None:
        self.model = model
        self.method = method
        self.trace = trace_of(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the share of the task's steps that is done."""
        self.trace.context.progress = state.global_step / max(1, state.max_steps)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand the finished gradients to the method."""
        self.method.before_step(self.model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """The group itself is saved when training ends; a last checkpoint would be for nothing."""
        if state.global_step >= state.max_steps:
            control.should_save = False
        return control


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
