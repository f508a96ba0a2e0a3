"""What a run's routing says: drift, activation, single tokens, training dynamics, the token's dilemma.

Each analysis is one function that returns a pandas DataFrame (docs/analysis.md); `dymoe analyze` computes it and keeps
it below the run, `stored` reads it there. Nothing heavy is imported before a name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dymoe.analysis.expert_activation import activation
    from dymoe.analysis.expert_use import dead, pruned, pruned_share
    from dymoe.analysis.learned import Learned, open_run
    from dymoe.analysis.routing_drift import correlation, drift, drift_and_forgetting, drift_by_task
    from dymoe.analysis.storage import about, store, stored
    from dymoe.analysis.token_dilemma import by_strategy, conclusion, dilemma, is_dilemma
    from dymoe.analysis.token_overlay import overlay, token_routing
    from dymoe.analysis.training_dynamics import dynamics

_HOMES = {
    "Learned": "learned",
    "about": "storage",
    "activation": "expert_activation",
    "by_strategy": "token_dilemma",
    "conclusion": "token_dilemma",
    "correlation": "routing_drift",
    "dead": "expert_use",
    "dilemma": "token_dilemma",
    "drift": "routing_drift",
    "drift_and_forgetting": "routing_drift",
    "drift_by_task": "routing_drift",
    "dynamics": "training_dynamics",
    "is_dilemma": "token_dilemma",
    "open_run": "learned",
    "overlay": "token_overlay",
    "pruned": "expert_use",
    "pruned_share": "expert_use",
    "store": "storage",
    "stored": "storage",
    "token_routing": "token_overlay",
}
__all__ = [
    "Learned",
    "about",
    "activation",
    "by_strategy",
    "conclusion",
    "correlation",
    "dead",
    "dilemma",
    "drift",
    "drift_and_forgetting",
    "drift_by_task",
    "dynamics",
    "is_dilemma",
    "open_run",
    "overlay",
    "pruned",
    "pruned_share",
    "store",
    "stored",
    "token_routing",
]


def __getattr__(name: str) -> Any:
    """Import the home of a public name at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
