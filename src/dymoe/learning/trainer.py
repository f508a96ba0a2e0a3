"""The trainer of one stage: transformers' Trainer, answer-only logits, routing terms, small checkpoints."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from dymoe.errors import DymoeError
from dymoe.files import atomic_json
from dymoe.learning.groups import trace_of, write_group
from dymoe.learning.recipe import Training
from dymoe.methods import Method

WEIGHTS = "adapter_model.safetensors"
MARKER = "complete.json"


def training_arguments(training: Training, folder: Path, seed: int, steps: int | None) -> TrainingArguments:
    """Transformers' arguments for one stage.

    Args:
        training: the recipe's part.
        folder: where checkpoints go while the stage trains.
        seed: of dropout and the order of the samples.
        steps: optimizer steps; None trains `training.epochs` epochs.

    Raises:
        DymoeError: float16 without a GPU.
    """
    gpu = torch.cuda.is_available()
    if training.dtype == "float16" and not gpu:
        raise DymoeError("training.dtype: float16 needs a GPU; use bfloat16 or float32")
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps if steps is not None else -1,
        num_train_epochs=training.epochs or 1.0,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.lr,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=training.dtype == "bfloat16",
        fp16=training.dtype == "float16",
        use_cpu=not gpu,
        activation_checkpointing=training.gradient_checkpointing,
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=0,
        dataloader_pin_memory=gpu,
        logging_steps=training.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=2,
        report_to=training.report_to or "none",
        disable_tqdm=True,
    )


def answer_logits(labels: Tensor) -> int:
    """How many last positions predict an answer token in some row: the longest answer and the one before it.

    Args:
        labels: (batch, tokens), -100 where nothing is learned; answers end at the right edge.
    """
    learned = (labels != -100).any(0)
    first = int(learned.int().argmax()) if bool(learned.any()) else labels.shape[1] - 1
    return min(labels.shape[1] - first + 1, labels.shape[1])


def next_token_loss(logits: Tensor, labels: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Cross entropy of the answers' tokens, a sum divided by `items`.

    Args:
        logits: (batch, k, vocabulary), of the last k positions.
        labels: (batch, tokens >= k), -100 where nothing is learned.
        items: learned tokens of the whole optimizer step (all micro-batches); this batch's own when None.
    """
    targets = labels[:, labels.shape[1] - logits.shape[1] + 1 :].reshape(-1)
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    total = F.cross_entropy(flat, targets, ignore_index=-100, reduction="sum")
    return total / ((targets != -100).sum() if items is None else items)


class StageTrainer(Trainer):
    """Trains one expert group on one stage's samples.

    Args:
        model: the model with all groups, `group` training and the others frozen.
        group: name of the training group; checkpoints hold it alone.
        method: gives the model-level loss terms.
        samples: what the stage trains on; `collator` makes batches of them.
        arguments: see `training_arguments`.
        callbacks: further observers.
    """

    def __init__(
        self,
        model: PeftModel,
        group: str,
        method: Method,
        samples: Sequence[Any],
        collator: Any,
        arguments: TrainingArguments,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=samples,  # type: ignore[arg-type]
            data_collator=collator,
            callbacks=[*callbacks, _StageCallback(model, method)],
        )
        self.remove_callback(PrinterCallback)
        self.group = group
        self.method = method
        self.trace = trace_of(model)
        # compute_loss divides by the step's items itself, so nothing is left to scale for accumulation.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._terms: dict[str, Tensor] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Next-token loss of the answers, the routing terms and the method's own terms.

        The next-token loss is exact under accumulation (a sum over the step's items); the routing terms are
        means over a micro-batch's tokens and count by its share of the items.
        """
        labels = inputs["labels"]
        batch = {key: value for key, value in inputs.items() if key != "labels"}
        self.trace.labels = labels
        outputs = model(**batch, logits_to_keep=answer_logits(labels), use_cache=False)
        items = num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != -100).sum()
        # Gradients are averaged over processes while `items` counts those of all processes.
        world = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        answer = next_token_loss(outputs.logits, labels, items) * world
        share = (labels[:, 1:] != -100).sum() / items * world
        terms = self.method.loss_terms(self.accelerator.unwrap_model(model), inputs, outputs)
        loss = self.trace.attach(answer + sum((term * share for term in terms.values()), answer.new_zeros(())), share)
        self._note({"next_token": answer, **{name: term * share for name, term in terms.items()}})
        return (loss, outputs) if return_outputs else loss

    def _note(self, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            value = value.detach().float()
            self._terms[name] = self._terms[name] + value if name in self._terms else value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss with its terms beside it, means over the steps since the last log."""
        if "loss" in logs:
            steps = max(1, self.state.global_step % self.args.logging_steps or self.args.logging_steps)
            logs.update({name: value.item() / steps for name, value in self._terms.items()})
            logs.update(self.trace.summary())
            self._terms = {}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: transformers' estimate would walk all parameters at every step."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            write_group(self.accelerator.unwrap_model(self.model), self.group, folder, state_dict=state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save the training group, optimizer and random state; the marker that says 'complete' comes last."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise DymoeError(
                f"{folder}: checkpoint cannot be written ({getattr(error, 'strerror', None) or error})"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
            atomic_json(folder / MARKER, sizes)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        target = self.accelerator.unwrap_model(model if model is not None else self.model)
        set_peft_model_state_dict(target, weights, adapter_name=self.group)

    def close(self) -> None:
        """Give the model back as it was: without the autocast wrapper of this stage's accelerator."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        vars(self.model).pop("forward", None)  # the unwrapped method, now found on the class again
        self.accelerator.free_memory()


class _StageCallback(TrainerCallback):
    """Tells the trace how far the task is, lets the method see the gradients, saves no checkpoint at the end."""

    def __init__(self, model: PeftModel, method: Method) -> None:
        self.model = model
        self.method = method
        self.trace = trace_of(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the share of the task's steps that is done."""
        self.trace.progress = state.global_step / max(1, state.max_steps)

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


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint below `folder` that was written to its end, None if there is none.

    A checkpoint counts only with its marker and every file at the size that the marker names, so one that a kill
    or a full disk cut short is passed over.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        marker = path / MARKER
        try:
            sizes = json.loads(marker.read_text(encoding="utf-8"))
            if all((path / name).stat().st_size == size for name, size in sizes.items()):
                return path
        except (OSError, ValueError, AttributeError):
            continue
    return None
