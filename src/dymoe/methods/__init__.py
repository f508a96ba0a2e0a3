"""Methods and plugins by name, a file each: the four choices of `dymoe.methods.base`, and what goes with any method."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from dymoe import extensions
from dymoe.errors import DymoeError
from dymoe.messages import brief, nearest, unknown
from dymoe.methods.asd import AnswerStyles
from dymoe.methods.base import Method, Probe, Stage, StageData
from dymoe.methods.cmoe import CMoE
from dymoe.methods.dymoe import DyMoE
from dymoe.methods.ewc import EWC
from dymoe.methods.inclora import IncLoRA
from dymoe.methods.incmoelora import IncMoELoRA
from dymoe.methods.joint import Joint
from dymoe.methods.lora import LoRA
from dymoe.methods.lwf import LwF
from dymoe.methods.moelora import MoELoRA
from dymoe.methods.olora import OLoRA
from dymoe.methods.plugin import Composed, Plugin
from dymoe.methods.proglora import ProgLoRA
from dymoe.methods.pruning import Pruning
from dymoe.methods.replay import Replay
from dymoe.methods.same import SAME
from dymoe.methods.sefe import SEFE
from dymoe.methods.settings import build
from dymoe.methods.task_router import TaskRouter
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
_PLUGINS: dict[str, type[Plugin]] = {plugin.name: plugin for plugin in (Replay, AnswerStyles, TaskRouter, Pruning)}

T = TypeVar("T")

__all__ = [
    "Composed",
    "Method",
    "Plugin",
    "Probe",
    "Stage",
    "StageData",
    "available",
    "create",
    "plugin_settings",
    "plugins",
    "settings_of",
]


def available() -> dict[str, str]:
    """Every method's name with one line on what it is, those of installed packages included."""
    return _summaries(_METHODS, "dymoe.methods", Method)


def settings_of(name: str) -> type[Method]:
    """The dataclass whose fields are the settings of the method `name`, which may be of a file (`dymoe.extensions`).

    Raises:
        DymoeError: no such method (the nearest name is given), or what has this name is no method.
    """
    if (method := _outside(name, _METHODS, "dymoe.methods", Method)) is None:
        raise DymoeError(unknown("method", name, available()))
    return method


def plugins() -> dict[str, str]:
    """Every plugin's name with one line on what it is, those of installed packages included."""
    return _summaries(_PLUGINS, "dymoe.plugins", Plugin)


def plugin_settings(name: str, where: str = "with") -> type[Plugin]:
    """The dataclass whose fields are the settings of the plugin `name`, which may be of a file (`dymoe.extensions`).

    Raises:
        DymoeError: no such plugin (the nearest name is given), or what has this name is no plugin.
    """
    if (plugin := _outside(name, _PLUGINS, "dymoe.plugins", Plugin)) is None:
        raise DymoeError(f"{where}: with: {brief(name)}: unknown plugin; {nearest(name, plugins())}")
    return plugin


def _outside(name: str, known: Mapping[str, type[T]], group: str, kind: type[T]) -> Any:
    """The class of this name: a known one, else of a file or an installed package, else None."""
    if name in known:
        return known[name]
    cls = extensions.find(name, group)
    if cls is not None and not (
        isinstance(cls, type) and issubclass(cls, kind) and dataclasses.is_dataclass(cls) and cls.name  # type: ignore[attr-defined]
    ):
        raise DymoeError(f"{name}: must be a dataclass with a name that inherits from dymoe.methods.{kind.__name__}")
    return cls


def _summaries(known: Mapping[str, Any], group: str, kind: type) -> dict[str, str]:
    classes = {name: _outside(name, known, group, kind) for name in (*known, *extensions.names(group))}
    return {name: each.summary for name, each in classes.items()}


def create(name: str, /, **settings: Any) -> Method:
    """Make the method `name` with `settings`, the others at their defaults.

    Raises:
        DymoeError: unknown method or setting (the nearest is named), a setting of a wrong type or range.
    """
    return build(settings_of(name), settings, where=f"method {name}")
