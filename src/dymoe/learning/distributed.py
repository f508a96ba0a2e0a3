"""One run in several processes: who writes, who waits, and what must be the same in all of them.

`accelerate launch` starts the processes and tells them in their environment how the training step is spread (DDP,
FSDP2, DeepSpeed); that is accelerate's work. Here is what a run adds. Process 0 alone writes the run folder. What is
decided by looking at the disk, it decides for all (`from_main`), so that no process waits where another goes on. What a
method does after a task, it does in process 0; the others take the saved group from the disk, as a run that goes on
after a kill would. The processes share one file system.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

from dymoe.errors import DymoeError
from dymoe.libraries import require_extra
from dymoe.messages import say

T = TypeVar("T")
Strategy = Literal["one", "ddp", "fsdp", "deepspeed"]
# How long a process waits for another: a method may work for hours after a task in process 0. A process that died does
# not need this long to be noticed, its launcher ends the others at once.
PATIENCE = timedelta(hours=24)
_leaving = threading.Lock()


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is.

    Attributes:
        rank: 0 for the one that writes.
        count: all of them, over all machines.
        strategy: how the training step is spread: ``one`` (not at all), ``ddp``, ``fsdp``, ``deepspeed``.
    """

    rank: int = 0
    count: int = 1
    strategy: Strategy = "one"

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    @property
    def wrapped(self) -> bool:
        """Whether the model is not the same object after training as before: the step is spread somehow."""
        return self.strategy != "one"

    def wait(self) -> None:
        """Wait until every process is here."""
        self.gather(None)

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks; each process gets all of them."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[T | None] = [None] * self.count
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` gives in process 0; the others do not call it and wait for the value."""
        value = make() if self.main else None
        if self.count > 1:
            import torch.distributed as dist

            box = [value]
            dist.broadcast_object_list(box, src=0)
            value = box[0]
        return value  # type: ignore[return-value]

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Means over the processes, by name; every process gives the same names."""
        if self.count == 1:
            return dict(values)
        rows = self.gather(dict(values))
        return {name: sum(row[name] for row in rows) / len(rows) for name in values}

    def same(self, what: str, value: str) -> None:
        """Check that every process holds the same `value`, a hash.

        Raises:
            DymoeError: in every process, naming those that differ from process 0.
        """
        hashes = self.gather(value)
        other = [rank for rank, one in enumerate(hashes) if one != hashes[0]]
        if other:
            raise DymoeError(
                f"{what} is not the same in all processes: {other} differ from process 0; run all of them with the "
                "same recipe, the same versions and the same kind of device"
            )


ALONE = Processes()


def join() -> Processes:
    """Which process this is, as the launcher's environment says; the others are met here.

    Raises:
        DymoeError: the launcher asks for a precision of its own, for FSDP1, for a base model loaded in one process
            alone, or for a library that is missing.
    """
    if "LOCAL_RANK" not in os.environ:
        return ALONE
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no":
        raise DymoeError(
            f"accelerate: mixed_precision is {precision!r}, but the recipe's training.dtype decides; set it to 'no' in "
            "the launcher's config or command"
        )
    strategy: Strategy = "ddp"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        require_extra("deepspeed", "accelerate")
        strategy = "deepspeed"
    elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        strategy = "fsdp"
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise DymoeError(
                "accelerate: FSDP1 cannot mix frozen and training parameters; set fsdp_version: 2 in the launcher's "
                "config, as recipes/accelerate/fsdp2.yaml does"
            )
        if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
            raise DymoeError(
                "accelerate: fsdp_cpu_ram_efficient_loading leaves the base model of all processes but one without "
                "weights; set it to false in the launcher's config"
            )
    import torch
    from accelerate import PartialState

    try:
        gpu = torch.cuda.is_available()
        state = PartialState(cpu=not gpu, timeout=PATIENCE)
    except ImportError as error:
        raise DymoeError(f"accelerate: {error}") from error
    if state.num_processes == 1 and strategy == "ddp":
        return ALONE
    return Processes(state.process_index, state.num_processes, strategy)


def first() -> bool:
    """Whether this is process 0, as the launcher's environment says; also before `join`."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


@contextmanager
def together(command: str) -> Iterator[None]:
    """Let a process of several end with one line that says what to do, whatever ended it.

    A process that fails tells its error with its number and leaves at once (the launcher then ends the others); one
    that the launcher ends, because another failed, tells how to go on. Nothing is done in a run of one process.

    Args:
        command: how the run goes on, for the message.
    """
    if "LOCAL_RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    rank, count = os.environ.get("RANK", "0"), os.environ["WORLD_SIZE"]
    how = (
        "what ended it stands above; where nothing does, the system did (out of memory, a lost machine, a time limit). "
        f"Go on, with any number of processes, with: {command}"
    )
    # Process 1 tells it too: process 0 may be the one that is gone.
    _on_termination(f"process {rank} of {count} was told to end, since another one did: {how}", rank in ("0", "1"))
    try:
        yield
    except DymoeError as error:
        _leave(f"process {rank} of {count}: {' '.join(str(error).split())}", 2)
    except KeyboardInterrupt:
        _leave(f"interrupted; go on with: {command}" if rank == "0" else "", 130)
    except RuntimeError as error:
        if not _connection_lost(error):
            raise
        # Not with the exit code of the one that failed first: the launcher's report names that one.
        _leave(f"process {rank} of {count} lost another one: {how}", 1)
    else:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def _connection_lost(error: RuntimeError) -> bool:
    """Whether the error says that another process is gone (gloo's have no type of their own)."""
    import torch.distributed as dist

    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
    )


def _leave(message: str, code: int) -> None:
    """End this process now: an orderly end would wait for collectives that never finish."""
    if not _leaving.acquire(blocking=False):
        threading.Event().wait()  # the other thread is already on its way out
    if message:
        say(f"dymoe: {message}", error=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _on_termination(message: str, speak: bool) -> None:
    """End with the message when the launcher says so, even if the main thread waits inside a collective.

    Python runs its own signal handlers in the main thread alone, and only when that is back from C. The number of a
    signal is written to a pipe at once, where a thread reads it.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM:
                _leave(message if speak else "", 128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="dymoe-termination").start()
