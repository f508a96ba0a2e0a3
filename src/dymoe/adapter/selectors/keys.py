"""`keys`: soft attention of the sample over the groups, one learned key per group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dymoe.adapter.selection import Prompt, Selector


class Keys(Selector):
    """ProgLoRA's allocation (Findings of ACL 2025, 2025.findings-acl.143; formula and sizes from its code).

    q = T(max over the prompt's embeddings), score_i = k_i . q / sqrt(d), a = softmax of the scores over the active
    groups; T = Linear(d, hidden) -> Linear(hidden, d) -> SiLU -> LayerNorm, its linears without bias.

    Each group holds its key and its own copy of T, started from the copy of the group added before it, and the copy of
    the last active group is used. So T goes on training from task to task while every older group stays
    bit-identical: the first t groups are stage t, with the T of that stage. As in the original, old keys meet a T that
    went on changing after they froze; unlike there, T as it was is kept, at 2 d hidden + 2 d parameters a group.

    Keys and linears start Xavier-uniform and the LayerNorm at 1 and 0, what the code's own start is written for (its
    helper tests the container in place of the layers in it, so what acts there depends on the library's defaults).
    Where the code and the paper's formula part, this follows the formula: the code subtracts from old and current
    scores two maxima taken over the whole batch (a sample's weights would depend on its neighbours), pools over padding
    and answer too, and pools anew over each decoded token.

    `selector_options`: hidden, the inner width of T (100, the code's).
    """

    name: ClassVar[str] = "keys"
    while_training: ClassVar[bool] = True
    adapter_layer_names = ("dymoe_key", "dymoe_down", "dymoe_up", "dymoe_norm_weight", "dymoe_norm_bias")

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.dymoe_key = nn.ParameterDict()
        self.dymoe_down = nn.ParameterDict()
        self.dymoe_up = nn.ParameterDict()
        self.dymoe_norm_weight = nn.ParameterDict()
        self.dymoe_norm_bias = nn.ParameterDict()

    def add_group(self, group: str, options: Mapping[str, Any]) -> None:
        """Make the group's key (d,) and its T: down (hidden, d), up (d, hidden), norm weight and bias (d,); float32.

        Raises:
            ValueError: `hidden` is no whole number of at least 1, or another than that of the groups before.
        """
        hidden, width = options.get("hidden", 100), self.width
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
            raise ValueError(f"selector_options: hidden must be a whole number of at least 1, got {hidden!r}")
        start = {
            "dymoe_key": nn.init.xavier_uniform_(torch.empty(1, width))[0],
            "dymoe_down": nn.init.xavier_uniform_(torch.empty(hidden, width)),
            "dymoe_up": nn.init.xavier_uniform_(torch.empty(width, hidden)),
            "dymoe_norm_weight": torch.ones(width),
            "dymoe_norm_bias": torch.zeros(width),
        }
        earlier = list(self.dymoe_key)[-1:]
        for attribute in self.adapter_layer_names:
            parameters = getattr(self, attribute)
            if earlier and attribute != "dymoe_key":
                before = parameters[earlier[0]].detach()
                if before.shape != start[attribute].shape:
                    raise ValueError(
                        f"group {group!r}: T is shared and goes on from group {earlier[0]!r}, so hidden must be "
                        f"{self.dymoe_down[earlier[0]].shape[0]}, got {hidden}"
                    )
                start[attribute] = before.clone()
            parameters[group] = nn.Parameter(start[attribute])

    def transform(self, pooled: Tensor, group: str) -> Tensor:
        """T as the group holds it: (..., d) -> (..., d)."""
        inner = F.linear(F.linear(pooled, self.dymoe_down[group]), self.dymoe_up[group])
        return F.layer_norm(F.silu(inner), (self.width,), self.dymoe_norm_weight[group], self.dymoe_norm_bias[group])

    def select(self, prompt: Prompt, groups: Sequence[str]) -> Tensor:
        """Attention of each sample over the groups, (samples, groups), in the keys' dtype; rows sum to 1."""
        with torch.autocast(prompt.embeddings.device.type, enabled=False):
            keys = torch.stack([self.dymoe_key[group] for group in groups])
            mask = prompt.prompt_mask.to(prompt.embeddings.device).unsqueeze(-1)
            pooled = prompt.embeddings.to(keys.dtype).masked_fill(~mask, float("-inf")).amax(1)
            pooled = pooled.masked_fill(~mask.any(1), 0.0)  # a sample without a prompt
            query = self.transform(pooled, groups[-1])
            return torch.softmax(query @ keys.t() / math.sqrt(self.width), dim=-1)
