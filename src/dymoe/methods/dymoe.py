"""`dymoe`: LLaVA-DyMoE; guided token assignment and routing-score regularization over `incmoelora`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from dymoe.methods.base import Stage
from dymoe.methods.incmoelora import IncMoELoRA
from dymoe.routing_settings import Mask, Routing
from dymoe.schema import LesserShare, Positive, Weight

if TYPE_CHECKING:
    from dymoe.adapter import DyMoEConfig


@dataclass
class DyMoE(IncMoELoRA):
    """DyMoE (arXiv 2603.27481): new tokens learn in the new group, all others stay with the old ones.

    Loss terms: load balance of the new group, exclusivity and specialization of the routing scores. Each part
    is switched off on its own: ``guidance: none`` (no TAG), ``exclusivity: 0`` and ``specialization: 0`` (no
    RSR), ``load_balance: 0``.

    Attributes:
        guidance: TAG's mask; ``exclusive`` hides the old groups from new tokens too (the authors' code, as
            reported), ``protect`` hides only the new group from the other tokens (the paper, as summarised). For the
            study of the token's dilemma the new group may be open to ambiguous tokens alone (``only-ambiguous``), to
            old ones (``only-old``) or to none (``no-token``).
        tau: relative score difference up to which a token is ambiguous.
        load_balance: weight of the load-balancing term on the new group.
        exclusivity: weight of the exclusivity term.
        specialization: weight of the specialization term.
        rsr_temperature: temperature of the unguided routing weights that both RSR terms see.
        rsr_start: share of a task's steps after which the RSR terms begin to rise.
    """

    name: ClassVar[str] = "dymoe"
    summary: ClassVar[str] = "incmoelora with token assignment guidance and routing score regularization"

    guidance: Mask = Routing.guidance
    tau: Weight = Routing.tau
    load_balance: Weight = Routing.load_balance
    exclusivity: Weight = Routing.exclusivity
    specialization: Weight = Routing.specialization
    rsr_temperature: Positive = Routing.rsr_temperature
    rsr_start: LesserShare = Routing.rsr_start

    def config(self, stage: Stage) -> DyMoEConfig:
        """IncMoELoRA's group with guidance and the three routing terms."""
        return replace(
            super().config(stage),
            guidance=self.guidance,
            tau=self.tau,
            load_balance=self.load_balance,
            exclusivity=self.exclusivity,
            specialization=self.specialization,
            rsr_temperature=self.rsr_temperature,
            rsr_start=self.rsr_start,
        )
