"""What a run's routing says: drift, activation, single tokens, training dynamics, the token's dilemma.

Each analysis is one file: a function that returns a pandas DataFrame (docs/analysis.md), what is read off it, and its
figures; `forgetting` is that of the accuracies, `runs` what all of them are drawn from. `dymoe analyze` computes a
frame and keeps it below the run, `stored` reads it there. Nothing heavy is imported before a name is used.
"""

# ruff: noqa: F401 - the imports below are for type checkers, which know no other way to a name's home

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dymoe.analysis.expert_activation import activation, dead, pruned, pruned_share
    from dymoe.analysis.learned import Learned, open_run
    from dymoe.analysis.routing_drift import correlation, drift, drift_and_forgetting, drift_by_task
    from dymoe.analysis.storage import about, store, stored
    from dymoe.analysis.token_dilemma import by_strategy, conclusion, dilemma, is_dilemma
    from dymoe.analysis.token_overlay import overlay, token_routing
    from dymoe.analysis.training_dynamics import dynamics

_NAMES = {
    "expert_activation": ("activation", "dead", "pruned", "pruned_share"),
    "learned": ("Learned", "open_run"),
    "routing_drift": ("correlation", "drift", "drift_and_forgetting", "drift_by_task"),
    "storage": ("about", "store", "stored"),
    "token_dilemma": ("by_strategy", "conclusion", "dilemma", "is_dilemma"),
    "token_overlay": ("overlay", "token_routing"),
    "training_dynamics": ("dynamics",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import the home of a public name at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
