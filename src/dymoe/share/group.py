"""A shared expert group: what push makes of a run's, and what is taken of one from others.

A hash that the sender made says nothing of the content, and PEFT believes what a config says: it searches with its
patterns, makes room for its sizes and loads every tensor that a file holds, of the base model too. So a shared config
names its layers one by one and the file holds exactly the tensors that the config makes.
"""

import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from dymoe.adapter import DyMoEConfig, tensors_hash
from dymoe.adapter.selectors import SELECTORS
from dymoe.errors import DymoeError
from dymoe.files import parse_json, read_bytes
from dymoe.learning.groups import check_tensors, read_tensors
from dymoe.messages import brief, shorten
from dymoe.schema import Range, fit
from dymoe.share.locations import REPOSITORY
from dymoe.share.manifest import CONFIG, CONFIG_BYTES, WEIGHTS, Group

MOST = 1024  # experts of a layer, and rank of each
RANKS = 8192  # of all experts of a layer together
LAYERS = 4096
PREFIX, SELECTOR = "base_model.model.", "base_model.model.dymoe_selector."  # of PEFT's names for tensors
LAYER = re.compile(r"\w{1,64}(\.\w{1,64}){0,30}", re.ASCII)
LIBRARY = re.compile(r"transformers(\.\w+)+", re.ASCII)  # AutoPeftModel imports what auto_mapping names

_KEYS: dict[str, Any] = {
    **typing.get_type_hints(DyMoEConfig),
    "peft_type": Literal["DYMOE"],
    "task_type": None,
    "revision": None,
    "auto_mapping": dict[str, str] | None,
    "num_experts": Annotated[int, Range(1, MOST)],
    "r": Annotated[int, Range(1, MOST)],
    "top_k": Annotated[int, Range(1, MOST * LAYERS)],
    "expert_pattern": dict[str, Annotated[int, Range(0, MOST)]],
    "target_modules": list[str],
    "exclude_modules": None,
}


def layers_of(tensors: Iterable[str]) -> set[str]:
    """The wrapped layers whose tensors have these names."""
    weights = (name for name in tensors if not name.startswith(SELECTOR))
    return {name.removeprefix(PREFIX).rpartition(".")[0] for name in weights}


def plain_config(values: Mapping[str, Any], layers: Iterable[str], base: str | None, where: object) -> dict[str, Any]:
    """A group's config as it is shared: with the names of its layers in place of patterns.

    Args:
        values: of the run's own adapter_config.json.
        layers: that hold experts of any group of the run; those that the config means are named.
        base: the base model's Hub repository, or None.
        where: what messages call the config.

    Raises:
        DymoeError: the values are no config of an expert group.
    """
    try:
        config = DyMoEConfig(**values)
    except (TypeError, ValueError) as error:
        raise DymoeError(f"{where}: is not the config of an expert group ({shorten(str(error), 300)})") from None
    targets = sorted(layer for layer in layers if check_target_module_exists(config, layer))
    experts = {layer: config.experts_in(layer) for layer in targets}
    same = set(experts.values()) <= {config.num_experts}
    gates = {layer: config.gate_in(layer).name for layer in targets} if config.gate_pattern else {}
    patterns = {"expert_pattern": {} if same else experts, "gate_pattern": gates}
    plain = {"target_modules": targets, "exclude_modules": None, **patterns}
    # What PEFT wrote as base is a folder of this machine, or the word None.
    return {**values, **plain, "base_model_name_or_path": base}


def read_group(folder: Path, group: Group, where: str) -> tuple[DyMoEConfig, dict[str, Tensor]]:
    """Config and tensors of a shared group, all of it checked before anything is done with it.

    Args:
        folder: with its two files.
        group: what the manifest says of it.
        where: what messages call the shared result.

    Raises:
        DymoeError: the config is no plain one of an expert group or out of bounds; the file holds other tensors than
            those of this group, of other shapes or types, not finite, or not those that the hash was made of.
    """
    source = f"{where}: {group.folder}"
    config = check_config(read_bytes(folder / CONFIG, CONFIG_BYTES), f"{source}/{CONFIG}")
    try:
        tensors = read_tensors(folder / WEIGHTS)
    except DymoeError:
        raise DymoeError(f"{source}/{WEIGHTS}: cannot be read as safetensors") from None
    if other := next((name for name, tensor in tensors.items() if tensor.dtype != torch.float32), None):
        raise DymoeError(f"{source}/{WEIGHTS} holds {brief(other)} as {tensors[other].dtype}, expected torch.float32")
    check_tensors(tensors, f"{source}/{WEIGHTS}", shapes_of(config, tensors, source))
    if tensors_hash(sorted(tensors.items())) != group.hash:
        raise DymoeError(f"{source}: expert group {group.name!r} is not the one saved (hash differs)")
    return config, tensors


