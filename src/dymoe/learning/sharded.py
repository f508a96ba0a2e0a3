"""A trainer that may be spread over processes: what must not depend on that, and whole tensors out of parts.

FSDP2 holds parameters and AdamW's moments as DTensors, DeepSpeed as parts of flat buffers (the parameters of ZeRO-3
and the moments of ZeRO-2 and ZeRO-3). A checkpoint holds them whole, by the parameter's name, so that another number of
processes can go on with it. Every function here has to be called by all processes.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from dymoe.adapter.holder import GroupHolder
from dymoe.errors import DymoeError
from dymoe.learning.distributed import Processes
from dymoe.learning.groups import named, of_group
from dymoe.libraries import require_names
from dymoe.methods import Method

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # transformers' names
# Of transformers' Trainer: names that are not promised to stay, overridden or called here.
require_names(
    Trainer,
    *("_prepare_for_training", "_load_from_checkpoint", "_load_scaler", "create_accelerator_and_postprocess"),
    *("_save", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler"),
)

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of every parameter, beside its step


class ShardedTrainer(Trainer):
    """Transformers' trainer, so that one, several or many processes compute the same and go on with one another's work.

    Attributes:
        group: name of the training group.
        processes: who takes part in every step.
    """

    group: str
    processes: Processes
    _names: Sequence[str] = ()  # of the optimizer's parameters, in its order

    @property
    def dtype(self) -> str:
        """Of the computation."""
        return "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else "float32"

    @property
    def parted(self) -> bool:
        """Whether no process holds all of the optimizer, or of the parameters."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @property
    def cut(self) -> bool:
        """Whether no process holds whole parameters."""
        plugin = self.accelerator.state.deepspeed_plugin
        return bool(self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3))

    def refuse_unequal(self, model: PeftModel, method: Method) -> None:
        """Refuse what would not compute the same as in one process."""
        way = "FSDP2" if self.is_fsdp_enabled else "DeepSpeed"
        if self.parted and self.args.fp16:
            raise DymoeError(f"training.dtype: float16 does not go with {way} here; use bfloat16")
        if self.parted and "paged" in str(self.args.optim):
            raise DymoeError(f"training.optimizer: paged-adamw is for one GPU; {way} spreads adamw's state")
        if self.cut and method.brings("loss_terms"):
            raise DymoeError(
                f"method {method.name}: its loss reads whole parameters, which {way} cuts into parts; "
                "use recipes/accelerate/ddp.yaml or zero2.yaml"
            )
        if self.parted and method.brings("before_step"):
            raise DymoeError(
                f"method {method.name}: it changes gradients before a step, which {way} does not hand out whole; "
                "use recipes/accelerate/ddp.yaml"
            )
        base: Any = model.base_model
        if self.cut and getattr(base.model, "is_loaded_in_4bit", False):
            raise DymoeError(
                f"model_options.load_in_4bit: {way} would cut the 4-bit weights into parts, which is not supported; "
                "use recipes/accelerate/ddp.yaml or zero2.yaml"
            )
        if self.cut and self.is_deepspeed_enabled and base.selector is not None and base.selector.while_training:
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

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast where neither accelerate nor DeepSpeed brings it."""
        if not self.is_fsdp_enabled or self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.args.device.type, dtype=getattr(torch, self.dtype))

    def weights(self, every: bool = False) -> dict[str, Tensor]:
        """The training group's tensors, whole, by their names in the model; to be called by every process.

        Args:
            every: those of all groups, the frozen ones too.

        Returns:
            name -> tensor on the CPU in process 0; nothing in the others, which only take part.
        """
        model = self.accelerator.unwrap_model(self.model)
        names = [name for name in named(model) if ".dymoe_" in name and (every or of_group(name, self.group))]
        return parameters(model, names, keep=self.processes.main)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the training group alone, whole however it is held."""
        if self.parted:
            self._save(output_dir, self.weights())
        else:
            super().save_model(output_dir, _internal_call)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Transformers' optimizer; the order of its parameters is kept by name."""
        optimizer = super().create_optimizer(model)
        names = {parameter: name for name, parameter in named(cast(nn.Module, self.model)).items()}
        self._names = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        return optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Wrap the model, and go on with a checkpoint that need not come from the same number of processes."""
        if self.parted and resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)  # while every process holds whole parameters
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.cut and self.is_deepspeed_enabled:
            let_layers_gather(cast(Any, self.model).base_model.layers())
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.parted:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        state = optimizer_state(cast(nn.Module, self.model), optimizer.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save({"by_name": state}, Path(output_dir) / OPTIMIZER)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        content = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        if not self.parted and "by_name" not in content:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = content.get("by_name") or {self._names[index]: one for index, one in content["state"].items()}
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        load_optimizer_state(cast(nn.Module, self.model), optimizer.optimizer, state)
        schedule = torch.load(Path(checkpoint) / SCHEDULER, weights_only=True)
        # One entry a parameter group, all the same; DeepSpeed drops the groups that are empty.
        groups = len(scheduler.base_lrs)
        scheduler.load_state_dict(
            {key: value[:1] * groups if isinstance(value, list) else value for key, value in schedule.items()}
        )
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate


def parameters(model: nn.Module, names: Iterable[str], keep: bool = True) -> dict[str, Tensor]:
    """These parameters, whole, on the CPU; nothing where `keep` is off, but that process takes part too."""
    by_name = named(model)
    result = {}
    for name in names:
        value = _parameter(by_name[name])
        if keep:
            result[name] = value.cpu()
    return result


def _parameter(value: nn.Parameter) -> Tensor:
    if hasattr(value, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([value]):
            return value.detach().clone()
    return _full_tensor(value.detach())


def let_layers_gather(layers: Iterable[GroupHolder]) -> None:
    """Tell ZeRO-3 that a layer's forward needs the parameters of its groups.

    It puts together a module's own parameters when the module runs; those of the groups sit in dictionaries below the
    layer, which never run.
    """
    import deepspeed

    for layer in layers:
        for attribute in layer.adapter_layer_names:
            for value in getattr(layer, attribute).values():
                deepspeed.zero.register_external_parameter(layer, value)


def optimizer_state(model: nn.Module, optimizer: Any, keep: bool = True) -> dict[str, dict[str, Tensor]]:
    """AdamW's state of every training parameter, by its name: the moments and the step, whole, on the CPU.

    Nothing where `keep` is off, but that process takes part too.
    """
    result = {}
    for name, value in named(model).items():
        if not value.requires_grad:
            continue
        if _is_deepspeed(optimizer):
            from deepspeed.utils import safe_get_full_optimizer_state

            state = {key: safe_get_full_optimizer_state(value, key) for key in MOMENTS}
            state["step"] = _steps(optimizer)[0]
        else:
            state = optimizer.state[value]
        state = {key: _full_tensor(one) for key, one in state.items() if one is not None}
        if keep:
            result[name] = {key: one.cpu() for key, one in state.items()}
    return result


def load_optimizer_state(model: nn.Module, optimizer: Any, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put back what `optimizer_state` gave, into parts as they are now.

    Raises:
        KeyError: a training parameter is not in `state`.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if _is_deepspeed(optimizer):
        _begin_state(optimizer)
    for name, value in named(model).items():
        if not value.requires_grad:
            continue
        moments = state[name]
        if _is_deepspeed(optimizer):
            for key in MOMENTS:
                _set_part(value, moments[key].to(value.device), key)
            for step in _steps(optimizer):
                step.fill_(float(moments["step"]))
            continue
        local_state: dict[str, Tensor] = {}
        for key, one in moments.items():
            one = one.to(value.device)
            if isinstance(value, DTensor) and one.shape == value.shape:
                one = distribute_tensor(one, value.device_mesh, value.placements)
            local_state[key] = one
        optimizer.state[value] = local_state


def _full_tensor(value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    full: Tensor = value.full_tensor() if isinstance(value, DTensor) else value.detach().clone()
    return full


def _is_deepspeed(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("deepspeed.")


def _begin_state(optimizer: Any) -> None:
    """Give the optimizer that DeepSpeed wraps the state which it would only make in its first step."""
    flat = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3, else ZeRO-2
    for value in optimizer.single_partition_of_fp32_groups if flat is None else flat:
        state = {key: torch.zeros_like(value) for key in MOMENTS}
        optimizer.optimizer.state[value] = {**state, "step": torch.zeros((), device=value.device)}
    if flat is None:
        optimizer._lazy_init_hp_params_optimizer_state()  # else the parameters do not find their parts of it


def _set_part(value: nn.Parameter, full: Tensor, key: str) -> None:
    """Put this process's part of one moment, given whole, where DeepSpeed holds it."""
    from deepspeed import comm
    from deepspeed.utils import (
        safe_get_local_optimizer_state,
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    if not hasattr(value, "ds_id"):
        safe_set_full_optimizer_state(value, full, key)
        return
    # ZeRO-3 fills parameters up until they can be cut evenly; DeepSpeed's setter of whole tensors forgets that.
    size = safe_get_local_optimizer_state(value, key).numel()
    start = comm.get_rank() * size
    part = full.flatten()[start : start + size]
    safe_set_local_optimizer_state(value, F.pad(part, (0, size - part.numel())), key)


def _steps(optimizer: Any) -> list[Tensor]:
    """The step counters of the optimizer that DeepSpeed wraps, one for each flat buffer."""
    return [state["step"] for state in optimizer.optimizer.state.values() if "step" in state]
