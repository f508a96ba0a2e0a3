"""Speed of the gate and the expert bank on one GPU, beside what that GPU does at best.

    python benchmarks/gpu_bank.py                         # LLaVA-7B's linears, 1 to 64 expert groups
    python benchmarks/gpu_bank.py --groups 8              # one size

Measured first are the ceilings: a copy of 1 GiB (bytes read and written a second) and a bfloat16 product of two
8192 x 8192 matrices. Then, for a linear of in x out features with G groups of 16 experts of rank 4 and top-k 16, each
way to compute the gate, the bank, and the whole wrapped linear as `compute: stacked` and `compute: triton` do (the
frozen linear included, loss terms not):

- `ask`: without gradients, 2048 tokens (a prompt), and 1 and 16 (decoding);
- `train`: forward and backward of 2048 tokens, the last group learning with dropout 0.05, all others frozen.

Tokens are `spread` (random: each uses experts of many groups) or in `runs` (128 neighbours near the same group, as
those of one picture may be). Times are medians of `triton.testing.do_bench`, caches flushed between calls; decoding is
also timed as a CUDA graph, which leaves out what Python and launches cost.

Columns: milliseconds; the same over the time of the frozen linear alone; TFLOP/s of the operations that the form really
does, GB/s of the bytes that its forward pass must touch at least, and the larger of their shares of the ceilings; and
the largest difference from the plain form, over the largest value (a tie at the border of the top k that falls to
another expert shows here too).

Without a GPU it says so and ends well.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from dymoe import routing
from dymoe.adapter.ops import Bank, ExpertBlock, Rule, fused, stacked
from dymoe.adapter.ops.triton import bank, forms, missing
from dymoe.adapter.ops.triton.route import Guidance, route

EXPERTS, RANK, TOP_K, TEMPERATURE, TAU, DROPOUT = 16, 4, 16, 0.01, 0.2, 0.05
LINEARS = ((4096, 4096), (4096, 11008), (11008, 4096))
GROUPS = (1, 2, 4, 8, 16, 64)
RUN = 128


@dataclass(frozen=True)
class Scene:
    """One linear with its bank and one input.

    Args:
        x: (tokens, in_features).
        weight: of the frozen linear, (out_features, in_features).
        rows: unit router rows of the frozen groups and of the last, float32.
        blocks: the same experts; the last group's learn where `train`.
        weights: what the gate gives, (tokens, experts), float32.
        train: whether forward and backward are meant.
    """

    x: Tensor
    weight: Tensor
    rows: list[Tensor]
    blocks: list[ExpertBlock]
    weights: Tensor
    train: bool

    @property
    def experts(self) -> int:
        """Experts of the bank."""
        return sum(block.experts for block in self.blocks)


@dataclass(frozen=True)
class Way:
    """One way to compute one part: what to call, its floating-point operations and the bytes it must touch."""

    part: str
    name: str
    call: Callable[[], Any]
    operations: float
    bytes: float


def scene(
    features: int, outputs: int, groups: int, tokens: int, spread: bool, train: bool, device: str, dtype: torch.dtype
) -> Scene:
    """Make a scene from a fixed seed; in `runs` a token's nearest experts are those of one group."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    centres = normal(groups, features)
    rows = F.normalize((centres.repeat_interleave(EXPERTS, 0) + normal(groups * EXPERTS, features)), dim=-1)
    x = normal(tokens, features)
    if not spread:
        x += centres[(torch.arange(tokens, device=device) // RUN) % groups]
    blocks = []
    learning = EXPERTS if train or groups == 1 else 0
    for count, learns in ((groups * EXPERTS - learning, False), (learning, train)):
        if count:
            a, b = (normal(count * RANK, n).div(n**0.5).to(dtype).requires_grad_(learns) for n in (features, outputs))
            blocks.append(ExpertBlock(a, b, RANK, 2.0 if learns else 1.0, DROPOUT if learns else 0.0))
    parts = list(rows.split([block.experts for block in blocks]))
    if train:
        parts[-1].requires_grad_()
    x = x.to(dtype)
    with torch.no_grad():
        weights = routing.topk_weights(routing.scores_of_directions(x, *parts), TOP_K, TEMPERATURE)
    weight = normal(outputs, features).to(dtype)
    return Scene(x.requires_grad_(train), weight, parts, blocks, weights.requires_grad_(train), train)


def plain_gate(s: Scene) -> tuple[Tensor, Tensor]:
    """Scores and weights by the functions of `dymoe.routing`."""
    scores = guided = routing.scores_of_directions(s.x, *s.rows)
    if s.train and len(s.rows) > 1:
        types = routing.token_types(scores, EXPERTS, TAU)
        guided = routing.token_assignment_guidance(scores, EXPERTS, TAU, "exclusive", types)
    return scores, routing.topk_weights(guided, TOP_K, TEMPERATURE)


def fused_gate(s: Scene) -> tuple[Tensor, Tensor]:
    """The same by one kernel."""
    guidance = Guidance(EXPERTS, TAU) if s.train and len(s.rows) > 1 else None
    decision = route(s.x, s.rows, TOP_K, TEMPERATURE, guidance)
    assert decision.scores is not None
    return decision.scores, decision.weights


def whole_stacked(s: Scene) -> Callable[[], Tensor]:
    """The wrapped linear as layers compute it by default."""
    frozen, new = (s.blocks[:-1], s.blocks[-1]) if s.train else (s.blocks, None)
    directions = s.rows[0] if frozen else None
    bank_of = Bank(
        frozen=frozen,
        directions=directions,
        rows=None if directions is None else directions.to(s.x.dtype),
        rule=Rule(TOP_K, TEMPERATURE, TAU, "exclusive" if s.train else "none"),
        dtype=s.x.dtype,
        r=RANK,
        scaling=1.0 if new is None else new.scale,
        dropout=0.0 if new is None else new.dropout,
        training=s.train,
    )
    learning = (None, None, None) if new is None else (s.rows[-1], new.a, new.b)
    return lambda: fused(s.x, F.linear(s.x, s.weight), *learning, bank_of)[0]


def whole_triton(s: Scene) -> Callable[[], Tensor]:
    """The wrapped linear as layers compute it by kernels."""
    guidance = Guidance(EXPERTS, TAU) if s.train and len(s.rows) > 1 else None

    def call() -> Tensor:
        result = F.linear(s.x, s.weight)
        rows = [*s.rows[:-1], F.normalize(s.rows[-1], dim=-1, eps=1e-12)] if s.train else s.rows
        weights = route(s.x, rows, TOP_K, TEMPERATURE, guidance).weights
        return result + bank.triton(s.x, weights, s.blocks, TOP_K)

    return call


def with_backward(s: Scene, forward: Callable[[], Any]) -> Callable[[], Any]:
    """`forward`, and in training its backward pass to everything that learns."""
    learns = [t for t in (s.x, s.weights, *s.rows, *(m for b in s.blocks for m in (b.a, b.b))) if t.requires_grad]
    factors: list[Tensor] = []

    def both() -> tuple[Any, ...]:
        results = forward()
        outputs = results if isinstance(results, tuple) else (results,)
        if not factors:
            factors.extend(torch.ones_like(output) for output in outputs)
        return (*outputs, *torch.autograd.grad(outputs, learns, factors, allow_unused=True))

    def without() -> Any:
        with torch.no_grad():
            return forward()

    return both if s.train else without


def executed_share(s: Scene) -> float:
    """Share of the dense operations that the chunked form of the frozen experts does."""
    part = forms.Part("chunked", RANK, s.blocks[0].experts, 0, 1.0)
    used, counts = forms.find_chunks(part, s.weights.detach())
    return float(counts.sum()) / used.numel()


def ways(s: Scene) -> Iterator[Way]:
    """Every way to compute the scene's linear, gate and bank."""
    tokens, features = s.x.shape
    outputs, size = s.weight.shape[0], s.x.element_size()
    passes = 3 if s.train else 1  # a backward pass has two products for each of the forward's; frozen rows have one
    frozen_passes = 2 if s.train else 1
    base = 2.0 * tokens * features * outputs * frozen_passes
    read = (s.weight.numel() + s.x.numel() + tokens * outputs) * size
    yield Way("linear", "frozen", with_backward(s, lambda: F.linear(s.x, s.weight)), base, read)
    counts = [len(rows) for rows in s.rows]
    learning = counts[-1] if s.train else 0
    frozen = sum(counts) - learning
    gate = 2.0 * tokens * features * (frozen * frozen_passes + learning * passes)
    touched = s.x.numel() * size + sum(counts) * features * 4 + 8.0 * tokens * sum(counts)
    yield Way("gate", "plain", with_backward(s, lambda: plain_gate(s)), gate, touched)
    # 16-bit rows are in two parts forwards, in one backwards
    doubled = 2.0 * tokens * features * sum(counts) if size == 2 else 0.0
    yield Way("gate", "fused", with_backward(s, lambda: fused_gate(s)), gate + doubled, touched)

    def bank_work(share: float) -> float:
        per_row = 2.0 * tokens * (features + outputs) * RANK
        return per_row * (frozen * frozen_passes * share + learning * passes)

    moved = (s.x.numel() + tokens * outputs) * size + 4.0 * s.weights.numel()
    matrices = s.experts * RANK * (features + outputs) * size
    op = bank.triton
    yield Way(
        "bank", "stacked", with_backward(s, lambda: stacked(s.x, s.weights, s.blocks)), bank_work(1), moved + matrices
    )
    yield Way(
        "bank",
        "dense",
        with_backward(s, lambda: op(s.x, s.weights, s.blocks, TOP_K, "dense")),
        bank_work(1),
        moved + matrices,
    )
    if frozen:
        share = executed_share(s)
        chunked = with_backward(s, lambda: op(s.x, s.weights, s.blocks, TOP_K, "chunked"))
        yield Way("bank", "chunked", chunked, bank_work(share), moved + matrices)
    if not s.train and tokens <= 64:
        chosen = min(s.experts, tokens * TOP_K) * RANK * (features + outputs) * size
        gathered = with_backward(s, lambda: op(s.x, s.weights, s.blocks, TOP_K, "gathered"))
        few = 2.0 * tokens * TOP_K * RANK * (features + outputs)
        yield Way("bank", "gathered", gathered, few, moved + chosen)
    rest = touched - s.x.numel() * size + matrices  # x is read once
    yield Way("whole", "stacked", with_backward(s, whole_stacked(s)), base + gate + bank_work(1), read + rest)
    form = bank.part_of(s.blocks[0], tokens, 0, s.train, TOP_K).form
    work, saved = bank_work(1), 0
    if form == "chunked":
        work = bank_work(executed_share(s))
    elif form == "gathered":
        work, saved = few, matrices - chosen
    triton_work = base + gate + doubled + work
    yield Way("whole", "triton", with_backward(s, whole_triton(s)), triton_work, read + rest - saved)


def difference(way: Way, plain: Way) -> float:
    """Largest difference of any result over the largest value of that result."""
    worst = 0.0
    got, expected = way.call(), plain.call()
    for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, expected)), strict=True):
        if one is not None and other is not None and one.numel():
            one, other = one.detach().float(), other.detach().float()
            worst = max(worst, float((one - other).abs().max() / other.abs().max().clamp(min=1e-6)))
    return worst