def check_config(data: bytes, where: str) -> DyMoEConfig:
    """The config in an adapter_config.json of others.

    Raises:
        DymoeError: it is of another PEFT method, has an unknown key or a value out of bounds, names layers by a
            pattern, code outside of transformers, or a base model that is no Hub repository.
    """
    values = parse_json(data, where)
    if not isinstance(values, dict) or values.get("peft_type") != "DYMOE":
        raise DymoeError(f"{where}: is not the config of an expert group (peft_type DYMOE)")
    if unknown := sorted(set(values) - set(_KEYS)):
        raise DymoeError(f"{where}: {brief(unknown[0])} is no key of an expert group's config")
    try:
        values = {key: fit(value, _KEYS[key], key) for key, value in values.items()}
        _check_names(values)
        return DyMoEConfig(**values)
    except (DymoeError, TypeError, ValueError) as error:
        raise DymoeError(f"{where}: {shorten(str(error), 300)}") from None


def _check_names(values: Mapping[str, Any]) -> None:
    """Refuse what a config names: layers, library, base model; and sizes that are too large together."""
    layers, pattern = values.get("target_modules") or [], values.get("expert_pattern") or {}
    gates = values.get("gate_pattern") or {}
    if not layers or len(layers) > LAYERS or len(set(layers)) < len(layers):
        raise DymoeError(f"target_modules: expected 1 to {LAYERS} different names of layers, got {len(layers)}")
    for layer in layers:
        if not LAYER.fullmatch(layer):
            raise DymoeError(f"target_modules: expected plain names of layers, got {brief(layer)}")
    if pattern and set(pattern) != set(layers):
        raise DymoeError("expert_pattern: expected nothing, or a number for each of target_modules")
    if gates and set(gates) != set(layers):
        raise DymoeError("gate_pattern: expected nothing, or a gate for each of target_modules")
    if max([values.get("num_experts", 16), *pattern.values()]) * values.get("r", 4) > RANKS:
        raise DymoeError(f"num_experts and r: expected at most {RANKS} ranks in a layer")
    library = (values.get("auto_mapping") or {}).get("parent_library", "transformers.models")
    if not LIBRARY.fullmatch(library):
        raise DymoeError(f"auto_mapping names {brief(library)}, which is no module of transformers")
    base = values.get("base_model_name_or_path")
    if base is not None and not REPOSITORY.fullmatch(base):
        raise DymoeError(f"base_model_name_or_path: expected a Hub repository owner/name, got {brief(base)}")


def shapes_of(config: DyMoEConfig, tensors: Mapping[str, Tensor], where: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a plain config makes; the layers' widths are those of the tensors.

    How many older experts a linear gate's router scores is also theirs.
    """
    assert config.target_modules is not None
    shapes = _selector_shapes(config, tensors, where)
    for layer in config.target_modules:
        a, b, router = (f"{PREFIX}{layer}.dymoe_{kind}" for kind in ("A", "B", "router"))
        experts = config.expert_pattern.get(layer, config.num_experts)
        inputs = _last(tensors, a if experts else router)
        if experts:
            shapes[a], shapes[b] = (experts, config.r, inputs), (experts, config.r, _last(tensors, b))
        stored = len(tensors[router]) if router in tensors and tensors[router].dim() else 0
        if rows := config.gate_in(layer).rows(experts, max(stored - experts, 0)):
            shapes[router] = (rows, inputs)
    return shapes


def _selector_shapes(config: DyMoEConfig, tensors: Mapping[str, Tensor], where: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the group's part of the selector, by making one that has no memory."""
    if config.selector == "none":
        return {}
    if config.selector not in SELECTORS:
        raise DymoeError(f"{where}: {CONFIG}: selector: expected none or one of {', '.join(SELECTORS)}")
    kind = SELECTORS[config.selector]
    try:
        with torch.device("meta"):
            selector = kind(_last(tensors, SELECTOR + kind.adapter_layer_names[0]))
            selector.add_group("group", config.selector_options)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise DymoeError(f"{where}: {CONFIG}: selector_options: {brief(str(error), 200)}") from None
    parts = {name: getattr(selector, name) for name in kind.adapter_layer_names}
    return {SELECTOR + name: tuple(part["group"].shape) for name, part in parts.items() if "group" in part}


def _last(tensors: Mapping[str, Tensor], name: str) -> int:
    """The size of a tensor's last dimension; 1 where there is none, or nothing in it."""
    shape = tensors[name].shape if name in tensors else ()
    return max(1, shape[-1]) if shape else 1
