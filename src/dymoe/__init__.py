"""Continual learning for large vision-language models with LoRA experts (LLaVA-DyMoE and its baselines).

`import dymoe` registers the method DYMOE with PEFT: expert groups are then ordinary PEFT adapters.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dymoe import _imports


def _load(name: str) -> None:
    import_module(name)


_imports.tolerate_torchvision()
_imports.after_import("peft", lambda: _load("dymoe.adapter"))

if TYPE_CHECKING:
    from dymoe.adapter import DyMoEConfig, DyMoEModel, RoutingTrace, group_hash
    from dymoe.errors import DymoeError
    from dymoe.share.loading import load_stage

__version__ = "0.1.0"
__all__ = ["DyMoEConfig", "DyMoEModel", "DymoeError", "RoutingTrace", "__version__", "group_hash", "load_stage"]

_HOMES = {
    "DyMoEConfig": "dymoe.adapter",
    "DyMoEModel": "dymoe.adapter",
    "RoutingTrace": "dymoe.adapter",
    "group_hash": "dymoe.adapter",
    "DymoeError": "dymoe.errors",
    "load_stage": "dymoe.share.loading",
}


def __getattr__(name: str) -> Any:
    """Import the home of a public name at its first use, so that `dymoe --help` does not load torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
