"""What the wrapped layers were given on a task and how much each expert had to do with it, measured and kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe.errors import DymoeError
from dymoe.files import atomic_dir

if TYPE_CHECKING:
    from torch import Tensor

    from dymoe.adapter.layer import DyMoELayer
    from dymoe.adapter.trace import LayerRouting, RoutingTrace

FILE = "inputs.safetensors"


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
        layers = layers_of(model, group)
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

        loaded = cls()
        try:
            with safe_open(path, framework="pt") as file:
                about: Mapping[str, str] = file.metadata() or {}
                loaded.tokens = int(about["tokens"])
                loaded.sources = json.loads(about["sources"])
                kinds = {
                    "covariance": loaded.covariances,
                    "used": loaded.used,
                    "importance": loaded.importance,
                }
                for key in file.keys():  # noqa: SIM118 - not a dictionary
                    kind, name = key.split(":", 1)
                    kinds[kind][name] = file.get_tensor(key)
            loaded.covariances = {name: _symmetric(value) for name, value in loaded.covariances.items()}
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise DymoeError(f"{path}: the earlier tasks' inputs cannot be read ({error})") from error
        return loaded


class _Watch:
    """The hooks of `InputStatistics.observing`."""

    def __init__(self, statistics: InputStatistics, trace: RoutingTrace, covariance: bool) -> None:
        self.statistics = statistics
        self.trace = trace
        self.covariance = covariance
        self.counts: dict[str, int] = {}
        self.last: tuple[str, Any] = ("", None)
        self.lengths: Tensor | None = None

    def see_input(self, layer: DyMoELayer, arguments: tuple[Any, ...]) -> None:
        x: Tensor = arguments[0].detach()
        mask = self.trace.context.mask_for(x.shape[:-1])
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
            sums = self.statistics.covariances
            sums[layer.name] = product if layer.name not in sums else sums[layer.name].add_(product)

    def see_routing(self, routing: LayerRouting) -> None:
        if routing.layer not in self.counts or self.lengths is None:
            return
        weights = routing.weights
        flat = (weights.flatten(0, -2) if routing.mask is None else weights[routing.mask]).double()
        lengths = self.lengths.double()
        statistics = self.statistics
        for sums, value in ((statistics.used, flat.sum(0)), (statistics.importance, lengths @ flat)):
            sums[routing.layer] = sums.get(routing.layer, 0) + value

    def finish(self) -> None:
        """Turn the sums into means."""
        statistics = self.statistics
        statistics.tokens = max(self.counts.values(), default=0)
        for by_layer in (statistics.covariances, statistics.used, statistics.importance):
            for name in by_layer:
                by_layer[name] = by_layer[name] / max(self.counts[name], 1)


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


def layers_of(model: Any, group: str) -> list[DyMoELayer]:
    """The wrapped layers that hold experts of the group."""
    return [layer for layer in model.base_model.layers() if group in layer.dymoe_A]
