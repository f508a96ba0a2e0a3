"""Which samples a training step takes: a function of seed and step, whatever number of processes shares the step."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from dymoe.images import cores


class Order(Sampler[list[int]]):
    """This process's micro-batches of an epoch.

    The epoch's order is one permutation for all processes, cut into pieces of `size`; they are dealt to the processes
    in turn. So k processes take together what one process takes in k micro-batches, also from the last, short pieces
    (accelerate's own sampler fills those up with samples from the beginning); a process for which none is left gets an
    empty piece.

    Args:
        count: samples.
        size: samples per micro-batch.
        seed: of the order; the epoch's number is added.
        rank: this process.
        processes: all of them.
    """

    def __init__(self, count: int, size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.count = count
        self.size = size
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // (self.size * self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        for start in range(self.rank * self.size, len(self) * self.size * self.processes, self.size * self.processes):
            yield order[start : start + self.size]


def workers_for(setting: int | None, cached: bool, processes: int = 1) -> int:
    """How many worker processes make batches ahead.

    Args:
        setting: of the recipe, None to choose.
        cached: whether the features of the pictures are there, so that a batch is text alone.
        processes: of the run; one works on each of a machine's GPUs.
    """
    if setting is not None:
        return setting
    if cached or not torch.cuda.is_available():
        return 0
    return min(4, max(1, cores() // min(processes, torch.cuda.device_count()) - 1))


class Loader(DataLoader[Any]):
    """Collated micro-batches in an `Order`; the trainer tells the epoch.

    A process without a sample in a step still takes part in it, with a batch in which nothing is learned.

    Args:
        samples: what is trained on.
        collator: makes a batch of samples.
        order: their order.
        options: further arguments of torch's DataLoader.
    """

    def __init__(
        self, samples: Sequence[Any], collator: Callable[[Sequence[Any]], Any], order: Order, **options: Any
    ) -> None:
        def collate(positions: list[int]) -> Any:
            if positions:
                return collator([samples[position] for position in positions])
            batch = collator([samples[0]])
            batch["labels"] = torch.full_like(batch["labels"], -100)
            return batch

        if options.get("num_workers"):
            # Forked: a worker inherits samples and tokenizer as they are, and touches no GPU.
            options = {"multiprocessing_context": "fork", "worker_init_fn": _begin_worker, **options}
        numbers: Any = range(order.count)  # `collate` gets the samples of these numbers
        super().__init__(numbers, batch_sampler=order, collate_fn=collate, **options)
        self._order = order

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration gives."""
        self._order.set_epoch(epoch)


def _begin_worker(number: int) -> None:
    """A forked tokenizer works in one thread; said so, it does not warn of it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
