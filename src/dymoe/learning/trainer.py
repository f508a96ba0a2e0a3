"""The trainer of one stage: transformers' Trainer, answer-only logits, routing terms, small checkpoints.

It trains in one process or in several; what that asks of a trainer is in `learning.sharded`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from dymoe.errors import DymoeError
from dymoe.files import atomic_json, read_json, reason
from dymoe.learning.callbacks import Divergence, StageCallback
from dymoe.learning.checkpoints import mark_complete
from dymoe.learning.distributed import ALONE, Processes
from dymoe.learning.groups import WEIGHTS, read_tensors, set_group, trace_of, write_group
from dymoe.learning.loss import answer_logits, next_token_loss
from dymoe.learning.recipe import Training
from dymoe.learning.sampler import Loader, Order
from dymoe.learning.sharded import ShardedTrainer
from dymoe.libraries import require_extra, require_names
from dymoe.methods import Method

SUMS = "sums.json"
# Names of transformers' Trainer that are not promised to stay: overridden, called or set here.
require_names(
    Trainer,
    *("_save", "_save_checkpoint", "_load_from_checkpoint", "_load_rng_state"),
    *("loss_is_scaled_for_ga", "_maybe_log_save_evaluate"),
)
# As well, but they are there only while it trains.
COUNTED = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step")
OPTIMIZERS = {"adamw": "adamw_torch_fused", "paged-adamw": "paged_adamw_32bit"}  # transformers' names


def training_arguments(
    training: Training, folder: Path, seed: int, steps: int, processes: int = 1, workers: int = 0
) -> TrainingArguments:
    """Transformers' arguments for one stage.

    Args:
        training: the recipe's part.
        folder: where checkpoints go while the stage trains.
        seed: of dropout and the order of the samples.
        steps: optimizer steps.
        processes: how many share a step.
        workers: processes that make batches ahead, 0 for none.

    Raises:
        DymoeError: float16 without a GPU, paged-adamw without bitsandbytes, or a step that cannot be shared evenly.
    """
    gpu = torch.cuda.is_available()
    if training.dtype == "float16" and not gpu:
        raise DymoeError("training.dtype: float16 needs a GPU; use bfloat16 or float32")
    if training.optimizer == "paged-adamw":
        require_extra("quantization", "training.optimizer")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulation(processes),
        learning_rate=training.lr,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=OPTIMIZERS[training.optimizer],
        bf16=training.dtype == "bfloat16",
        fp16=training.dtype == "float16",
        use_cpu=not gpu,
        activation_checkpointing=training.gradient_checkpointing,
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=workers,
        dataloader_pin_memory=gpu,
        # Every training parameter gets a gradient in every pass; the frozen base's buffers are the same everywhere.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        logging_steps=training.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=2,
        report_to=training.report_to or "none",
        disable_tqdm=True,
    )
    # Where one process sees several GPUs, transformers would multiply the batch and copy the model to all of them
    # (nn.DataParallel), whose threads would share one trace. Several GPUs are for `accelerate launch`.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class StageTrainer(ShardedTrainer):
    """Trains one expert group on one stage's samples.

    Args:
        model: the model with all groups, `group` training and the others frozen.
        group: name of the training group; checkpoints hold it alone.
        method: gives the model-level loss terms.
        samples: what the stage trains on; `collator` makes batches of them.
        arguments: see `training_arguments`.
        callbacks: further observers.
        processes: who takes part in every step.
        name: what learns, as messages call it; the group when None.

    Raises:
        DymoeError: the method or the dtype does not go with the way the launcher spreads the training.
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
        processes: Processes = ALONE,
        name: str | None = None,
    ) -> None:
        self.group, self.method, self.processes = group, method, processes
        self.trace = trace_of(model)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=samples,  # type: ignore[arg-type]
            data_collator=collator,
            callbacks=[*callbacks, StageCallback(model, method)],
        )
        self.remove_callback(PrinterCallback)
        # compute_loss divides by the step's items itself, so nothing is left to scale for accumulation.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._terms: dict[str, Tensor] = {}
        self._logged = 0  # the step at which `_terms` began
        self._ended = 0  # the last step whose loss is complete
        self._divergence = Divergence(name or group, arguments.learning_rate)
        self.refuse_unequal(model, method)

    def get_train_dataloader(self) -> Loader:
        """This process's micro-batches; see `learning.sampler`."""
        samples, collator = cast(Any, self.train_dataset), cast(Any, self.data_collator)
        seed, processes = int(self.args.data_seed or 0), self.processes
        order = Order(len(samples), self._train_batch_size, seed, processes.rank, processes.count)
        options = {"num_workers": self.args.dataloader_num_workers, "pin_memory": self.args.dataloader_pin_memory}
        return Loader(samples, collator, order, **options)

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
        with self.trace.context.labelled(labels), self.autocast():
            outputs = model(**batch, logits_to_keep=answer_logits(labels), use_cache=False)
        items = num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != -100).sum()
        # Gradients are averaged over processes while `items` counts those of all processes.
        world = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        answer = next_token_loss(outputs.logits, labels, items) * world
        share = (labels[:, 1:] != -100).sum() / items * world
        terms = self.method.loss_terms(self.accelerator.unwrap_model(model), inputs, outputs)
        loss = self.trace.attach(answer + sum((term * share for term in terms.values()), answer.new_zeros(())), share)
        self._divergence.add(loss)
        self._note({"next_token": answer, **{name: term * share for name, term in terms.items()}})
        return (loss, outputs) if return_outputs else loss

    def _note(self, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            value = value.detach().float()
            self._terms[name] = self._terms[name] + value if name in self._terms else value

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Look whether training diverged, before anything is logged or saved.

        Raises:
            DymoeError: it did.
        """
        step = self.state.global_step
        if step > self._ended:  # transformers comes here once more when an epoch ends
            self._divergence.end_step(step, None if self.accelerator.optimizer_step_was_skipped else grad_norm)
            self._ended = step
        due = self.control.should_log or self.control.should_save or self.control.should_training_stop
        if due or self.args.device.type == "cpu":
            self._divergence.check()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss with its terms beside it, means over the steps since the last log and over the processes."""
        if "loss" in logs:
            steps = self.state.global_step - self._logged
            values = {name: value.item() / steps for name, value in self._terms.items()}
            logs.update(self.processes.mean({**values, **self.trace.summary()}))
            self._terms, self._logged = {}, self.state.global_step
        super().log(logs, start_time)

    def _save_sums(self, file: Path) -> None:
        """Write what was summed up since the last log, means over the processes; every process calls this."""
        require_names(cast(Any, self), *COUNTED)
        terms = self.processes.mean({name: value.item() for name, value in self._terms.items()})
        losses = self.processes.mean({"since": self._tr_loss.item(), "before": self._total_loss_scalar})
        if self.args.should_save:
            atomic_json(file, {"logged": self._logged, "terms": terms, "losses": losses})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random numbers and, with them, the sums; transformers has set its own to zero before."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        sums, device = read_json(Path(checkpoint) / SUMS), self.args.device
        self._terms = {name: torch.tensor(value, device=device) for name, value in sums["terms"].items()}
        self.state.compute_steps(self.args, self.state.max_steps)  # log_steps and save_steps may be other ones now
        self._logged = self._globalstep_last_logged = sums["logged"]
        self._tr_loss = torch.tensor(sums["losses"]["since"], device=device)
        self._total_loss_scalar, self._initial_global_step = sums["losses"]["before"], 0
        self._ended = self.state.global_step

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
            raise DymoeError(f"{folder}: checkpoint cannot be written ({reason(error, folder)})") from error
        self._save_sums(folder / SUMS)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        file = Path(resume_from_checkpoint) / WEIGHTS
        target = self.accelerator.unwrap_model(model if model is not None else self.model)
        set_group(target, self.group, read_tensors(file), str(file))

    def close(self) -> None:
        """Give the model back as it was: without the autocast wrapper of this stage's accelerator.

        A model whose training was spread over processes is not to be used afterwards; `weights` come before.
        """
        if not self.processes.wrapped:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            vars(self.model).pop("forward", None)  # the unwrapped method, now found on the class again
        self.accelerator.free_memory()
