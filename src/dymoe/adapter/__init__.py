"""The PEFT method DYMOE: an expert group is a PEFT adapter. Importing this package registers it with PEFT."""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from dymoe.adapter.config import PEFT_TYPE, DyMoEConfig
from dymoe.adapter.holder import GroupHolder
from dymoe.adapter.layer import DyMoELayer
from dymoe.adapter.model import DyMoEModel, group_hash, group_tensors, tensors_hash
from dymoe.adapter.trace import GroupWeights, LayerRouting, RoutingTrace

# PEFT's mappings take any string as key; saving and loading are delegated to the tuner class found here.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = DyMoEConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = DyMoEModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = DyMoEModel.prefix  # type: ignore[index]

__all__ = [
    "PEFT_TYPE",
    "DyMoEConfig",
    "DyMoELayer",
    "DyMoEModel",
    "GroupHolder",
    "GroupWeights",
    "LayerRouting",
    "RoutingTrace",
    "group_hash",
    "group_tensors",
    "tensors_hash",
]
