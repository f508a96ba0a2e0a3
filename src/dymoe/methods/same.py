"""`same`: a shared bank whose router and experts change little where earlier tasks had their inputs (SAME)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from dymoe.errors import DymoeError
from dymoe.methods.base import Stage, StageData, require
from dymoe.methods.inputs import FILE, InputStatistics, layers_of
from dymoe.methods.moelora import GROUP, MoELoRA
from dymoe.methods.parameters import draw
from dymoe.methods.shaping import (
    damped_inverse,
    decompose,
    frozen_experts,
    leading,
    outside,
    preconditioned,
    running_scale,
)
from dymoe.schema import LesserShare, Positive, PositiveShare, Range, Size

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "same"


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

    rank: Size = 8
    lora_alpha: Positive = 128.0
    router: Literal["project", "hold", "scale", "free"] = "project"
    energy: PositiveShare = 0.9
    energy_of: Literal["squares", "trace"] = "squares"
    components: Size | None = None
    window: Size = 3
    curvature: bool = True
    mu: Positive = 0.9
    truncate: bool = False
    keep_norm: bool = True
    freeze: bool = False
    freeze_below: Annotated[float, Range(-1, 1)] = 0.1
    decay: LesserShare | None = None
    samples: Size | None = 128

    def __post_init__(self) -> None:
        """Refuse a window without a middle; the guards of a stage are made in `before_task`."""
        super().__post_init__()
        require(self.window % 2 == 1, "window", "an odd number", self.window)
        self._guards: dict[str, Guard] = {}
        self._start: dict[str, Tensor] = {}
        self._frozen: dict[str, Tensor] = {}

    def state_size(self, trainable: int, inputs: Sequence[int]) -> int:
        """Each input's inverse; U is not counted, since its directions are known from the data alone."""
        return sum(width**2 for width in inputs) if self.curvature else 0

    def before_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Decompose the earlier inputs' covariance of every layer; from the second task on.

        Raises:
            DymoeError: what the stage before kept is missing, broken or of other layers or experts.
        """
        self._guards, self._start, self._frozen = {}, {}, {}
        if not stage.earlier:
            return
        known = InputStatistics.load(stage.earlier[-1] / FOLDER / FILE)
        guards: dict[str, Guard] = {}
        for layer in layers_of(model, GROUP):
            source = known.source_of(layer.name)
            if source not in guards:
                covariance = known.covariances[source].to(layer.dymoe_A[GROUP].device)
                guards[source] = self._guard(covariance)
            self._guards[layer.name] = guards[source]
            if self.router == "hold":
                self._start[layer.name] = layer.dymoe_router[GROUP].detach().clone()
        if self.freeze:
            now = InputStatistics()
            with now.observing(model, GROUP, covariance=False):
                self._observe(model, stage, data)
            for name, used in now.used.items():
                importance = known.importance[name].to(used.device)
                if importance.shape != used.shape:
                    raise DymoeError(
                        f"same: freeze: layer {name!r} has {len(used)} experts, {len(importance)} were measured; it "
                        "does not go with pruning"
                    )
                self._frozen[name] = frozen_experts(used, importance, self.freeze_below)

    def _observe(self, model: Any, stage: Stage, data: StageData) -> None:
        """Pass the samples that are measured through the model."""
        from dymoe.adapter.observation import observe

        observe(model, data.batches(draw(data.samples, self.samples, stage.seed)), autocast=data.autocast)

    def _guard(self, covariance: Tensor) -> Guard:
        """The decomposition of one covariance, as far as the settings need it."""
        values, vectors = decompose(covariance)
        rank = leading(values, self.energy, self.energy_of, self.components)
        scale = running_scale(values[:rank], self.window) if self.router == "scale" else None
        inverse = None
        if self.curvature:
            inverse = damped_inverse(values, vectors, self.mu, rank if self.truncate else None)
        return Guard(vectors[:, :rank].contiguous(), scale, inverse)

    def before_step(self, model: Any) -> None:
        """Shape the gradients of router rows and experts."""
        for layer in layers_of(model, GROUP) if self._guards else []:
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
        for layer in layers_of(model, GROUP) if self._start else []:
            rows, start = layer.dymoe_router[GROUP].data, self._start[layer.name]
            rows.copy_(start + outside(rows - start, self._guards[layer.name].basis))

    def after_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Measure the task's inputs with the trained model, join them to the earlier ones and keep the result."""
        self._hold(model)
        self._guards, self._start, self._frozen = {}, {}, {}
        statistics = InputStatistics()
        with statistics.observing(model, GROUP, importance=self.freeze):
            self._observe(model, stage, data)
        if stage.earlier:
            statistics = InputStatistics.load(stage.earlier[-1] / FOLDER / FILE).joined(statistics, self.decay)
        statistics.save(stage.memory / FOLDER)
        # What the stage before left is still needed if this one is repeated; what lies further back is not.
        for folder in stage.earlier[:-1]:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)


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
