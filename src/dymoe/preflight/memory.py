"""How much memory a run takes, and how much arithmetic: what `dymoe doctor`, a dry run and docs/memory.md say.

Everything is counted from the model's shapes and the method's groups, nothing is run. What is exact: weights, groups,
gradients, optimizer state. What is an estimate: activations (a fixed number of copies of what a layer sees, see
`activations`) and the time. torch's own share (context, fragmentation: 1 to 2 GB) comes on top.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe.adapter.decoder import decoder_linears
from dymoe.models.options import ModelOptions

if TYPE_CHECKING:
    from dymoe.adapter import DyMoEConfig
    from dymoe.learning.recipe import Recipe
    from dymoe.methods import Method

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
EXPERT_BYTES = 4  # bytes of an expert's parameter, its gradient and each of AdamW's two moments: float32
# Bits of a 4-bit weight with its block's scale: 64 weights share a float32, which double quantisation holds in 8 bits
# with a float32 for 256 of them (QLoRA, section 3).
BITS = {True: 4 + 8 / 64 + 32 / (64 * 256), False: 4 + 32 / 64}
# Linears of one module that read the same input.
SHARED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate, up", "up_proj": "gate, up"}
# Text tokens behind the image that an estimate takes where no data says more; answers' tokens among them.
TEXT, ANSWER = 128, 64


@dataclass(frozen=True)
class Linear:
    """A linear that experts may be added to: its name and sizes."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Shape:
    """What the arithmetic needs to know of a model.

    Attributes:
        parameters: of the whole base model.
        linears: the linears of its language model.
        hidden: width of the language model.
        inner: width of its feed-forward part.
        layers: its layers.
        keys: width of a token's keys (and values) in one layer.
        vocabulary: rows of the output embedding.
        image_tokens: tokens of a picture.
    """

    parameters: int
    linears: tuple[Linear, ...]
    hidden: int
    inner: int
    layers: int
    keys: int
    vocabulary: int
    image_tokens: int

    @property
    def linear_parameters(self) -> int:
        """Weights in the language model's linears."""
        return sum(linear.inputs * linear.outputs for linear in self.linears)


def shape_of(model: Any) -> Shape:
    """The shapes of a model, on any device (`dymoe.models.shapes.meta_model`), before it got experts."""
    text = model.config.get_text_config()
    linears = [(name, model.get_submodule(name)) for name in decoder_linears(model)]
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linears=tuple(Linear(name, module.in_features, module.out_features) for name, module in linears),
        hidden=text.hidden_size,
        inner=getattr(text, "intermediate_size", 4 * text.hidden_size),
        layers=text.num_hidden_layers,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * width,
        vocabulary=text.vocab_size,
        image_tokens=getattr(model.config, "image_seq_length", 576),
    )


def group_parameters(shape: Shape, config: "DyMoEConfig", older: int = 0) -> tuple[int, int, int]:
    """(A and B, router rows, bytes of packed rows) of the group that `config` adds to the language model's linears.

    A selector's own parameters are not counted.

    Args:
        shape: the model.
        config: the group.
        older: experts that each linear already has; a linear router scores them too.
    """
    pairs = routers = packed = 0
    for linear in shape.linears:
        if not _wraps(config.target_modules, linear.name):
            continue
        experts = config.experts_in(linear.name)
        pairs += experts * config.r * (linear.inputs + linear.outputs)
        gate = config.gate_in(linear.name)
        numbers = gate.rows(experts, older) * linear.inputs
        routers, packed = routers + numbers, packed + numbers * gate.pack_bytes
    return pairs, routers, packed


def distinct_inputs(shape: Shape, targets: Any) -> tuple[int, ...]:
    """Width of each input of the linears that `targets` wraps; q, k and v share one, and gate and up."""
    widths: dict[tuple[str, str], int] = {}
    for linear in shape.linears:
        if _wraps(targets, linear.name):
            parent, _, projection = linear.name.rpartition(".")
            widths[parent, SHARED.get(projection, projection)] = linear.inputs
    return tuple(widths.values())


