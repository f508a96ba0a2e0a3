"""The methods by name; each is one file that makes the four choices of `dymoe.methods.base`."""

from typing import Any

from dymoe.errors import DymoeError
from dymoe.methods.base import Method, Stage
from dymoe.methods.dymoe import DyMoE
from dymoe.methods.incmoelora import IncMoELoRA
from dymoe.methods.joint import Joint
from dymoe.methods.lora import LoRA
from dymoe.methods.settings import build, nearest

_METHODS: dict[str, type[Method]] = {method.name: method for method in (LoRA, IncMoELoRA, DyMoE, Joint)}

__all__ = ["Method", "Stage", "available", "create", "settings_of"]


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


def create(name: str, /, **settings: Any) -> Method:
    """Make the method `name` with `settings`, the others at their defaults.

    Raises:
        DymoeError: unknown method or setting (the nearest is named), a setting of a wrong type or range.
    """
    return build(settings_of(name), settings, where=f"method {name}")
