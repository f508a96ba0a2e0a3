"""Several processes on one machine: forked from this one, or started by `accelerate launch`."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"
ON_CPU = Path(__file__).with_name("on_cpu.py")


def launch(config: str, *words: str, count: int = 2) -> subprocess.Popen:
    """`accelerate launch` with the config of this name; `dymoe` gets the words. Its output goes to one pipe."""
    script = ["-m", "dymoe"] if config == "ddp" else [str(ON_CPU)]
    how = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", str(count), "--main_process_port", "0"]
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *how, *script, *words],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_TORCH_DEVICE": "cpu",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def process_of(launcher: subprocess.Popen, rank: int) -> psutil.Process:
    """The launcher's process of this rank."""
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"no process of rank {rank}")


def wait_until(true: Callable[[], bool], launcher: subprocess.Popen, seconds: float = 240) -> None:
    """Wait for something that the launched processes do."""
    deadline = time.monotonic() + seconds
    while not true():
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def environment(config: str, count: int) -> dict[str, str]:
    """What `accelerate launch` with this config tells its processes, rank aside; the port is a free one."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    words = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", str(count)]
    told: dict[str, str] = {}

    def instead_of_starting(args: Any) -> None:
        told.update(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.master_port), WORLD_SIZE=str(count))

    with mock.patch("torch.distributed.run.run", instead_of_starting):
        launch_command(launch_command_parser().parse_args([*words, "--main_process_port", "0", "dymoe"]))
    return {key: value for key, value in told.items() if os.environ.get(key) != value}


def forked(count: int, work: Callable[..., Any], *given: Any, config: str = "ddp") -> list[Any]:
    """What `work(*given)` returns in each of `count` processes, which see themselves as launched with the config.

    They are forked, so that nothing is imported again. A process that raises ends the test with its traceback; one
    that leaves by itself gives its exit code.
    """
    told = environment(config, count)
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    children = [
        context.Process(target=_child, args=(pipes[rank][1], {**told, "RANK": str(rank)}, config, work, given))
        for rank in range(count)
    ]
    for child in children:
        child.start()
    found: list[Any] = []
    for (reader, writer), child in zip(pipes, children, strict=True):
        writer.close()
        try:
            found.append(pickle.loads(reader.recv_bytes()))
        except EOFError:
            child.join(60)
            found.append(child.exitcode)
    for child in children:
        child.join(60)
        child.kill()
    wrong = [value for value in found if isinstance(value, _Raised)]
    assert not wrong, wrong[0].text
    return found


class _Raised:
    def __init__(self, text: str) -> None:
        self.text = text


def _child(writer: Any, told: dict[str, str], config: str, work: Callable[..., Any], given: Sequence[Any]) -> None:
    try:
        os.environ.update(told, LOCAL_RANK=told["RANK"])
        torch.set_num_threads(1)
        if config != "ddp":
            import tests.learning.on_cpu  # noqa: F401 - in this process alone
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        value = work(*given)
    except BaseException:
        value = _Raised(traceback.format_exc())
    writer.send_bytes(pickle.dumps(value))  # tensors by value: this process is gone when they are read
    writer.close()
