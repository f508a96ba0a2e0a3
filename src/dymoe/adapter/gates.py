"""Gates: which router rows a group brings, how a bank of groups is scored, what that costs.

A gate is a class; nothing outside asks for its name. `dymoe.routing.route` makes weights and losses of its scores. A
class with a name registers itself: a user's, beside his method, is known as soon as its file is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dymoe import routing
from dymoe.routing import Decision, Routing, Tokens


class Setting(NamedTuple):
    """What a gate is told of the bank and of the forward pass.

    Attributes:
        sizes: experts of each active group, in the order of their columns.
        num_new: experts of the group that trains, which is the last; 0 where none does.
        routing: the settings of the last group.
        tokens: leading dimensions of the layer's input, of which the gate sees the product.
        selection: (samples, groups), what a selector decided for each sample, or None (see `adapter.selection`).
        learns: the new group trains, with guidance and losses.
        mask: (tokens,), true for tokens that count in the losses, or None for all.
        scale: factor on the regularization, 0-d, or None while it is off.
        report: somebody reads the losses and statistics of this pass.
        prompt: (tokens,), true for tokens of a prompt (neither padding nor answer), or None for all.
        prompts: what `pooled` keeps of the prompts while answers are decoded, by layer; None without a key/value cache.
        layer: the layer's name.
    """

    sizes: tuple[int, ...]
    num_new: int
    routing: Routing
    tokens: tuple[int, ...]
    selection: Tensor | None = None
    learns: bool = False
    mask: Tensor | None = None
    scale: Tensor | None = None
    report: bool = False
    prompt: Tensor | None = None
    prompts: dict[str, Tensor] | None = None
    layer: str = ""

    @property
    def num_old(self) -> int:
        """Experts of all groups but the one that trains."""
        return sum(self.sizes) - self.num_new

    def by_group(self) -> Tensor:
        """The selection repeated for the tokens of each sample, (tokens, groups).

        Raises:
            ValueError: the layer's input does not start with the dimension of samples.
        """
        selection, tokens = self.selection, self.tokens
        assert selection is not None
        if len(tokens) < 2 or tokens[0] != selection.shape[0]:
            raise ValueError(
                f"a selection for {selection.shape[0]} samples does not fit an input of {tuple(tokens)} tokens"
            )
        spread = selection.view(tokens[0], *[1] * (len(tokens) - 1), -1)
        return spread.expand(*tokens, -1).flatten(0, -2)

    def pooled(self, x: Tensor) -> Tensor:
        """Mean of the tokens of each sample's prompt, (samples, features), float32 or wider; 0 where there is none.

        While an answer is decoded with a cache, that of its prompt.

        Args:
            x: the layer's input, (tokens, features).

        Raises:
            ValueError: the layer's input does not start with the dimension of samples.
        """
        if self.prompts is not None and self.layer in self.prompts:
            return self.prompts[self.layer]
        if len(self.tokens) < 2:
            raise ValueError(f"a mean over a sample's tokens needs samples before tokens, got {tuple(self.tokens)}")
        by_sample = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (self.tokens[0], -1))
        counts = torch.ones_like(by_sample[..., :1]) if self.prompt is None else self.prompt.view_as(by_sample[..., 0])
        counts = counts.reshape(*by_sample.shape[:2], 1).to(by_sample.dtype)
        mean = (by_sample * counts).sum(1) / counts.sum(1).clamp(min=1)
        if self.prompts is not None:
            self.prompts[self.layer] = mean
        return mean

    def by_expert(self) -> Tensor:
        """`by_group` repeated for the experts of each group, (tokens, experts)."""
        selection = self.by_group()
        repeats = torch.tensor(self.sizes, device=selection.device)
        return selection.repeat_interleave(repeats, dim=1, output_size=sum(self.sizes))

    def route(self, old: Tensor, new: Tensor, guide: bool, visible: Tensor | None = None) -> Decision:
        """`dymoe.routing.route` of these scores (tokens, experts)."""
        return routing.route(
            old,
            new,
            self.routing,
            visible=visible,
            learns=self.learns,
            guide=guide,
            mask=self.mask,
            scale=self.scale,
            report=self.report,
        )


GATES: dict[str, Gate] = {}  # by name


class Gate:
    """Base of all gates; a subclass with a `name` of its own registers an instance in `GATES`.

    Attributes:
        name: what a config's `gate` says; unlike that of any other module's gate.
        routes: a token's weights depend on the token.
        scores_older: a group's rows score the experts of earlier groups too, as they were when it trained.
        pack_bytes: what `pack` adds to each number of a frozen router row, in bytes.
    """

    name: ClassVar[str] = ""
    routes: ClassVar[bool] = True
    scores_older: ClassVar[bool] = False
    pack_bytes: ClassVar[int] = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            return
        other = GATES.get(cls.name)
        # A file that is run again after a change brings its gates again.
        if other is not None and (type(other).__module__ == __name__ or type(other).__qualname__ != cls.__qualname__):
            raise TypeError(
                f"gate {cls.name!r} is {type(other).__module__}.{type(other).__qualname__}; take another name"
            )
        GATES[cls.name] = cls()

    def rows(self, experts: int, older: int) -> int:
        """Router rows that a group of `experts` brings to a layer that has `older` ones."""
        raise NotImplementedError

    def saved_bytes(self, old: int, new: int, top_k: int, size: int) -> int:
        """Bytes that a decision keeps of one token for its backward pass, with so many experts on each side.

        A product of every expert in the compute dtype, of `size` bytes; the softmax and the weight of every candidate
        in float32; where a side has more experts than top_k, the candidates' positions twice: for the largest scores,
        and for the hidden values that they choose.
        """
        candidates = min(old, top_k) + min(new, top_k)
        return size * (old + new) + 8 * candidates + 16 * top_k * ((old > top_k) + (new > top_k))

    def pack(self, routers: Sequence[Tensor]) -> Any:
        """What frozen groups' router rows (rows, features) are kept as between forward passes, without gradient."""
        return tuple(routers)

    def decide(self, x: Tensor, old: Any, new: Tensor | None, setting: Setting) -> Decision:
        """Where the tokens go.

        Args:
            x: the layer's input, (tokens, features).
            old: `pack` of the frozen groups' router rows; None without frozen groups.
            new: router rows of the group that trains, (rows, features), or None.
            setting: see `Setting`.
        """
        raise NotImplementedError