def _wraps(targets: Any, name: str) -> bool:
    import re

    if targets is None:
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at one stage.

    Attributes:
        weights: the frozen base.
        groups: all groups' parameters, and what the method keeps of them.
        packed: the frozen groups once more, packed in the compute dtype.
        gradients: of the training group.
        optimizer: AdamW's two moments of it; paged, they may lie on the CPU and count under `paged`.
        activations: what the backward pass needs at its fullest.
        evaluation: what answering takes beside these (keys and values, prompts, the last group packed).
        paged: bytes that may move to the CPU.
        trainable: parameters that train.
        stored: parameters of all groups.
    """

    weights: float
    groups: float
    packed: float
    gradients: float
    optimizer: float
    activations: float
    evaluation: float
    paged: float
    trainable: int
    stored: int

    @property
    def training(self) -> float:
        """The peak while a task trains."""
        return self.weights + self.groups + self.packed + self.gradients + self.optimizer + self.activations

    @property
    def asking(self) -> float:
        """The peak while tasks are asked."""
        return self.weights + self.groups + self.packed + self.evaluation

    @property
    def peak(self) -> float:
        """The larger of both."""
        return max(self.training, self.asking)


@dataclass(frozen=True)
class Groups:
    """The groups of a run after one of its stages.

    Attributes:
        configs: of every group, the training one last.
        older: experts in a linear before each of them.
    """

    configs: tuple["DyMoEConfig", ...]
    older: tuple[int, ...] = field(default=())


def groups_after(method: "Method", stages: int) -> Groups:
    """The groups that a method has in stage `stages` (from 1); a method that decides by probing has its full bank."""
    from dymoe.methods import Stage

    configs: dict[str, Any] = {}
    nowhere = Path("nowhere")
    for index in range(1, stages + 1):
        stage = Stage(index, f"task-{index}", (), nowhere, tuple(nowhere for _ in range(index - 1)))
        name = method.group(stage)
        if name not in configs:
            configs[name] = method.config(stage)
    in_order = tuple(configs.values())
    older = tuple(sum(config.num_experts for config in in_order[:position]) for position in range(len(in_order)))
    return Groups(in_order, older)


def weight_bytes(shape: Shape, dtype: str, options: ModelOptions) -> float:
    """Bytes of the frozen base in `dtype`, its language model's linears in 4 bits where the options say so."""
    if not options.load_in_4bit:
        return float(shape.parameters * BYTES[dtype])
    rest = shape.parameters - shape.linear_parameters
    return shape.linear_parameters * BITS[options.double_quant] / 8 + rest * BYTES[dtype]


def saved(shape: Shape, groups: Groups, dtype: str) -> float:
    """Bytes that one layer keeps of one token for its backward pass, as autograd saves them (compared in the tests).

    Frozen weights need no inputs, so a layer keeps: two norms in float32; queries, keys, values and attention's output;
    the FFN's gate, its activation and the other half. A bank adds the layer's distinct inputs; for each linear what the
    gate decides (`Gate.saved_bytes`), the ranks of all experts whose weight depends on the token, those that top-k
    chose of the old ones and, for B, those of the new group once more; with dropout also its input and the mask. On a
    CPU less where guidance sends few tokens to the new group.
    """
    size = BYTES[dtype]
    total = 2.0 * 4 * shape.hidden + size * (2 * shape.hidden + 2 * shape.keys + 3 * shape.inner)
    if not groups.configs:
        return total
    new = groups.configs[-1]
    wide = sum(linear.inputs for linear in shape.linears) / shape.layers
    older = sum(config.num_experts for config in groups.configs[:-1])
    new_ranks, all_ranks = new.num_experts * new.r, sum(config.num_experts * config.r for config in groups.configs)
    all_ranks += new.top_k * new.r if older > new.top_k else 0
    if new.lora_dropout:
        total += wide * (size + 1)
    gates = [new.gate_in(linear.name) for linear in shape.linears]
    routes = any(gate.routes for gate in gates)
    total += (3 * shape.hidden + shape.inner) * (0 if new.lora_dropout and not routes else size)
    for gate in gates:
        ranks = new_ranks + (all_ranks if gate.routes else 0)
        total += (size * ranks + gate.saved_bytes(older, new.num_experts, new.top_k, size)) / shape.layers
    return total


