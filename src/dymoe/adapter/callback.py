"""What an unmodified Trainer does not know of groups: where the best checkpoint holds the one that trains."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dymoe.errors import DymoeError


class LoadBestGroup(TrainerCallback):
    """Ends a training with `load_best_model_at_end` with the training group of the best checkpoint.

    The Trainer saves every adapter in a folder of its name but looks for the best one beside these folders, where PEFT
    saves the adapter called "default" alone. It then says that it could not locate the best model and goes on.
    """

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Load the training group as it was at the best checkpoint.

        Raises:
            DymoeError: the checkpoint does not hold it.
        """
        group = getattr(getattr(model, "base_model", None), "training_group", None)
        best = state.best_model_checkpoint
        if not args.load_best_model_at_end or best is None or group in (None, "default"):
            return
        folder = Path(best) / group
        if not (folder / "adapter_config.json").is_file():
            raise DymoeError(f"load_best_model_at_end: {best} holds no expert group {group!r}")
        model.load_adapter(folder, group)


def register_callback() -> None:
    """Let every Trainer made from now on have the callback; it does nothing for other models."""
    from transformers.trainer import DEFAULT_CALLBACKS

    if LoadBestGroup not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(LoadBestGroup)  # type: ignore[arg-type]
