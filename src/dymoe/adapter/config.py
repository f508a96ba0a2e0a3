"""The config of one expert group (one PEFT adapter)."""

import enum
import re
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from peft import PeftConfig

from dymoe.adapter.gates import GATES, Gate
from dymoe.routing_settings import Routing


class PeftType(str, enum.Enum):  # noqa: UP042 - as PEFT's own, whose text names the class
    """PEFT's enum of methods cannot be extended; where it reads a method's `value` it finds this one."""

    DYMOE = "DYMOE"


PEFT_TYPE = PeftType.DYMOE
T = TypeVar("T")
COMPUTE = ("stacked", "reference")


@dataclass
class DyMoEConfig(Routing, PeftConfig):
    """What one task adds to the bank, and how its tokens are routed while it trains.

    The settings of the router are those of `dymoe.routing_settings.Routing`; only the cosine gate has scores that its
    `guidance` can compare. Defaults follow the supplement of LLaVA-DyMoE, A.1 (16 experts of rank 4 a task); what the
    supplement leaves open says so below.

    Args:
        num_experts: experts that this group adds to every wrapped layer.
        r: rank of each expert.
        lora_alpha: the group's output is scaled by lora_alpha / (num_experts * r). Not stated in the paper; 128 gives
            the factor 2 of CoIN's LoRA recipe (alpha 256, rank 128).
        lora_dropout: dropout on the input of the training experts. Not stated in the paper; LLaVA-1.5 uses 0.05.
        gate: "cosine" (cosine scores, softmax over the top k), "uniform" (every expert has weight 1, no router: plain
            LoRA is one such expert), "linear" (a linear router, softmax over the top k; the router of a group scores
            the experts of all groups up to its own), "pooled" (cosine, one decision for a sample from the mean of its
            prompt's tokens) or a gate from outside (`adapter.gates.Gate`).
        gate_pattern: gates in layers whose name is, ends with or as a regular expression fits a key, in place of
            `gate`; for example uniform in early layers and cosine in later ones.
        compute: "stacked" (dense products for the bank) or "reference" (a loop over experts).
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
    gate: str = field(default="cosine", metadata={"help": "cosine | uniform | linear | pooled"})
    gate_pattern: dict[str, str] = field(default_factory=dict, metadata={"help": "gates by layer"})
    compute: str = field(default="stacked", metadata={"help": "stacked | reference"})
    expert_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "experts by layer"})
    selector: str = field(default="none", metadata={"help": "none, or what weighs groups for a sample"})
    selector_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "the selector's settings"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "linears to wrap"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "linears to leave alone"})

    def __post_init__(self) -> None:
        Routing.__post_init__(self)
        PeftConfig.__post_init__(self)
        self.peft_type = PEFT_TYPE  # type: ignore[assignment]
        gates = {"gate": self.gate} | {f"gate_pattern: {key!r}": name for key, name in self.gate_pattern.items()}
        for where, name in gates.items():
            if name not in GATES:
                raise ValueError(
                    f"{where} must be one of {', '.join(GATES)}, got {name!r}; a gate from outside is known once the "
                    "file with its class is imported"
                )
        if self.compute not in COMPUTE:
            raise ValueError(f"compute must be one of {', '.join(COMPUTE)}, got {self.compute!r}")
        for name in ("num_experts", "r"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha must be positive, got {self.lora_alpha!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be a share in [0, 1), got {self.lora_dropout!r}")
        for key, value in self.expert_pattern.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"expert_pattern: {key!r}: expected a whole number from 0, got {value!r}")
        # Lists become sets so that PEFT's bookkeeping (which expects one or the other) and equality agree.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    @property
    def weights_depend_on(self) -> Literal["token", "sample", "nothing"]:
        """What an expert's weight depends on once nothing trains; where on nothing, the groups are one plain LoRA."""
        if any(gate.routes for gate in self.gates):
            return "token"
        return "nothing" if self.selector == "none" else "sample"

    @property
    def scaling(self) -> float:
        """Factor on the group's output: lora_alpha / (num_experts * r)."""
        return self.lora_alpha / (self.num_experts * self.r)

    @property
    def gates(self) -> tuple[Gate, ...]:
        """Every gate that some layer may have."""
        return tuple(GATES[name] for name in sorted({self.gate, *self.gate_pattern.values()}))

    def gate_in(self, layer: str) -> Gate:
        """The gate of the layer of this name."""
        return GATES[_of_layer(self.gate_pattern, layer, self.gate)]

    def experts_in(self, layer: str) -> int:
        """Experts that the group adds to the layer of this name."""
        return _of_layer(self.expert_pattern, layer, self.num_experts)


def _of_layer(pattern: dict[str, T], layer: str, default: T) -> T:
    """What a pattern says of a layer: by its whole name first, then by the first key that fits."""
    if layer in pattern:
        return pattern[layer]
    fits = (key for key in pattern if layer.endswith(f".{key}") or re.fullmatch(key, layer))
    return next((pattern[key] for key in fits), default)
