"""What wrapped layers and selectors share: parameters that belong to groups, of which at most one trains."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dymoe.libraries import require_names

require_names(BaseTunerLayer, "_disable_adapters", "_active_adapter", "merged_adapters")


class GroupHolder(nn.Module, BaseTunerLayer):
    """A module that holds one set of parameters per expert group.

    `adapter_layer_names` names its ParameterDicts, each keyed by group; `other_param_names` its other dictionaries.

    Attributes:
        training_group: the group that trains, or None.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.training_group: str | None = None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = []

    def groups_changed(self) -> None:
        """Called after the set of groups, the active ones or the training one changed."""

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active groups. Unlike in other PEFT methods this unfreezes none: only the training group trains.

        Args:
            adapter_names: names of the groups to route over; names this module lacks are ignored.
            inference_mode: freeze the training group too.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._active_adapter = names
        self._apply_requires_grad(not inference_mode)
        self.groups_changed()

    def set_training_group(self, group: str | None) -> None:
        """Let this group train and freeze all others; None freezes all."""
        self.training_group = group
        self._apply_requires_grad(True)
        self.groups_changed()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """PEFT's switch: the last named group becomes the training group, or stops being it."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if requires_grad:
            self.set_training_group(names[-1] if names else None)
        elif self.training_group in names:
            self.set_training_group(None)

    def _apply_requires_grad(self, allowed: bool) -> None:
        for attribute in self.adapter_layer_names:
            for group, parameter in getattr(self, attribute).items():
                parameter.requires_grad_(allowed and group == self.training_group and group in self._active_adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget a group on purpose; the others stay active."""
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in getattr(self, attribute):
                del getattr(self, attribute)[adapter_name]
        if self.training_group == adapter_name:
            self.training_group = None
        self.set_adapter([name for name in self.active_adapters if name != adapter_name])