def activations(shape: Shape, groups: Groups, rows: int, tokens: int, dtype: str, checkpointing: bool) -> float:
    """Bytes that the backward pass needs of one forward pass; an estimate.

    With checkpointing the input of every layer is kept and one layer is computed again at a time; without it all
    layers keep everything. On top: what is under way while a layer is differentiated (taken as three values of each
    width), and the answers' logits in float32, three times.

    Args:
        shape: the model.
        groups: all groups, the training one last.
        rows: samples in a batch.
        tokens: tokens in each.
        dtype: of the computation.
        checkpointing: whether layers are computed again.
    """
    size = BYTES[dtype]
    layer = saved(shape, groups, dtype)
    under_way = 3 * size * (shape.hidden + shape.inner)
    per_token = (shape.layers * shape.hidden * size + layer) if checkpointing else shape.layers * layer
    logits = 3 * 4 * shape.vocabulary * min(ANSWER, tokens)
    return float(rows * (tokens * (per_token + under_way) + logits))


def memory(recipe: "Recipe", shape: Shape, stage: int, tokens: int | None = None) -> Memory:
    """Bytes on one device while stage `stage` (from 1) of a recipe learns and is asked.

    Args:
        recipe: the experiment; batch sizes are those of one device.
        shape: its model.
        stage: how many tasks there are by then.
        tokens: longest sequence of a batch; a picture and `TEXT` tokens when None.
    """
    method = recipe.build_method()
    training, options = recipe.training, recipe.model_options
    learns = recipe.trains
    groups = groups_after(method, stage) if learns else Groups(())
    tokens = tokens or shape.image_tokens + TEXT
    sizes = [group_parameters(shape, config, older) for config, older in zip(groups.configs, groups.older, strict=True)]
    stored = sum(pairs + routers for pairs, routers, _ in sizes)
    trainable = sum(sizes[-1][:2]) if sizes else 0
    inputs = distinct_inputs(shape, groups.configs[-1].target_modules) if groups.configs else ()
    state_numbers = method.state_size(trainable, inputs) if stage > 1 else 0
    size = BYTES[training.dtype]
    packs = [pairs * size + rows for pairs, _, rows in sizes]
    moments = 2 * EXPERT_BYTES * trainable
    paged = training.optimizer == "paged-adamw"
    spent = activations(shape, groups, training.batch_size, tokens, training.dtype, training.gradient_checkpointing)
    cache = 2 * shape.layers * shape.keys * size
    prompt = 4 * shape.hidden * size + 3 * shape.inner * size
    return Memory(
        weights=weight_bytes(shape, training.dtype, options),
        groups=float(EXPERT_BYTES * (stored + state_numbers)),
        packed=float(sum(packs[:-1])),
        gradients=float(EXPERT_BYTES * trainable),
        optimizer=0.0 if paged else float(moments),
        activations=spent if learns else 0.0,
        evaluation=float(recipe.evaluation.batch_size * tokens * (cache + prompt) + sum(packs[-1:])),
        paged=float(moments) if paged else 0.0,
        trainable=trainable,
        stored=stored,
    )


def operations(shape: Shape, stored: int, tokens: float, checkpointing: bool) -> float:
    """Floating-point operations to train on `tokens` tokens: 2 a weight forward, 2 backward, 2 again if recomputed.

    The base is frozen, so its backward pass goes to the inputs alone; the groups' goes to their weights too.
    """
    passes = 3 if checkpointing else 2
    return 2.0 * tokens * (passes * (shape.linear_parameters + stored) + stored)


def gigabytes(memory: Memory) -> Mapping[str, float]:
    """The parts of a budget in GB (10^9 bytes), in order."""
    names = ("weights", "groups", "packed", "gradients", "optimizer", "activations")
    parts = {name: getattr(memory, name) / 1e9 for name in names}
    return {**parts, "training": memory.training / 1e9, "asking": memory.asking / 1e9}


def table(rows: Sequence[tuple[str, Memory]]) -> str:
    """Budgets as a Markdown table; docs/memory.md holds one."""
    head = ["", "parameters that train", *gigabytes(rows[0][1])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for label, row in rows:
        cells = [label, f"{row.trainable:,}", *(f"{value:.1f}" for value in gigabytes(row).values())]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
