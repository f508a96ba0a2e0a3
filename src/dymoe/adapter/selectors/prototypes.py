"""`prototypes`: the task whose prompts look most like this one, by linear discriminant analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dymoe.adapter.selection import Prompt, Selector

EXACT, EARLIER = "own", "earlier"


class Prototypes(Selector):
    """Nearest class mean by Mahalanobis distance with one covariance for all classes; a class is a task of a group.

    d(x, c)^2 = (x - mu_c)^T S^-1 (x - mu_c) on `Prompt.features()`, with
    S = (1 - shrinkage) P + shrinkage diag(P), P = sum_c scatter_c / (n - classes), the pooled covariance of the active
    groups. All classes count alike. A group keeps the means (tasks, width), the sum of its classes' scatter matrices
    (width, width) and the samples per class (tasks,), float32; they never train and are fitted by `fit`.

    `reach` "own" selects the group of the nearest class alone, "earlier" it and all groups before it. Nothing is
    selected while a group trains and where there is a single active group; groups without statistics are never chosen.

    Its config's `selector_options`: ``tasks`` (names of the classes, in order), ``shrinkage`` and ``reach``.
    """

    name: ClassVar[str] = "prototypes"
    while_training: ClassVar[bool] = False
    adapter_layer_names = ("dymoe_means", "dymoe_scatter", "dymoe_counts")
    other_param_names = ("tasks",)

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.dymoe_means = nn.ParameterDict()
        self.dymoe_scatter = nn.ParameterDict()
        self.dymoe_counts = nn.ParameterDict()
        self.tasks: dict[str, list[str]] = {}
        self.shrinkage = 0.1
        self.reach = EXACT
        self._rules: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    # ---- statistics ---------------------------------------------------------------------------------------------

    def add_group(self, group: str, options: Mapping[str, Any]) -> None:
        """Make room for the statistics that `options` names; a new group has none before its task was learned."""
        self.shrinkage = float(options.get("shrinkage", self.shrinkage))
        self.reach = str(options.get("reach", self.reach))
        self.tasks[group] = list(options.get("tasks", ()))
        classes = len(self.tasks[group])
        if classes:
            sizes = (classes, self.width), (self.width, self.width), (classes,)
            self._store(group, *(torch.zeros(size) for size in sizes))

    def fit(self, group: str, task: str, features: Tensor) -> None:
        """Add a class to the group.

        Args:
            group: the group that learned the task.
            task: the class's name.
            features: of its prompts, (samples, width).
        """
        features = features.detach().double()
        mean = features.mean(0)
        scatter = (features - mean).T @ (features - mean)
        means, count = mean[None], torch.tensor([float(len(features))])
        if group in self.dymoe_means:
            means = torch.cat([self.dymoe_means[group].to(means), means])
            scatter = self.dymoe_scatter[group].to(scatter) + scatter
            count = torch.cat([self.dymoe_counts[group].to(count), count])
        self._store(group, means, scatter, count)
        self.tasks.setdefault(group, []).append(task)

    def _store(self, group: str, *values: Tensor) -> None:
        for attribute, value in zip(self.adapter_layer_names, values, strict=True):
            parameters = getattr(self, attribute)
            parameters[group] = nn.Parameter(value.to(self._device(), torch.float32), requires_grad=False)
        self._rules.clear()

    def _device(self) -> torch.device | None:
        return next((parameter.device for parameter in self.parameters()), self._home)

    _home: torch.device | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> Prototypes:
        # A selector without statistics holds no tensor that would tell where it lives.
        self._home = fn(torch.zeros(())).device
        self._rules.clear()
        super()._apply(fn, recurse)
        return self

    def _apply_requires_grad(self, allowed: bool) -> None:
        """Statistics are fitted, never trained."""

    # ---- decision -----------------------------------------------------------------------------------------------

    def classes(self, groups: Sequence[str]) -> list[tuple[str, str]]:
        """(group, task) of every class of these groups, in the order of `nearest`."""
        return [(group, task) for group in groups for task in self.tasks.get(group, ())]

    def nearest(self, features: Tensor, groups: Sequence[str]) -> Tensor:
        """Place in `classes(groups)` of each sample's nearest class: features (samples, width) to int64 (samples,).

        Raises:
            ValueError: these groups have no statistics.
        """
        fitted = [group for group in groups if self.tasks.get(group)]
        if not fitted:
            raise ValueError("no group has prototypes yet")
        weights, bias = self._rule(fitted)
        with torch.autocast(features.device.type, enabled=False):
            return (features.double() @ weights + bias).argmax(1)

    def _rule(self, groups: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The distance without its part common to all classes: x^T S^-1 mu - mu^T S^-1 mu / 2, float64."""
        parameters = [getattr(self, attribute)[group] for group in groups for attribute in self.adapter_layer_names]
        key = (self.shrinkage, *groups, *(parameter._version for parameter in parameters))
        if key not in self._rules:
            with torch.no_grad(), torch.autocast(parameters[0].device.type, enabled=False):
                means = torch.cat([self.dymoe_means[group] for group in groups]).double()
                scatter = torch.stack([self.dymoe_scatter[group].double() for group in groups]).sum(0)
                free = sum(float(self.dymoe_counts[group].sum()) for group in groups) - len(means)
                factor = torch.linalg.cholesky(shrunk(scatter / max(free, 1.0), self.shrinkage))
                weights = torch.cholesky_solve(means.T, factor)
                self._rules = {key: (weights, -0.5 * (means * weights.T).sum(1))}
        return self._rules[key]

    def select(self, prompt: Prompt, groups: Sequence[str]) -> Tensor | None:
        """One-hot (or, with reach "earlier", a run of ones), (samples, groups), float32."""
        classes = self.classes(groups)
        if self.training_group is not None or len(groups) < 2 or not classes:
            return None
        chosen = self.nearest(prompt.features(), groups)
        owners = torch.tensor([groups.index(group) for group, _ in classes], device=chosen.device)[chosen]
        columns = torch.arange(len(groups), device=chosen.device)
        mask = columns <= owners[:, None] if self.reach == EARLIER else columns == owners[:, None]
        return mask.float()


def shrunk(covariance: Tensor, shrinkage: float) -> Tensor:
    """(1 - shrinkage) C + shrinkage diag(C), with variances of at least a millionth of their mean in the diagonal.

    Args:
        covariance: (width, width).
        shrinkage: in (0, 1].
    """
    variances = covariance.diagonal()
    mean = float(variances.mean())
    target = variances.clamp(min=1e-6 * mean if mean > 0 else 1.0)
    return (1 - shrinkage) * covariance + shrinkage * torch.diag(target)
