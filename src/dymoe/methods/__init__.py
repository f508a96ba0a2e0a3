"""The methods by name; each is one file that makes the four choices of `dymoe.methods.base`."""

from typing import Any

from dymoe.errors import DymoeError
from dymoe.messages import brief
from dymoe.methods.base import Method, Probe, Stage, StageData
from dymoe.methods.cmoe import CMoE
from dymoe.methods.companions import COMPANIONS, Companion, Composed
from dymoe.methods.dymoe import DyMoE
from dymoe.methods.ewc import EWC
from dymoe.methods.inclora import IncLoRA
from dymoe.methods.incmoelora import IncMoELoRA
from dymoe.methods.joint import Joint
from dymoe.methods.lora import LoRA
from dymoe.methods.lwf import LwF
from dymoe.methods.moelora import MoELoRA
from dymoe.methods.olora import OLoRA
from dymoe.methods.proglora import ProgLoRA
from dymoe.methods.same import SAME
from dymoe.methods.sefe import SEFE
from dymoe.methods.settings import build, nearest
from dymoe.methods.zero_shot import ZeroShot

_METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        LoRA,
        IncMoELoRA,
        DyMoE,
        Joint,
        ZeroShot,
        MoELoRA,
        CMoE,
        SAME,
        ProgLoRA,
        IncLoRA,
        OLoRA,
        EWC,
        LwF,
        SEFE,
    )
}

__all__ = [
    "Companion",
    "Composed",
    "Method",
    "Probe",
    "Stage",
    "StageData",
    "available",
    "companion_settings",
    "companions",
    "create",
    "settings_of",
]


def available() -> dict[str, str]:
    """Every method's name with one line on what it is."""
    return {name: method.summary for name, method in _METHODS.items()}


def settings_of(name: str) -> type[Method]:
    """The dataclass whose fields are the settings of the method `name`.

    Raises:
        DymoeError: no such method; the nearest name is given.
    """
    if name not in _METHODS:
        raise DymoeError(f"{name}: unknown method; {nearest(name, _METHODS)}")
    return _METHODS[name]


def companions() -> dict[str, str]:
    """Every companion's name with one line on what it is."""
    return {name: companion.summary for name, companion in COMPANIONS.items()}


def companion_settings(name: str, where: str = "with") -> type[Companion]:
    """The dataclass whose fields are the settings of the companion `name`.

    Raises:
        DymoeError: no such companion; the nearest name is given.
    """
    if name not in COMPANIONS:
        raise DymoeError(f"{where}: with: {brief(name)}: unknown companion; {nearest(name, COMPANIONS)}")
    return COMPANIONS[name]


def create(name: str, /, **settings: Any) -> Method:
    """Make the method `name` with `settings`, the others at their defaults.

    Raises:
        DymoeError: unknown method or setting (the nearest is named), a setting of a wrong type or range.
    """
    return build(settings_of(name), settings, where=f"method {name}")
