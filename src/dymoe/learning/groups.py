"""Expert groups on a model and on disk: begin, train on, freeze, save, load, hash."""

import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dymoe.adapter import (
    DyMoEConfig,
    DyMoELayer,
    DyMoEModel,
    GroupHolder,
    RoutingTrace,
    group_hash,
    group_tensors,
    tensors_hash,
)
from dymoe.adapter.selectors import SELECTORS
from dymoe.errors import DymoeError
from dymoe.files import TEMPORARY, atomic_dir, reason
from dymoe.messages import brief, printable, shorten

WEIGHTS = "adapter_model.safetensors"  # PEFT's name


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
    """Save the group `name` as a PEFT adapter in `folder`, atomically, once its file was read back and is the group.

    Raises:
        DymoeError: the folder cannot be written, what was written is not the group, or the group has numbers that are
            not finite; nothing half-written is left.
    """
    with atomic_dir(folder) as temporary:
        write_group(model, name, temporary, folder)
        where = f"{folder}: expert group {name!r} is not saved: its file, read back,"
        tensors, expected = read_tensors(temporary / WEIGHTS), group_tensors(model, name)
        check_tensors(tensors, where, {key: tuple(value.shape) for key, value in expected.items()})
        if tensors_hash(sorted(tensors.items())) != group_hash(model, name):
            differing = [key for key, value in expected.items() if not torch.equal(value.cpu(), tensors[key])]
            raise DymoeError(f"{where} differs in {_listed(differing)}")


def write_group(model: PeftModel, name: str, folder: Path, target: Path | None = None, **options: Any) -> None:
    """Write the group `name` into `folder` itself (PEFT would make a folder of that name inside it).

    Args:
        model: holds the group.
        name: the group.
        folder: where to.
        target: what messages call the folder, where it is yet to take another one's place.
        options: for PEFT's `save_pretrained`.

    Raises:
        DymoeError: the disk is full, the folder cannot be written, or not all of the group was.
    """
    target = target or folder
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=TEMPORARY) as inner:
            # No look-up of the base model in the network: the embeddings never train.
            model.save_pretrained(inner, selected_adapters=[name], save_embedding_layers=False, **options)
            saved = Path(inner) if name == "default" else Path(inner) / name  # PEFT's own name has no folder there
            for file in saved.iterdir():
                # PEFT's model card speaks of a Hub repository that does not exist.
                if file.name != "README.md":
                    shutil.move(file, folder / file.name)
            with safe_open(folder / WEIGHTS, "pt") as file:
                written = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise DymoeError(f"{target}: cannot be written ({reason(error, folder)})") from error
    expected = [key.rpartition(".")[0] for key in named(model) if of_group(key, name)]
    _compare_names(written, expected, f"{target}: expert group {name!r} is not saved: its file, read back,")


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters by the names they have in an unwrapped model."""
    return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in model.named_parameters()}


def of_group(parameter: str, group: str) -> bool:
    """Whether a parameter, by its name in the model, is one of the group's."""
    return ".dymoe_" in parameter and parameter.rpartition(".")[2] == group


def load_group(base: nn.Module, model: PeftModel | None, name: str, folder: Path) -> PeftModel:
    """Load a saved group, frozen and active, after the groups that `model` already has.

    Raises:
        DymoeError: the folder holds no group or a broken one, or it does not fit the model; `base` and `model` are as
            they were.
    """
    return add_group(base, model, name, *read_saved(name, folder), f"{folder}: expert group {name!r}")


