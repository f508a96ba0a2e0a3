"""What a plugin is: a change to the choices of whatever method it goes with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from dymoe.methods.base import Method, Probe, Stage, StageData
from dymoe.schema import check_fields

if TYPE_CHECKING:
    from torch import Tensor

    from dymoe.adapter import DyMoEConfig
    from dymoe.tasks import Sample, Task


@dataclass
class Plugin:
    """Base of every plugin: each hook takes what the method (and the plugins before) chose."""

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Refuse settings out of their ranges."""
        check_fields(self)

    def config(self, config: DyMoEConfig, stage: Stage) -> DyMoEConfig:
        """The config of the group that `stage` adds."""
        return config

    def before_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Hook before a stage trains."""

    def loss_terms(self, model: Any, batch: Mapping[str, Any], outputs: Any) -> dict[str, Tensor]:
        """Further terms of the loss."""
        return {}

    def before_step(self, model: Any) -> None:
        """Hook before the optimizer's step."""

    def after_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Hook after a stage has trained, before its group is frozen, saved and evaluated."""

    def training_samples(self, samples: Sequence[Sample], stage: Stage) -> Sequence[Sample]:
        """The samples that `stage` trains on."""
        return samples


class Composed(Method):
    """A method with its plugins; they act after the method, in the order given.

    Args:
        method: the method.
        plugins: at least one.
    """

    def __init__(self, method: Method, plugins: Sequence[Plugin]) -> None:
        self.name = method.name  # type: ignore[misc]  # whatever goes with it, the method is the same
        self.method = method
        self.plugins = tuple(plugins)
        self.parts: tuple[Method | Plugin, ...] = (method, *self.plugins)

    def rounds(self, tasks: Sequence[Task]) -> list[tuple[str, tuple[Task, ...]]]:
        """The method's stages."""
        return self.method.rounds(tasks)

    def group(self, stage: Stage) -> str:
        """The method's group."""
        return self.method.group(stage)

    def state_size(self, trainable: int, inputs: Sequence[int]) -> int:
        """What the method holds."""
        return self.method.state_size(trainable, inputs)

    def brings(self, hook: str) -> bool:
        """Whether the method or a plugin has a hook of its own."""
        overrides = (getattr(type(one), hook) is not getattr(Plugin, hook) for one in self.plugins)
        return self.method.brings(hook) or any(overrides)

    def config(self, stage: Stage) -> DyMoEConfig:
        """The method's config as the plugins change it."""
        return self._changed(self.method.config(stage), stage)

    def _changed(self, config: DyMoEConfig, stage: Stage) -> DyMoEConfig:
        for plugin in self.plugins:
            config = plugin.config(config, stage)
        return config

    def probe(self, stage: Stage, data: StageData) -> Probe | None:
        """The method's probe; its config changes like a group's, since both belong to one bank."""
        probe = self.method.probe(stage, data)
        return None if probe is None else replace(probe, config=self._changed(probe.config, stage))

    def probed(self, model: Any, group: str, stage: Stage, data: StageData) -> None:
        """The method's hook."""
        self.method.probed(model, group, stage, data)

    def before_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Everybody's hook."""
        for part in self.parts:
            part.before_task(model, stage, data)

    def loss_terms(self, model: Any, batch: Mapping[str, Any], outputs: Any) -> dict[str, Tensor]:
        """Everybody's terms."""
        terms: dict[str, Tensor] = {}
        for part in self.parts:
            terms.update(part.loss_terms(model, batch, outputs))
        return terms

    def before_step(self, model: Any) -> None:
        """Everybody's hook."""
        for part in self.parts:
            part.before_step(model)

    def after_task(self, model: Any, stage: Stage, data: StageData) -> None:
        """Everybody's hook."""
        for part in self.parts:
            part.after_task(model, stage, data)

    def training_samples(self, stage: Stage) -> Sequence[Sample]:
        """The method's samples as the plugins change them."""
        samples = self.method.training_samples(stage)
        for plugin in self.plugins:
            samples = plugin.training_samples(samples, stage)
        return samples
