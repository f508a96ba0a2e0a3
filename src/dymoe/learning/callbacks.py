"""Passes what the trainer tells on to events.jsonl and to the display."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dymoe.learning.folder import RunFolder
from dymoe.learning.progress import Display
from dymoe.methods import Stage


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
