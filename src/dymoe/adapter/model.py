"""The tuner: wraps the linears of any transformers model and keeps the expert groups in order."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dymoe.adapter.config import DyMoEConfig
from dymoe.adapter.decoder import decoder_linears, drop_capture_hooks
from dymoe.adapter.holder import GroupHolder
from dymoe.adapter.layer import DyMoELayer, DyMoELinear
from dymoe.adapter.selection import Select, Selector
from dymoe.adapter.selectors import SELECTORS
from dymoe.adapter.trace import RoutingTrace
from dymoe.errors import DymoeError
from dymoe.libraries import require_arguments, require_names
from dymoe.names import parts_of, safe_name

require_names(BaseTuner, "_pre_injection_hook", "_prepare_adapter_config", "_create_and_replace", "_replace_module")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class GroupConfigs(dict[str, PeftConfig]):
    """The groups' configs by name.

    PEFT's model remembers the name of its first adapter and looks that config up in every forward pass, also after
    this adapter was deleted while several others are active. A deleted name therefore answers with the first group
    left.
    """

    def __init__(self, configs: dict[str, PeftConfig]) -> None:
        super().__init__(configs)
        self.deleted: set[str] = set()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.deleted.add(name)

    def __missing__(self, name: str) -> PeftConfig:
        if name in self.deleted and self:
            return next(iter(self.values()))
        raise KeyError(name)


class DyMoEModel(BaseTuner):
    """PEFT's tuner for the method DYMOE.

    Adding a group (an adapter) freezes the earlier ones and leaves all of them active, so that the router's softmax
    runs over all groups and only the new one trains. Stage t of a run is the first t groups: `set_adapter` with a name
    goes back to the stage that this group ended, with a list of names it routes over those alone.

    Attributes:
        trace: the model's routing trace, shared by all wrapped layers.
    """

    prefix: str = "dymoe_"
    tuner_layer_cls = DyMoELayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's own class attribute
    trace: RoutingTrace

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if any(isinstance(module, GroupHolder) for module in model.modules()):
            raise DymoeError(
                "the model has expert groups already; add the next one by `add_adapter` of what `get_peft_model` gave"
            )
        super().__init__(model, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        drop_capture_hooks(self.model)
        return vars(self)

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.trace = RoutingTrace()
        self.peft_config = GroupConfigs(self.peft_config)
        self._hooks: list[RemovableHandle] = []

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        # On the model itself, so that `generate` and direct calls pass here too.
        self._hooks.append(model.register_forward_pre_hook(_Begin(self.trace), with_kwargs=True))
        self._hooks.append(model.register_forward_hook(_AttachLoss(self.trace), with_kwargs=True))

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, DyMoEConfig)
        if peft_config.target_modules is None:
            peft_config.target_modules = _language_projections(self.model)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, DyMoEConfig)
        if isinstance(target, DyMoELayer):
            target.add_group(adapter_name, peft_config)
            return
        if not isinstance(getattr(target, "in_features", None), int) or not hasattr(target, "out_features"):
            raise ValueError(
                f"{current_key}: a {type(target).__name__} cannot hold experts; target_modules may only name linears "
                "(modules with in_features and out_features)"
            )
        layer = DyMoELinear(target, current_key, self.trace)
        layer.add_group(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the group to every targeted layer, freeze the earlier groups and activate all of them.

        Raises:
            ValueError: name, config or model do not allow the group; the model is as it was.
        """
        earlier = [name for name in self.stage if name != adapter_name]
        training = self.training_group
        trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
        config = self.peft_config[adapter_name]
        try:
            others = [name for name in self.peft_config if name != adapter_name]
            safe_name(adapter_name, "adapter", others, parts_of(model))
            self._check_gate(adapter_name)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            # Not earlier: PEFT freezes the base only where it finds none of its layers yet, and a selector counts as
            # one.
            self._add_to_selector(adapter_name)
            self._check_selected_layers()
        except Exception:
            self._take_back(adapter_name, earlier, training)
            for parameter, allowed in trains.items():
                parameter.requires_grad_(allowed)
            raise
        self.set_training_group(None if config.inference_mode else adapter_name)
        self.set_adapter([*earlier, adapter_name])

    def _take_back(self, group: str, active: list[str], training: str | None) -> None:
        """Leave nothing of a refused group: neither parameters nor layers that were wrapped for it."""
        dict.pop(self.peft_config, group, None)  # past `del`, after which the name would answer for another group
        if not self.peft_config:
            self.unload()
            return
        for holder in self.holders():
            holder.delete_adapter(group)
        for name, layer in [(layer.name, layer) for layer in self.layers() if not layer.group_configs]:
            self.model.set_submodule(name, layer.base_layer)
        self.set_training_group(training)
        self.set_adapter(active)

    def _add_to_selector(self, adapter_name: str) -> None:
        """Give the group its part of the selector; the first group brings the selector itself."""
        config = self.peft_config[adapter_name]
        assert isinstance(config, DyMoEConfig)
        if config.selector == "none":
            return
        if self.selector is None:
            decoder = self.model.get_decoder()  # type: ignore[operator]
            require_arguments(type(decoder), "forward", "input_ids", "inputs_embeds", "attention_mask", "position_ids")
            embedding = decoder.get_input_embeddings().weight
            new_selector = SELECTORS[config.selector](embedding.shape[1]).to(embedding.device)
            self.model.dymoe_selector = new_selector
            self._hooks.append(
                decoder.register_forward_pre_hook(Select(new_selector, self.trace.context), with_kwargs=True)
            )
        selector = self.selector
        assert selector is not None
        selector.add_group(adapter_name, config.selector_options)
        selector.to(self.model.get_input_embeddings().weight.device)  # type: ignore[operator]

    def _check_selected_layers(self) -> None:
        """Refuse wrapped layers that run before the selector decides, or after the decoder.

        Raises:
            ValueError: there is a selector and a wrapped layer outside the language model's decoder.
        """
        if self.selector is None:
            return
        inside = set(self.model.get_decoder().modules())  # type: ignore[operator]
        for layer in self.layers():
            if layer not in inside:
                raise ValueError(
                    f"{layer.name}: a selector weighs layers of the language model's decoder alone; leave this one out "
                    "of target_modules"
                )

    @property
    def selector(self) -> Selector | None:
        """What weighs whole groups for a sample, or None."""
        module = getattr(self.model, "dymoe_selector", None)
        return module if isinstance(module, Selector) else None

    def holders(self) -> list[GroupHolder]:
        """Return everything that holds parameters of groups: the wrapped layers and the selector, if there is one."""
        return [module for module in self.model.modules() if isinstance(module, GroupHolder)]

    def _check_gate(self, adapter_name: str) -> None:
        selector = getattr(self.peft_config[adapter_name], "selector", "none")
        if selector != "none" and selector not in SELECTORS:
            raise ValueError(f"selector must be none or one of {', '.join(SELECTORS)}, got {selector!r}")
        for key in ("gate", "gate_pattern", "selector"):
            values = {name: getattr(config, key) for name, config in self.peft_config.items()}
            other = next((name for name in values if values[name] != values[adapter_name]), None)
            if other is not None:
                raise ValueError(
                    f"group {adapter_name!r} has {key} {values[adapter_name]!r} but group {other!r} has "
                    f"{values[other]!r}: all groups of a bank share one {key}"
                )

    @property
    def training_group(self) -> str | None:
        """The group that trains, or None."""
        return next((layer.training_group for layer in self.model.modules() if isinstance(layer, DyMoELayer)), None)

    @property
    def active_adapters(self) -> list[str]:
        """The active groups, first the one that trains: a Trainer, which knows a single adapter, takes the first."""
        training = self.training_group
        return sorted(self.stage, key=lambda name: name != training)

    @property
    def stage(self) -> list[str]:
        """The active groups in the order of their columns."""
        return [self.active_adapter] if isinstance(self.active_adapter, str) else list(self.active_adapter)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the groups to route over; frozen groups stay frozen.

        Args:
            adapter_name: a list routes over these groups alone, in this order; a single name over the stage that this
                group ended, the group and all those added before it.
            inference_mode: freeze the training group too.

        Raises:
            DymoeError: there is no such group; nothing changed.
        """
        known = list(self.peft_config)
        names = list(dict.fromkeys([adapter_name] if isinstance(adapter_name, str) else adapter_name))
        missing = [name for name in names if name not in known]
        if missing:
            raise DymoeError(f"set_adapter: no expert group {missing[0]!r}; there are {', '.join(known) or 'none'}")
        if isinstance(adapter_name, str):
            names = known[: known.index(adapter_name) + 1]
        super().set_adapter(names, inference_mode=inference_mode)
        if self.selector is not None:  # PEFT tells the wrapped layers alone
            self.selector.set_adapter(names, inference_mode=inference_mode)
        self._count_layers()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """PEFT's switch: the last named group becomes the training group, or stops being it."""
        super().set_requires_grad(adapter_names, requires_grad)
        self.set_training_group(self.training_group)  # the trace learns of it

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook around forward and generate: refuse what it would drop without a word.

        Raises:
            DymoeError: an adapter is named for each sample.
        """
        if kwargs.get("adapter_names") is not None:
            raise DymoeError(
                "adapter_names: samples of one batch cannot route over groups of their own; choose the groups for the "
                "whole batch by model.base_model.set_adapter([...])"
            )
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not possible: groups are not added up.

        Raises:
            DymoeError: always.
        """
        raise DymoeError("add_weighted_adapter: expert groups cannot be combined into one, tokens are routed over them")

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget a group on purpose, in the layers and in the selector; the others stay active."""
        super().delete_adapter(adapter_name)
        if self.selector is not None:
            self.selector.delete_adapter(adapter_name)
        self._count_layers()

    def unload(self) -> nn.Module:
        """Return the base model as it was before its first group: no wrapped layer, no selector, no hook."""
        for hook in self._hooks:
            hook.remove()
        if self.selector is not None:
            del self.model.dymoe_selector
        return super().unload()

    def set_training_group(self, group: str | None) -> None:
        """Let this group train and freeze all others; None freezes all."""
        for holder in self.holders():
            holder.set_training_group(group)
        if group is not None:
            # Not above: transformers imports PEFT, which imports this module, before it has a TrainerCallback.
            from dymoe.adapter.callback import register_callback

            register_callback()
            config = self.peft_config[group]
            assert isinstance(config, DyMoEConfig)
            self.trace.context.rsr_start = config.rsr_start
            self.trace.context.progress = None
        self._count_layers()

    def train(self, mode: bool = True) -> DyMoEModel:
        """Set training mode; batch norms of the frozen base stay in evaluation mode.

        A vision tower's batch norm would otherwise normalise by the batch and move its statistics, which are part of
        what must not change.
        """
        super().train(mode)
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def layers(self) -> list[DyMoELayer]:
        """Return the wrapped layers in the model's order."""
        return [module for module in self.model.modules() if isinstance(module, DyMoELayer)]

    def _count_layers(self) -> None:
        training = [(layer, layer.group_order()[1]) for layer in self.layers()]
        carrying = sum(group is not None and layer.experts_of(group) > 0 for layer, group in training)
        self.trace.context.num_layers = max(carrying, 1)