class Cosine(Gate):
    """Cosine scores, guidance, softmax over the top k; groups that a selection leaves at 0 get no weight."""

    name = "cosine"
    pack_bytes = 4

    def rows(self, experts: int, older: int) -> int:
        """One for each expert."""
        return experts

    def pack(self, routers: Sequence[Tensor]) -> Tensor:
        """Unit rows of all groups, (experts, features), float32 or wider."""
        rows = torch.cat(list(routers))
        return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1, eps=1e-12)

    def decide(self, x: Tensor, old: Tensor | None, new: Tensor | None, setting: Setting) -> Decision:
        """Scores of each side apart, then `dymoe.routing.route`."""
        tokens = Tokens.of(x)
        nothing = tokens.wide.new_zeros(len(x), 0)
        by_old = nothing if old is None else routing.cosine_scores(tokens, old, unit=True)
        by_new = nothing if new is None else routing.cosine_scores(tokens, new)
        visible = None if setting.selection is None else setting.by_expert() != 0
        return setting.route(by_old, by_new, True, visible)


class Pooled(Cosine):
    """One cosine decision for each sample, from the mean of its prompt's tokens; all its tokens follow it."""

    name = "pooled"

    def decide(self, x: Tensor, old: Tensor | None, new: Tensor | None, setting: Setting) -> Decision:
        """The decision for each sample, repeated for its tokens; the losses are means over samples."""
        means, samples = setting.pooled(x), setting.tokens[0]
        decision = super().decide(means, old, new, setting._replace(tokens=(samples, 1), mask=None))
        return decision.repeated(len(x) // samples)


class Linear(Gate):
    """Softmax over the top k of a linear router, which scores all experts that its group met or brought.

    The last active group's router decides, or the routers that the selection names for a sample (a mixture where it
    names several).
    """

    name = "linear"
    scores_older = True

    def rows(self, experts: int, older: int) -> int:
        """One for each expert and each older one."""
        return older + experts

    def decide(self, x: Tensor, old: Sequence[Tensor] | None, new: Tensor | None, setting: Setting) -> Decision:
        """Scores of the last router; of several routers weights alone.

        Raises:
            ValueError: a router does not fit the groups before it (they are not the ones it was trained with).
        """
        rows = [*(old or ()), *([] if new is None else [new])]
        total = 0
        for size, router in zip(setting.sizes, rows, strict=True):
            total += size
            if router.shape[0] != total:
                raise ValueError(
                    f"a linear router for {router.shape[0]} experts meets {total}: activate the groups it was trained "
                    "with, in their order"
                )
        sides = [setting.num_old, setting.num_new]
        if setting.selection is None:
            by_old, by_new = _linear_scores(x, rows[-1]).split(sides, -1)
            return setting.route(by_old, by_new, False)
        weights = x.new_zeros(len(x), total, dtype=rows[-1].dtype)
        shares = setting.by_group()
        for number, router in enumerate(rows):
            scores = _linear_scores(x, router)
            weighted = routing.route(scores, scores[:, :0], setting.routing).columns(0)
            weights = weights + shares[:, number : number + 1].to(weighted.dtype) * F.pad(
                weighted, (0, total - len(router))
            )
        by_old, by_new = weights.split(sides, -1)
        return Decision(None, (by_old, by_new), (None, None), (sides[0], sides[1]))


def _linear_scores(x: Tensor, rows: Tensor) -> Tensor:
    """Products in the rows' dtype; their gradient is bfloat16's where the inputs are, as in `routing.cosine_scores`."""
    with torch.autocast(device_type=x.device.type, enabled=False):
        if x.dtype == torch.bfloat16 and torch.is_grad_enabled():
            value = F.linear(x.detach().to(rows.dtype), rows.detach())
            return routing.straight_through(value, F.linear(x, rows.to(x.dtype)))
        return F.linear(x.to(rows.dtype), rows)


class Uniform(Gate):
    """Weight 1 for every expert of every token, or what the selection gives its group."""

    name = "uniform"
    routes = False

    def rows(self, experts: int, older: int) -> int:
        """None."""
        return 0

    def saved_bytes(self, old: int, new: int, top_k: int, size: int) -> int:
        """Nothing: no weight depends on the token."""
        return 0

    def decide(self, x: Tensor, old: Any, new: Tensor | None, setting: Setting) -> Decision:
        """One row of weights for all tokens, unless there is a selection."""
        if setting.selection is None:
            weights = torch.ones(1, sum(setting.sizes), dtype=torch.float32, device=x.device)
        else:
            weights = setting.by_expert()
            weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        sides = (setting.num_old, setting.num_new)
        by_old, by_new = weights.split(list(sides), -1)
        return Decision(None, (by_old, by_new), (None, None), sides)
