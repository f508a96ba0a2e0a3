"""The settings of the router: the one place of their defaults, ranges and sources.

Without torch, so that a recipe is checked before torch is loaded. `dymoe.routing` computes with them; an adapter's
config holds them (`dymoe.adapter.DyMoEConfig`) and a method that sets them takes its defaults from here.
"""

from dataclasses import dataclass, field
from typing import Literal

from dymoe.numbers import WORKABLE, workable
from dymoe.schema import LesserShare, Positive, Size, Weight, check_fields

Mask = Literal["exclusive", "protect", "only-ambiguous", "only-old", "no-token", "none"]
MASKS: tuple[str, ...] = ("exclusive", "protect", "only-ambiguous", "only-old", "no-token", "none")


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

    top_k: Size = field(default=16, metadata={"help": "experts with weight per token"})
    temperature: Positive = field(default=0.01, metadata={"help": "of the router's softmax"})
    tau: Weight = field(default=0.2, metadata={"help": "threshold of token types"})
    guidance: Mask = field(default="exclusive", metadata={"help": "exclusive | protect | none | .."})
    load_balance: Weight = field(default=1e-3, metadata={"help": "weight of the load-balance loss"})
    balance_over: Literal["new", "all"] = field(
        default="new", metadata={"help": "new | all: experts whose use is evened out"}
    )
    exclusivity: Weight = field(default=1e-3, metadata={"help": "weight of the exclusivity loss"})
    specialization: Weight = field(default=1e-3, metadata={"help": "weight of the specialization loss"})
    rsr_temperature: Positive = field(default=0.1, metadata={"help": "of the regularization's softmax"})
    rsr_start: LesserShare = field(default=0.5, metadata={"help": "share of steps before the regularization rises"})

    def __post_init__(self) -> None:
        """Refuse values out of their ranges.

        Raises:
            ValueError: a value out of its range; the message names the field.
        """
        for name, value in vars(self).items():
            if isinstance(value, float) and not workable(value):
                raise ValueError(f"{name} must be {WORKABLE}, got {value!r}")
        check_fields(self, Routing)
