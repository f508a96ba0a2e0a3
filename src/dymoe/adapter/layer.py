"""The wrapped linear: base output plus the gated output of the expert bank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from dymoe.adapter.bank import Block, reference, stacked
from dymoe.adapter.config import DyMoEConfig
from dymoe.adapter.gates import Gate, Setting
from dymoe.adapter.holder import GroupHolder
from dymoe.adapter.trace import LayerRouting, RoutingTrace
from dymoe.routing import Decision

_compiling = torch.compiler.is_compiling

# By what the experts' weights depend on: how a stage leaves for something that knows no expert groups.
WAYS_OUT = {
    "token": "its weights depend on the token; serve the stage as it is (examples/serve.py)",
    "sample": "its weights depend on the sample; `dymoe export RUN --as groups` writes a LoRA for each group, and what "
    "weighs them",
    "nothing": "its groups stay as they are; `dymoe export RUN --as merged` writes a whole model, `--as lora` one LoRA",
}

_version = attrgetter("_version")  # asked of every frozen parameter at every call


@dataclass(frozen=True)
class Pack:
    """The frozen active groups, packed once.

    Attributes:
        blocks: experts of equal rank, scale folded into B, in the compute dtype.
        rows: what the gate keeps of their router rows (`Gate.pack`).
        sources: the parameters that were packed.
        versions: torch's counters of their in-place changes at that time.
    """

    blocks: tuple[Block, ...]
    rows: Any
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
        frozen: those that are packed; the last may be the newest one.
        new: the group that trains, or None.
        num_new: experts that it has here.
    """

    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    frozen: tuple[str, ...]
    new: str | None
    num_new: int


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
        routed = config.gate_in(self.name).rows(experts, older)
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
        if adapter_name in names and experts and self.group_configs[adapter_name].gate_in(self.name).scores_older:
            position = names.index(adapter_name)
            start = sum(self.experts_of(name) for name in names[:position])
            for name in names[position + 1 :]:
                rows = self.dymoe_router[name]
                rest = torch.cat([rows[:start], rows[start + experts :]]).detach()
                if len(rest):
                    self.dymoe_router[name] = nn.Parameter(rest, requires_grad=rows.requires_grad)
                else:  # as in `add_group`: nothing to route to, no router
                    del self.dymoe_router[name]
        super().delete_adapter(adapter_name)

    def groups_changed(self) -> None:
        """Lay out and pack the groups anew at the next use."""
        self._packs.clear()
        self._layouts.clear()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not in place, which would end a group that is to stay as it is; says which way out there is."""
        depends = next(iter(self.group_configs.values())).weights_depend_on
        raise NotImplementedError(f"an expert bank cannot be merged into the base layer: {WAYS_OUT[depends]}")

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
        layout = self._layouts.get(learning)
        if layout is None:
            frozen, new = self.group_order()
            groups = frozen if new is None else [*frozen, new]
            sizes = tuple(self.experts_of(group) for group in groups)
            if not learning:
                frozen, new = groups, None
            num_new = 0 if new is None else sizes[-1]
            layout = Layout(tuple(groups), sizes, tuple(frozen), new, num_new)
            self._layouts[learning] = layout
        return layout

    def _pack(self, groups: tuple[str, ...], gate: Gate, dtype: torch.dtype) -> Pack:
        """Return the packed groups in the compute dtype; packed anew only after one of them changed."""
        key = (groups, dtype)
        pack = self._packs.get(key)
        if pack is not None and (_compiling() or pack.current()):
            return pack
        parameters_of = [getattr(self, attribute) for attribute in self.adapter_layer_names]
        sources = tuple(parameters[group] for parameters in parameters_of for group in groups if group in parameters)
        with torch.no_grad(), torch.autocast(self._like().device.type, enabled=False):
            rows = gate.pack([self._router(group).detach() for group in groups])
            versions = () if _compiling() else tuple(map(_version, sources))
            pack = Pack(self._pack_blocks(groups, dtype), rows, sources if versions else (), versions)
        self._packs = {key: pack}
        return pack

    def _pack_blocks(self, groups: Sequence[str], dtype: torch.dtype) -> tuple[Block, ...]:
        blocks: list[Block] = []
        for r, run in groupby((g for g in groups if self.experts_of(g)), lambda g: self.group_configs[g].r):
            names = list(run)
            scaled = [self.dymoe_B[g] * self.group_configs[g].scaling for g in names]
            a, b = (
                torch.cat(list(parts)).transpose(0, 1).to(dtype).contiguous().detach()
                for parts in ([self.dymoe_A[g] for g in names], scaled)
            )
            assert len(a) == r
            blocks.append(Block(a, b))
        return tuple(blocks)

    def _like(self) -> Tensor:
        """One of the layer's parameters, for their dtype and device."""
        return next(iter(self.dymoe_A.values()))

    def _router(self, group: str) -> Tensor:
        """A group's router rows; none for one that brought none."""
        if group in self.dymoe_router:
            return self.dymoe_router[group]
        return self._like().new_zeros(0, self.in_features)

    # ---- forward ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus bank output; x is (..., in_features), the result (..., out_features)."""
        result = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters:
            return result
        layout = self._layout(self.training or torch.is_grad_enabled())
        if not sum(layout.sizes):
            return result
        config, trace, device = self.group_configs[layout.groups[-1]], self.trace, x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self._like().dtype
        gate, setting = config.gate_in(self.name), self._setting(x, layout, config)
        with torch.autocast(device, enabled=False):  # what is computed in which dtype is said here
            flat = x.reshape(-1, self.in_features)
            old = self._pack(layout.frozen, gate, dtype) if layout.frozen else None
            rows, blocks = (None, ()) if old is None else (old.rows, old.blocks)
            new_rows = None if layout.new is None else self._router(layout.new)
            decision = gate.decide(flat, rows, new_rows, setting)
            bank = reference if config.compute == "reference" else stacked
            new = self._new_block(layout, config, dtype)
            output = bank(result.reshape(-1, result.shape[-1]), flat.to(dtype), decision, blocks, new)
            output = output.view(result.shape)
        if decision.terms is not None and decision.total is not None:
            total = decision.total / trace.context.num_layers
            trace.leave_terms(self.name, total, decision.terms, decision.statistics)
            if total.requires_grad or not torch.is_grad_enabled():
                output = trace.inject(output, total)
        if trace.observers:
            self._leave_routing(x, decision, layout)
        return output

    def _setting(self, x: Tensor, layout: Layout, config: DyMoEConfig) -> Setting:
        """What the gate is told of the bank and of this forward pass."""
        context, tokens = self.trace.context, x.shape[:-1]
        learns = self.training and layout.num_new > 0
        mask = context.mask_for(tokens) if learns else None
        prompt = context.mask_for(tokens, context.prompt_mask)
        return Setting(
            sizes=layout.sizes,
            num_new=layout.num_new,
            routing=config,
            tokens=tuple(tokens),
            selection=context.selection_for(layout.groups, x),
            learns=learns,
            mask=None if mask is None else mask.reshape(-1).to(x.device),
            scale=context.scale.to(x.device) if context.rsr_active else None,
            report=context.collect,
            prompt=None if prompt is None else prompt.reshape(-1).to(x.device),
            prompts=context.prompts,
            layer=self.name,
        )

    def _new_block(self, layout: Layout, config: DyMoEConfig, dtype: torch.dtype) -> Block | None:
        """The experts of the group that trains, in the compute dtype."""
        if layout.new is None or not layout.num_new:
            return None
        a, b = (parameters[layout.new].transpose(0, 1).to(dtype) for parameters in (self.dymoe_A, self.dymoe_B))
        return Block(a, b, config.scaling, config.lora_dropout if self.training else 0.0)

    def _leave_routing(self, x: Tensor, decision: Decision, layout: Layout) -> None:
        tokens = x.shape[:-1]

        def shaped(sides: Sequence[Tensor]) -> Tensor:
            joined = torch.cat(list(sides), -1).detach()
            return joined.expand(math.prod(tokens), -1).reshape(*tokens, -1)

        scores = None if decision.scores is None else shaped(decision.scores)
        weights, mask = shaped([decision.columns(0), decision.columns(1)]), self.trace.context.mask_for(tokens)
        self.trace.leave_routing(LayerRouting(self.name, layout.groups, layout.sizes, scores, weights, mask))

    def __repr__(self) -> str:
        groups = ", ".join(f"{g}: {c.num_experts} x r{c.r}" for g, c in self.group_configs.items())
        return f"dymoe.{type(self).__name__}({self.in_features} -> {self.out_features}; {groups or 'no groups'})"


class DyMoELinear(DyMoELayer):
    """A wrapped linear under a name that PEFT knows: "all-linear" takes layers whose class says "Linear"."""
