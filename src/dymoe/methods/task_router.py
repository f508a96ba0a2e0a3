"""`task-router`: first decide which task a prompt belongs to, then route its tokens within that task's experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dymoe.errors import DymoeError
from dymoe.methods.base import Stage, StageData
from dymoe.methods.parameters import draw, load_tensors, save_tensors, trained_group
from dymoe.methods.plugin import Plugin
from dymoe.methods.reports import report_locator
from dymoe.schema import PositiveShare, Size

if TYPE_CHECKING:
    from torch import Tensor

    from dymoe.adapter import DyMoEConfig

FEATURES = "task-router.safetensors"


@dataclass
class TaskRouter(Plugin):
    """A task-level router before the token-level one (arXiv 2603.27481, supplement B.6 and Table 12).

    The supplement says that the task router decides "which experts are activated for each task" and names no
    construction. Here it is a linear discriminant analysis of the prompts (`adapter.selectors.prototypes`): no task id,
    no gradient, nothing kept of the samples but a mean and a covariance. It decides at inference only; training goes on
    over all groups, since guidance needs both sides.

    Attributes:
        shrinkage: how far the pooled covariance is shrunk towards its diagonal, in (0, 1]; no source.
        reach: ``earlier`` activates the chosen task's group and those before it, which were active when it learned;
            ``own`` that group alone. The supplement does not say which. Guidance keeps ambiguous and old tokens off
            the new experts, so under ``own`` most tokens of a task meet experts that never learned them
            (docs/methods/task-router.md). With a linear gate the chosen group's own router scores the groups before
            it anyway, and both are the same.
        limit: training prompts per task that its statistics are taken from; none for all. No source.
        check: validation prompts per seen task on which the router's accuracy is reported; none for all.
    """

    name: ClassVar[str] = "task-router"
    summary: ClassVar[str] = "decide a prompt's task first, then route within its experts"

    shrinkage: PositiveShare = 0.1
    reach: Literal["own", "earlier"] = "earlier"
    limit: Size | None = 256
    check: Size | None = 64

    def config(self, config: DyMoEConfig, stage: Stage) -> DyMoEConfig:
        """The config with this selector; a locator that is not trained with the experts is replaced.

        Raises:
            DymoeError: the method's own selector is trained with the experts.
        """
        from dymoe.adapter.selectors import SELECTORS

        if config.selector != "none" and SELECTORS[config.selector].while_training:
            raise DymoeError(
                f"with.task-router: this method trains its own selector ({config.selector}) with the experts, which "
                "cannot be replaced; leave task-router out"
            )
        # A mixture of several linear routers is not what any of them was trained for.
        reach = "own" if any(gate.scores_older for gate in config.gates) else self.reach
        options = {"tasks": [], "shrinkage": self.shrinkage, "reach": reach}
        return replace(config, selector="prototypes", selector_options=options)

    def after_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Fit the new tasks' prototypes and report the router's accuracy over all tasks seen."""
        from dymoe.adapter.observation import prompt_features

        selector, group = model.base_model.selector, trained_group(model)
        for task in stage.tasks:
            samples = draw(task.train, self.limit, f"task-router/{task.name}")
            selector.fit(group, task.name, prompt_features(model, data.batches(samples), data.autocast))
        config = model.peft_config[group]
        config.selector_options = {**config.selector_options, "tasks": list(selector.tasks[group])}
        report_locator(stage, self._chosen(model, stage, data))

    def _chosen(self, model: Any, stage: Stage, data: StageData) -> dict[str, list[str]]:
        """Of every task seen that has validation prompts: the task chosen for each of them."""
        from dymoe.adapter.observation import prompt_features

        selector = model.base_model.selector
        group, groups = trained_group(model), list(selector.active_adapters)
        names = [task for _, task in selector.classes(groups)]
        known, fresh = _earlier_features(stage.earlier), {}
        chosen = {}
        for task in (*stage.earlier_tasks, *stage.tasks):
            if not task.validation:
                continue
            if task.name not in known:
                # The features are those of the frozen base, so later stages need not compute them again.
                samples = draw(task.validation, self.check, f"task-router/{task.name}")
                features = prompt_features(model, data.batches(samples), data.autocast)
                known[task.name] = fresh[task.name] = features.cpu()
            nearest = selector.nearest(known[task.name].to(selector.dymoe_means[group].device), groups)
            chosen[task.name] = [names[index] for index in nearest.tolist()]
        if fresh:
            save_tensors(stage.memory / FEATURES, fresh)
        return chosen


def _earlier_features(folders: Sequence[Path]) -> dict[str, Tensor]:
    """Validation features of the tasks seen, as the stages before left them."""
    by_task: dict[str, Tensor] = {}
    for folder in folders:
        if (folder / FEATURES).is_file():
            by_task.update(load_tensors(folder / FEATURES))
    return by_task
