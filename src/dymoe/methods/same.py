"""`same`: a shared bank whose router and experts change little where earlier tasks had their inputs (SAME)."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dymoe.errors import DymoeError
from dymoe.files import atomic_dir
from dymoe.methods.base import Stage, StageData, require
from dymoe.methods.moelora import GROUP, MoELoRA

if TYPE_CHECKING:
    from torch import Tensor

    from dymoe.adapter.layer import DyMoELayer
    from dymoe.adapter.trace import LayerRouting, RoutingTrace

FOLDER = "same"
FILE = "inputs.safetensors"


@dataclass
class SAME(MoELoRA):
    """SAME (arXiv 2602.01990, ICML 2026): `moelora` with gradients shaped by the inputs of earlier tasks.

    Growth and gate: those of `moelora`. Loss terms: none. Before each optimizer step, with C the uncentred covariance
    E[x x^T] of the layer's inputs over the earlier tasks and U its leading eigenvectors:

    - router rows: g <- g - (g U) U^T (or what `router` says),
    - experts' A: g <- g (C + mu I)^-1; B has no input of its own and stays as it is,
    - with `freeze`: no gradient for experts that matter to earlier tasks more than to this one.

    What is known comes from summaries and reviews of the paper and from the settings of its toolbox (Prism); the paper
    and its code were not at hand. They leave open or contradict each other in what the attributes say. The first task
    trains as `moelora` does. The gradients were clipped before they are shaped.

    Attributes:
        rank: rank of each expert (8, the paper's).
        lora_alpha: 128, for the scale 2 of 8 experts of rank 8 (not stated in what is known of the paper).
        router: what happens to a router gradient inside the span of U. ``project`` removes it: the paper's aim, that
            no score of an earlier input changes. ``hold`` also undoes what the optimizer's step moved inside the
            span: AdamW divides each coordinate by its own size and so leaves the complement even when every gradient
            lies in it. ``scale`` keeps the part inside, times g_i: the paper's update is reported to be the sum of
            both parts, where g is only described (inverse of a running mean of the eigenvalues); here
            g_i = (smallest running mean) / (running mean i), in (0, 1]. ``free`` changes nothing.
        energy: U holds this share of the covariance's energy (0.9, the toolbox's).
        energy_of: what energy sums: ``squares`` of the eigenvalues (the formula reported of the paper) or the
            eigenvalues themselves, ``trace`` (the usual explained variance; holds more directions).
        components: at most this many directions in U; none for no bound (the toolbox has 64).
        window: eigenvalues in the running mean of ``scale`` (3, the toolbox's).
        curvature: whether the experts' gradients are preconditioned.
        mu: damping of the inverse, in units of the squared inputs (0.9, the toolbox's).
        truncate: take the eigenvalues outside U as 0 in the inverse, as the paper does to store only U; the whole
            covariance is at hand here, so the default uses all of it.
        keep_norm: rescale the preconditioned gradient of each expert to the norm it had. The paper has no such step.
            Without it the layers' gradients would be multiplied by factors between 1 / (C + mu) and 1 / mu after
            clipping, so neither the clipping norm nor AdamW's epsilon would mean what they do in other methods.
        freeze: whether experts are frozen for a task (off: the score is known, but not when it is taken, and with the
            toolbox's threshold a task that uses the experts as the earlier ones did would freeze nearly all).
        freeze_below: an expert is frozen where its score is below this (0.1, the toolbox's). Score = U - F, both
            scaled to [0, 1] over the layer's experts; U is the expert's mean routing weight on the new task before it
            trains, F its mean of weight x |x|^2 on the earlier tasks. The best expert of a layer always trains.
        decay: share that earlier tasks keep when a task's covariance joins them; none weighs every token of every task
            alike, C <- (n_old C_old + n C_task) / (n_old + n), as the paper is reported to do.
        samples: at most this many samples of a task, drawn by the stage's seed, give its covariance; none for all.
    """

    name: ClassVar[str] = "same"
    summary: ClassVar[str] = "moelora with gradients kept away from the inputs of earlier tasks"

    rank: int = 8
    lora_alpha: float = 128.0
    router: Literal["project", "hold", "scale", "free"] = "project"
    energy: float = 0.9
    energy_of: Literal["squares", "trace"] = "squares"
    components: int | None = None
    window: int = 3
    curvature: bool = True
    mu: float = 0.9
    truncate: bool = False
    keep_norm: bool = True
    freeze: bool = False
    freeze_below: float = 0.1
    decay: float | None = None
    samples: int | None = 128

    def __post_init__(self) -> None:
        """Refuse settings out of range; the guards of a stage are made in `before_task`."""
        super().__post_init__()
        require(0 < self.energy <= 1, "energy", "a share in (0, 1]", self.energy)
        require(self.components is None or self.components >= 1, "components", "1 or more", self.components)
        require(self.window >= 1 and self.window % 2 == 1, "window", "an odd number of at least 1", self.window)
        require(self.mu > 0, "mu", "a number above 0", self.mu)
        require(-1 <= self.freeze_below <= 1, "freeze_below", "a number in [-1, 1]", self.freeze_below)
        require(self.decay is None or 0 <= self.decay < 1, "decay", "a share in [0, 1)", self.decay)
        require(self.samples is None or self.samples >= 1, "samples", "1 or more", self.samples)
        self._guards: dict[str, Guard] = {}
        self._start: dict[str, Tensor] = {}
        self._frozen: dict[str, Tensor] = {}

    def before_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Decompose the earlier inputs' covariance of every layer; from the second task on.

        Raises:
            DymoeError: what the stage before kept is missing, broken or of other layers or experts.
        """
        self._guards, self._start, self._frozen = {}, {}, {}
        if not stage.earlier:
            return
        known = InputStatistics.load(stage.earlier[-1] / FOLDER / FILE)
        made: dict[str, Guard] = {}
        for layer in _layers(model, GROUP):
            source = known.source_of(layer.name)
            if source not in made:
                covariance = known.covariances[source].to(layer.dymoe_A[GROUP].device)
                made[source] = self._guard(covariance)
            self._guards[layer.name] = made[source]
            if self.router == "hold":
                self._start[layer.name] = layer.dymoe_router[GROUP].detach().clone()
        if self.freeze:
            now = InputStatistics()
            with now.observing(model, GROUP, covariance=False):
                self._ask(model, data, stage.seed)
            for name, used in now.used.items():
                importance = known.importance[name].to(used.device)
                if importance.shape != used.shape:
                    raise DymoeError(
                        f"same: freeze: layer {name!r} has {len(used)} experts, {len(importance)} were measured; it "
                        "does not go with pruning"
                    )
                self._frozen[name] = frozen_experts(used, importance, self.freeze_below)

    def _guard(self, covariance: Tensor) -> Guard:
        """The decomposition of one covariance, as far as the settings need it."""
        values, vectors = decompose(covariance)
        kept = leading(values, self.energy, self.energy_of, self.components)
        scale = running_scale(values[:kept], self.window) if self.router == "scale" else None
        inverse = None
        if self.curvature:
            inverse = damped_inverse(values, vectors, self.mu, kept if self.truncate else None)
        return Guard(vectors[:, :kept].contiguous(), scale, inverse)

    def before_step(self, model: Any) -> None:
        """Shape the gradients of router rows and experts."""
        for layer in _layers(model, GROUP) if self._guards else []:
            guard = self._guards[layer.name]
            rows, a, b = layer.dymoe_router[GROUP], layer.dymoe_A[GROUP], layer.dymoe_B[GROUP]
            if rows.grad is not None and self.router != "free":
                rows.grad.copy_(outside(rows.grad, guard.basis, guard.scale))
            if a.grad is not None and guard.inverse is not None:
                a.grad.copy_(preconditioned(a.grad, guard.inverse, self.keep_norm))
            if layer.name in self._frozen:
                for gradient in (a.grad, b.grad):
                    if gradient is not None:
                        gradient[self._frozen[layer.name]] = 0
        self._hold(model)

    def _hold(self, model: Any) -> None:
        """Put the router rows back, inside the span, to where the task found them."""
        for layer in _layers(model, GROUP) if self._start else []:
            rows, start = layer.dymoe_router[GROUP].data, self._start[layer.name]
            rows.copy_(start + outside(rows - start, self._guards[layer.name].basis))

    def after_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Measure the task's inputs with the trained model, join them to the earlier ones and keep the result."""
        self._hold(model)
        self._guards, self._start, self._frozen = {}, {}, {}
        found = InputStatistics()
        with found.observing(model, GROUP, importance=self.freeze):
            self._ask(model, data, stage.seed)
        if stage.earlier:
            found = InputStatistics.load(stage.earlier[-1] / FOLDER / FILE).joined(found, self.decay)
        found.save(stage.memory / FOLDER)
        # What the stage before left is still needed if this one is repeated; what lies further back is not.
        for folder in stage.earlier[:-1]:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)

    def _ask(self, model: Any, data: StageData, seed: int) -> None:
        """Pass (at most `samples`) samples through the model, in evaluation mode, for observers to see."""
        import torch

        chosen: Sequence[Any] = data.samples
        if self.samples is not None and self.samples < len(chosen):
            order = random.Random(seed).sample(range(len(chosen)), self.samples)
            chosen = [chosen[number] for number in sorted(order)]
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                for batch in data.batches(chosen):
                    data.loss(model, batch)
        finally:
            model.train(training)


@dataclass(frozen=True)
class Guard:
    """What shapes one layer's gradients.

    Attributes:
        basis: U, (features, kept), orthonormal columns.
        scale: factors (kept,) on the part inside the span, None for 0.
        inverse: (C + mu I)^-1, (features, features), or None.
    """

    basis: Tensor
    scale: Tensor | None
    inverse: Tensor | None


def decompose(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (features,), largest first and at least 0, and eigenvectors (features, features) in columns.

    Args:
        covariance: (features, features), symmetric, float32 or float64.
    """
    import torch

    values, vectors = torch.linalg.eigh(covariance)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def leading(values: Tensor, energy: float, energy_of: str, components: int | None = None) -> int:
    """How many eigenvalues, largest first, hold the share `energy` of all; 0 where all are 0.

    Args:
        values: eigenvalues, descending, at least 0.
        energy: share in (0, 1].
        energy_of: "squares" or "trace".
        components: upper bound of the result.
    """
    weights = values.double().square() if energy_of == "squares" else values.double()
    sums = weights.cumsum(0)
    total = float(sums[-1])
    # A hair less than the share, since the sum of all may fall short of the total by rounding.
    kept = int((sums < energy * total * (1 - 1e-9)).sum()) + 1 if total > 0 else 0
    kept = min(kept, int((values > 0).sum()))
    return kept if components is None else min(kept, components)


def running_scale(values: Tensor, window: int) -> Tensor:
    """g_i = m_k / m_i with m the centred running mean of the eigenvalues (shorter at both ends): (kept,), in (0, 1].

    Args:
        values: kept eigenvalues, descending, above 0.
        window: odd length of the running mean.
    """
    import torch

    half = window // 2
    means = [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
    return means[-1] / torch.stack(means) if means else values


def outside(gradient: Tensor, basis: Tensor, scale: Tensor | None = None) -> Tensor:
    """The gradient (rows, features) without its part in the span of `basis`, or with `scale` times that part."""
    inside = gradient @ basis
    return gradient - (inside if scale is None else inside * (1 - scale)) @ basis.mT


def damped_inverse(values: Tensor, vectors: Tensor, mu: float, kept: int | None = None) -> Tensor:
    """(C + mu I)^-1, with C's eigenvalues after the first `kept` taken as 0.

    That is V_k (S_k + mu I)^-1 V_k^T + (I - V_k V_k^T) / mu.
    """
    used = values.clone()
    if kept is not None:
        used[kept:] = 0
    return (vectors / (used + mu)) @ vectors.mT


def preconditioned(gradient: Tensor, inverse: Tensor, keep_norm: bool) -> Tensor:
    """Each expert's gradient times the inverse, (experts, rank, features), at its own norm if `keep_norm`."""
    shaped = gradient @ inverse
    if not keep_norm:
        return shaped
    before, after = (part.flatten(1).norm(dim=1) for part in (gradient, shaped))
    factor = before / after.clamp(min=1e-30)
    return shaped * factor.view(-1, 1, 1)


def frozen_experts(used: Tensor, importance: Tensor, below: float) -> Tensor:
    """Which experts of a layer are frozen: score under `below`, except the best one; (experts,), bool.

    Args:
        used: mean routing weights on the new task, (experts,).
        importance: mean of weight x squared input length on earlier tasks, (experts,).
        below: threshold.
    """

    def scaled(values: Tensor) -> Tensor:
        values = values.double()
        return (values - values.min()) / (values.max() - values.min()).clamp(min=1e-30)

    score = scaled(used) - scaled(importance)
    frozen = score < below
    frozen[int(score.argmax())] = False
    return frozen


class InputStatistics:
    """Uncentred covariances of the layers' inputs and what each expert had to do with them, in one pass.

    Layers that are given one and the same tensor (q, k, v; gate, up) share a covariance. Memory: one (features,
    features) float32 matrix per distinct input, whatever the number of tokens.

    Attributes:
        covariances: name of a layer -> mean of x x^T over the tokens seen, (features, features), float32.
        sources: name of a layer -> name of the layer whose covariance is its own.
        tokens: how many tokens were seen (with `decay`, what they count).
        used: name of a layer -> mean routing weight of every expert, (experts,), float64.
        importance: name of a layer -> mean of weight x |x|^2 for every expert, (experts,), float64.
    """

    def __init__(self) -> None:
        self.covariances: dict[str, Tensor] = {}
        self.sources: dict[str, str] = {}
        self.tokens = 0
        self.used: dict[str, Tensor] = {}
        self.importance: dict[str, Tensor] = {}

    def source_of(self, layer: str) -> str:
        """Name of the layer that holds this layer's covariance.

        Raises:
            DymoeError: the layer was not measured.
        """
        if layer not in self.sources:
            raise DymoeError(f"same: the inputs of layer {layer!r} were not measured after the earlier tasks")
        return self.sources[layer]

    @contextmanager
    def observing(
        self, model: Any, group: str, covariance: bool = True, importance: bool = True
    ) -> Iterator[InputStatistics]:
        """Take in every token that is not padding of the model's forward passes while the block runs.

        Args:
            model: the PEFT model.
            group: only layers that hold this group's experts are observed.
            covariance: whether covariances are wanted.
            importance: whether `used` and `importance` are wanted (one more look at every layer's routing).
        """
        trace = model.base_model.trace
        layers = _layers(model, group)
        watch = _Watch(self, trace, covariance)
        handles = [layer.register_forward_pre_hook(watch.see_input) for layer in layers]
        if importance:
            trace.observers.append(watch.see_routing)
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            if importance:
                trace.observers.remove(watch.see_routing)
            watch.finish()

    def joined(self, new: InputStatistics, decay: float | None) -> InputStatistics:
        """These statistics with those of a further task; weighed by tokens, or `decay` to 1 - `decay`."""
        total = self.tokens + new.tokens
        share = decay if decay is not None else self.tokens / max(total, 1)
        result = InputStatistics()
        result.tokens, result.sources = total, dict(new.sources)
        for mine, theirs, both in (
            (self.covariances, new.covariances, result.covariances),
            (self.used, new.used, result.used),
            (self.importance, new.importance, result.importance),
        ):
            for name, value in theirs.items():
                both[name] = share * mine[name].to(value) + (1 - share) * value
        return result

    def save(self, folder: Path) -> None:
        """Write everything into `folder`, atomically; of each covariance the upper triangle, row by row.

        Raises:
            DymoeError: the folder cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        triangles = {name: _triangle(value) for name, value in self.covariances.items()}
        parts = {"covariance": triangles, "used": self.used, "importance": self.importance}
        tensors = {
            f"{kind}:{name}": value.detach().cpu().contiguous()
            for kind, values in parts.items()
            for name, value in values.items()
        }
        about = {"tokens": str(self.tokens), "sources": json.dumps(self.sources)}
        with atomic_dir(folder) as temporary:
            try:
                save_file(tensors, temporary / FILE, metadata=about)
            except (OSError, SafetensorError) as error:
                raise DymoeError(f"{folder}: cannot be written ({error})") from error

    @classmethod
    def load(cls, path: Path) -> InputStatistics:
        """Read what `save` wrote.

        Raises:
            DymoeError: the file is missing or broken.
        """
        from safetensors import SafetensorError, safe_open

        found = cls()
        try:
            with safe_open(path, framework="pt") as file:
                about: Mapping[str, str] = file.metadata() or {}
                found.tokens = int(about["tokens"])
                found.sources = json.loads(about["sources"])
                kinds = {"covariance": found.covariances, "used": found.used, "importance": found.importance}
                for key in file.keys():  # noqa: SIM118 - not a dictionary
                    kind, name = key.split(":", 1)
                    kinds[kind][name] = file.get_tensor(key)
            found.covariances = {name: _symmetric(value) for name, value in found.covariances.items()}
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise DymoeError(f"{path}: the earlier tasks' inputs cannot be read ({error})") from error
        return found


class _Watch:
    """The hooks of `InputStatistics.observing`."""

    def __init__(self, statistics: InputStatistics, trace: RoutingTrace, covariance: bool) -> None:
        self.statistics = statistics
        self.trace = trace
        self.covariance = covariance
        self.counts: dict[str, int] = {}
        self.last: tuple[str, Any] = ("", None)
        self.lengths: Tensor | None = None
        self.sums: dict[str, Tensor] = {}

    def see_input(self, layer: DyMoELayer, arguments: tuple[Any, ...]) -> None:
        x: Tensor = arguments[0].detach()
        mask = self.trace.mask_for(x.shape[:-1])
        flat = (x.flatten(0, -2) if mask is None else x[mask]).float()
        self.lengths = flat.square().sum(-1)
        self.counts[layer.name] = self.counts.get(layer.name, 0) + flat.shape[0]
        sources = self.statistics.sources
        # The tensor is compared and not its values: q, k and v are handed the same one, one after the other.
        same = self.last[0] if arguments[0] is self.last[1] else layer.name
        if sources.setdefault(layer.name, same) != same:
            raise DymoeError(
                f"same: layer {layer.name!r} shared its input with {sources[layer.name]!r} before, not now"
            )
        if same != layer.name:
            return
        self.last = (layer.name, arguments[0])
        if self.covariance:
            import torch

            with torch.autocast(x.device.type, enabled=False):
                product = flat.mT @ flat
            held = self.statistics.covariances
            held[layer.name] = product if layer.name not in held else held[layer.name].add_(product)

    def see_routing(self, routing: LayerRouting) -> None:
        if routing.layer not in self.counts or self.lengths is None:
            return
        weights = routing.weights
        flat = (weights.flatten(0, -2) if routing.mask is None else weights[routing.mask]).double()
        lengths = self.lengths.double()
        statistics = self.statistics
        for held, value in ((statistics.used, flat.sum(0)), (statistics.importance, lengths @ flat)):
            held[routing.layer] = held.get(routing.layer, 0) + value

    def finish(self) -> None:
        """Turn the sums into means."""
        statistics = self.statistics
        statistics.tokens = max(self.counts.values(), default=0)
        for held in (statistics.covariances, statistics.used, statistics.importance):
            for name in held:
                held[name] = held[name] / max(self.counts[name], 1)


def _triangle(matrix: Tensor) -> Tensor:
    """The upper triangle of a square matrix, row by row: (n (n + 1) / 2,)."""
    import torch

    rows, columns = torch.triu_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns]


def _symmetric(triangle: Tensor) -> Tensor:
    """The symmetric matrix of which `_triangle` took the upper triangle."""
    import torch

    size = int(((8 * len(triangle) + 1) ** 0.5 - 1) / 2 + 0.5)
    rows, columns = torch.triu_indices(size, size)
    matrix = triangle.new_empty(size, size)
    matrix[rows, columns] = triangle
    matrix[columns, rows] = triangle
    return matrix


def _layers(model: Any, group: str) -> list[DyMoELayer]:
    """The wrapped layers that hold experts of the group."""
    return [layer for layer in model.base_model.layers() if group in layer.dymoe_A]
