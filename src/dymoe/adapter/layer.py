"""The wrapped linear: base output plus the gated output of the expert bank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dymoe import routing
from dymoe.adapter.config import DyMoEConfig
from dymoe.adapter.gates import GATES, Gating, Routing
from dymoe.adapter.holder import GroupHolder
from dymoe.adapter.ops import OPS, Bank, Candidates, ExpertBlock, Rule, fused
from dymoe.adapter.ops.candidates import token_statistics
from dymoe.adapter.ops.triton import suits
from dymoe.adapter.ops.triton.route import GUIDES, Guidance, group_mass, route
from dymoe.adapter.trace import TERMS, LayerRouting, RoutingTrace

_compiling = torch.compiler.is_compiling


_version = attrgetter("_version")  # asked of every frozen parameter at every call


@dataclass(frozen=True)
class Pack:
    """The frozen active groups, packed once.

    Attributes:
        blocks: experts of equal rank, scale folded into B, in the compute dtype.
        directions: unit router rows, float32.
        rows: the same in the compute dtype.
        sources: the parameters that were packed.
        versions: torch's counters of their in-place changes at that time.
    """

    blocks: tuple[ExpertBlock, ...]
    directions: Tensor | None
    rows: Tensor | None
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def current(self) -> bool:
        """Whether no packed parameter has changed since."""
        return tuple(map(_version, self.sources)) == self.versions


@dataclass(frozen=True)
class Layout:
    """The active groups as the layer's columns.

    Attributes:
        groups: all of them.
        sizes: experts of each.
        frozen: those that are packed, without groups that brought no experts here; the last may be the newest one.
        new: the group that trains, if it has experts here.
    """

    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    frozen: tuple[str, ...]
    new: str | None


class DyMoELayer(GroupHolder):
    """A linear (anything with in_features and out_features) with a bank of expert groups.

    y = W0 x + sum over active groups of (alpha / bank rank of the group) * sum_e w_e B_e A_e x

    Per group g the layer holds A (experts, r, in_features), B transposed (experts, r, out_features) and, unless the
    gate is uniform, router rows (experts, in_features), float32. At most one group trains; it is the new group and its
    experts are the last columns. Frozen groups are packed for the compute dtype the first time they are used.

    Args:
        base_layer: the frozen linear.
        name: the layer's name in the model.
        trace: the model's routing trace.
    """

    adapter_layer_names = ("dymoe_A", "dymoe_B", "dymoe_router")
    other_param_names = ("group_configs",)

    def __init__(self, base_layer: nn.Module, name: str, trace: RoutingTrace) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.in_features = cast(int, base_layer.in_features)
        self.out_features = cast(int, base_layer.out_features)
        self.dymoe_A = nn.ParameterDict()
        self.dymoe_B = nn.ParameterDict()
        self.dymoe_router = nn.ParameterDict()
        self.group_configs: dict[str, DyMoEConfig] = {}
        self.trace = trace
        self._packs: dict[tuple[Any, ...], Pack] = {}
        self._layouts: dict[bool, Layout] = {}

    # ---- groups -------------------------------------------------------------------------------------------------

    def add_group(self, group: str, config: DyMoEConfig) -> None:
        """Add an expert group: A and router rows Kaiming-uniform (a = sqrt 5), B zero, all float32.

        A layer that gets no new experts holds nothing of the group, except under the linear gate its router, if there
        are older experts to route to.
        """
        weight = getattr(self.get_base_layer(), "weight", None)
        device = weight.device if isinstance(weight, Tensor) else None
        experts, r = config.experts_in(self.name), config.r
        older = sum(self.experts_of(name) for name in self.group_configs)
        if experts:
            a = torch.empty(experts * r, self.in_features, dtype=torch.float32, device=device)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            self.dymoe_A[group] = nn.Parameter(a.view(experts, r, self.in_features))
            self.dymoe_B[group] = nn.Parameter(torch.zeros(experts, r, self.out_features, device=device))
        routed = {"cosine": experts, "linear": older + experts, "uniform": 0}[config.gate]
        if routed:
            rows = torch.empty(routed, self.in_features, dtype=torch.float32, device=device)
            nn.init.kaiming_uniform_(rows, a=math.sqrt(5))
            self.dymoe_router[group] = nn.Parameter(rows)
        self.group_configs[group] = config
        self.groups_changed()

    def experts_of(self, group: str) -> int:
        """How many experts of the group this layer holds."""
        return int(self.dymoe_A[group].shape[0]) if group in self.dymoe_A else 0

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget a group on purpose; the linear routers of later groups lose the columns of its experts."""
        names = list(self.group_configs)
        experts = self.experts_of(adapter_name)
        if adapter_name in names and experts and self.group_configs[adapter_name].gate == "linear":
            place = names.index(adapter_name)
            start = sum(self.experts_of(name) for name in names[:place])
            for name in names[place + 1 :]:
                rows = self.dymoe_router[name]
                kept = torch.cat([rows[:start], rows[start + experts :]]).detach()
                if len(kept):
                    self.dymoe_router[name] = nn.Parameter(kept, requires_grad=rows.requires_grad)
                else:  # as in `add_group`: nothing to route to, no router
                    del self.dymoe_router[name]
        super().delete_adapter(adapter_name)

    def groups_changed(self) -> None:
        """Lay out and pack the groups anew at the next use."""
        self._packs.clear()
        self._layouts.clear()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible: the weight of an expert depends on the token."""
        raise NotImplementedError(
            "an expert bank cannot be merged into the base layer: its weights depend on the token"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def group_order(self) -> tuple[list[str], str | None]:
        """Return (frozen active groups in order of activation, the training group if it is active)."""
        active = [name for name in self._active_adapter if name in self.group_configs]
        new = self.training_group if self.training_group in active else None
        return [name for name in active if name != new], new

    # ---- frozen groups, packed ----------------------------------------------------------------------------------

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packs.clear()  # `assign=True` puts other parameters in the place of those packed
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> DyMoELayer:
        self._packs.clear()
        return cast(DyMoELayer, super()._apply(fn, recurse))

    def _layout(self, learning: bool) -> Layout:
        """The layout; where nothing learns, the newest group counts as frozen."""
        found = self._layouts.get(learning)
        if found is None:
            frozen, new = self.group_order()
            groups = frozen if new is None else [*frozen, new]
            sizes = tuple(self.experts_of(group) for group in groups)
            if not learning:
                frozen, new = groups, None
            held = tuple(group for group in frozen if self.experts_of(group))
            found = Layout(tuple(groups), sizes, held, new if new is not None and self.experts_of(new) else None)
            self._layouts[learning] = found
        return found

    def _pack(self, groups: tuple[str, ...], dtype: torch.dtype) -> Pack:
        """Return the packed groups in the compute dtype; packed anew only after one of them changed."""
        key = (groups, dtype)
        found = self._packs.get(key)
        if found is not None and (_compiling() or found.current()):
            return found
        held = [getattr(self, attribute) for attribute in self.adapter_layer_names]
        sources = tuple(parameters[group] for parameters in held for group in groups if group in parameters)
        with torch.no_grad(), torch.autocast(self.dymoe_A[groups[0]].device.type, enabled=False):
            directions = self._pack_directions(groups)
            rows = None if directions is None else directions.to(dtype)
            versions = () if _compiling() else tuple(map(_version, sources))
            pack = Pack(self._pack_blocks(groups, dtype), directions, rows, sources if versions else (), versions)
        self._packs = {key: pack}
        return pack

    def _pack_blocks(self, groups: Sequence[str], dtype: torch.dtype) -> tuple[ExpertBlock, ...]:
        blocks: list[ExpertBlock] = []
        start = 0
        while start < len(groups):
            r = self.group_configs[groups[start]].r
            stop = start + 1
            while stop < len(groups) and self.group_configs[groups[stop]].r == r:
                stop += 1
            run = groups[start:stop]
            a = torch.cat([self.dymoe_A[g].flatten(0, 1) for g in run]).to(dtype)
            b = torch.cat([self.dymoe_B[g].flatten(0, 1) * self.group_configs[g].scaling for g in run]).to(dtype)
            blocks.append(ExpertBlock(a.detach(), b.detach(), r))
            start = stop
        return tuple(blocks)

    def _pack_directions(self, groups: Sequence[str]) -> Tensor | None:
        """Unit router rows of all groups (cosine gate)."""
        if self.group_configs[groups[0]].gate != "cosine":
            return None
        rows = torch.cat([self.dymoe_router[g] for g in groups])
        return F.normalize(rows.float(), dim=-1, eps=1e-12).detach()

    # ---- forward ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus bank output; x is (..., in_features), the result (..., out_features)."""
        result = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters:
            return result
        layout = self._layout(self.training or torch.is_grad_enabled())
        groups, sizes, new = layout.groups, layout.sizes, layout.new
        if not sum(sizes):
            return result
        config = self.group_configs[groups[-1]]
        device = x.device.type
        own = next(iter(self.dymoe_A.values())).dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else own
        selection = self.trace.selection_for(groups, x)
        plain = config.gate != "cosine" or selection is not None or _compiling()
        if not plain and config.compute != "reference" and not self._by_kernels(x, config):
            return self._fused(x, result, layout, config, dtype)
        num_new = sizes[-1] if new is not None else 0
        blocks, rows = self._bank(layout.frozen, new, config, dtype)
        if config.gate == "linear":
            none = x.new_zeros(0, self.in_features, dtype=own)  # a group that found and brought no experts here
            rows = [self.dymoe_router.get(group, none) for group in groups]
        decision = self._route(x, rows, sizes, config, num_new, selection)
        # Only a softmax over the top k promises that nobody asks for the gradient of a weight that is 0.
        sparse = config.gate != "uniform" and selection is None
        output = OPS[config.compute](x.to(dtype), decision.weights, blocks, config.top_k if sparse else None)
        result = result + output.to(result.dtype)
        if self.training and num_new:
            result = self._leave_terms(result, decision, config, num_new)
        if self.trace.observers:
            self._leave_routing(x, decision, groups, sizes)
        return result

    def _fused(self, x: Tensor, result: Tensor, layout: Layout, config: DyMoEConfig, dtype: torch.dtype) -> Tensor:
        """The cosine gate and the bank as one function (`ops.fused`)."""
        trace, new = self.trace, layout.new
        training = self.training and new is not None
        pack = self._pack(layout.frozen, dtype) if layout.frozen else None
        mask = trace.mask_for(x.shape[:-1]) if training else None
        mask = None if mask is None else mask.reshape(-1)
        penalty = config.exclusivity > 0 or config.specialization > 0
        # Before the regularization starts its terms are only reported.
        regularize = penalty and (trace.rsr_active or trace.collect)
        rule = Rule(
            top_k=config.top_k,
            temperature=config.temperature,
            tau=config.tau,
            guidance=config.guidance if training else "none",
            load_balance=config.load_balance if training else 0.0,
            balance_all=config.balance_over == "all",
            exclusivity=config.exclusivity,
            specialization=config.specialization,
            rsr_temperature=config.rsr_temperature,
            regularize=training and regularize,
            layers=trace.num_layers,
            statistics=training and trace.collect,
        )
        bank = Bank(
            frozen=() if pack is None else pack.blocks,
            directions=None if pack is None else pack.directions,
            rows=None if pack is None else pack.rows,
            rule=rule,
            dtype=dtype,
            r=config.r,
            scaling=config.scaling,
            dropout=config.lora_dropout if training else 0.0,
            mask=mask,
            scale=trace.scale,
            upstream=trace.upstream,
            # A linear of another kind, or a hook on it, may keep its output.
            inplace=type(self.base_layer) is nn.Linear and not self.base_layer._forward_hooks,
            training=self.training,
        )
        router = a = b = None
        if new is not None:
            router, a, b = self.dymoe_router[new], self.dymoe_A[new].flatten(0, 1), self.dymoe_B[new].flatten(0, 1)
        result, outcome = fused(x, result, router, a, b, bank, trace.inverse_norm)
        chosen = cast(Candidates, outcome.chosen)
        if training and (chosen.total is not None or trace.collect):
            zero = chosen.scores.new_zeros(())
            terms = zero.expand(len(TERMS)) if chosen.terms is None else chosen.terms
            trace.leave_terms(self.name, zero if chosen.total is None else chosen.total, terms, chosen.statistics)
        if trace.observers:
            tokens = x.shape[:-1]
            scores, weights = (values.view(*tokens, -1) for values in (outcome.scores(), outcome.weights()))
            self._leave_routing(x, Routing(scores, weights), layout.groups, layout.sizes)
        return result

    def _bank(
        self, frozen: tuple[str, ...], new: str | None, config: DyMoEConfig, dtype: torch.dtype
    ) -> tuple[list[ExpertBlock], list[Tensor]]:
        """Blocks of all active experts and, for the cosine gate, their unit router rows."""
        blocks: list[ExpertBlock] = []
        rows: list[Tensor] = []
        if frozen:
            pack = self._pack(frozen, dtype)
            blocks.extend(pack.blocks)
            if pack.directions is not None:
                rows.append(pack.directions)
        if new is not None:
            dropout = config.lora_dropout if self.training else 0.0
            a, b = self.dymoe_A[new].flatten(0, 1), self.dymoe_B[new].flatten(0, 1)
            blocks.append(ExpertBlock(a.to(dtype), b.to(dtype), config.r, config.scaling, dropout))
            if config.gate == "cosine":
                rows.append(F.normalize(self.dymoe_router[new], dim=-1, eps=1e-12))
        return blocks, rows

    def _route(
        self,
        x: Tensor,
        rows: list[Tensor],
        sizes: tuple[int, ...],
        config: DyMoEConfig,
        num_new: int,
        selection: Tensor | None,
    ) -> Routing:
        guide = None
        guided = self.training and config.guidance != "none" and 0 < num_new < sum(sizes)
        if config.gate == "cosine" and selection is None and self._by_kernels(x, config):
            guidance = Guidance(num_new, config.tau, cast(routing.Mask, config.guidance)) if guided else None
            return route(x, rows, config.top_k, config.temperature, guidance)
        if guided:

            def guide(scores: Tensor) -> tuple[Tensor, Tensor]:
                mask = cast(routing.Mask, config.guidance)
                types = routing.token_types(scores, num_new, config.tau)
                return routing.token_assignment_guidance(scores, num_new, config.tau, mask, types), types

        return GATES[config.gate](x, Gating(sizes, tuple(rows), config.top_k, config.temperature, guide, selection))

    @staticmethod
    def _by_kernels(x: Tensor, config: DyMoEConfig) -> bool:
        """Whether kernels compute the gate and the masses; the masks of the dilemma are not theirs."""
        if config.guidance not in GUIDES:
            return False
        return config.compute == "triton" or (config.compute == "auto" and suits(x))

    def _leave_terms(self, result: Tensor, decision: Routing, config: DyMoEConfig, num_new: int) -> Tensor:
        """Leave the routing's loss terms in the trace and tie them to the result."""
        trace, scores, weights = self.trace, decision.scores, decision.weights
        regularize = config.exclusivity > 0 or config.specialization > 0
        if scores is None or not (config.load_balance > 0 or regularize or trace.collect):
            return result
        mask = trace.mask_for(scores.shape[:-1])
        zero = scores.new_zeros(())
        evened = num_new if config.balance_over == "new" else weights.shape[-1]
        balance = routing.load_balance_loss(weights, evened, mask) if config.load_balance > 0 else zero
        exclusivity = specialization = zero
        if regularize and num_new < scores.shape[-1] and (trace.rsr_active or trace.collect):
            mass = group_mass if self._by_kernels(scores, config) else routing.group_mass
            # Before the regularization starts its terms are only reported.
            with torch.set_grad_enabled(torch.is_grad_enabled() and trace.rsr_active):
                exclusivity, specialization = routing.routing_score_regularization(
                    scores, num_new, config.top_k, config.rsr_temperature, mask, mass
                )
        penalty = config.exclusivity * exclusivity + config.specialization * specialization
        total = (config.load_balance * balance + trace.scale.to(penalty.device) * penalty) / trace.num_layers
        statistics = None
        if trace.collect:
            with torch.no_grad():
                types = decision.types
                types = routing.token_types(scores, num_new, config.tau) if types is None else types
                statistics = token_statistics(types, weights, num_new, mask)
        trace.leave_terms(self.name, total, torch.stack([balance, exclusivity, specialization]), statistics)
        return trace.inject(result, total) if total.requires_grad or not torch.is_grad_enabled() else result

    def _leave_routing(self, x: Tensor, decision: Routing, groups: Sequence[str], sizes: tuple[int, ...]) -> None:
        weights = decision.weights.detach().expand(*x.shape[:-1], -1)
        scores = None if decision.scores is None else decision.scores.detach()
        mask = self.trace.mask_for(x.shape[:-1])
        self.trace.leave_routing(LayerRouting(self.name, tuple(groups), sizes, scores, weights, mask))

    def __repr__(self) -> str:
        groups = ", ".join(f"{g}: {c.num_experts} x r{c.r}" for g, c in self.group_configs.items())
        return f"dymoe.{type(self).__name__}({self.in_features} -> {self.out_features}; {groups or 'no groups'})"


class DyMoELinear(DyMoELayer):
    """A wrapped linear under a name that PEFT knows: "all-linear" takes layers whose class says "Linear"."""
