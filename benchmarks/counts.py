"""Floating-point operations and bytes of wrapped linears, counted by hand: the limit that speed is held against.

`python benchmarks/counts.py` prints the tables of docs/performance.md. A product (m, k) x (k, n) counts 2 m k n
operations; what is not a product is left out. n is tokens, E experts, r rank, T tasks of 16 experts of rank 4.
"""

from dataclasses import dataclass

SHAPES = {
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "llava-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
}
LAYERS = {"smollm2": 30, "llava-7b": 32}
EXPERTS, RANK, TOP_K = 16, 4, 16


def linears(shape: str) -> list[tuple[int, int]]:
    """(in, out) of a decoder layer's seven projections."""
    size, inner = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
    keys = size // SHAPES[shape]["num_attention_heads"] * SHAPES[shape]["num_key_value_heads"]
    return [(size, size), (size, keys), (size, keys), (size, size), (size, inner), (size, inner), (inner, size)]


@dataclass(frozen=True)
class Counts:
    """Operations per token of one linear in a training step (forward, and backward to inputs and learned weights)."""

    inside: int
    outside: int

    @property
    def base(self) -> int:
        """The frozen base: forward and to the inputs."""
        return 4 * self.inside * self.outside

    def lora(self, rank: int = EXPERTS * RANK) -> int:
        """LoRA: two products forward, two to the inputs, two to its weights."""
        return 6 * rank * (self.inside + self.outside)

    def scores(self, tasks: int, sparse: bool = False) -> int:
        """Router scores forward, to the inputs (all experts, or those with weight) and to the new group's rows."""
        experts = EXPERTS * tasks
        back = min(experts, TOP_K + EXPERTS) if sparse else experts
        return 2 * self.inside * (experts + back + EXPERTS)

    def dense(self, tasks: int) -> int:
        """The bank as stacked products over all experts."""
        each = 2 * EXPERTS * RANK * (self.inside + self.outside)
        return self.scores(tasks) + 2 * each * (tasks - 1) + 3 * each

    def needed(self, tasks: int, share_new: float) -> float:
        """What must be computed under guidance: a token uses one side, and of the old side its top k alone."""
        each = 2 * TOP_K * RANK * (self.inside + self.outside)
        return self.scores(tasks, True) + 3 * each * share_new + 2 * each * (1 - share_new) * (tasks > 1)

    def one_side(self, tasks: int, share_new: float) -> float:
        """Between the two: a token uses one side, but all experts of it (what dense products can leave out)."""
        each = 2 * EXPERTS * RANK * (self.inside + self.outside)
        return self.scores(tasks) + 3 * each * share_new + 2 * each * (tasks - 1) * (1 - share_new)


def decode_bytes(inside: int, outside: int, tasks: int, rows: int, gathered: bool) -> tuple[int, int]:
    """(base, bank) bytes read to decode one token a row: bfloat16 weights, float32 router rows."""
    base = 2 * inside * outside
    ranks = min(EXPERTS * RANK * tasks, rows * TOP_K * RANK) if gathered else EXPERTS * RANK * tasks
    return base, 4 * EXPERTS * tasks * inside + 2 * ranks * (inside + outside)


def main() -> None:
    """Print the tables of docs/performance.md."""
    share = 0.05
    for shape in SHAPES:
        rows = [Counts(*pair) for pair in linears(shape)]
        base = sum(row.base for row in rows)
        print(f"\n{shape}: a training step's operations relative to the frozen base ({base * LAYERS[shape] / 1e9:.2f}")
        print(f"GFLOP a token in {LAYERS[shape]} layers), {share:.0%} of the tokens on the new group\n")
        print("| tasks | experts | LoRA r 64 | bank, dense | one side, dense | what must be computed |")
        print("|---|---|---|---|---|---|")
        for tasks in (1, 2, 4, 8, 16, 64):
            new = 1.0 if tasks == 1 else share
            cells = [
                sum(row.lora() for row in rows),
                sum(row.dense(tasks) for row in rows),
                sum(row.one_side(tasks, new) for row in rows),
                sum(row.needed(tasks, new) for row in rows),
            ]
            shown = " | ".join(f"{1 + cell / base:.3f}" for cell in cells)
            print(f"| {tasks} | {tasks * EXPERTS} | {shown} |")
        print(f"\n{shape}: bytes of weights read to decode a token, relative to the base's own\n")
        print("| tasks | dense, any rows | gathered, 1 row | gathered, 32 rows |\n|---|---|---|---|")
        for tasks in (1, 2, 4, 8, 16, 64):
            cells = []
            for count, gathered in ((1, False), (1, True), (32, True)):
                pairs = [decode_bytes(*pair, tasks, count, gathered) for pair in linears(shape)]
                cells.append(1 + sum(bank for _, bank in pairs) / sum(own for own, _ in pairs))
            print(f"| {tasks} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