def without_dropout(s: Scene) -> Scene:
    """The same scene with nothing random in it, so that ways can be compared."""
    blocks = [ExpertBlock(block.a, block.b, block.r, block.scale) for block in s.blocks]
    return Scene(s.x, s.weight, s.rows, blocks, s.weights, s.train)


def check(s: Scene) -> dict[tuple[str, str], float]:
    """Compare every way with the plain one of its part; gradients of weights that are 0 are nobody's business."""
    found = list(ways(without_dropout(s)))
    plain = {"gate": "plain", "bank": "stacked", "whole": "stacked"}
    reference = {part: next(w for w in found if (w.part, w.name) == (part, name)) for part, name in plain.items()}
    result = {}
    for way in found:
        if way.part in plain and way.name != plain[way.part]:
            if way.name == "chunked" and s.train:
                masked = [masked_weights(w, s) for w in (way, reference[way.part])]
                result[way.part, way.name] = difference(*masked)
            else:
                result[way.part, way.name] = difference(way, reference[way.part])
    return result


def masked_weights(way: Way, s: Scene) -> Way:
    """The way with the gradients of weights that are 0 set to 0."""

    def call() -> tuple[Tensor | None, ...]:
        chosen = s.weights.detach() != 0
        return tuple(
            r * chosen if isinstance(r, Tensor) and r.shape == chosen.shape and r.dtype == torch.float32 else r
            for r in way.call()
        )

    return Way(way.part, way.name, call, way.operations, way.bytes)


