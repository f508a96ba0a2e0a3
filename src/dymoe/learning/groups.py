"""Expert groups on a model and on disk: begin, train on, freeze, save, load, hash."""

import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn

from dymoe.adapter import DyMoEConfig, DyMoEModel, RoutingTrace, group_hash, group_tensors
from dymoe.errors import DymoeError
from dymoe.files import TEMPORARY, atomic_dir


def train_group(base: nn.Module, model: PeftModel | None, name: str, config: DyMoEConfig) -> PeftModel:
    """Let the group `name` train, all others frozen and active; it is added if the model lacks it.

    Args:
        base: the frozen model, wrapped at its first group.
        model: what an earlier call returned, None at the first.
        name: the group, for example the task's name.
        config: its experts and gate; unused where the group exists.
    """
    try:
        if model is None:
            return get_peft_model(base, config, adapter_name=name)  # type: ignore[arg-type]
        if name in model.peft_config:
            model.base_model.set_training_group(name)  # type: ignore[operator]
        else:
            model.add_adapter(name, config)
        return model
    except ValueError as error:
        raise DymoeError(f"expert group {name!r}: {error}") from error


def freeze_all(model: PeftModel) -> None:
    """Freeze every group, so that all are packed and the bank answers fastest."""
    model.base_model.set_training_group(None)  # type: ignore[operator]


def trace_of(model: PeftModel) -> RoutingTrace:
    """The model's routing trace."""
    return cast(DyMoEModel, model.base_model).trace


def hashes(model: PeftModel | None) -> dict[str, str]:
    """SHA-256 of every group's parameters, by name, in the order they were added."""
    return {} if model is None else {name: group_hash(model, name) for name in model.peft_config}


def trainable_parameters(model: nn.Module) -> int:
    """How many parameters train now."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def stored_parameters(model: PeftModel) -> int:
    """How many parameters all groups hold together."""
    return sum(tensor.numel() for name in model.peft_config for tensor in group_tensors(model, name).values())


def delete_group(model: PeftModel, name: str) -> PeftModel | None:
    """Forget the group `name`; None when it was the only one (the base is wrapped anew at the next group)."""
    if list(model.peft_config) == [name]:
        model.base_model.unload()  # type: ignore[operator]
        return None
    model.delete_adapter(name)
    return model


def save_group(model: PeftModel, name: str, folder: Path) -> None:
    """Save the group `name` as a PEFT adapter in `folder`, atomically.

    Raises:
        DymoeError: the folder cannot be written; nothing half-written is left.
    """
    with atomic_dir(folder) as temporary:
        write_group(model, name, temporary)


def write_group(model: PeftModel, name: str, folder: Path, **options: Any) -> None:
    """Write the group `name` into `folder` itself (PEFT would make a folder of that name inside it).

    Raises:
        DymoeError: the disk is full or the folder cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=TEMPORARY) as inner:
            # No look-up of the base model in the network: the embeddings never train.
            model.save_pretrained(inner, selected_adapters=[name], save_embedding_layers=False, **options)
            saved = Path(inner) if name == "default" else Path(inner) / name  # PEFT's own name has no folder there
            for file in saved.iterdir():
                # PEFT's model card speaks of a Hub repository that does not exist.
                if file.name != "README.md":
                    shutil.move(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise DymoeError(f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


def load_group(base: nn.Module, model: PeftModel | None, name: str, folder: Path) -> PeftModel:
    """Load a saved group, frozen and active, after the groups that `model` already has.

    Raises:
        DymoeError: the folder holds no group or a broken one, or it does not fit the model.
    """
    try:
        if model is None:
            return PeftModel.from_pretrained(base, folder, adapter_name=name, is_trainable=False)  # type: ignore[arg-type]
        model.load_adapter(folder, adapter_name=name, is_trainable=False)
        return model
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DymoeError(f"{folder}: expert group {name!r} cannot be loaded ({error})") from error
