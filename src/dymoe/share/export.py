"""`export`: a stage as what knows no expert groups takes it: one plain LoRA, a whole model, or one LoRA a group.

A group's output is (lora_alpha / (experts r)) sum_e w_e B_e A_e x. Where no w_e depends on the token, that of all
groups is B A x with the rows of all A_e, and the scaled and weighted columns of all B_e, side by side: a LoRA whose
rank is the sum of theirs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from dymoe.adapter import DyMoEConfig
from dymoe.adapter.gates import Setting
from dymoe.errors import DymoeError
from dymoe.files import atomic_dir, atomic_json, expand
from dymoe.learning.groups import read_tensors
from dymoe.messages import brief
from dymoe.share.group import PREFIX, SELECTOR
from dymoe.share.manifest import MANIFEST, WEIGHTS
from dymoe.share.paths import base_kind, base_name
from dymoe.share.stages import SavedGroup, SavedStage, read_stage

if TYPE_CHECKING:
    from dymoe.models import Lvlm

FORMS = ("lora", "merged", "groups")
GROUPS, SELECTOR_FILE = "groups.json", "selector.safetensors"
A, B = ".dymoe_A", ".dymoe_B"


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the folder, and the stage's folder name ``NN-NAME``."""

    folder: Path
    stage: str


class Factors(NamedTuple):
    """The change of a linear's weight as B A: a (rank, in_features), b (out_features, rank), float32."""

    a: Tensor
    b: Tensor


def export(
    source: str | Path,
    form: str = "lora",
    stage: int | None = None,
    output: str | Path | None = None,
    model: str | None = None,
    dtype: str | None = None,
) -> Exported:
    """Write a stage for whatever loads a plain LoRA or a model of transformers; the folder appears whole or not at all.

    Args:
        source: a run folder, or what `dymoe push` or `dymoe pull` wrote (a Hub repository too).
        form: "lora", one adapter as PEFT saves it; "merged", a model folder; "groups", an adapter for each group with
            the selector that weighs them for a sample (``groups.json``, ``selector.safetensors``).
        stage: counted from 1; the last one when None.
        output: where to, not there yet or empty; below a run folder ``exports/NN-NAME-FORM`` when None.
        model: the base model that "merged" starts from, where it is no longer where the recipe says.
        dtype: of "merged", a floating dtype by name; the recipe's when None.

    Raises:
        DymoeError: no such stage, a group that is not the one saved, experts whose weights do not allow this form, a
            base model that is another one or quantised, or a folder that holds something or cannot be written.
    """
    if form not in FORMS:
        raise DymoeError(f"--as: expected one of {', '.join(FORMS)}, got {brief(form)}")
    saved = read_stage(source, stage)
    check_form(saved, form)
    target = expand(output) if output is not None else _beside(saved, form)
    if target.is_symlink() or (target.exists() and not target.is_dir()) or (target.is_dir() and any(target.iterdir())):
        raise DymoeError(f"{target}: is there already; give --output a folder that does not exist or is empty")
    lvlm = _base_model(saved, model, dtype) if form == "merged" else None
    with atomic_dir(target) as new:
        if lvlm is not None:
            _write_merged(new, saved, lvlm, model)
        elif form == "lora":
            write_lora(new, saved.groups, _hub_name(saved))
        else:
            _write_groups(new, saved)
        for file in new.rglob("*.safetensors"):
            file.chmod(0o644)  # who serves it may be another user; safetensors lets its owner alone read
    return Exported(target, saved.folder)


def check_form(saved: SavedStage, form: str) -> None:
    """Refuse a form in which the experts' weights would be others than they are.

    Raises:
        DymoeError: they depend on the token; or on the sample and `form` is not "groups"; or on nothing and it is.
    """
    config, where = saved.groups[-1].config, f"{saved.where}: --as {form}"
    if config.weights_depend_on == "token":
        gate = next(gate.name for gate in config.gates if gate.routes)
        raise DymoeError(
            f"{where}: every token has weights of its own for the experts (gate {gate}), which no plain LoRA "
            "can say; serve the stage as it is (examples/serve.py)"
        )
    if config.weights_depend_on == "sample" and form != "groups":
        raise DymoeError(
            f"{where}: the selector {config.selector} weighs the groups for each sample, which one LoRA cannot say; "
            "--as groups writes them apart, with what weighs them"
        )
    if config.weights_depend_on == "nothing" and form == "groups":
        raise DymoeError(f"{where}: all groups are active for every sample, nothing weighs them; give --as lora")


