"""The methods by name; each is one file that makes the four choices of `dymoe.methods.base`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from dymoe import plugins
from dymoe.errors import DymoeError
from dymoe.messages import brief, nearest, unknown
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
from dymoe.methods.settings import build
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

T = TypeVar("T")

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
    """Every method's name with one line on what it is, those of installed packages included."""
    return _summaries(_METHODS, "dymoe.methods", Method)


def settings_of(name: str) -> type[Method]:
    """The dataclass whose fields are the settings of the method `name`, which may be of a file (`dymoe.plugins`).

    Raises:
        DymoeError: no such method (the nearest name is given), or what has this name is no method.
    """
    if (method := _outside(name, _METHODS, "dymoe.methods", Method)) is None:
        raise DymoeError(unknown("method", name, available()))
    return method


def companions() -> dict[str, str]:
    """Every companion's name with one line on what it is, those of installed packages included."""
    return _summaries(COMPANIONS, "dymoe.companions", Companion)


def companion_settings(name: str, where: str = "with") -> type[Companion]:
    """The dataclass whose fields are the settings of the companion `name`, which may be of a file (`dymoe.plugins`).

    Raises:
        DymoeError: no such companion (the nearest name is given), or what has this name is no companion.
    """
    if (companion := _outside(name, COMPANIONS, "dymoe.companions", Companion)) is None:
        raise DymoeError(f"{where}: with: {brief(name)}: unknown companion; {nearest(name, companions())}")
    return companion


def _outside(name: str, known: Mapping[str, type[T]], group: str, kind: type[T]) -> Any:
    """The class of this name: a known one, else of a file or an installed package, else None."""
    if name in known:
        return known[name]
    cls = plugins.find(name, group)
    if cls is not None and not (
        isinstance(cls, type) and issubclass(cls, kind) and dataclasses.is_dataclass(cls) and cls.name  # type: ignore[attr-defined]
    ):
        raise DymoeError(f"{name}: must be a dataclass with a name that inherits from dymoe.methods.{kind.__name__}")
    return cls


def _summaries(known: Mapping[str, Any], group: str, kind: type) -> dict[str, str]:
    classes = {name: _outside(name, known, group, kind) for name in (*known, *plugins.names(group))}
    return {name: each.summary for name, each in classes.items()}


def create(name: str, /, **settings: Any) -> Method:
    """Make the method `name` with `settings`, the others at their defaults.

    Raises:
        DymoeError: unknown method or setting (the nearest is named), a setting of a wrong type or range.
    """
    return build(settings_of(name), settings, where=f"method {name}")
