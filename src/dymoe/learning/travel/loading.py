"""`load_stage`: a stage of a shared result on a base model."""

from pathlib import Path
from typing import TYPE_CHECKING

from dymoe.errors import DymoeError
from dymoe.learning.travel.manifest import CONFIG, WEIGHTS, check_file, check_group, parse
from dymoe.learning.travel.places import open_source

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


def load_stage(source: str | Path, model: "nn.Module", stage: int | None = None) -> "PeftModel":
    """Put the groups of a stage on a base model, frozen and active, every file and group checked first.

    Args:
        source: a folder that `dymoe push` or `dymoe pull` wrote, or a Hub repository ``owner/name``.
        model: the base model that the groups were trained on, as transformers loads it; it is wrapped in place.
        stage: which stage, counted from 1; the last one when None.

    Returns:
        PEFT's model in evaluation mode.

    Raises:
        DymoeError: no such source or stage, something in it is not as its manifest says, or the groups do not fit the
            model.
    """
    from peft import PeftModel

    from dymoe.adapter import DyMoELayer
    from dymoe.learning.groups import hashes, load_group

    if isinstance(model, PeftModel) or any(isinstance(module, DyMoELayer) for module in model.modules()):
        raise DymoeError(f"load_stage: the {type(model).__name__} has adapters already; give the base model")
    place = open_source(source)
    manifest = parse(place.manifest(), place.where)
    groups = manifest.groups(stage, place.where)
    folders = {}
    for group in groups:
        for part in (CONFIG, WEIGHTS):
            name = f"{group.folder}/{part}"
            file = place.fetch(name)
            check_file(file, name, manifest.files[name], place.where)
            folders[group.name] = file.parent
        check_group(folders[group.name], group, place.where)
    loaded: PeftModel | None = None
    for group in groups:
        loaded = load_group(model, loaded, group.name, folders[group.name])
    assert loaded is not None  # a checked stage has groups
    found = hashes(loaded)
    for group in groups:
        if found[group.name] != group.hash:
            raise DymoeError(f"{place.where}: expert group {group.name!r} does not fit this model (hash differs)")
    return loaded
