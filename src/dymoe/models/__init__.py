"""Vision-language models: load one, turn samples into batches, cache the features of a frozen vision tower.

Nothing heavy is imported before a name is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dymoe.models.collate import Collator
    from dymoe.models.features import ImageFeatures, cached_features
    from dymoe.models.model import Lvlm, load

__all__ = ["Collator", "ImageFeatures", "Lvlm", "cached_features", "load"]

_HOMES = {
    "Collator": "collate",
    "ImageFeatures": "features",
    "Lvlm": "model",
    "cached_features": "features",
    "load": "model",
}


def __getattr__(name: str) -> Any:
    """Import the module of a public name at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