def _beside(saved: SavedStage, form: str) -> Path:
    """Where an export of a run goes by itself."""
    if saved.base is None:
        raise DymoeError("export: --output is missing: a shared result holds its own files alone")
    return Path(saved.where) / "exports" / f"{saved.folder}-{form}"


def _hub_name(saved: SavedStage) -> str | None:
    """The base model where it is a Hub repository: a path of this machine, or a name of dymoe's, helps no reader."""
    name = saved.recipe["model"]
    return name if base_kind(name) == "hub" else None


# ---- one plain LoRA ---------------------------------------------------------------------------------------------


def factors(groups: Sequence[SavedGroup]) -> dict[str, Factors]:
    """The groups' experts side by side, by layer in order of names, scale and weight in B.

    Raises:
        DymoeError: a group holds a tensor that is no factor of an expert, or there is no expert at all.
    """
    sides: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for group in groups:
        for name, a in group.tensors.items():
            if name.startswith(SELECTOR) or name.endswith(B):
                continue
            if not name.endswith(A):
                raise DymoeError(f"{group.where}: holds {name}, which no plain LoRA has room for")
            layer = name.removeprefix(PREFIX).removesuffix(A)
            sides.setdefault(layer, []).append((a, group.tensors[f"{PREFIX}{layer}{B}"] * group.config.scaling))
    if not sides:
        raise DymoeError(f"{groups[-1].where}: holds no expert")
    return {layer: _side_by_side(sides[layer], groups[-1].config, layer) for layer in sorted(sides)}


def _side_by_side(sides: Sequence[tuple[Tensor, Tensor]], config: DyMoEConfig, layer: str) -> Factors:
    """A and scaled B of a layer's groups, (experts, rank, features) each, as one pair; the gate gives the weights."""
    sizes = tuple(len(a) for a, _ in sides)
    gate, x = config.gate_in(layer), torch.zeros(1, sides[0][0].shape[-1])
    rows = gate.pack([x[:0]] * len(sizes))
    weights = gate.decide(x, rows, None, Setting(sizes, 0, config, (1,))).columns(0)[0].split(sizes)
    b = [side * weight.view(-1, 1, 1) for (_, side), weight in zip(sides, weights, strict=True)]
    a_rows, b_rows = (torch.cat([side.flatten(0, 1) for side in part]) for part in ([a for a, _ in sides], b))
    return Factors(a_rows.contiguous(), b_rows.mT.contiguous())


