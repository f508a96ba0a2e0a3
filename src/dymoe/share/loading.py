"""`load_stage`: a stage of a shared result, or of a run, on a base model."""

from pathlib import Path
from typing import TYPE_CHECKING

from dymoe.errors import DymoeError
from dymoe.share.stages import read_groups

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


def load_stage(source: str | Path, model: "nn.Module", stage: int | None = None) -> "PeftModel":
    """Put the groups of a stage on a base model, frozen and active, every file and group checked first.

    Args:
        source: a folder that `dymoe push` or `dymoe pull` wrote, a Hub repository ``owner/name``, or a run folder.
        model: the base model that the groups were trained on, as transformers loads it; it is wrapped in place.
        stage: which stage, counted from 1; the last one when None.

    Returns:
        PEFT's model in evaluation mode.

    Raises:
        DymoeError: no such source or stage, something in it is not as it was saved or no part of an expert group,
            or the groups do not fit the model, which is as it was.
    """
    from peft import PeftModel

    from dymoe.adapter import DyMoELayer
    from dymoe.learning.groups import add_group

    if isinstance(model, PeftModel) or any(isinstance(module, DyMoELayer) for module in model.modules()):
        raise DymoeError(f"load_stage: the {type(model).__name__} has adapters already; give the base model")
    groups = read_groups(source, stage)
    loaded: PeftModel | None = None
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for group in groups:
            loaded = add_group(model, loaded, group.name, group.config, group.tensors, group.where)
    except BaseException:  # it does not fit, no memory is left, or it was interrupted
        if loaded is not None:
            loaded.base_model.unload()  # type: ignore[operator]
        for parameter, allowed in trains:
            parameter.requires_grad_(allowed)
        for module, mode in modes:
            module.training = mode
        raise
    assert loaded is not None  # a checked stage has groups
    return loaded
