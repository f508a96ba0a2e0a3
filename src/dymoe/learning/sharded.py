"""Whole tensors of a model whose training is spread over processes, and of its optimizer.

FSDP2 holds parameters and AdamW's moments as DTensors, DeepSpeed as parts of flat buffers (the parameters of ZeRO-3
and the moments of ZeRO-2 and ZeRO-3). A checkpoint holds them whole, by the parameter's name, so that another number of
processes can go on with it. Every function here has to be called by all processes.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dymoe.adapter.holder import GroupHolder

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of every parameter, beside its step


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters by the names they have in an unwrapped model."""
    return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in model.named_parameters()}


def parameters(model: nn.Module, names: Iterable[str], keep: bool = True) -> dict[str, Tensor]:
    """These parameters, whole, on the CPU; nothing where `keep` is off, but that process takes part too."""
    held = named(model)
    found = {}
    for name in names:
        value = _parameter(held[name])
        if keep:
            found[name] = value.cpu()
    return found


def _parameter(value: nn.Parameter) -> Tensor:
    if hasattr(value, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([value]):
            return value.detach().clone()
    return _whole(value.detach())


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
    found = {}
    for name, value in named(model).items():
        if not value.requires_grad:
            continue
        if _is_deepspeed(optimizer):
            from deepspeed.utils import safe_get_full_optimizer_state

            state = {key: safe_get_full_optimizer_state(value, key) for key in MOMENTS}
            state["step"] = _steps(optimizer)[0]
        else:
            state = optimizer.state[value]
        state = {key: _whole(one) for key, one in state.items() if one is not None}
        if keep:
            found[name] = {key: one.cpu() for key, one in state.items()}
    return found


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
        kept = state[name]
        if _is_deepspeed(optimizer):
            for key in MOMENTS:
                _set_part(value, kept[key].to(value.device), key)
            for step in _steps(optimizer):
                step.fill_(float(kept["step"]))
            continue
        made: dict[str, Tensor] = {}
        for key, one in kept.items():
            one = one.to(value.device)
            if isinstance(value, DTensor) and one.shape == value.shape:
                one = distribute_tensor(one, value.device_mesh, value.placements)
            made[key] = one
        optimizer.state[value] = made


def _whole(value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value.detach().clone()
    return whole


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


def _set_part(value: nn.Parameter, whole: Tensor, key: str) -> None:
    """Put this process's part of one moment, given whole, where DeepSpeed holds it."""
    from deepspeed import comm
    from deepspeed.utils import (
        safe_get_local_optimizer_state,
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    if not hasattr(value, "ds_id"):
        safe_set_full_optimizer_state(value, whole, key)
        return
    # ZeRO-3 fills parameters up until they can be cut evenly; DeepSpeed's setter of whole tensors forgets that.
    size = safe_get_local_optimizer_state(value, key).numel()
    start = comm.get_rank() * size
    part = whole.flatten()[start : start + size]
    safe_set_local_optimizer_state(value, F.pad(part, (0, size - part.numel())), key)


def _steps(optimizer: Any) -> list[Tensor]:
    """The step counters of the optimizer that DeepSpeed wraps, one for each flat buffer."""
    return [state["step"] for state in optimizer.optimizer.state.values() if "step" in state]
