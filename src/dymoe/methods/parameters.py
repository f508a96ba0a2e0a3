"""What methods share: a group's A and B by layer, a draw of samples, named tensors on disk."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dymoe.errors import DymoeError
from dymoe.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor, nn


T = TypeVar("T")


@dataclass(frozen=True)
class LayerLoRA:
    """The LoRA of one group in one wrapped linear; all experts of the group are stacked, as the uniform gate sums them.

    Attributes:
        layer: the linear's name in the model.
        a: A, (rank, in_features), float32.
        b: B transposed, (rank, out_features), float32.
        scale: factor on B A.
        older: A of every other active group, in order, each (its rank, in_features).
    """

    layer: str
    a: Tensor
    b: Tensor
    scale: float
    older: tuple[Tensor, ...] = ()

    def delta(self, scaled: bool = True) -> Tensor:
        """The change of the linear's weight, scale * B A (or B A), (out_features, in_features), float32."""
        import torch

        with torch.autocast(self.a.device.type, enabled=False):
            return self.b.t() @ (self.a * self.scale if scaled else self.a)


def training_lora(model: Any) -> Iterator[LayerLoRA]:
    """A and B of the training group in every wrapped linear that holds some of it, in the model's order.

    Args:
        model: a PEFT model with expert groups.
    """
    for layer in model.base_model.layers():
        frozen, group = layer.group_order()
        if group is None or group not in layer.dymoe_A:
            continue
        a, b = layer.dymoe_A[group].flatten(0, 1), layer.dymoe_B[group].flatten(0, 1)
        older = tuple(layer.dymoe_A[name].flatten(0, 1) for name in frozen if name in layer.dymoe_A)
        yield LayerLoRA(layer.name, a, b, layer.group_configs[group].scaling, older)


def trainable(model: Any) -> dict[str, nn.Parameter]:
    """Every parameter that trains now, by its name in `model`."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_group(model: Any) -> str:
    """Name of the group that the stage has just trained.

    Raises:
        RuntimeError: no group trains (the hook was called after freezing).
    """
    names = {holder.training_group for holder in model.base_model.holders()}
    if len(names) != 1 or None in names:
        raise RuntimeError(f"expected one training group, found {names}")
    return str(names.pop())


def draw(samples: Sequence[T], count: int | None, key: int | str, ordered: bool = True) -> Sequence[T]:
    """`count` of the samples without replacement, drawn by a generator seeded with `key`; all where there are fewer.

    Args:
        samples: to draw from.
        count: how many, None for all.
        key: the same draws the same positions of as many samples.
        ordered: in the order of `samples`, else in that of the draw.
    """
    count = len(samples) if count is None else min(count, len(samples))
    if ordered and count == len(samples):
        return samples  # which may be on disk
    positions = random.Random(key).sample(range(len(samples)), count)
    return [samples[position] for position in (sorted(positions) if ordered else positions)]


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors to `path` as safetensors, atomically; the folder is made.

    Raises:
        DymoeError: the file cannot be written; an older one is untouched.
    """
    from safetensors.torch import save

    atomic_write(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote, on the CPU.

    Raises:
        DymoeError: the file is missing or broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DymoeError(f"{path}: what an earlier stage kept cannot be read ({error})") from error
