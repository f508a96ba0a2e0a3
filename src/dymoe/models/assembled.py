"""Models that are put together from parts when they are loaded, by the names that recipes give them.

Each is a module with `assemble(dtype, cache_dir)`, which gives model and processor, `outline()`, which gives
configuration and processor without the weights of the parts, and `digests(cache_dir)`, the name and SHA-256 of every
file that is read.
"""

from importlib import import_module
from typing import Any

MODULES = {"pocket": "dymoe.models.pocket"}


def assembled(name: str) -> Any:
    """The module of the model `name`; None where that is a folder or a Hub id."""
    return import_module(MODULES[name]) if name in MODULES else None
