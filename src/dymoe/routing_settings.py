"""The settings of the router: the one place of their defaults, ranges and sources.

Without torch, so that a recipe is checked before torch is loaded. `dymoe.routing` computes with them; an adapter's
config holds them (`dymoe.adapter.DyMoEConfig`) and a method that sets them takes its defaults from here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from dymoe.numbers import WORKABLE, workable

Mask = Literal["exclusive", "protect", "only-ambiguous", "only-old", "no-token", "none"]
MASKS: tuple[str, ...] = ("exclusive", "protect", "only-ambiguous", "only-old", "no-token", "none")


@dataclass(frozen=True)
class Range:
    """Which values a setting may have.

    Args:
        words: the range in words, for messages.
        holds: whether a value lies in it.
    """

    words: str
    holds: Callable[[Any], bool]


_COUNT = Range(
    "a whole number of at least 1", lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1
)
_POSITIVE = Range("a number above 0", lambda value: value > 0)
_WEIGHT = Range("0 or more", lambda value: value >= 0)
_MASK = Range(f"one of {', '.join(MASKS)}", lambda value: value in MASKS)
_SIDE = Range("one of new, all", lambda value: value in ("new", "all"))
_SHARE = Range("a share in [0, 1)", lambda value: 0 <= value < 1)


def _setting(default: Any, allowed: Range, help: str) -> Any:
    return field(default=default, metadata={"help": help, "range": allowed})


@dataclass
class Routing:
    """How tokens are routed, and what their routing adds to the loss.

    The defaults are those of LLaVA-DyMoE's supplement, A.1, where nothing else is said.

    Args:
        top_k: experts with weight per token, over all active groups (16).
        temperature: of the router's softmax (0.01, reported of the authors' code).
        tau: relative score difference above which a token is new or old, not ambiguous (0.2).
        guidance: mask of Token Assignment Guidance while training: "exclusive", "protect", "none", or one of those
            that study the token's dilemma ("only-ambiguous", "only-old", "no-token"; see
            `routing.token_assignment_guidance`).
        load_balance: weight of the load-balance loss (1e-3).
        balance_over: experts whose use it evens out: those of the "new" group, or "all" that the router scores.
        exclusivity: weight of the exclusivity loss (1e-3).
        specialization: weight of the specialization loss (1e-3).
        rsr_temperature: temperature of the regularization's own softmax (0.1).
        rsr_start: share of a task's steps before the regularization starts to rise (0.5).
    """

    top_k: int = _setting(16, _COUNT, "experts with weight per token")
    temperature: float = _setting(0.01, _POSITIVE, "of the router's softmax")
    tau: float = _setting(0.2, _WEIGHT, "threshold of token types")
    guidance: Mask = field(default="exclusive", metadata={"help": "exclusive | protect | none | ..", "range": _MASK})
    load_balance: float = _setting(1e-3, _WEIGHT, "weight of the load-balance loss")
    balance_over: str = _setting("new", _SIDE, "new | all: experts whose use is evened out")
    exclusivity: float = _setting(1e-3, _WEIGHT, "weight of the exclusivity loss")
    specialization: float = _setting(1e-3, _WEIGHT, "weight of the specialization loss")
    rsr_temperature: float = _setting(0.1, _POSITIVE, "of the regularization's softmax")
    rsr_start: float = _setting(0.5, _SHARE, "share of steps before the regularization rises")

    def __post_init__(self) -> None:
        """Refuse values out of their ranges.

        Raises:
            ValueError: a value out of its range; the message names the field.
        """
        for name, value in vars(self).items():
            if isinstance(value, float) and not workable(value):
                raise ValueError(f"{name} must be {WORKABLE}, got {value!r}")
        for name, allowed in RANGES.items():
            if not allowed.holds(getattr(self, name)):
                raise ValueError(f"{name} must be {allowed.words}, got {getattr(self, name)!r}")


RANGES: dict[str, Range] = {each.name: each.metadata["range"] for each in fields(Routing)}
