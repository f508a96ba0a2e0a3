"""Selectors by name; one file each."""

from dymoe.adapter.selection import Selector
from dymoe.adapter.selectors.keys import Keys
from dymoe.adapter.selectors.prototypes import Prototypes
from dymoe.adapter.selectors.vae import VaeSelector

_ALL: tuple[type[Selector], ...] = (Keys, Prototypes, VaeSelector)
SELECTORS: dict[str, type[Selector]] = {selector.name: selector for selector in _ALL}

__all__ = ["SELECTORS"]