def measured(s: Scene, graph: bool) -> Iterator[tuple[Way, float]]:
    """Milliseconds of every way."""
    from triton.testing import do_bench, do_bench_cudagraph

    for way in ways(s):
        way.call()  # compiles
        if graph:
            yield way, do_bench_cudagraph(way.call, return_mode="median")
        else:
            yield way, do_bench(way.call, return_mode="median")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write benchmarks/results/gpu-bank-gpu.json."""
    parser = measure.parser("Speed of the gate and the expert bank on one GPU.")
    parser.add_argument("--groups", type=int, nargs="+", default=list(GROUPS), help="numbers of expert groups")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 16, 1], help="tokens of an input")
    parser.add_argument("--modes", nargs="+", default=["ask", "train"], choices=["ask", "train"])
    options = parser.parse_args(arguments)
    device = "cuda"
    reason = missing(torch.device(device)) if torch.cuda.is_available() else "no GPU that torch can use"
    if reason is not None:
        print(f"gpu_bank: {reason}; nothing was measured")
        return
    best = measure.ceilings()
    copied, multiplied = best["bytes a second"], best["operations a second"]
    name = torch.cuda.get_device_name()
    print(f"{name}: copy {copied / 1e9:.0f} GB/s, bfloat16 product {multiplied / 1e12:.0f} TFLOP/s")
    print("mode  in x out      groups tokens input  part   way      ms      x linear TFLOP/s  GB/s  of ceiling  off by")
    rows: list[dict[str, Any]] = []
    cases = itertools.product(options.modes, LINEARS, options.groups, options.tokens, (False, True))
    for mode, (features, outputs), groups, tokens, spread in cases:
        if (mode == "train" and tokens < 64) or (tokens < RUN and not spread):
            continue
        s = scene(features, outputs, groups, tokens, spread, mode == "train", device, torch.bfloat16)
        off = check(s)
        for graph in (False, True) if tokens < 64 else (False,):
            linear = 0.0
            for way, ms in measured(s, graph):
                linear = ms if way.part == "linear" else linear
                rates = way.operations / ms * 1e3, way.bytes / ms * 1e3
                share = max(rates[0] / multiplied, rates[1] / copied)
                row = {
                    "mode": mode + (" graph" if graph else ""),
                    "in": features,
                    "out": outputs,
                    "groups": groups,
                    "tokens": tokens,
                    "input": "spread" if spread else "runs",
                    "part": way.part,
                    "way": way.name,
                    "ms": ms,
                    "of_linear": ms / linear,
                    "flops": rates[0],
                    "bytes": rates[1],
                    "of_ceiling": share,
                    "off": off.get((way.part, way.name)),
                }
                rows.append(row)
                differs = "" if row["off"] is None else f"{row['off']:.1e}"
                print(
                    f"{row['mode']:11s} {features:5d} x {outputs:5d} {groups:4d} {tokens:6d} {row['input']:6s} "
                    f"{way.part:6s} {way.name:8s} {ms:8.4f} {ms / linear:8.2f} {rates[0] / 1e12:7.1f} "
                    f"{rates[1] / 1e9:6.0f} {share:9.2f}   {differs}",
                    flush=True,
                )
    measure.write("gpu-bank", options, {"ceilings": best, "rows": rows})


if __name__ == "__main__":
    main()