class _Begin:
    """Forward pre-hook: starts a pass in the trace (a class, so that models stay copyable)."""

    def __init__(self, trace: RoutingTrace) -> None:
        self.trace = trace

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        by_position = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) if args else {}
        self.trace.begin(module, {**by_position, **kwargs})


class _AttachLoss:
    """Forward hook: adds the layers' loss terms to a loss that the model computed."""

    def __init__(self, trace: RoutingTrace) -> None:
        self.trace = trace

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not module.training:
            return output
        if isinstance(output, tuple):  # return_dict=False
            if kwargs.get("labels") is not None:
                return (self.trace.attach(output[0]), *output[1:])
            self.trace.follow(output[0])
            return output
        loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
        if isinstance(loss, Tensor):
            output["loss"] = self.trace.attach(loss)
        elif isinstance(logits, Tensor):
            self.trace.follow(logits)
        return output


def _language_projections(model: nn.Module) -> str | list[str]:
    """Return a target for all linears of the language model's decoder, read off the module tree.

    Fused projections count as what they are. The output embedding, a vision tower and a projector are left alone; a
    module that is no transformers model with a decoder gets the seven usual names.
    """
    linears = decoder_linears(model)
    if not linears:
        return list(PROJECTIONS)
    decoder = model.get_decoder()  # type: ignore[operator]
    inside = next(name for name, module in model.named_modules() if module is decoder)
    leaves = "|".join(sorted({re.escape(name.rpartition(".")[2]) for name in linears}))
    pattern = (re.escape(inside + ".") if inside else "") + rf"(.*\.)?({leaves})"
    matched = {name for name, module in model.named_modules() if re.fullmatch(pattern, name)}
    return pattern if matched == set(linears) else linears


def group_tensors(model: nn.Module, group: str) -> dict[str, Tensor]:
    """Return a group's parameters by name, without the group's own name in the key.

    Raises:
        ValueError: the model has no such group.
    """
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, GroupHolder):
            for attribute in module.adapter_layer_names:
                parameters = getattr(module, attribute)
                if group in parameters:
                    tensors[f"{name}.{attribute}"] = parameters[group].detach()
    if not tensors:
        raise ValueError(f"the model has no expert group {group!r}")
    return tensors


def group_hash(model: nn.Module, group: str) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a group's parameters: equal exactly when nothing changed.

    Raises:
        ValueError: the model has no such group.
    """
    return tensors_hash(sorted(group_tensors(model, group).items()))


def tensors_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of tensors of any dtype and device, one after the other.

    A group's names are those under which PEFT saves it, so that the hash can be taken from the file alone.
    """
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
