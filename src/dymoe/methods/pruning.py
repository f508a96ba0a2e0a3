"""`pruning`: after each task the new group gives up the experts that its tokens use least."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dymoe.files import atomic_json, read_json
from dymoe.methods.base import Stage, StageData
from dymoe.methods.parameters import draw, trained_group
from dymoe.methods.plugin import Plugin
from dymoe.schema import ProperShare, Size

if TYPE_CHECKING:
    from torch import Tensor

    from dymoe.adapter import DyMoEConfig, LayerRouting, RoutingTrace
    from dymoe.tasks import Sample

FILE = "pruning.json"


@dataclass
class Pruning(Plugin):
    """Drop the least activated experts of the group that a stage added (arXiv 2603.27481, supplement B.7).

    In every wrapped layer floor(share x experts) experts go. Activation is the routing weight that an expert gets from
    the task's training prompts, a mean over their tokens: the supplement speaks of activation frequencies and, of its
    Figure 4, of aggregated routing scores; on which prompts, before or after the top-k, in each layer or over all of
    them, and whether older groups lose experts again is not stated. Under a uniform gate, where all weights are 1, it
    is the mean norm of the expert's scaled output. The kept experts stay as they are, and so does the scale of the
    group's output. A group of fewer than 1 / share experts loses none.

    A group that a later stage trains on is not pruned again: no expert of it is new.

    Attributes:
        share: share of the group's experts to drop; 1/8 and 1/4 in the supplement.
        limit: training prompts per task on which activation is measured; none for all. Not stated in the supplement.
    """

    name: ClassVar[str] = "pruning"
    summary: ClassVar[str] = "drop a new group's least used experts after its task"

    share: ProperShare = 0.125
    limit: Size | None = 128

    def after_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Measure, drop, and write down what was dropped (``pruning.json``)."""
        group = trained_group(model)
        records = [folder / FILE for folder in stage.earlier]
        if any(read_json(path)["group"] == group for path in records if path.is_file()):
            return
        samples = [sample for task in stage.tasks for sample in draw(task.train, self.limit, f"pruning/{task.name}")]
        measured = activation(model, group, data, samples)
        survivors = {name: keep(values.tolist(), self.share) for name, values in measured.items()}
        shrink(model, group, survivors)
        adjust(model.peft_config[group], self.share)
        layers = {
            name: {"experts": len(values), "kept": survivors[name], "activation": values.tolist()}
            for name, values in measured.items()
        }
        atomic_json(stage.memory / FILE, {"group": group, "share": self.share, "layers": layers})


def dropped(experts: int, share: float) -> int:
    """floor(share x experts), safe against shares such as 0.29 that binary fractions miss by a hair."""
    return int(share * experts + 1e-9)


def keep(values: Sequence[float], share: float) -> list[int]:
    """Places of the experts to keep, ascending; of equally activated experts the first ones go."""
    order = sorted(range(len(values)), key=lambda expert: (values[expert], expert))
    return sorted(order[dropped(len(values), share) :])


def activation(model: Any, group: str, data: StageData, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Mean activation of the group's experts over the prompts' tokens, float64 (experts,), by layer.

    The other groups are active too. The group still trains, so no selector that chooses a task has a say.
    """
    from dymoe.adapter.observation import observe

    tuner = model.base_model
    layers = {layer.name: layer for layer in tuner.layers() if layer.experts_of(group)}
    sums = _Sums(tuner.trace, group)
    config = model.peft_config[group]
    without = [layer for name, layer in layers.items() if not config.gate_in(name).routes]
    sums.routed = layers.keys() - {layer.name for layer in without}
    with tuner.trace.aside(), _watching(without, sums):
        observe(model, data.batches(samples), autocast=data.autocast)
    return {name: sums.mean(name) for name in layers}


class _Sums:
    """Running sums of per-expert values over the tokens of prompts, by layer; an observer of routing."""

    def __init__(self, trace: RoutingTrace, group: str) -> None:
        self.trace = trace
        self.group = group
        self.routed: set[str] = set()  # layers whose weights depend on the token
        self.totals: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def __call__(self, routing: LayerRouting) -> None:
        """Add the group's columns of one layer's routing weights."""
        if routing.layer in self.routed and self.group in routing.groups:
            position = routing.groups.index(self.group)
            columns = routing.weights.split(list(routing.sizes), dim=-1)[position]
            if columns.shape[-1]:
                self.add(routing.layer, columns)

    def add(self, layer: str, values: Tensor) -> None:
        """Add values (..., experts) of the tokens that belong to a prompt."""
        tokens = values.shape[:-1]
        mask = self.trace.context.prompt_mask
        if mask is not None and mask.numel() == tokens.numel():
            values = values[mask.reshape(tokens)]
        rows = values.reshape(-1, values.shape[-1]).double().cpu()
        self.totals[layer] = self.totals[layer] + rows.sum(0) if layer in self.totals else rows.sum(0)
        self.tokens[layer] = self.tokens.get(layer, 0) + len(rows)

    def mean(self, layer: str) -> Tensor:
        """Mean over tokens, (experts,)."""
        return self.totals[layer] / max(1, self.tokens[layer])


@contextmanager
def _watching(without: Sequence[Any], sums: _Sums) -> Iterator[None]:
    """Let `sums` see the routing weights, in layers without routing the norms of the experts' outputs."""
    sums.trace.observers.append(sums)  # `aside` restores the list

    def hook(layer: Any, arguments: tuple[Any, ...]) -> None:
        sums.add(layer.name, output_norms(layer, sums.group, arguments[0]))

    handles = [layer.register_forward_pre_hook(hook) for layer in without]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def output_norms(layer: Any, group: str, x: Tensor) -> Tensor:
    """Norm of scale * B_e A_e x for each expert of the group: x (..., in_features) to float32 (..., experts)."""
    import torch

    a, b = layer.dymoe_A[group].float(), layer.dymoe_B[group].float()
    with torch.autocast(x.device.type, enabled=False):
        hidden = torch.einsum("...i,eri->...er", x.float(), a)
        gram = torch.einsum("ero,eso->ers", b, b)
        squares = torch.einsum("...er,ers,...es->...e", hidden, gram, hidden)
    return layer.group_configs[group].scaling * squares.clamp(min=0).sqrt()


def shrink(model: Any, group: str, survivors: Mapping[str, Sequence[int]]) -> None:
    """Keep only these experts of the group, by layer: A, B and the router rows that score them.

    A linear router keeps its rows for the groups before; routers of later groups must not exist yet.
    """
    import torch
    from torch import nn

    for layer in model.base_model.layers():
        if layer.name not in survivors:
            continue
        experts = layer.experts_of(group)
        index = torch.tensor(list(survivors[layer.name]), device=layer.dymoe_A[group].device)
        for parameters in (layer.dymoe_A, layer.dymoe_B, layer.dymoe_router):
            if group not in parameters:
                continue
            old = parameters[group]
            older = torch.arange(old.shape[0] - experts, device=index.device)
            rows = torch.cat([older, old.shape[0] - experts + index])
            parameters[group] = nn.Parameter(old.detach()[rows].clone(), requires_grad=old.requires_grad)
        layer.groups_changed()


def adjust(config: DyMoEConfig, share: float) -> None:
    """Let the config say what is left, in place: experts, pattern, and the alpha that keeps the scale as it was."""
    scaling = config.scaling
    config.num_experts -= dropped(config.num_experts, share)
    config.lora_alpha = scaling * config.num_experts * config.r
    config.expert_pattern = {key: count - dropped(count, share) for key, count in config.expert_pattern.items()}