def write_lora(folder: Path, groups: Sequence[SavedGroup], base: str | None) -> None:
    """Write the groups as one LoRA of PEFT: adapter_config.json and adapter_model.safetensors.

    Args:
        folder: where to.
        groups: whose experts have weight 1.
        base: the base model's Hub repository, or None.

    Raises:
        DymoeError: as `factors`; or what was written is not what is read back.
    """
    by_layer = factors(groups)
    ranks = {layer: len(a) for layer, (a, _) in by_layer.items()}
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    others = {layer: count for layer, count in ranks.items() if count != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # the scale is 1: each group's own stands in its B
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=list(ranks),
        lora_dropout=0.0,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.target_modules = list(ranks)  # of PEFT's set the order would be another one each time
    config.save_pretrained(str(folder))
    tensors = {
        f"{PREFIX}{layer}.lora_{kind}.weight": side
        for layer, pair in by_layer.items()
        for kind, side in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if differing := _differing(tensors, read_tensors(folder / WEIGHTS)):
        raise DymoeError(f"{folder / WEIGHTS}: {differing} is not as it was written; is the disk sound?")


def _differing(tensors: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> str | None:
    """The first tensor that is not there as it should be."""
    return next((name for name, one in tensors.items() if name not in there or not torch.equal(one, there[name])), None)


# ---- a LoRA for each group --------------------------------------------------------------------------------------


def _write_groups(folder: Path, saved: SavedStage) -> None:
    """Every group's LoRA in a folder of its own, the selector's tensors, and what they are."""
    rows, tensors = [], {}
    for number, group in enumerate(saved.groups, start=1):
        name = f"{number:02d}-{group.name}"
        (folder / name).mkdir()
        write_lora(folder / name, [group], _hub_name(saved))
        rows.append({"name": group.name, "folder": name, "options": group.config.selector_options})
        for key, tensor in group.tensors.items():
            if key.startswith(SELECTOR):
                tensors[f"{name}.{key.removeprefix(SELECTOR).removeprefix('dymoe_')}"] = tensor
    save_file(tensors, folder / SELECTOR_FILE, metadata={"format": "pt"})
    description = {"format": "dymoe-groups/1", "base": base_name(saved.recipe["model"]), "stage": saved.folder}
    atomic_json(folder / GROUPS, {**description, "selector": saved.groups[-1].config.selector, "groups": rows})


# ---- a whole model ----------------------------------------------------------------------------------------------


def _base_model(saved: SavedStage, model: str | None, dtype: str | None) -> "Lvlm":
    """The base model in memory.

    Raises:
        DymoeError: it cannot be loaded, is another one than the run learned on, or is kept in 4 bits there.
    """
    from dymoe.libraries import quiet
    from dymoe.models import load
    from dymoe.models.identity import identity

    name = model or saved.recipe["model"]
    if saved.recipe.get("model_options", {}).get("load_in_4bit"):
        raise DymoeError(
            f"{saved.where}: --as merged: the groups learned on a base in 4 bits (model_options.load_in_4bit), whose "
            "weights are not those of the model that would be written; give --as lora"
        )
    if model is None and saved.base is None and base_kind(name) == "folder":
        raise DymoeError(f"{saved.where}: its base model {name!r} was a folder elsewhere; give --model its folder here")
    commit = (saved.base or {}).get("commit")
    if saved.base is not None and identity(name, revision=commit) != saved.base:
        raise DymoeError(f"{saved.where}: the base model {name} is not what the run learned on; give --model that one")
    with quiet():
        return load(name, dtype or saved.recipe["training"]["dtype"], revision=commit)


def merge(model: nn.Module, by_layer: Mapping[str, Factors], where: str) -> None:
    """Add B A to the weights of a model, in place and in float32 before they are rounded to their dtype.

    Raises:
        DymoeError: a layer is missing, is no plain linear of these sizes or shares its weight with the embedding, or
            a weight would not be finite.
    """
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
    modules = dict(model.named_modules())
    for layer, (a, b) in by_layer.items():
        linear = modules.get(layer)
        if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != (len(b), a.shape[1]):
            raise DymoeError(f"{where}: the base model has no linear {layer} of {a.shape[1]} to {len(b)} features")
        if linear.weight is embeddings:
            raise DymoeError(f"{where}: {layer} shares its weight with the embedding, which has no experts")
        with torch.no_grad():
            linear.weight += (b @ a).to(linear.weight.device)
        if not bool(linear.weight.isfinite().all()):
            raise DymoeError(f"{where}: {layer}: the sum is not finite in {linear.weight.dtype}; give another --dtype")


def _write_merged(folder: Path, saved: SavedStage, lvlm: "Lvlm", model: str | None) -> None:
    """Model and processor as transformers saves them, with a manifest of what they are."""
    from dymoe.libraries import quiet
    from dymoe.models.llava import image_backend

    merge(lvlm.model, factors(saved.groups), saved.where)
    with quiet():
        lvlm.model.save_pretrained(folder)
        lvlm.processor.save_pretrained(folder)
    name = model or saved.recipe["model"]
    facts = {"kind": "a base model with the groups of a stage merged", "base": base_name(name), "stage": saved.folder}
    backend = image_backend(expand(name))  # how its pictures are scaled goes on with it
    pictures = {} if backend is None else {"image_backend": backend}
    atomic_json(folder / MANIFEST, {**facts, "groups": [group.name for group in saved.groups], **pictures})
