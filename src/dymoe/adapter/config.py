"""The config of one expert group (one PEFT adapter)."""

import enum
import re
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from dymoe.numbers import WORKABLE, workable
from dymoe.routing import MASKS


class PeftType(str, enum.Enum):  # noqa: UP042 - as PEFT's own, whose text names the class
    """PEFT's enum of methods cannot be extended; where it reads a method's `value` it finds this one."""

    DYMOE = "DYMOE"


PEFT_TYPE = PeftType.DYMOE
GATES = ("cosine", "uniform", "linear")
COMPUTE = ("stacked", "reference", "triton", "auto")


@dataclass
class DyMoEConfig(PeftConfig):
    """What one task adds to the bank, and how its tokens are routed while it trains.

    Defaults follow the supplement of LLaVA-DyMoE, A.1 (16 experts of rank 4 a task, top-k 16, loss weights 1e-3);
    what the supplement leaves open says so below.

    Args:
        num_experts: experts that this group adds to every wrapped layer.
        r: rank of each expert.
        lora_alpha: the group's output is scaled by lora_alpha / (num_experts * r). Not stated in the paper; 128 gives
            the factor 2 of CoIN's LoRA recipe (alpha 256, rank 128).
        lora_dropout: dropout on the input of the training experts. Not stated in the paper; LLaVA-1.5 uses 0.05.
        gate: "cosine" (cosine scores, softmax over the top k), "uniform" (every expert has weight 1, no router: plain
            LoRA is one such expert) or "linear" (a linear router, softmax over the top k; the router of a group scores
            the experts of all groups up to its own).
        top_k: experts with weight per token, over all active groups.
        temperature: of the router's softmax (0.01).
        tau: relative score difference above which a token is new or old, not ambiguous (0.2).
        guidance: mask of Token Assignment Guidance while training: "exclusive", "protect", "none", or one of those
            that study the token's dilemma ("only-ambiguous", "only-old", "no-token"; see
            `routing.token_assignment_guidance`); only the cosine gate has scores to guide.
        load_balance: weight of the load-balance loss.
        balance_over: experts whose use it evens out: those of the "new" group, or "all" that the router scores.
        exclusivity: weight of the exclusivity loss.
        specialization: weight of the specialization loss.
        rsr_temperature: temperature of the regularization's softmax (0.1).
        rsr_start: share of a task's steps before the regularization starts to rise.
        compute: "stacked" (two matrix products for the bank), "reference" (a loop over experts), "triton" (kernels
            for GPUs) or "auto" (triton on a GPU that has it, else stacked).
        expert_pattern: experts in layers whose name is, ends with or as a regular expression fits a key, in place of
            num_experts; 0 leaves a layer without new experts. The scale stays that of num_experts.
        selector: what weighs whole groups for a whole sample before the gates do: "none" or a name of
            `adapter.selectors.SELECTORS`.
        selector_options: the selector's own settings.
        target_modules: names or a regular expression of the linears to wrap; None wraps the seven projections
            (q, k, v, o, gate, up, down) of the language model.
        exclude_modules: names or a regular expression of linears to leave alone.

    Raises:
        ValueError: a value out of its range; the message names the field.
    """

    num_experts: int = field(default=16, metadata={"help": "experts this group adds"})
    r: int = field(default=4, metadata={"help": "rank of each expert"})
    lora_alpha: float = field(default=128.0, metadata={"help": "scale: lora_alpha / (num_experts * r)"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout on the training experts' input"})
    gate: str = field(default="cosine", metadata={"help": "cosine | uniform | linear"})
    top_k: int = field(default=16, metadata={"help": "experts with weight per token"})
    temperature: float = field(default=0.01, metadata={"help": "of the router's softmax"})
    tau: float = field(default=0.2, metadata={"help": "threshold of token types"})
    guidance: str = field(default="exclusive", metadata={"help": "exclusive | protect | none | .."})
    load_balance: float = field(default=1e-3, metadata={"help": "weight of the load-balance loss"})
    balance_over: str = field(default="new", metadata={"help": "new | all: experts whose use is evened out"})
    exclusivity: float = field(default=1e-3, metadata={"help": "weight of the exclusivity loss"})
    specialization: float = field(default=1e-3, metadata={"help": "weight of the specialization loss"})
    rsr_temperature: float = field(default=0.1, metadata={"help": "of the regularization's softmax"})
    rsr_start: float = field(default=0.5, metadata={"help": "share of steps before the regularization rises"})
    compute: str = field(default="stacked", metadata={"help": "stacked | reference | triton | auto"})
    expert_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "experts by layer"})
    selector: str = field(default="none", metadata={"help": "none, or what weighs groups for a sample"})
    selector_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "the selector's settings"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "linears to wrap"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "linears to leave alone"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE  # type: ignore[assignment]
        choices = (("gate", GATES), ("guidance", MASKS), ("compute", COMPUTE), ("balance_over", ("new", "all")))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("num_experts", "r", "top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name, value in vars(self).items():
            if isinstance(value, float) and not workable(value):
                raise ValueError(f"{name} must be {WORKABLE}, got {value!r}")
        for name in ("temperature", "rsr_temperature", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name in ("tau", "load_balance", "exclusivity", "specialization"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")
        for name in ("lora_dropout", "rsr_start"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        for key, value in self.expert_pattern.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"expert_pattern: {key!r}: expected a whole number from 0, got {value!r}")
        # Lists become sets so that PEFT's bookkeeping (which expects one or the other) and equality agree.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    @property
    def scaling(self) -> float:
        """Factor on the group's output: lora_alpha / (num_experts * r)."""
        return self.lora_alpha / (self.num_experts * self.r)

    def experts_in(self, layer: str) -> int:
        """Experts that the group adds to the layer of this name."""
        if layer in self.expert_pattern:
            return self.expert_pattern[layer]
        for key, count in self.expert_pattern.items():
            if layer == key or layer.endswith(f".{key}") or re.fullmatch(key, layer):
                return count
        return self.num_experts
