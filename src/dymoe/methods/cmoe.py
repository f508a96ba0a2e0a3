"""`cmoe`: LLaVA-CMoE; probes where a task needs experts, one router per task, an autoencoder picks the router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, pstdev
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from dymoe.errors import DymoeError
from dymoe.methods.base import Method, Probe, Stage, StageData
from dymoe.methods.parameters import draw
from dymoe.methods.reports import add_report, report_locator
from dymoe.schema import Count, Positive, ProperShare, Range, Share, Size, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from dymoe.adapter import DyMoEConfig, DyMoELayer, LayerRouting
    from dymoe.tasks import Sample, Task

# Towers have linears of the same names.
FFN = r"(?!.*(vision|visual|audio)).*\.(gate_proj|up_proj|down_proj)"
DECISION = "decision.json"


@dataclass
class CMoE(Method):
    """LLaVA-CMoE (arXiv 2503.21227; formulas as the reviews of its ICLR 2026 submission quote them).

    Growth: from the second task on, a temporary group of probe experts in every candidate layer trains on a part of
    the task; layers whose probe experts are used often enough get experts, the others only a router. New experts start
    as a copy of the old expert used most while probing. Gate: a linear router per task over all experts there are; at
    inference an autoencoder per task picks the router (selector ``vae``). No replay.

    A candidate layer is one wrapped linear here, with a router of its own. Where no source was found (marked *open*)
    the default is a choice of this implementation.

    Attributes:
        target_modules: candidate layers; none for the FFN linears (gate, up, down) of the language model (the paper
            puts experts into FFN layers).
        experts: experts that a task adds to a layer (open; the paper calls it a hyperparameter).
        rank: rank of each expert (open); 4 experts of rank 16 make a first bank of rank 64.
        top_k: experts with weight per token (open); 2 as in CL-MoE and BranchLoRA. It must be below the number of
            experts that the probe meets, or every expert is active for every token.
        temperature: of the router's softmax; 1 for a plain linear router.
        load_balance: weight of the load-balance loss, over all experts that the router scores, while a task's own
            group trains; 0, since the source names the loss for the probe alone.
        probe_share: share of the task's samples and of its steps that the probe takes (0.1, the paper's); 0 switches
            probing off: every task adds experts everywhere and none starts as a copy.
        probe_steps: the probe's optimizer steps, none for `probe_share` of the task's.
        probe_experts: probe experts per layer (open), none for as many as `experts`.
        probe_load_balance: weight of the load-balance loss while probing (open), 0.01 as in Switch Transformer.
        measure: samples on which the activation frequency is counted (open): ``held``, a part of the probe's samples
            that it did not train on, or ``same``, those that it trained on.
        held_share: share of the probe's samples held out for ``held``.
        alpha: a layer gets experts where f > mean(f) - alpha * std(f) (Eq. 2; value open). 0.5 keeps about two thirds
            of normally spread layers, 1 about 84 %, 0 half.
        added: experts of a layer that gets some: ``fixed``, always `experts` (the paper's section 4.3), or
            ``counted``, as many as it has probe experts above the threshold (its section on expansion).
        locator_hidden: width of the autoencoder's hidden layers (open); 128, that of D-MoLE's autoencoder.
        locator_latent: size of its code (open).
        locator_kl: weight of its divergence term (open); 1, the evidence lower bound itself.
        locator_epochs: its passes over the features (open).
        locator_lr: its learning rate, Adam (open).
        locator_batch: features per step (open).
        locator_samples: training samples, drawn at random, that it is fitted to; none for all.
        locator_report: validation samples per task seen on which its accuracy is reported after every task; 0 for
            no report.
    """

    name: ClassVar[str] = "cmoe"
    summary: ClassVar[str] = "experts where a probe finds them needed, one router per task, picked by an autoencoder"

    experts: Size = 4
    rank: Size = 16
    top_k: Size = 2
    temperature: Positive = 1.0
    load_balance: Weight = 0.0
    probe_share: Share = 0.1
    probe_steps: Size | None = None
    probe_experts: Size | None = None
    probe_load_balance: Weight = 0.01
    measure: Literal["held", "same"] = "held"
    held_share: ProperShare = 0.2
    alpha: float = 0.5
    added: Literal["fixed", "counted"] = "fixed"
    locator_hidden: Size = 128
    locator_latent: Size = 32
    locator_kl: Weight = 1.0
    locator_epochs: Size = 100
    locator_lr: Positive = 1e-3
    locator_batch: Size = 64
    locator_samples: Annotated[int, Range(2)] | None = 256
    locator_report: Count = 32

    # growth
    def config(self, stage: Stage) -> DyMoEConfig:
        """The task's group: `experts` in every layer, or what the stage's decision says."""
        return self._config(self.experts, self.lora_alpha, self.load_balance, self._pattern(stage))

    def _config(self, experts: int, lora_alpha: float, load_balance: float, pattern: dict[str, int]) -> DyMoEConfig:

        return self.group_config(
            experts,
            self.rank,
            lora_alpha=lora_alpha,
            top_k=self.top_k,
            temperature=self.temperature,
            gate="linear",
            load_balance=load_balance,
            balance_over="all",
            expert_pattern=pattern,
            selector="vae",
            selector_options={"hidden": self.locator_hidden, "latent": self.locator_latent},
            target_modules=FFN if self.target_modules is None else self.target_modules,
        )

    def _pattern(self, stage: Stage) -> dict[str, int]:
        """Experts of the layers that get another number than `experts`."""
        layers = _decision(stage).get("layers", {})
        return {name: row["added"] for name, row in layers.items() if row["added"] != self.experts}

    def probe(self, stage: Stage, data: StageData) -> Probe | None:
        """Probe experts in every candidate layer, at the scale of the experts to come; none at the first task."""
        if stage.index == 1 or self.probe_share == 0:
            return None
        experts = self.probe_experts or self.experts
        config = self._config(experts, self.lora_alpha * experts / self.experts, self.probe_load_balance, {})
        steps = self.probe_steps or max(1, round(self.probe_share * data.steps))
        return Probe(config, self._probe_samples(stage)[0], steps)

    def _probe_samples(self, stage: Stage) -> tuple[Sequence[Sample], Sequence[Sample]]:
        """What the probe trains on and what it is measured on; the task's own samples, whatever is replayed."""
        samples = self.training_samples(stage)
        count = min(len(samples), max(2, round(self.probe_share * len(samples))))
        chosen = draw(samples, count, stage.seed, ordered=False)
        if self.measure == "same" or count < 2:
            return chosen, chosen
        size = min(count - 1, max(1, round(self.held_share * count)))
        return chosen[size:], chosen[:size]

    def probed(self, model: Any, group: str, stage: Stage, data: StageData) -> None:
        """Count how often the probe's experts and the old ones are used, decide, write the decision."""
        from dymoe.adapter.observation import observe
        from dymoe.files import atomic_json

        activations = Activations()
        observe(model, data.batches(self._probe_samples(stage)[1]), activations, autocast=data.autocast)
        atomic_json(stage.memory / DECISION, self.decide(activations.frequencies(), group))

    def decide(self, frequencies: Mapping[str, Mapping[str, Sequence[float]]], group: str) -> dict[str, Any]:
        """Which layers get how many experts, and which old expert each copies.

        Args:
            frequencies: by layer and group, how often each expert was used, in [0, 1].
            group: the probe.

        Returns:
            ``mean``, ``std`` (population) and ``threshold`` of f, the layers ``expanded``, and by layer its ``f`` (mean
            over its probe experts), each probe expert's frequency ``experts``, how many are ``added`` and what they
            ``copy``: group, number and frequency of the old expert used most, None where there is none.
        """
        f = {name: mean(groups[group]) for name, groups in frequencies.items()}
        center, spread = mean(f.values()), pstdev(f.values())
        threshold = center - self.alpha * spread
        layers: dict[str, Any] = {}
        for name, groups in frequencies.items():
            above = sum(value > threshold for value in groups[group])
            added = (self.experts if f[name] > threshold else 0) if self.added == "fixed" else above
            layers[name] = {
                "f": f[name],
                "experts": list(groups[group]),
                "added": added,
                "copy": _most_used(groups, group),
            }
        expanded = [name for name, row in layers.items() if row["added"]]
        return {"mean": center, "std": spread, "threshold": threshold, "expanded": expanded, "layers": layers}

    # loss terms
    def before_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Start the new experts as copies of the old one that the decision names for their layer."""
        decided = _decision(stage).get("layers", {})
        group = self.group(stage)
        for layer in model.base_model.layers():
            source = decided.get(layer.name, {}).get("copy")
            if source is not None and layer.experts_of(group):
                copy_expert(layer, source["group"], source["expert"], group)

    def after_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Fit the group's task locator to the task's own prompts, then report."""
        from dymoe.adapter.observation import prompt_features
        from dymoe.adapter.selectors.vae import VaeSelector

        selector = model.base_model.selector
        add_report(stage, growth=self._growth(model, stage))
        if isinstance(selector, VaeSelector):  # a plugin may have put another in its place
            samples = self.training_samples(stage)
            if self.locator_samples is not None and self.locator_samples < len(samples):
                samples = draw(samples, self.locator_samples, stage.seed, ordered=False)
            selector.fit(
                self.group(stage),
                prompt_features(model, data.batches(samples), data.autocast),
                self.locator_kl,
                self.locator_epochs,
                self.locator_lr,
                self.locator_batch,
                stage.seed,
            )
            report_locator(stage, self._chosen(model, selector, (*stage.earlier_tasks, *stage.tasks), data))

    def _growth(self, model: Any, stage: Stage) -> dict[str, Any]:
        """Layers that got experts and parameters added, beside those that expanding every layer now would add."""
        group = self.group(stage)
        layers = model.base_model.layers()
        added = everywhere = 0
        for layer in layers:
            tensors = [
                getattr(layer, kind)[group] for kind in layer.adapter_layer_names if group in getattr(layer, kind)
            ]
            added += sum(tensor.numel() for tensor in tensors)
            older = sum(layer.experts_of(name) for name in layer.group_configs if name != group)
            everywhere += self.experts * self.rank * (layer.in_features + layer.out_features)
            everywhere += (older + self.experts) * layer.in_features
        expanded = [layer.name for layer in layers if layer.experts_of(group)]
        counts = {"candidates": len(layers), "parameters": added, "parameters_everywhere": everywhere}
        return {"expanded": expanded, **counts}

    def _chosen(self, model: Any, selector: Any, tasks: Sequence[Task], data: StageData) -> dict[str, list[str]]:
        """Of every task seen: whose router the locator picks for each of its validation prompts."""
        from dymoe.adapter.observation import prompt_features

        groups = list(selector.active_adapters)
        chosen = {}
        for task in tasks:
            samples = list(task.validation[: self.locator_report])
            if samples and task.name in groups:
                features = prompt_features(model, data.batches(samples), data.autocast)
                chosen[task.name] = [groups[position] for position in selector.locate(features, groups).tolist()]
        return chosen


class Activations:
    """An observer of the routing trace: how often every expert of every layer has weight, over unpadded tokens."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._groups: dict[str, list[tuple[str, int]]] = {}

    def __call__(self, routing: LayerRouting) -> None:
        """Count one layer's routing of one forward pass."""
        used = routing.weights > 0
        tokens = used[..., 0].numel()
        if routing.mask is not None:
            used = used & routing.mask.unsqueeze(-1)
            tokens = int(routing.mask.sum())
        counts = used.reshape(-1, used.shape[-1]).sum(0).cpu()
        name = routing.layer
        self._counts[name] = self._counts[name] + counts if name in self._counts else counts
        self._tokens[name] = self._tokens.get(name, 0) + tokens
        self._groups[name] = list(zip(routing.groups, routing.sizes, strict=True))

    def frequencies(self) -> dict[str, dict[str, list[float]]]:
        """By layer and group: the share of tokens that used each expert, in [0, 1]."""
        by_layer: dict[str, dict[str, list[float]]] = {}
        for name, counts in self._counts.items():
            shares = iter((counts.double() / max(self._tokens[name], 1)).tolist())
            by_layer[name] = {group: [next(shares) for _ in range(size)] for group, size in self._groups[name]}
        return by_layer


def copy_expert(layer: DyMoELayer, group: str, expert: int, into: str) -> None:
    """Make every expert of the group `into` compute what one expert of `group` computes, group scales included.

    Raises:
        DymoeError: the two groups' experts have different ranks.
    """
    import torch

    old, new = layer.group_configs[group], layer.group_configs[into]
    if old.r != new.r:
        raise DymoeError(f"{layer.name}: experts of rank {new.r} cannot start as a copy of one of rank {old.r}")
    with torch.no_grad():
        layer.dymoe_A[into].copy_(layer.dymoe_A[group][expert])
        layer.dymoe_B[into].copy_(layer.dymoe_B[group][expert] * (old.scaling / new.scaling))


def _most_used(groups: Mapping[str, Sequence[float]], probe: str) -> dict[str, Any] | None:
    """The old expert with the largest frequency, the first of equals."""
    old = [(value, name, number) for name, row in groups.items() if name != probe for number, value in enumerate(row)]
    if not old:
        return None
    value, name, number = max(old, key=lambda entry: entry[0])
    return {"group": name, "expert": number, "frequency": value}


def _decision(stage: Stage) -> dict[str, Any]:
    """What probing decided, empty where nothing was probed."""
    from dymoe.files import read_json

    file = stage.memory / DECISION
    return read_json(file) if file.is_file() else {}