def read_saved(name: str, folder: Path) -> tuple[DyMoEConfig, dict[str, Tensor]]:
    """Config and tensors of the group `name`, saved in `folder`.

    Raises:
        DymoeError: the folder holds no group or a broken one.
    """
    where = f"{folder}: expert group {name!r}"
    try:
        config = check_config(PeftConfig.from_pretrained(str(folder)), where)
        return config, read_tensors(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DymoeError(f"{where} cannot be loaded ({error})") from error


def add_group(
    base: nn.Module,
    model: PeftModel | None,
    name: str,
    config: DyMoEConfig,
    tensors: Mapping[str, Tensor],
    where: str,
) -> PeftModel:
    """Put a group that was read on a model, frozen and active, after the groups that `model` already has.

    Raises:
        DymoeError: it does not fit the model; `base` and `model` are as they were. The message begins with `where`.
    """
    config.inference_mode = True
    # PEFT's get_peft_model would put the path of `base` there.
    base_name, config.base_model_name_or_path = config.base_model_name_or_path, None
    try:
        model = train_group(base, model, name, config)
    except (DymoeError, KeyError, TypeError, ArithmeticError, RuntimeError) as error:
        raise DymoeError(f"{where} cannot be loaded ({error})") from error
    config.base_model_name_or_path = base_name
    try:
        set_group(model, name, tensors, where)
    except DymoeError:
        delete_group(model, name)
        raise
    model.eval()
    return model


def set_group(model: PeftModel, name: str, tensors: Mapping[str, Tensor], where: str) -> None:
    """Let the group `name` of the model have these tensors.

    Args:
        model: holds the group.
        name: the group.
        tensors: all of the group, by the names under which PEFT saves them.
        where: what messages call their source.

    Raises:
        DymoeError: they are not exactly the group's (see `check_tensors`); the model is as it was.
    """
    parameters = group_tensors(model, name)
    shapes = {key: tuple(tensor.shape) for key, tensor in parameters.items()}
    check_tensors(tensors, where, shapes)
    with torch.no_grad():
        for key, tensor in parameters.items():
            tensor.copy_(tensors[key])


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        DymoeError: it is missing or no safetensors file.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise DymoeError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


SHOWN = 200  # characters of a tensor's name in a message
_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.(?P<kind>dymoe_\w+)")
_HOLDERS: tuple[type[GroupHolder], ...] = (DyMoELayer, *SELECTORS.values())
_KINDS = {kind for holder in _HOLDERS for kind in holder.adapter_layer_names}


def check_config(config: PeftConfig, where: str) -> DyMoEConfig:
    """The config of an expert group.

    Raises:
        DymoeError: it is another PEFT method's.
    """
    if not isinstance(config, DyMoEConfig):
        raise DymoeError(f"{where} is no expert group (peft_type {getattr(config, 'peft_type', None)!r}, not DYMOE)")
    return config


def check_tensors(tensors: Mapping[str, Tensor], where: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are not exactly those of one expert group, before anything is done with them.

    Args:
        tensors: by the names under which PEFT saves them.
        where: what messages call their source.
        shapes: of the group, by the same names.

    Raises:
        DymoeError: a tensor is no part of an expert group, is missing, has another shape or numbers that are not
            finite.
    """
    for name, tensor in tensors.items():
        match, label = _NAME.fullmatch(name), shorten(printable(name), SHOWN)
        if match is None or match["kind"] not in _KINDS:
            raise DymoeError(f"{where} holds {label!r}, which is no part of an expert group")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise DymoeError(f"{where} holds {label}, which has numbers that are not finite")
    _compare_names(tensors, shapes, where)
    for name, shape in shapes.items():
        if (other := tuple(tensors[name].shape)) != shape:
            label = shorten(printable(name), SHOWN)
            raise DymoeError(f"{where} holds {label} of shape {brief(other)}, expected {brief(shape)}")


def _compare_names(there: Iterable[str], expected: Iterable[str], where: str) -> None:
    """Refuse a group's tensors of which some are missing or too many."""
    missing, unknown = sorted({*expected} - {*there}), sorted({*there} - {*expected})
    if missing:
        raise DymoeError(f"{where} lacks {len(missing)} of {len({*expected})} tensors: {_listed(missing)}")
    if unknown:
        raise DymoeError(f"{where} holds tensors that the model has no place for: {_listed(unknown)}")


def _listed(names: Iterable[str]) -> str:
    """The first names of many."""
    names = [shorten(printable(name), SHOWN) for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
