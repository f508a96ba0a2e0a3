"""The trainer of one stage: transformers' Trainer, answer-only logits, routing terms, small checkpoints.

It trains in one process or in several. Gradients, sharding and their communication are accelerate's work; here is what
must not depend on it: the loss, the order of the samples, the precision, and checkpoints that another number of
processes can go on with.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from dymoe.learning import sharded
from dymoe.learning.callbacks import Divergence, StageCallback
from dymoe.learning.checkpoints import mark_complete
from dymoe.learning.distributed import ALONE, Processes
from dymoe.learning.groups import WEIGHTS, of_group, read_tensors, set_group, trace_of, write_group
from dymoe.learning.loss import answer_logits, next_token_loss
from dymoe.learning.recipe import Training
from dymoe.learning.sampler import Loader, Order
from dymoe.libraries import require_extra, require_names
from dymoe.methods import Method

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # transformers' names
SUMS = "sums.json"
# Names of transformers' Trainer that are not promised to stay: overridden, called or set here.
require_names(
    Trainer,
    *("_save", "_save_checkpoint", "_load_from_checkpoint", "_prepare_for_training", "_load_scaler"),
    *("_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler", "create_accelerator_and_postprocess"),
    *("loss_is_scaled_for_ga", "_maybe_log_save_evaluate", "_load_rng_state"),
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


class StageTrainer(Trainer):
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
        self.processes = processes
        self.dtype = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "float32"
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=samples,  # type: ignore[arg-type]
            data_collator=collator,
            callbacks=[*callbacks, StageCallback(model, method)],
        )
        self.remove_callback(PrinterCallback)
        self.group = group
        self.method = method
        self.trace = trace_of(model)
        # compute_loss divides by the step's items itself, so nothing is left to scale for accumulation.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._terms: dict[str, Tensor] = {}
        self._logged = 0  # the step at which `_terms` began
        self._ended = 0  # the last step whose loss is complete
        self._divergence = Divergence(name or group, arguments.learning_rate)
        self._names: list[str] = []
        self._refuse(model, method)

    @property
    def _parted(self) -> bool:
        """Whether no process holds all of the optimizer, or of the parameters."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @property
    def _cut(self) -> bool:
        """Whether no process holds whole parameters."""
        plugin = self.accelerator.state.deepspeed_plugin
        return bool(self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3))

    def _refuse(self, model: PeftModel, method: Method) -> None:
        """Refuse what would not compute the same as in one process."""
        way = "FSDP2" if self.is_fsdp_enabled else "DeepSpeed"
        if self._parted and self.args.fp16:
            raise DymoeError(f"training.dtype: float16 does not go with {way} here; use bfloat16")
        if self._parted and "paged" in str(self.args.optim):
            raise DymoeError(f"training.optimizer: paged-adamw is for one GPU; {way} spreads adamw's state")
        if self._cut and method.brings("loss_terms"):
            raise DymoeError(
                f"method {method.name}: its loss reads whole parameters, which {way} cuts into parts; "
                "use recipes/accelerate/ddp.yaml or zero2.yaml"
            )
        if self._parted and method.brings("before_step"):
            raise DymoeError(
                f"method {method.name}: it changes gradients before a step, which {way} does not hand out whole; "
                "use recipes/accelerate/ddp.yaml"
            )
        base: Any = model.base_model
        if self._cut and getattr(base.model, "is_loaded_in_4bit", False):
            raise DymoeError(
                f"model_options.load_in_4bit: {way} would cut the 4-bit weights into parts, which is not supported; "
                "use recipes/accelerate/ddp.yaml or zero2.yaml"
            )
        if self._cut and self.is_deepspeed_enabled and base.selector is not None and base.selector.while_training:
            raise DymoeError(
                f"method {method.name}: its selector learns outside of the layers that ZeRO-3 puts together; "
                "use recipes/accelerate/ddp.yaml, zero2.yaml or fsdp2.yaml"
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Let the precision be what it is in one process: the parameters' own dtypes, and autocast."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            from torch.distributed.fsdp import MixedPrecisionPolicy

            # accelerate's would run experts and routers in bfloat16 and sum their gradients in it.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        if self.is_deepspeed_enabled:
            # DeepSpeed's own bfloat16 mode would turn experts and routers into bfloat16.
            config = self.accelerator.state.deepspeed_plugin.hf_ds_config.config
            config["bf16"] = {"enabled": False}
            config["torch_autocast"] = {"enabled": self.dtype != "float32", "dtype": "bfloat16"}

    def _autocast(self) -> AbstractContextManager[Any]:
        """Autocast where neither accelerate nor DeepSpeed brings it."""
        if not self.is_fsdp_enabled or self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.args.device.type, dtype=getattr(torch, self.dtype))

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
        self.trace.labels = labels
        with self._autocast():
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

    def weights(self, every: bool = False) -> dict[str, Tensor]:
        """The training group's tensors, whole, by their names in the model; to be called by every process.

        Args:
            every: those of all groups, the frozen ones too.

        Returns:
            name -> tensor on the CPU in process 0; nothing in the others, which only take part.
        """
        model = self.accelerator.unwrap_model(self.model)
        names = [name for name in sharded.named(model) if ".dymoe_" in name and (every or of_group(name, self.group))]
        return sharded.parameters(model, names, keep=self.processes.main)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the training group alone, whole however it is held."""
        if self._parted:
            self._save(output_dir, self.weights())
        else:
            super().save_model(output_dir, _internal_call)

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

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Transformers' optimizer; the order of its parameters is kept by name."""
        optimizer = super().create_optimizer(model)
        names = {parameter: name for name, parameter in sharded.named(cast(nn.Module, self.model)).items()}
        self._names = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        return optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Wrap the model, and go on with a checkpoint that need not come from the same number of processes."""
        if self._parted and resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)  # while every process holds whole parameters
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self._cut and self.is_deepspeed_enabled:
            sharded.let_layers_gather(cast(Any, self.model).base_model.layers())
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._parted:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        state = sharded.optimizer_state(cast(nn.Module, self.model), optimizer.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save({"by_name": state}, Path(output_dir) / OPTIMIZER)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        kept = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        if not self._parted and "by_name" not in kept:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = kept.get("by_name") or {self._names[place]: one for place, one in kept["state"].items()}
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        sharded.load_optimizer_state(cast(nn.Module, self.model), optimizer.optimizer, state)
        schedule = torch.load(Path(checkpoint) / SCHEDULER, weights_only=True)
        # One entry a parameter group, all the same; DeepSpeed drops the groups that are empty.
        groups = len(scheduler.base_lrs)
        scheduler.load_state_dict(
            {key: value[:1] * groups if isinstance(value, list) else value for key, value in schedule.items()}
        )
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def close(self) -> None:
        """Give the model back as it was: without the autocast wrapper of this stage's accelerator.

        A model whose training was spread over processes is not to be used afterwards; `weights` come before.
        """
        if not self.processes.wrapped:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            vars(self.model).pop("forward", None)  # the unwrapped method, now found on the class again
        self.accelerator.free_memory()
